// Floating-point operations and memory of training, counted from the shapes. Torch-free.
//
// A multiply-add is two operations; backward is twice forward, and once it for weights that are frozen. Only
// matrix products count. Attention is causal: a document of L tokens has L (L + 1) / 2 pairs of query and
// visible key per head.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "model/config.h"
#include "model/lora.h"

namespace topk_sft {

// Parameters of the model; a tied output head counts once.
int64_t parameter_count(const ModelConfig& config);
// Parameters of the adapters that `lora` adds.
int64_t adapter_parameter_count(const ModelConfig& config, const LoraOptions& lora);

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
  // sparsity: of top-k attention; none: dense. max_seqlen: the longest document asked for. lora: adapters of
  // a frozen model; none: all weights train.
  FlopCounter(const ModelConfig& config, const std::optional<SparsityConfig>& sparsity, int64_t max_seqlen,
              const std::optional<LoraOptions>& lora = std::nullopt);

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

// What the memory of a step depends on besides the model's shape.
struct MemorySettings {
  bool bfloat16 = false;
  bool cuda = false;
  int64_t tokens = 0;               // of one micro-batch
  int64_t longest = 0;              // document in it
  int64_t kept = 0;                 // keys kept per query; 0: dense
  bool accumulates = false;         // several micro-batches a step
  bool checkpointing = false;       // activation checkpointing,
  bool keeps_attention = false;     // with the results of attention kept,
  bool offloads = false;            // in host memory
  std::optional<LoraOptions> lora;  // adapters of a frozen model
};

// Bytes that training needs, by part. An estimate: allocator slack and libraries come on top.
struct MemoryEstimate {
  double weights = 0;
  double master_weights = 0;  // float32 copies, when the compute type is bfloat16
  double gradients = 0;
  double moments = 0;
  double kept = 0;     // activations kept from forward to backward
  double working = 0;  // activations and gradients of the layer at work
  double logits = 0;   // one chunk of the output head, its gradients
  double host = 0;     // kept in host memory instead; not in the total
  double total() const { return weights + master_weights + gradients + moments + kept + working + logits; }
};

MemoryEstimate estimate_memory(const ModelConfig& config, const MemorySettings& settings);

}  // namespace topk_sft
