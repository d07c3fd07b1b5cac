// One transformer layer and the norm around it: attention with grouped KV heads and SwiGLU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "model/config.h"
#include "model/rope.h"

namespace topk_sft {

// A linear map; bias is undefined when the model has none.
struct Linear {
  at::Tensor weight;  // (out, in)
  at::Tensor bias;    // (out)
  at::Tensor operator()(const at::Tensor& x) const;
};

struct Layer {
  at::Tensor input_norm;  // (hidden)
  Linear q, k, v, o;
  at::Tensor q_norm, k_norm;  // (head_dim); undefined without QK-norm
  at::Tensor post_norm;       // (hidden)
  Linear gate, up, down;

  std::vector<at::Tensor> parameters() const;
};

// The attention of one layer: q (..., H, D), k and v (..., Hkv, D), after RoPE -> (..., H, D).
using Attend = std::function<at::Tensor(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v)>;

// x (..., hidden) -> (..., hidden); the leading dimensions are those of the RoPE table.
at::Tensor layer_forward(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                         const RopeTable& rope, const Attend& attend);

// Causal attention inside each document, torch's SDPA. q (T, H, D), k and v (T, Hkv, D); bounds as
// cu_seqlens, on the host. The group's queries read one KV head through strides: nothing is repeated.
at::Tensor dense_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::vector<int64_t>& bounds);

}  // namespace topk_sft
