#include "train/flops.h"

#include <algorithm>

#include "topk_attn/contract.h"

namespace topk_sft {

namespace {

// Weights of one layer's projections and MLP.
int64_t layer_matrices(const ModelConfig& c) {
  const int64_t q = c.num_heads * c.head_dim;
  const int64_t kv = c.num_kv_heads * c.head_dim;
  return c.hidden_size * (2 * q + 2 * kv) + 3 * c.hidden_size * c.intermediate_size;
}

}  // namespace

int64_t parameter_count(const ModelConfig& c) {
  const int64_t q = c.num_heads * c.head_dim;
  const int64_t kv = c.num_kv_heads * c.head_dim;
  int64_t layer = layer_matrices(c) + 2 * c.hidden_size;
  if (c.qkv_bias) layer += q + 2 * kv;
  if (c.o_bias) layer += c.hidden_size;
  if (c.mlp_bias) layer += 2 * c.intermediate_size + c.hidden_size;
  if (c.qk_norm) layer += 2 * c.head_dim;
  const int64_t embedding = c.vocab_size * c.hidden_size;
  return c.num_layers * layer + c.hidden_size + embedding * (c.tie_embeddings ? 1 : 2);
}

FlopCounter::FlopCounter(const ModelConfig& config, const std::optional<SparsityConfig>& sparsity,
                         int64_t max_seqlen) {
  per_token_ = 6.0 * static_cast<double>(config.num_layers * layer_matrices(config));
  per_target_ = 6.0 * static_cast<double>(config.hidden_size * config.vocab_size);
  per_pair_ = 2.0 * static_cast<double>(config.num_heads * config.head_dim);
  dense_layers_ = config.num_layers;
  if (!sparsity) return;
  dense_layers_ = static_cast<int64_t>(sparsity->dense_layers.size());
  topk_layers_ = config.num_layers - dense_layers_;
  topk_attn::Budget budget;
  budget.topk = sparsity->topk.value_or(0);
  budget.ratio = sparsity->ratio.value_or(0.0);
  budget.min_keys = sparsity->min_keys;
  budget.max_keys = sparsity->max_keys.value_or(topk_attn::kNoLimit);
  kept_pairs_.push_back(0);
  for (int64_t n = 1; n <= max_seqlen; ++n) {
    kept_pairs_.push_back(kept_pairs_.back() + static_cast<double>(topk_attn::budget(n, budget)));
  }
}

Flops FlopCounter::document(int64_t length, int64_t targets) const {
  const auto l = static_cast<double>(length);
  const double pairs = l * (l + 1) / 2;
  const double rest = l * per_token_ + static_cast<double>(targets) * per_target_;
  // Forward: scores and P V. Backward: dV, dP, dQ, dK.
  const double dense_layer = 6 * per_pair_ * pairs;
  Flops flops;
  flops.dense = rest + static_cast<double>(dense_layers_ + topk_layers_) * dense_layer;
  flops.spent = rest + static_cast<double>(dense_layers_) * dense_layer;
  if (topk_layers_ > 0) {
    const double kept = kept_pairs_[static_cast<size_t>(length)];
    flops.spent += static_cast<double>(topk_layers_) * per_pair_ * (pairs + 5 * kept);
  }
  return flops;
}

MemoryEstimate estimate_memory(const ModelConfig& c, bool bfloat16, int64_t tokens, int64_t kept,
                               bool checkpointing, bool keep_attention) {
  const auto parameters = static_cast<double>(parameter_count(c));
  const double element = bfloat16 ? 2 : 4;
  MemoryEstimate m;
  m.weights = parameters * element;
  m.master_weights = bfloat16 ? parameters * 4 : 0;
  m.gradients =
      parameters * (bfloat16 ? 6 : 4);  // bfloat16: the float32 sum and the gradient that is added to it
  m.moments = parameters * 8;
  const auto t = static_cast<double>(tokens);
  const auto q = static_cast<double>(c.num_heads * c.head_dim);
  const auto kv = static_cast<double>(c.num_kv_heads * c.head_dim);
  const auto h = static_cast<double>(c.hidden_size);
  const auto i = static_cast<double>(c.intermediate_size);
  // Per token of a layer. Attention: rotated q and k, v, its result and lse; with top-k the kept keys'
  // indices and probabilities. Rest: the residual stream before and after attention, gate and up, q and k
  // before their norm.
  const double attention = element * (2 * q + 2 * kv) + 4 * static_cast<double>(c.num_heads) +
                           8 * static_cast<double>(c.num_heads * kept);
  const double layer = attention + element * (2 * h + 2 * i + (c.qk_norm ? q + kv : 0));
  const auto layers = static_cast<double>(c.num_layers);
  const double kept_of_layer = element * h + (keep_attention ? attention : 0);
  m.activations = t * (checkpointing ? layers * kept_of_layer + layer : layers * layer);
  const double chunk = std::min(t, 1024.0);
  m.logits = chunk * static_cast<double>(c.vocab_size) * 3 * 4;
  return m;
}

}  // namespace topk_sft
