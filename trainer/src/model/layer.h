// One transformer layer in two parts around the attention: grouped KV heads before it, SwiGLU after it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "model/config.h"
#include "model/functions.h"
#include "model/rope.h"

namespace topk_sft {

struct Layer {
  at::Tensor input_norm;  // (hidden)
  Linear q, k, v, o;
  at::Tensor q_norm, k_norm;  // (head_dim); undefined without QK-norm
  at::Tensor post_norm;       // (hidden)
  Linear gate, up, down;

  // Those that layer_heads and layer_output read.
  std::vector<at::Tensor> head_parameters() const;
  std::vector<at::Tensor> output_parameters() const;
};

// The attention of one layer: q (..., H, D), k and v (..., Hkv, D), after RoPE -> (..., H, D).
using Attend = std::function<at::Tensor(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v)>;

// x (..., hidden) -> q, k and v, rotated; the leading dimensions are those of the RoPE table.
std::vector<at::Tensor> layer_heads(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                                    const RopeTable& rope);
// x and what attention made of it (..., H, D) -> (..., hidden).
at::Tensor layer_output(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                        const at::Tensor& attended);
// Both, with the attention between them.
at::Tensor layer_forward(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                         const RopeTable& rope, const Attend& attend);

}  // namespace topk_sft
