// Floating-point operations and memory of training, counted from the shapes. Torch-free.
//
// A multiply-add is two operations; backward is twice forward. Only matrix products count. Attention is
// causal: a document of L tokens has L (L + 1) / 2 pairs of query and visible key per head.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "model/config.h"

namespace topk_sft {

// Parameters of the model; a tied output head counts once.
int64_t parameter_count(const ModelConfig& config);

struct Flops {
  double dense = 0;  // what dense attention would take
  double spent = 0;  // what is computed: with top-k attention every pair is scored, and only kept pairs reach
                     // softmax, the product with V and the backward pass
  Flops& operator+=(const Flops& other) {
    dense += other.dense;
    spent += other.spent;
    return *this;
  }
};

// Forward and backward of documents, one model and one attention setting.
class FlopCounter {
 public:
  // sparsity: of top-k attention; none: dense. max_seqlen: the longest document asked for.
  FlopCounter(const ModelConfig& config, const std::optional<SparsityConfig>& sparsity, int64_t max_seqlen);

  // Attention of one document of `length` tokens, plus its share of everything else; `targets`: positions
  // with a label, the only ones that reach the output head.
  Flops document(int64_t length, int64_t targets) const;

 private:
  double per_token_ = 0;   // projections and MLP, all layers
  double per_target_ = 0;  // output head
  double per_pair_ = 0;    // one matrix product over one pair, all heads of a layer: 2 H D
  int64_t dense_layers_ = 0;
  int64_t topk_layers_ = 0;
  std::vector<double> kept_pairs_;  // [length]: pairs kept per head in a document of that length
};

// Bytes that training needs, by part. An estimate: allocator slack and libraries come on top.
struct MemoryEstimate {
  double weights = 0;
  double master_weights = 0;  // float32 copies, when the compute type is bfloat16
  double gradients = 0;
  double moments = 0;
  double activations = 0;  // kept from forward to backward for `tokens` tokens
  double logits = 0;       // one chunk of the output head
  double total() const { return weights + master_weights + gradients + moments + activations + logits; }
};

// tokens: of one micro-batch. kept: keys kept per query (0: dense). checkpointing: activation checkpointing,
// with the heads and results of attention kept or not.
MemoryEstimate estimate_memory(const ModelConfig& config, bool bfloat16, int64_t tokens, int64_t kept,
                               bool checkpointing, bool keep_attention = false);

}  // namespace topk_sft
