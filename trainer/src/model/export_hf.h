// Writing a Hugging Face folder that transformers loads unchanged and with the same attention.
#pragma once

#include <string>

#include "model/model.h"

namespace topk_sft {

// Bytes of one weight file before the next shard begins.
inline constexpr int64_t kMaxShardBytes = int64_t{5} * 1000 * 1000 * 1000;

// Writes `model` to `target_dir`. Every file of `source_dir` that is not a weight (tokenizer, chat template,
// generation_config, ...) is copied byte for byte; config.json keeps its keys and order except
// attn_implementation and topk_attention (set for top-k attention, removed for dense) and dtype /
// torch_dtype. Weights, with adapters merged in, go to model.safetensors, or to shards of at most
// `max_shard_bytes` and an index; a tied lm_head is left out. The folder appears whole or not at all; an
// existing non-empty target is an Error unless `replace`.
void export_hf(const CausalLM& model, const std::string& source_dir, const std::string& target_dir,
               const AttentionSettings& attention, bool replace = false,
               int64_t max_shard_bytes = kMaxShardBytes);

}  // namespace topk_sft
