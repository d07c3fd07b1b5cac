// Generating tokens with a causal language model and its KV cache, under the attention that is set on the
// model.
//
// Prompts of different lengths need no padding: each is prefilled alone into its pages of the cache, then all
// sequences of a batch step together at their own lengths. Equal prompts of a batch are computed once and
// share pages. Positions and visible keys are those of a sequence alone, and so is the randomness (see
// TokenSampler); a batch differs from single runs only in how the matrix products of float32 round, which
// batch_size = 1 takes away as well.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "generate/sampler.h"
#include "model/model.h"

namespace topk_sft {

struct GenerateOptions {
  int64_t max_new_tokens = 256;        // >= 1
  std::vector<int64_t> eos_token_ids;  // any of them ends a sequence; it is part of the result
  int64_t batch_size = 8;              // sequences that step together; the cache has room for these only
  int64_t page_size = 64;              // tokens of a cache page
  bool key_codes = false;              // int8 copy of the keys, for the certified scan (CUDA)
  SamplingOptions sampling;
};

enum class FinishReason { kStop, kLength };           // an eos token; max_new_tokens
const char* finish_reason_name(FinishReason reason);  // "stop", "length"

struct Generated {
  std::vector<int64_t> ids;  // without the prompt; a closing eos token included
  FinishReason finish_reason = FinishReason::kLength;
  double prefill_seconds = 0.0;  // of this prompt, its result is the first token; equal prompts share one
  std::vector<double>
      token_seconds;  // per token of `ids`: duration of the call it came from (first: the prefill)
};

struct Generation {
  std::vector<Generated> sequences;  // as the prompts
  int64_t prefill_tokens = 0;        // computed: a prompt that others share counts once
  double prefill_seconds = 0.0;
  int64_t decode_tokens = 0;    // from single-token steps: all tokens but the first of each sequence
  double decode_seconds = 0.0;  // of these steps, batches counted once
  int64_t cache_bytes = 0;      // of the largest batch's cache: K, V, codes, tables
};

// What generate() checks of its arguments, for callers who want the Error before they load a model: prompts
// that are non-empty with ids below the vocabulary, eos ids there too, options in range.
void check_generation(const ModelConfig& config, const std::vector<std::vector<int64_t>>& prompts,
                      const GenerateOptions& options);

// Called for every token as soon as it is chosen: number of the prompt, token id.
using TokenCallback = std::function<void(size_t prompt, int64_t id)>;

// Completes each prompt (non-empty, ids in [0, vocab_size)). Equal prompts of one call get samples of their
// own. Throws Error on bad options or prompts, before anything is computed, and on non-finite logits.
Generation generate(const CausalLM& model, const std::vector<std::vector<int64_t>>& prompts,
                    const GenerateOptions& options, const TokenCallback& on_token = {});

}  // namespace topk_sft
