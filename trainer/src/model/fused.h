// The trainer's CUDA kernels (trainer/kernels) on tensors. A build without CUDA has none of them: `available`
// is then false for every tensor, and the others are never called.
//
// Nothing here knows of gradients; functions.cpp makes differentiable functions of these.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace topk_sft::fused {

// True for float32 and bfloat16 tensors on a CUDA device, in a build with CUDA.
bool available(const at::Tensor& x);

bool norm_available(const at::Tensor& x);  // also: the last dimension is one that the kernels take
struct Norm {
  at::Tensor sum;          // x + residual; x itself without a residual
  at::Tensor y;            // sum / rms(sum) * weight
  at::Tensor inverse_rms;  // float32 (rows)
};
// `residual` undefined: none.
Norm norm_forward(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps);
// The gradients of x and weight; `grad_sum` (undefined: none) reaches x past the norm.
std::pair<at::Tensor, at::Tensor> norm_backward(const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& inverse_rms, const at::Tensor& grad_y,
                                                const at::Tensor& grad_sum);

bool rope_available(const at::Tensor& x);
// x (..., heads, head_dim), cos and sin (..., head_dim); `weight` (head_dim) of the norm before, or
// undefined.
at::Tensor rope_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& cos,
                        const at::Tensor& sin, double eps);
// The gradients of x and weight; x is read only with a weight.
std::pair<at::Tensor, at::Tensor> rope_backward(const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& cos, const at::Tensor& sin,
                                                const at::Tensor& grad_y, double eps);

at::Tensor swiglu_forward(const at::Tensor& gate, const at::Tensor& up);
struct SwigluGradients {
  at::Tensor y, gate, up;
};
SwigluGradients swiglu_backward(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& grad_y);

// The loss of each row, float32; with `gradient` the logits become softmax - one_hot(label) in place.
at::Tensor cross_entropy(at::Tensor& logits, const at::Tensor& labels, bool gradient);

// One AdamW update of bfloat16 parameters from float32 or bfloat16 gradients (all of one type).
struct AdamWUpdate {
  std::vector<at::Tensor> parameters, masters, gradients, exp_avg, exp_avg_sq;
  double learning_rate, beta1, beta2, epsilon, weight_decay;
  double gradient_scale;
  int64_t step;  // from 1
};
void adamw(const AdamWUpdate& update);

}  // namespace topk_sft::fused
