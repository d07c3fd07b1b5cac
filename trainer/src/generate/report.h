// topk-generate's JSON: prompts, completions and timings in one document.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "generate/generator.h"
#include "io/json.h"
#include "model/config.h"
#include "tokenizer/detokenizer.h"

namespace topk_sft {

struct GenerationReport {
  std::string model;  // folder
  std::string dtype;
  std::string device;
  std::optional<SparsityConfig> attention;  // none: dense
  std::vector<std::vector<int64_t>> prompts;
  const GenerateOptions& options;
  const Generation& generation;
  const Detokenizer* detokenizer;  // nullptr: no text
  bool skip_special_tokens = true;
};

OrderedJson report_json(const GenerationReport& report);

// Tokens per second; 0 when nothing was timed.
double rate(int64_t tokens, double seconds);

}  // namespace topk_sft
