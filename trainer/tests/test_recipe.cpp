// Recipes: every kind of mistake is one error that says where it is, and what was probably meant.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "catch_shim.h"
#include "io/error.h"
#include "recipe/keys.h"
#include "recipe/nearest.h"
#include "recipe/recipe.h"
#include "recipe/yaml_tree.h"

using namespace topk_sft;

namespace {

const std::string kMinimal =
    "model:\n  base_model: m\n"
    "data:\n  dataset_prepared_path: d\n"
    "attention:\n  ratio: 0.05\n"
    "checkpoint:\n  output_dir: o\n";

std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  try {
    parse_recipe(text, "r.yaml", overrides);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

// The minimal recipe with a section's lines in place of, or besides, its own.
std::string with(const std::string& section, const std::string& lines) {
  std::string text = kMinimal;
  const size_t at = text.find(section + ":\n");
  if (at == std::string::npos) return text + section + ":\n" + lines;
  return text.insert(at + section.size() + 2, lines);
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

#define CHECK_ERROR(error, part)     \
  do {                               \
    const std::string text_ = error; \
    INFO(text_);                     \
    CHECK(contains(text_, part));    \
  } while (false)

}  // namespace

TEST_CASE("a minimal recipe has the documented defaults", "[recipe]") {
  const Recipe r = parse_recipe(kMinimal, "r.yaml").recipe;
  CHECK(r.model.base_model == "m");
  CHECK(r.model.dtype == "float32");  // auto on cpu
  CHECK(r.data.sequence_len == 2048);
  CHECK(r.attention.mode == "topk");
  CHECK(r.attention.ratio == 0.05);
  CHECK(!r.attention.topk);
  CHECK(r.optim.learning_rate == 2e-5);
  CHECK(parse_recipe(kMinimal, "r.yaml", {"model.device=cuda"}).recipe.model.dtype == "bfloat16");
}

TEST_CASE("values of every type", "[recipe]") {
  const auto parsed = parse_recipe(
      "model: {base_model: 'a b', dtype: bf16, device: cuda:1}\n"
      "data:\n  train_files: [x, \"y z\"]\n  eval_files: e\n  sequence_len: 4096\n  sample_packing: false\n"
      "attention:\n  mode: topk\n  topk: 64\n  max_keys: null\n  dense_layers: [0, 3]\n"
      "train:\n  num_epochs: 1.5\n  max_steps: ~\n  seed: 0\n"
      "optim:\n  learning_rate: 1e-4\n  weight_decay: 0\n  warmup_ratio: .1\n"
      "checkpoint:\n  output_dir: 2024\n",
      "r.yaml");
  const Recipe& r = parsed.recipe;
  CHECK(r.model.base_model == "a b");
  CHECK(r.model.dtype == "bfloat16");
  CHECK(r.data.train_files == std::vector<std::string>{"x", "y z"});
  CHECK(r.data.eval_files == std::vector<std::string>{"e"});
  CHECK(r.data.sequence_len == 4096);
  CHECK(!r.data.sample_packing);
  CHECK(r.attention.topk == 64);
  CHECK(!r.attention.max_keys);
  CHECK(r.attention.dense_layers == std::vector<int64_t>{0, 3});
  CHECK(r.train.num_epochs == 1.5);
  CHECK(!r.train.max_steps);
  CHECK(r.optim.learning_rate == 1e-4);
  CHECK(r.optim.warmup_ratio == 0.1);
  CHECK(r.checkpoint.output_dir == "2024");
  CHECK(parsed.notes.empty());
}

TEST_CASE("unknown keys name the place and the nearest key", "[recipe]") {
  CHECK_ERROR(error_of(with("optim", "  learning_rat: 1\n")),
              "r.yaml:10:3: unknown key 'optim.learning_rat'; did you mean 'optim.learning_rate'?");
  CHECK_ERROR(error_of(with("train", "  sead: 1\n")), "did you mean 'train.seed'?");
  CHECK_ERROR(error_of(with("attention", "  min_kyes: 1\n")), "r.yaml:6:3");
  CHECK_ERROR(error_of("trian:\n  seed: 1\n"), "r.yaml:1:1: unknown section 'trian'; did you mean 'train'?");
  CHECK_ERROR(error_of(with("model", "  learning_rate: 1\n")),
              "'learning_rate' does not belong to section 'model'; did you mean 'optim.learning_rate'?");
  CHECK_ERROR(error_of("learning_rate: 1\n"), "did you mean 'optim.learning_rate' (in section 'optim')?");
  CHECK_ERROR(error_of(with("optim", "  [a, b]: 1\n")), "a key must be text");
  CHECK_ERROR(error_of(with("optim", "  Learning_Rate: 1\n")), "did you mean 'optim.learning_rate'?");
}

TEST_CASE("values of the wrong type or range", "[recipe]") {
  CHECK_ERROR(error_of(with("data", "  sequence_len: many\n")),
              "r.yaml:4:17: data.sequence_len must be an integer, got 'many'");
  CHECK_ERROR(error_of(with("data", "  sequence_len: 1.5\n")), "must be an integer, got '1.5'");
  CHECK_ERROR(error_of(with("data", "  sequence_len: '512'\n")), "must be an integer, got the text \"512\"");
  CHECK_ERROR(error_of(with("data", "  sequence_len: 1\n")), "must be at least 2, at most 16777216, got 1");
  CHECK_ERROR(error_of(with("data", "  sequence_len: 99999999999999999999\n")), "must be an integer");
  CHECK_ERROR(error_of(with("data", "  sequence_len:\n")),
              "r.yaml:4:3: data.sequence_len must be an integer, got null");
  CHECK_ERROR(error_of(with("data", "  sequence_len: [1]\n")), "got a list");
  CHECK_ERROR(error_of(with("data", "  shuffle: yes\n")), "data.shuffle must be true or false, got 'yes'");
  CHECK_ERROR(error_of(with("data", "  shuffle: \"true\"\n")), "must be true or false");
  CHECK_ERROR(error_of(with("data", "  overflow: trunkate\n")),
              "must be one of truncate, split, got 'trunkate'; did you mean 'truncate'?");
  CHECK_ERROR(error_of(with("optim", "  learning_rate: 0\n")), "must be above 0, got 0");
  CHECK_ERROR(error_of(with("optim", "  learning_rate: nan\n")), "must be a number, got 'nan'");
  CHECK_ERROR(error_of(with("optim", "  learning_rate: .inf\n")), "must be a number");
  CHECK_ERROR(error_of(with("optim", "  learning_rate: 1e999\n")), "must be a number");
  CHECK_ERROR(error_of(with("optim", "  adam_beta2: 1\n")), "below 1, got 1");
  CHECK_ERROR(error_of(with("train", "  seed: -1\n")), "train.seed must be at least 0");
  CHECK_ERROR(error_of(kMinimal, {"attention.ratio=0"}), "must be above 0, at most 1, got 0");
  CHECK_ERROR(error_of(kMinimal, {"attention.ratio=1.01"}), "must be above 0, at most 1, got 1.01");
  CHECK_ERROR(error_of(with("attention", "  dense_layers: [0, x]\n")), "got 'x'");
  CHECK_ERROR(error_of(with("attention", "  dense_layers: [1, 1]\n")), "names 1 twice");
  CHECK_ERROR(error_of(with("attention", "  dense_layers: [-1]\n")), "at least 0");
  CHECK_ERROR(error_of(with("train", "  eval_attention: [topk, dens]\n")), "did you mean 'dense'?");
  CHECK_ERROR(error_of(with("train", "  eval_ratios: [0.5, 0]\n")), "must be above 0, at most 1, got 0");
  CHECK_ERROR(error_of(with("train", "  eval_ratios: [0.5, x]\n")), "must be a list of numbers, got 'x'");
  CHECK_ERROR(error_of(with("train", "  eval_ratios: [0.5, 0.50]\n")), "names 0.5 twice");
  CHECK_ERROR(error_of(kMinimal, {"model.device=gpu"}), "must be cpu, cuda or cuda:N, got 'gpu'");
  CHECK_ERROR(error_of(kMinimal, {"model.device=cuda:x"}), "must be cpu, cuda or cuda:N");
  CHECK_ERROR(error_of(with("model", "  dtype: float16\n")), "must be one of auto, float32, bfloat16");
}

TEST_CASE("duplicates, also under a synonym", "[recipe]") {
  CHECK_ERROR(error_of(with("train", "  seed: 1\n  seed: 2\n")),
              "r.yaml:11:3: train.seed is given twice, first at r.yaml:10:9");
  CHECK_ERROR(error_of(with("train", "  num_epochs: 1\n  num_train_epochs: 2\n")),
              "train.num_epochs is given twice");
  CHECK_ERROR(error_of("train:\n  seed: 1\ntrain:\n  seed: 2\n"),
              "section 'train' is given twice, first at r.yaml:1:1");
}

TEST_CASE("synonyms are read with a note", "[recipe]") {
  const auto parsed = parse_recipe(
      "model: {model_name_or_path: m}\n"
      "data: {tokenized_path: d, cutoff_len: 512}\n"
      "attention: {attn_implementation: sdpa}\n"
      "train: {num_train_epochs: 2, per_device_train_batch_size: 4}\n"
      "checkpoint: {output_dir: o}\n",
      "r.yaml");
  CHECK(parsed.recipe.data.sequence_len == 512);
  CHECK(parsed.recipe.train.num_epochs == 2);
  CHECK(parsed.recipe.train.micro_batch_size == 4);
  CHECK(parsed.recipe.attention.mode == "dense");
  REQUIRE(parsed.notes.size() == 6);
  CHECK(parsed.notes[2] == "r.yaml:2:27: 'cutoff_len' is read as data.sequence_len");
}

TEST_CASE("settings that contradict each other", "[recipe]") {
  CHECK_ERROR(error_of(kMinimal, {"attention.topk=8"}), "only one of attention.topk and attention.ratio");
  CHECK_ERROR(error_of(kMinimal, {"attention.ratio=null"}), "needs attention.topk");
  CHECK_ERROR(error_of(with("attention", "  min_keys: 8\n  max_keys: 4\n")),
              "attention.max_keys (4) must be at least attention.min_keys (8)");
  CHECK_ERROR(error_of(kMinimal, {"optim.warmup_steps=1", "optim.warmup_ratio=0.1"}), "only one of");
  CHECK_ERROR(error_of(kMinimal, {"data.train_files=x"}), "only one of data.dataset_prepared_path");
  CHECK_ERROR(error_of(kMinimal, {"data.dataset_prepared_path=null"}), "is required");
  CHECK_ERROR(error_of(kMinimal, {"model.base_model=null"}), "model.base_model is required");
  CHECK_ERROR(error_of(kMinimal, {"checkpoint.output_dir="}), "checkpoint.output_dir is required");
  CHECK_ERROR(error_of(kMinimal, {"train.sample_steps=1"}), "needs train.sample_prompts");
  CHECK_ERROR(
      error_of(kMinimal, {"attention.mode=dense", "attention.ratio=null", "train.eval_attention=[topk]"}),
      "needs attention.topk");
}

TEST_CASE("settings without effect are noted", "[recipe]") {
  const auto parsed = parse_recipe(kMinimal, "r.yaml", {"attention.mode=dense", "optim.decay_steps=5"});
  REQUIRE(parsed.notes.size() == 2);
  CHECK(contains(parsed.notes[0], "attention.ratio has no effect"));
  CHECK(contains(parsed.notes[1], "optim.decay_steps has no effect"));
  // With evaluation under top-k attention the budget matters.
  for (const char* evaluation : {"train.eval_attention=[dense,topk]", "train.eval_ratios=[0.01, 1]"}) {
    CHECK(parse_recipe(kMinimal, "r.yaml", {"attention.mode=dense", evaluation}).notes.empty());
  }
}

TEST_CASE("overrides", "[recipe]") {
  const Recipe r = parse_recipe(kMinimal, "r.yaml",
                                {"optim.learning_rate=3e-4", "attention.dense_layers=[0,1]", "train.seed=7",
                                 "train.seed=8", "model.base_model=/a: b #c", "data.cutoff_len=64"})
                       .recipe;
  CHECK(r.optim.learning_rate == 3e-4);
  CHECK(r.attention.dense_layers == std::vector<int64_t>{0, 1});
  CHECK(r.train.seed == 8);
  CHECK(r.model.base_model == "/a: b #c");
  CHECK(r.data.sequence_len == 64);
  CHECK_ERROR(error_of(kMinimal, {"optim.lr"}), "override 'optim.lr': must be section.key=value");
  CHECK_ERROR(error_of(kMinimal, {"seed=1"}), "did you mean 'train.seed'?");
  CHECK_ERROR(error_of(kMinimal, {"optim.lerning_rate=1"}),
              "override 'optim.lerning_rate=1': unknown key 'optim.lerning_rate'; did you mean "
              "'optim.learning_rate'?");
  CHECK_ERROR(error_of(kMinimal, {"optin.lr=1"}), "unknown section 'optin'; did you mean 'optim'?");
  CHECK_ERROR(error_of(kMinimal, {"train.seed=abc"}),
              "override 'train.seed=abc': train.seed must be an integer");
  CHECK_ERROR(error_of(kMinimal, {"train.seed=[1"}), "override 'train.seed=[1'");
  CHECK_ERROR(error_of(kMinimal, {"train.seed=a\x01"}), "control character");
  CHECK_ERROR(error_of(kMinimal, {"=1"}), "override '=1'");
  // The file itself may be empty.
  CHECK(parse_recipe("", "r.yaml",
                     {"model.base_model=m", "data.dataset_prepared_path=d", "attention.topk=4",
                      "checkpoint.output_dir=o"})
            .recipe.attention.topk == 4);
}

TEST_CASE("text that is no recipe", "[recipe]") {
  CHECK_ERROR(error_of("- a\n- b\n"), "r.yaml:1:1: a recipe is a map of sections");
  CHECK_ERROR(error_of("just text"), "a recipe is a map of sections");
  CHECK_ERROR(error_of("model: 3\n"), "section 'model' must be a map of keys, got '3'");
  CHECK_ERROR(error_of("model: {a: b\n"), "not valid YAML");
  CHECK_ERROR(error_of("model:\n\tbase_model: m\n"), "r.yaml:2:");
  CHECK_ERROR(error_of(kMinimal + "---\n" + kMinimal), "a second one starts here");
  CHECK_ERROR(error_of("a: &x 1\n"), "anchors (&name) are not allowed");
  CHECK_ERROR(error_of("a: *x\n"), "r.yaml:1:4");
  CHECK_ERROR(error_of("train:\n  seed: &a 1\n  max_steps: *a\n"), "not allowed");
  CHECK_ERROR(error_of("train:\n  seed: !!int 1\n"), "tags (tag:yaml.org,2002:int) are not allowed");
  CHECK_ERROR(error_of("<<: {}\n"), "unknown section '<<'");
  CHECK_ERROR(error_of("model:\n  base_model: \xff\n"), "r.yaml:2:15: not UTF-8 text (byte 0xff)");
  CHECK_ERROR(error_of("model:\n  base_model: \xed\xa0\x80\n"), "not UTF-8");
  CHECK_ERROR(error_of(std::string("model:\n  base_model: a\0b\n", 25)), "control character 0x00");
  CHECK_ERROR(error_of("model:\n  base_model: \"a\\nb\"\n"), "without control characters");
  CHECK_ERROR(error_of("model:\n  base_model: " + std::string(kYamlMaxScalar + 1, 'a') + "\n"),
              "at most 16384 are allowed");
  CHECK_ERROR(error_of(std::string(kYamlMaxBytes + 1, '#')), "a recipe has at most");
  CHECK_ERROR(error_of("a: " + std::string(100, '[') + "\n"), "nested deeper than 16");
  CHECK_ERROR(error_of("a: " + std::string(100000, '[') + "\n"), "r.yaml:1:");
  CHECK_ERROR(error_of(std::string(50000, '{') + "\n"), "r.yaml:1:");
  CHECK(error_of(std::string(50000, '?')) != "no error");
  std::string dashes;
  for (int i = 0; i < 20000; ++i) dashes += "- ";
  CHECK_ERROR(error_of(dashes), "nested deeper");
  std::string many = "a: [";
  for (size_t i = 0; i < kYamlMaxNodes + 10; ++i) many += "1,";
  CHECK_ERROR(error_of(many + "]\n"), "too many values");
}

TEST_CASE("a recipe that is missing or a folder", "[recipe]") {
  CHECK_THROWS_AS(load_recipe("/nonexistent/recipe.yaml"), Error);
  CHECK_THROWS_AS(load_recipe("/"), Error);
}

TEST_CASE("a recipe written out reads back the same", "[recipe]") {
  Recipe r =
      parse_recipe(with("attention", "  dense_layers: [2]\n  min_keys: 4\n"), "r.yaml",
                   {"model.base_model=it's \"here\" \\ # : x", "optim.learning_rate=1.2345678901234567e-05",
                    "data.dataset_prepared_path=/tmp/ä ö", "train.eval_attention=[topk,dense]",
                    "train.eval_ratios=[0.01,1]"})
          .recipe;
  const std::string yaml = recipe_to_yaml(r);
  const Recipe again = parse_recipe(yaml, "again").recipe;
  CHECK(recipe_to_yaml(again) == yaml);
  CHECK(again.model.base_model == r.model.base_model);
  CHECK(again.optim.learning_rate == r.optim.learning_rate);
  CHECK(again.train.eval_ratios == std::vector<double>{0.01, 1});
}

TEST_CASE("the table of keys is consistent", "[recipe]") {
  std::set<std::string> names, bare;
  for (const Key& key : recipe_keys()) {
    INFO(key.full_name());
    CHECK(names.insert(key.full_name()).second);
    CHECK(std::string(key.doc).size() > 5);
    CHECK(std::string(key.doc).find('|') == std::string::npos);  // it stands in a Markdown table
    // A name or synonym belongs to one key, whatever the section, or a misplaced key could not be pointed at.
    CHECK(bare.insert(key.name).second);
    for (const char* synonym : key.synonyms) CHECK(bare.insert(synonym).second);
    for (const auto& [other, choice] : key.value_synonyms) {
      CHECK(std::find(key.choices.begin(), key.choices.end(), std::string(choice)) != key.choices.end());
    }
    CHECK(contains(recipe_help(), std::string("  ") + key.name + "  ("));
    CHECK(contains(recipe_markdown(), std::string("| `") + key.name + "` |"));
  }
}

TEST_CASE("edit distance", "[recipe]") {
  CHECK(edit_distance("", "") == 0);
  CHECK(edit_distance("abc", "") == 3);
  CHECK(edit_distance("seed", "sead") == 1);
  CHECK(edit_distance("trian", "train") == 1);
  CHECK(edit_distance("LR", "lr") == 0);
  CHECK(nearest_name("sequence_length", {"seed", "sequence_len"}) == "sequence_len");
  CHECK(nearest_name("x", {}).empty());
}

TEST_CASE("the recipes that come with the trainer are valid", "[recipe]") {
  namespace fs = std::filesystem;
  int count = 0;
  for (const auto& entry : fs::directory_iterator(fs::path(TOPK_SOURCE_DIR) / "recipes")) {
    if (entry.path().extension() != ".yaml") continue;
    INFO(entry.path().string());
    ++count;
    ParsedRecipe parsed;
    REQUIRE_NOTHROW(parsed = load_recipe(entry.path().string()));
    CHECK(parsed.notes.empty());
  }
  CHECK(count >= 4);
}

TEST_CASE("docs/recipes.md is the reference that the table makes", "[recipe]") {
  std::ifstream file(std::filesystem::path(TOPK_SOURCE_DIR) / "docs/recipes.md");
  REQUIRE(file.good());
  std::string text{std::istreambuf_iterator<char>(file), {}};
  CHECK(text == recipe_markdown());
}
