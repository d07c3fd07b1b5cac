#include "train/flops.h"

#include <algorithm>
#include <map>
#include <string>

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

int64_t adapter_parameter_count(const ModelConfig& c, const LoraOptions& lora) {
  const int64_t q = c.num_heads * c.head_dim;
  const int64_t kv = c.num_kv_heads * c.head_dim;
  const std::map<std::string, int64_t> in_and_out = {{"q_proj", c.hidden_size + q},
                                                     {"k_proj", c.hidden_size + kv},
                                                     {"v_proj", c.hidden_size + kv},
                                                     {"o_proj", c.hidden_size + q},
                                                     {"gate_proj", c.hidden_size + c.intermediate_size},
                                                     {"up_proj", c.hidden_size + c.intermediate_size},
                                                     {"down_proj", c.hidden_size + c.intermediate_size}};
  int64_t sum = 0;
  for (const std::string& target : lora.targets) sum += lora.rank * in_and_out.at(target);
  return c.num_layers * sum;
}

FlopCounter::FlopCounter(const ModelConfig& config, const std::optional<SparsityConfig>& sparsity,
                         int64_t max_seqlen, const std::optional<LoraOptions>& lora) {
  const double operations = lora ? 4.0 : 6.0;  // forward and the gradient of the input; that of the weight
  per_token_ = operations * static_cast<double>(config.num_layers * layer_matrices(config));
  if (lora) per_token_ += 6.0 * static_cast<double>(adapter_parameter_count(config, *lora));
  per_target_ = operations * static_cast<double>(config.hidden_size * config.vocab_size);
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

MemoryEstimate estimate_memory(const ModelConfig& c, const MemorySettings& s) {
  const auto parameters = static_cast<double>(parameter_count(c));
  const auto trained = s.lora ? static_cast<double>(adapter_parameter_count(c, *s.lora)) : parameters;
  const double element = s.bfloat16 ? 2 : 4;
  MemoryEstimate m;
  m.weights = (s.lora ? parameters + trained : parameters) * element;
  m.master_weights = s.bfloat16 ? trained * 4 : 0;
  // bfloat16: the gradient itself, and the float32 sum of several; one alone is updated from where it is on a
  // GPU.
  m.gradients = trained * (!s.bfloat16 ? 4 : s.cuda && !s.accumulates ? 2 : 6);
  m.moments = trained * 8;

  const auto t = static_cast<double>(s.tokens);
  const auto heads = static_cast<double>(c.num_heads);
  const auto q = static_cast<double>(c.num_heads * c.head_dim);
  const auto kv = static_cast<double>(c.num_kv_heads * c.head_dim);
  const auto h = static_cast<double>(c.hidden_size);
  const auto i = static_cast<double>(c.intermediate_size);
  const auto layers = static_cast<double>(c.num_layers);

  // Per token of a layer. What attention leaves: its result and lse; with top-k the encoding, and on a GPU a
  // bit a key for every 64 rows, on the CPU the kept keys' indices and probabilities.
  double results = element * q + 4 * heads;
  if (s.kept > 0) {
    results +=
        heads * (8 + (s.cuda ? static_cast<double>(s.longest) / 512 : 8 * static_cast<double>(s.kept)));
  }
  const double rotated = element * (q + 2 * kv);
  // Without checkpointing also: the heads before and after their norm, the residual stream twice, gate and
  // up.
  const double whole = results + rotated + element * (2 * h + 2 * i + (c.qk_norm ? q + kv : 0));
  if (!s.checkpointing) {
    m.kept = t * layers * whole;
    m.working = t * element * 3 * i;  // gradients inside the MLP
  } else {
    // Outside attention a chunk of tokens at a time (model/layer_checkpoint.h).
    const double chunk = std::min(t, static_cast<double>(int64_t{1} << 27) / i);
    const double kept = element * h + (s.keeps_attention ? results : 0);
    // On the device two layers wait for their copies to end, or the next one arrives.
    m.kept = t * kept * (s.offloads ? std::min(layers, 2.0) : layers);
    m.host = s.offloads ? t * kept * layers : 0;
    // The layer's input, result and their gradients; heads twice (before and after they are joined) and their
    // gradients; the MLP of a chunk, forward and backward.
    m.working = t * (element * 4 * h + results + element * q + 3 * rotated) + chunk * element * 6 * i;
  }
  // Hidden states of the targets and their gradient, a chunk of logits, the head's gradient in float32.
  const double rows = s.cuda ? static_cast<double>(int64_t{1} << 28) / static_cast<double>(c.vocab_size)
                             : static_cast<double>(int64_t{1} << 24) / static_cast<double>(c.vocab_size);
  m.logits = t * element * 2 * h +
             std::min(t, rows) * static_cast<double>(c.vocab_size) * (s.cuda ? element : element + 8) +
             (s.lora ? 0 : h * static_cast<double>(c.vocab_size) * 4);
  return m;
}

}  // namespace topk_sft
