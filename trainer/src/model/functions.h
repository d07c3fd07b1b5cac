// Differentiable building blocks with hand-written gradients, where plain ATen would keep too much in memory
// or pass over it too often. On a CUDA device float32 and bfloat16 run on the trainer's own kernels
// (fused.h), everything else on ATen; both round at the same places.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "model/rope.h"

namespace topk_sft {

// A linear map; bias is undefined when the model has none.
struct Linear {
  at::Tensor weight;  // (out, in)
  at::Tensor bias;    // (out)
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

// function(inputs), of which only the inputs are kept for the backward, which calls `function` again.
// `function` must be deterministic and may read, besides its inputs, only `parameters` as differentiable
// tensors; their gradients come out as if it had been called directly.
using TensorFunction = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;
std::vector<at::Tensor> checkpoint(const TensorFunction& function, const std::vector<at::Tensor>& inputs,
                                   const std::vector<at::Tensor>& parameters);

}  // namespace topk_sft
