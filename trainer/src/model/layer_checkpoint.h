// A layer of which little is kept for the backward, and which is computed a range of tokens at a time.
//
// Kept of T tokens: the layer's input (T, hidden), and with `keep_attention` what attention returned,
// (T, H D), with its logsumexp and, for top-k attention, the selection. The backward makes the heads and the
// MLP again; with `keep_attention` attention runs, and keys are selected, once. No tensor of T x
// intermediate_size exists at any time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "model/attention.h"
#include "model/config.h"
#include "model/layer.h"
#include "model/offload.h"
#include "model/rope.h"

namespace topk_sft {

struct CheckpointOptions {
  bool keep_attention = true;
  int64_t chunk_tokens = 0;    // tokens at a time outside attention; 0: by the size of the MLP
  Offload* offload = nullptr;  // where what is kept waits; null: on the device
};

// Differentiable in x and the layer's parameters. The gradients are those of the layer without checkpointing,
// to the bit if one chunk holds all tokens; several chunks are added in float32.
at::Tensor checkpointed_layer(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                              const std::shared_ptr<const RopeTable>& rope,
                              const std::shared_ptr<const PackedAttention>& attention,
                              const CheckpointOptions& options);

// Tokens of a chunk when CheckpointOptions says 0: 256 MiB in bfloat16 of one tensor of the MLP.
int64_t default_chunk_tokens(int64_t intermediate_size);

}  // namespace topk_sft
