// Fuzzes the reader of recipes: YAML text, overrides, and the way back to YAML.
#include "fuzz.h"
#include "io/error.h"
#include "recipe/recipe.h"

namespace {

const std::vector<std::string> kRecipes = {
    R"(# a comment
model:
  base_model: models/SmolLM2-135M
  dtype: bf16
  device: cuda:0
data:
  dataset_prepared_path: "data/with space"
  sequence_len: 4096
  sample_packing: true
  overflow: split
attention:
  mode: topk
  ratio: 0.05
  min_keys: 16
  max_keys: null
  select: kv_group
  dense_layers: [0, 1, 29]
train:
  num_epochs: 1.5
  micro_batch_size: 2
  seed: 7
  eval_attention: [dense, topk]
optim:
  learning_rate: 1e-4
  lr_scheduler: wsd
  warmup_ratio: .03
  decay_steps: 10
checkpoint: {output_dir: out, save_steps: 50}
logging:
  progress: plain
)",
    R"({"model": {"base_model": "m"}, "data": {"train_files": ["a", "b"]}, "attention": {"topk": 64},
"checkpoint": {"output_dir": 'it''s'}, "train": {"max_steps": 10}}
)",
    R"(%YAML 1.2
---
model: {base_model: m, dtype: float32}
data:
  train_files:
  - a
  - "b\u00e9"
  cutoff_len: 512
attention: {attn_implementation: sdpa}
checkpoint:
  output_dir: |
    block
  save_total_limit: 3
train:
  sample_prompts: >-
    folded
    text
...
)"};

void read_recipe(const std::string& text) {
  using namespace topk_sft;
  // Besides the file, the first bytes are tried as the value of an override.
  const std::string value = text.substr(0, 40);
  for (const char* key : {"attention.dense_layers=", "optim.learning_rate=", "model.base_model=", ""}) {
    try {
      parse_recipe(kRecipes[0], "seed.yaml", {key + value});
    } catch (const Error&) {
    }
  }
  const Recipe recipe = parse_recipe(text, "recipe.yaml").recipe;
  const std::string yaml = recipe_to_yaml(recipe);
  if (recipe_to_yaml(parse_recipe(yaml, "again.yaml").recipe) != yaml) {
    throw std::logic_error("the recipe does not survive a round trip:\n" + yaml);
  }
}

}  // namespace

int main(int argc, char** argv) {
  topk_fuzz::Fuzzer fuzzer;
  fuzzer.name = "recipe";
  fuzzer.seeds = kRecipes;
  fuzzer.seeds.pop_back();  // a block scalar ends in a newline, which a path must not hold: refused
  fuzzer.target = read_recipe;
  fuzzer.iterations = 3000;
  fuzzer.mutate = [](const std::string& seed, topk_fuzz::Random& random) {
    const std::string& start = random.below(4) == 0 ? kRecipes[2] : seed;
    return random.below(3) == 0 ? topk_fuzz::mutate_bytes(start, kRecipes, random)
                                : topk_fuzz::mutate_text(start, kRecipes, random);
  };
  return topk_fuzz::run_fuzzer(fuzzer, argc, argv);
}
