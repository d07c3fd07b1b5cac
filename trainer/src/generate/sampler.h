// Choosing the next token from logits: greedy, or sampled with temperature, top-k, top-p, min-p and
// repetition penalty, applied in the order of transformers' generate. Torch-free.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

namespace topk_sft {

struct SamplingOptions {
  bool sample = false;       // false: the highest logit, the lowest id among equals
  double temperature = 1.0;  // > 0; divides the logits
  int64_t top_k = 0;         // keep the k highest; 0: all
  double top_p = 1.0;        // in (0, 1]: keep the fewest tokens whose probability reaches p
  double min_p = 0.0;        // in [0, 1]: keep tokens of at least min_p times the highest probability
  double repetition_penalty =
      1.0;  // > 0: logits of ids already seen are divided by it (if negative, multiplied)
  uint64_t seed = 0;
};

// Throws Error that names the option.
void check_sampling(const SamplingOptions& options);

// The sampler of one sequence. What it draws depends on the seed, the prompt and `occurrence` only: not on
// the other sequences of a batch nor on their number. `occurrence` tells apart several samples of one prompt.
class TokenSampler {
 public:
  TokenSampler(const SamplingOptions& options, std::span<const int64_t> prompt, uint64_t occurrence = 0);

  // The next id from logits (vocab_size), which are changed. Throws Error if one of them is NaN or all are
  // -inf.
  int64_t next(std::span<float> logits);

 private:
  void penalise(std::span<float> logits) const;
  int64_t draw(std::span<const float> logits);
  double uniform();  // in [0, 1)

  SamplingOptions options_;
  std::unordered_set<int64_t> seen_;  // ids of the prompt and of what was chosen
  uint64_t state_;
};

}  // namespace topk_sft
