// Differentiable building blocks with hand-written gradients, where plain ATen would keep too much in memory
// or pass over it too often. On a CUDA device float32 and bfloat16 run on the trainer's own kernels
// (fused.h), everything else on ATen; both round at the same places.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

#include "model/rope.h"

namespace topk_sft {

// A linear map; bias is undefined when the model has none, lora_a and lora_b when there is no adapter. With
// one the map is x -> weight x + bias + lora_scaling lora_b (lora_a x), and the product is added to the
// rounded result of the weight.
struct Linear {
  at::Tensor weight;  // (out, in)
  at::Tensor bias;    // (out)
  at::Tensor lora_a;  // (rank, in)
  at::Tensor lora_b;  // (out, rank)
  double lora_scaling = 0.0;

  static constexpr size_t kTensors = 4;
  std::array<at::Tensor, kTensors> tensors() const { return {weight, bias, lora_a, lora_b}; }
  at::Tensor operator()(const at::Tensor& x) const;
};

// x / rms(x) * weight over the last dimension. The norm is taken in float32 (float64 for float64 inputs) and
// rounded to x's dtype before the weight, as transformers does. x (..., N), weight (N).
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// One to three linear maps of rms_norm(x). What lies between the norm and the maps is made again in the
// backward instead of being kept.
std::vector<at::Tensor> norm_linear(const at::Tensor& x, const at::Tensor& norm_weight, double eps,
                                    const std::vector<Linear>& maps);
// The same for x + residual, which is the first result, before those of the maps.
std::vector<at::Tensor> add_norm_linear(const at::Tensor& x, const at::Tensor& residual,
                                        const at::Tensor& norm_weight, double eps,
                                        const std::vector<Linear>& maps);

// The rotary embedding of heads x (..., heads, head_dim), after a norm over head_dim if `norm_weight` is
// defined.
at::Tensor norm_rope(const at::Tensor& x, const at::Tensor& norm_weight, double eps, const RopeTable& table);

// down(silu(gate) * up); the product is made again in the backward.
at::Tensor swiglu_linear(const at::Tensor& gate, const at::Tensor& up, const Linear& down);

// Sum of the cross-entropy of hidden @ weight^T against labels: a float32 scalar (float64 for float64
// inputs). hidden (T, N), weight (V, N), labels int64 (T) in [0, V). Logits exist for a chunk of tokens at a
// time; the gradients of hidden and weight are made in the same pass over the chunks, the weight's in
// float32.
at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight,
                                    const at::Tensor& labels);

}  // namespace topk_sft
