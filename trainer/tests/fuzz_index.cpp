// Fuzzes model.safetensors.index.json beside two valid shards.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "fuzz.h"
#include "io/safetensors.h"

namespace fs = std::filesystem;

int main(int argc, char** argv) {
  char folder_template[] = "/tmp/topk_fuzz_index_XXXXXX";
  const char* made = mkdtemp(folder_template);
  if (made == nullptr) return 1;
  const fs::path folder = made;
  const auto shard = [&](const char* file, const std::vector<const char*>& names) {
    topk_sft::SafetensorsWriter writer((folder / file).string());
    const float value = 1.0f;
    for (const char* name : names) writer.declare(name, topk_sft::DType::kF32, {1});
    for (const char* name : names) writer.write(name, &value, sizeof value);
    writer.commit();
  };
  shard("model-00001-of-00002.safetensors", {"a", "b"});
  shard("model-00002-of-00002.safetensors", {"c"});

  topk_fuzz::Fuzzer fuzzer;
  fuzzer.name = "index";
  fuzzer.iterations = 10000;
  fuzzer.seeds = {
      R"({"metadata": {"total_size": 12}, "weight_map": {"a": "model-00001-of-00002.safetensors", )"
      R"("b": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}})",
      R"({"weight_map":{"c":"model-00002-of-00002.safetensors"}})"};
  fuzzer.target = [&](const std::string& input) {
    std::ofstream(folder / "model.safetensors.index.json", std::ios::binary) << input;
    const topk_sft::SafetensorsFolder weights(folder.string());
    volatile size_t count = 0;
    for (const auto& entry : weights.entries()) count = count + entry.file->bytes(*entry.tensor).size();
  };
  fuzzer.mutate = [&](const std::string& seed, topk_fuzz::Random& random) {
    return random.below(4) == 0 ? topk_fuzz::mutate_bytes(seed, fuzzer.seeds, random)
                                : topk_fuzz::mutate_text(seed, fuzzer.seeds, random);
  };
  const int rc = topk_fuzz::run_fuzzer(fuzzer, argc, argv);
  std::error_code ignored;
  fs::remove_all(folder, ignored);
  return rc;
}
