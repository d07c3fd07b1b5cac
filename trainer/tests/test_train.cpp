// The parts around the training loop: command line, files, figures.
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "catch_shim.h"
#include "io/error.h"
#include "train/append_file.h"
#include "train/checkpoint_dir.h"
#include "train/cli.h"
#include "train/console.h"
#include "train/flops.h"
#include "train/tensorboard.h"
#include "train_helpers.h"

using namespace topk_sft;
namespace fs = std::filesystem;

namespace {

std::string content(const std::string& path) {
  std::ostringstream out;
  out << std::ifstream(path, std::ios::binary).rdbuf();
  return out.str();
}

void put(const std::string& path, const std::string& text) {
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void make_checkpoint(const std::string& output_dir, int64_t step) {
  const std::string path = output_dir + "/step-" + std::to_string(step);
  put(path + "/model.safetensors", "weights of step " + std::to_string(step));
  mark_complete(path, step);
}

std::vector<int64_t> steps_in(const std::string& output_dir) {
  std::vector<int64_t> steps;
  for (const auto& entry : list_checkpoints(output_dir)) steps.push_back(entry.step);
  return steps;
}

std::string folder_error(const std::string& output_dir, bool fresh) {
  try {
    const RunFolder folder(output_dir, fresh);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

ModelConfig tiny_config() {
  ModelConfig c;
  c.vocab_size = 100;
  c.hidden_size = 16;
  c.intermediate_size = 32;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 8;
  return c;
}

}  // namespace

TEST_CASE("the command line", "[cli]") {
  using Action = CommandLine::Action;
  CHECK(parse_command_line({"r.yaml"}).recipe == "r.yaml");
  const CommandLine line = parse_command_line(
      {"--dry-run", "r.yaml", "train.seed=1", "--resume", "latest", "model.base_model=/a=b"});
  CHECK(line.action == Action::kDryRun);
  CHECK(line.recipe == "r.yaml");
  CHECK(line.overrides == std::vector<std::string>{"train.seed=1", "checkpoint.resume_from_checkpoint=latest",
                                                   "model.base_model=/a=b"});
  CHECK(parse_command_line({"r.yaml", "--resume=x/step-5"}).overrides ==
        std::vector<std::string>{"checkpoint.resume_from_checkpoint=x/step-5"});
  CHECK(parse_command_line({"--help"}).action == Action::kHelp);
  CHECK(parse_command_line({"--help-recipe"}).action == Action::kHelpRecipe);
  CHECK(parse_command_line({"--help-recipe=markdown"}).action == Action::kHelpRecipeMarkdown);
  CHECK(parse_command_line({"--version"}).action == Action::kVersion);
  CHECK(parse_command_line({"r.yaml", "--evaluate"}).action == Action::kEvaluate);
  CHECK_THROWS_AS(parse_command_line({"r.yaml", "--evaluate", "--dry-run"}), UsageError);
  CHECK_THROWS_AS(parse_command_line({}), UsageError);
  CHECK_THROWS_AS(parse_command_line({"train.seed=1"}), UsageError);
  CHECK_THROWS_AS(parse_command_line({"a.yaml", "b.yaml"}), UsageError);
  CHECK_THROWS_AS(parse_command_line({"a.yaml", "--resume"}), UsageError);
  CHECK_THROWS_AS(parse_command_line({"a.yaml", "--resume="}), UsageError);
  CHECK_THROWS_AS(parse_command_line({"a.yaml", "--dryrun"}), UsageError);
}

TEST_CASE("numbers for people", "[console]") {
  CHECK(duration_text(0.4) == "0s");
  CHECK(duration_text(59.6) == "1m00s");
  CHECK(duration_text(187) == "3m07s");
  CHECK(duration_text(7500) == "2h05m");
  CHECK(duration_text(273600) == "3d04h");
  CHECK(count_text(0) == "0");
  CHECK(count_text(999) == "999");
  CHECK(count_text(1234567) == "1,234,567");
  CHECK(count_text(-1000) == "-1,000");
  CHECK(bytes_text(1536.0 * 1024 * 1024) == "1.50 GiB");
  CHECK(bytes_text(3.0 * 1024 * 1024) == "3 MiB");
  CHECK(resident_bytes() > 1e6);
  CHECK(peak_resident_bytes() >= resident_bytes() * 0.5);
}

TEST_CASE("CRC-32C has the published check values", "[tensorboard]") {
  CHECK(crc32c("123456789") == 0xe3069283);
  CHECK(crc32c("") == 0);
  CHECK(crc32c(std::string(32, '\0')) == 0x8a9136aa);
  CHECK(masked_crc32c("123456789") == ((0xe3069283u >> 15 | 0xe3069283u << 17) + 0xa282ead8u));
}

TEST_CASE("event files are records of framed protobuf", "[tensorboard]") {
  const TempDir dir;
  TensorBoardWriter writer(dir.file("tb"));
  writer.scalars(300, {{"a/b", 1.5}});
  const fs::path path = fs::directory_iterator(dir.file("tb"))->path();
  CHECK(path.filename().string().rfind("events.out.tfevents.", 0) == 0);
  const std::string bytes = content(path.string());
  std::vector<std::string> events;
  for (size_t at = 0; at < bytes.size();) {
    uint64_t length = 0;
    for (int i = 7; i >= 0; --i)
      length = length << 8 | static_cast<unsigned char>(bytes[at + static_cast<size_t>(i)]);
    events.push_back(bytes.substr(at + 12, length));
    at += 16 + length;
  }
  REQUIRE(events.size() == 2);
  CHECK(contains(events[0],
                 "\x1a\x0d"
                 "brain.Event:2"));
  // step 300 as a varint; summary { value { tag "a/b" simple_value 1.5 } }
  CHECK(contains(events[1], std::string("\x10\xac\x02\x2a\x0c\x0a\x0a\x0a\x03", 9) + "a/b" +
                                std::string("\x15\0\0\xc0\x3f", 5)));
}

TEST_CASE("an append that does not fit leaves whole lines only", "[files]") {
  const TempDir dir;
  AppendFile file(dir.file("log"));
  file.append("first\n");
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before = {};
  getrlimit(RLIMIT_FSIZE, &before);
  rlimit small = before;
  small.rlim_cur = 10;
  setrlimit(RLIMIT_FSIZE, &small);
  CHECK_THROWS_AS(file.append("second line\n"), Error);
  setrlimit(RLIMIT_FSIZE, &before);
  CHECK(content(dir.file("log")) == "first\n");
  file.append("third\n");
  CHECK(content(dir.file("log")) == "first\nthird\n");
  CHECK_THROWS_AS(AppendFile(dir.file("log"), /*exclusive=*/true), Error);
  CHECK_THROWS_AS(AppendFile(dir.file("no/log")), Error);
}

TEST_CASE("checkpoints are listed by step and checked by their marker", "[checkpoint]") {
  const TempDir dir;
  CHECK(list_checkpoints(dir.file("missing")).empty());
  make_checkpoint(dir.path(), 10);
  make_checkpoint(dir.path(), 9);
  put(dir.file("step-11/model.safetensors"), "half");
  put(dir.file("step-x/file"), "");
  put(dir.file("step--1/file"), "");
  put(dir.file("step-12"), "a file");
  CHECK(steps_in(dir.path()) == std::vector<int64_t>{9, 10, 11});
  CHECK(list_checkpoints(dir.path())[1].marked);
  CHECK_FALSE(list_checkpoints(dir.path())[2].marked);
  const std::string ten = dir.file("step-10");
  CHECK(checkpoint_fault(ten, true).empty());
  CHECK(contains(checkpoint_fault(dir.file("step-11"), true), "never finished"));
  CHECK(contains(checkpoint_fault(dir.file("none"), true), "is not a folder"));
  SECTION("truncated") {
    put(ten + "/model.safetensors", "weights of step 1");
    CHECK(contains(checkpoint_fault(ten, false), "has 17 bytes instead of 18"));
  }
  SECTION("changed in place") {
    put(ten + "/model.safetensors", "weights of step 1O");
    CHECK(checkpoint_fault(ten, false).empty());
    CHECK(contains(checkpoint_fault(ten, true), "model.safetensors does not have the sha256"));
  }
  SECTION("a file gone") {
    fs::remove(ten + "/model.safetensors");
    CHECK(contains(checkpoint_fault(ten, false), "model.safetensors is missing"));
  }
  SECTION("markers that lie") {
    for (const char* text :
         {"", "{", "[]", "{}", "{\"format\": 3}", "null",
          "{\"format\":\"topk-sft-checkpoint\",\"version\":1}",
          "{\"format\":\"topk-sft-checkpoint\",\"version\":1,\"files\":{}}",
          "{\"format\":\"topk-sft-checkpoint\",\"version\":1,\"files\":{\"model.safetensors\":1}}",
          "{\"format\":\"topk-sft-checkpoint\",\"version\":2,\"files\":{}}"}) {
      put(ten + "/COMPLETE", text);
      INFO(text);
      CHECK_FALSE(checkpoint_fault(ten, true).empty());
    }
  }
}

TEST_CASE("the newest complete checkpoints are kept", "[checkpoint]") {
  const TempDir dir;
  for (const int64_t step : {1, 2, 10, 20}) make_checkpoint(dir.path(), step);
  put(dir.file("step-5/model.safetensors"), "half");   // older than a whole one: removed
  put(dir.file("step-30/model.safetensors"), "half");  // newer: stays
  CHECK(prune_checkpoints(dir.path(), 0).size() == 1);
  CHECK(steps_in(dir.path()) == std::vector<int64_t>{1, 2, 10, 20, 30});
  CHECK(prune_checkpoints(dir.path(), 2).size() == 2);
  CHECK(steps_in(dir.path()) == std::vector<int64_t>{10, 20, 30});
  // A damaged checkpoint does not count as one that is kept.
  put(dir.file("step-20/model.safetensors"), "x");
  CHECK(prune_checkpoints(dir.path(), 1).empty());
  CHECK(steps_in(dir.path()) == std::vector<int64_t>{10, 20, 30});
}

TEST_CASE("a run's folder is never taken over", "[checkpoint]") {
  const TempDir dir;
  { const RunFolder fresh(dir.file("new/run"), true); }
  { const RunFolder again(dir.file("new/run"), true); }  // holds nothing but the lock
  put(dir.file("other/thesis.txt"), "");
  CHECK(contains(folder_error(dir.file("other"), true), "thesis.txt"));
  CHECK(contains(folder_error(dir.file("other"), false), "is not the folder of a run"));
  CHECK(fs::exists(dir.file("other/thesis.txt")));
  CHECK_THROWS_AS(RunFolder(dir.file("other/thesis.txt"), true), Error);
  make_checkpoint(dir.file("new/run"), 5);
  put(dir.file("new/run/.step-6.tmp-1-2/model.safetensors"), "half");
  CHECK(contains(folder_error(dir.file("new/run"), true), "--resume latest"));
  const RunFolder resumed(dir.file("new/run"), false);
  CHECK_FALSE(fs::exists(dir.file("new/run/.step-6.tmp-1-2")));
  CHECK(contains(folder_error(dir.file("new/run"), false), "another process"));
}

TEST_CASE("FLOPs of a tiny model, counted by hand", "[flops]") {
  const ModelConfig c = tiny_config();
  // A layer: q and o 2 * 16 * 32, k and v 2 * 16 * 16, MLP 3 * 16 * 32.
  const double layer = 1024 + 512 + 1536;
  CHECK(parameter_count(c) == 2 * (3072 + 32) + 16 + 2 * 100 * 16);
  const FlopCounter dense(c, std::nullopt, 4);
  // 10 pairs in a document of 4; per layer 6 products of 2 * 32 operations a pair.
  const double rest = 4 * 6 * 2 * layer + 3 * 6 * 1600;
  CHECK(dense.document(4, 3).dense == Approx(rest + 2 * 6 * 64 * 10));
  CHECK(dense.document(4, 3).spent == dense.document(4, 3).dense);
  SparsityConfig s;
  s.topk = 2;  // keeps 1, 2, 2, 2 keys: 7 pairs
  s.dense_layers = {0};
  const FlopCounter sparse(c, s, 4);
  CHECK(sparse.document(4, 3).dense == Approx(dense.document(4, 3).dense));
  CHECK(sparse.document(4, 3).spent == Approx(rest + 6 * 64 * 10 + 64 * (10 + 5 * 7)));
}

TEST_CASE("FLOPs of a frozen model with adapters", "[flops]") {
  const ModelConfig c = tiny_config();
  const LoraOptions lora{4, 8.0, {"q_proj", "down_proj"}};
  // A layer: A (4, 16) and B (32, 4) of q; A (4, 32) and B (16, 4) of down.
  const double adapters = 2 * (4 * (16 + 32) + 4 * (32 + 16));
  CHECK(static_cast<double>(adapter_parameter_count(c, lora)) == adapters);
  const double layer = 1024 + 512 + 1536;
  const double rest = 4 * (4 * 2 * layer + 6 * adapters) + 3 * 4 * 1600;
  CHECK(FlopCounter(c, std::nullopt, 4, lora).document(4, 3).spent == Approx(rest + 2 * 6 * 64 * 10));
}

TEST_CASE("the memory estimate follows the settings", "[flops]") {
  const ModelConfig c = tiny_config();
  const auto parameters = static_cast<double>(parameter_count(c));
  const auto estimate = [&](auto change) {
    MemorySettings settings;
    settings.tokens = settings.longest = 128;
    change(settings);
    return estimate_memory(c, settings);
  };
  const MemoryEstimate plain = estimate([](MemorySettings&) {});
  CHECK(plain.master_weights == 0);
  CHECK(plain.moments == 8 * parameters);
  CHECK(plain.host == 0);
  CHECK(estimate([](MemorySettings& s) { s.bfloat16 = true; }).master_weights == 4 * parameters);
  CHECK(estimate([](MemorySettings& s) { s.kept = 16; }).kept > plain.kept);
  CHECK(estimate([](MemorySettings& s) { s.tokens = 256; }).kept == 2 * plain.kept);

  const MemoryEstimate input = estimate([](MemorySettings& s) { s.checkpointing = true; });
  CHECK(input.kept == 2 * 128 * 16 * 4);  // two layers, hidden size 16, float32
  const MemoryEstimate results =
      estimate([](MemorySettings& s) { s.checkpointing = s.keeps_attention = true; });
  const double attended = c.num_heads * c.head_dim * 4 + c.num_heads * 4;  // the result and lse
  CHECK(results.kept == input.kept + 2 * 128 * attended);
  const MemoryEstimate away =
      estimate([](MemorySettings& s) { s.checkpointing = s.keeps_attention = s.offloads = true; });
  CHECK(away.host == results.kept);

  const LoraOptions lora{4, 8.0, {"q_proj"}};
  const MemoryEstimate frozen = estimate([&](MemorySettings& s) { s.lora = lora; });
  const auto adapters = static_cast<double>(adapter_parameter_count(c, lora));
  CHECK(frozen.weights == 4 * (parameters + adapters));
  CHECK(frozen.moments == 8 * adapters);
  CHECK(frozen.gradients == 4 * adapters);
}
