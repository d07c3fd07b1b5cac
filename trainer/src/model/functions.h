// Differentiable building blocks with hand-written gradients, where plain ATen would keep too much in memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace topk_sft {

// x / rms(x) * weight over the last dimension. The norm is taken in float32 (float64 for float64 inputs) and
// rounded to x's dtype before the weight, as transformers does. x (..., N), weight (N).
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// Sum of the cross-entropy of hidden @ weight^T against labels: a float32 scalar (float64 for float64
// inputs). hidden (T, N), weight (V, N), labels int64 (T) in [0, V). Logits exist for a chunk of tokens at a
// time; the gradients of hidden and weight are made in the same pass over the chunks, the weight's in
// float32.
at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight,
                                    const at::Tensor& labels);

// function(x), of which only x is kept for the backward, which calls `function` again. `function` must be
// deterministic and may read, besides x, only `parameters` as differentiable tensors; their gradients come
// out as if it had been called directly.
at::Tensor checkpoint(const std::function<at::Tensor(const at::Tensor&)>& function, const at::Tensor& x,
                      const std::vector<at::Tensor>& parameters);

}  // namespace topk_sft
