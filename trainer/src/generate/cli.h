// The command line of topk-generate. Torch-free.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "generate/sampler.h"
#include "model/config.h"

namespace topk_sft {

// A command line that cannot be understood: printed with a hint at --help, exit status 2.
class GenerateUsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What --topk, --ratio, --dense, ... change of the attention that config.json asks for.
struct AttentionOverrides {
  bool dense = false;
  std::optional<int64_t> topk;
  std::optional<double> ratio;
  std::optional<int64_t> min_keys;
  std::optional<int64_t> max_keys;
  std::optional<std::string> select;
  std::optional<int64_t> sink;
  std::optional<int64_t> recent;
  std::optional<std::vector<int64_t>> dense_layers;
  std::optional<bool> prefill_dense;

  // The model's own settings (none: dense) with these on top. A new --topk or --ratio replaces the model's
  // budget. Throws GenerateUsageError if there is no budget to apply an option to.
  std::optional<SparsityConfig> apply(const std::optional<SparsityConfig>& own) const;
};

enum class OutputFormat { kText, kIds, kJson };

struct GenerateCommand {
  enum class Action { kGenerate, kHelp, kVersion };
  Action action = Action::kGenerate;
  std::string model;
  std::string prompts;                    // token file, or empty
  std::vector<std::vector<int64_t>> ids;  // prompts given on the command line
  AttentionOverrides attention;
  SamplingOptions sampling;
  int64_t max_new_tokens = 256;
  int64_t samples = 1;
  int64_t batch_size = 8;
  int64_t page_size = 64;
  bool key_codes = false;
  std::optional<std::vector<int64_t>> eos;  // instead of the model's; empty: none
  OutputFormat format = OutputFormat::kText;
  bool keep_special_tokens = false;
  std::string dtype;  // "float32", "bfloat16", "float64"; empty: as stored
  std::string device = "cpu";
  std::optional<int64_t> threads;
};

// arguments: without the program's name. Throws GenerateUsageError.
GenerateCommand parse_generate_command(const std::vector<std::string>& arguments);

const char* generate_usage_text();

}  // namespace topk_sft
