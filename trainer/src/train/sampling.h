// Completions of fixed prompts by the model in training, to see what it has learnt; and ids as text.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "model/model.h"
#include "tokenizer/detokenizer.h"
#include "train/plan.h"

namespace topk_sft {

// Text of ids by the model's tokenizer.json, in quotes on one line, special tokens included. A tokenizer.json
// that cannot be decoded natively gives the ids themselves; `notice` then says why.
class TextOfIds {
 public:
  explicit TextOfIds(const std::string& hf_dir);
  std::string operator()(std::span<const int64_t> ids) const;
  const std::string& notice() const { return notice_; }

 private:
  std::optional<Detokenizer> detokenizer_;
  std::string notice_;
};

struct Completion {
  std::string prompt;
  std::string completion;
};

// The prompts of train.sample_prompts (none: empty), checked against the model and its tokenizer. Throws
// Error.
std::vector<std::vector<int64_t>> load_sample_prompts(const RunPlan& plan);

// Completes the prompts under the attention that is set on the model; `step` takes part in the seed.
std::vector<Completion> complete_prompts(const CausalLM& model, const RunPlan& plan,
                                         const std::vector<std::vector<int64_t>>& prompts,
                                         const TextOfIds& text, int64_t step);

}  // namespace topk_sft
