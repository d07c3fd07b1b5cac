// CUDA kernels of the trainer: what a training step does besides matrix products and attention, each in one
// pass over memory. Plain pointers and sizes; no torch, no allocation, no wait for the device; every sum is
// taken in a fixed order, so that a result never differs between two runs.
//
// Matrices are row-major and dense. Type names the element type of activations and weights; statistics,
// partial sums and optimizer state are float32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace topk_sft::cuda {

enum class Type { kFloat, kBFloat16 };

// ---- RMSNorm over the last dimension, with the residual addition before it
// ----------------------------------------

// Row lengths that the norm kernels take: multiples of 8 up to 8192.
bool norm_supported(int64_t columns);
// Blocks of norm_backward, and so the rows of its `partial`.
int64_t norm_backward_blocks(int64_t rows, int64_t columns);

struct NormForward {
  Type type;
  int64_t rows, columns;
  float eps;
  const void* x;         // (rows, columns)
  const void* residual;  // the same shape, added to x first; null: nothing
  const void* weight;    // (columns)
  void* sum;             // x + residual; only with a residual
  void* y;               // round(sum * inverse_rms) * weight
  float* inverse_rms;    // (rows)
};
cudaError_t norm_forward(const NormForward& call, cudaStream_t stream);

struct NormBackward {
  Type type;
  int64_t rows, columns;
  const void* x;  // what was normed
  const void* weight;
  const float* inverse_rms;
  const void* grad_y;
  const void* grad_sum;  // gradient that reaches x past the norm, added to grad_x; null: none
  void* grad_x;
  void* grad_weight;  // (columns)
  float* partial;     // workspace (norm_backward_blocks, columns)
};
cudaError_t norm_backward(const NormBackward& call, cudaStream_t stream);

// ---- Rotary embedding of heads, with the norm over head_dim that Qwen3 has before it
// -------------------------------

int64_t rope_backward_blocks(int64_t tokens, int64_t heads);

struct Rope {
  Type type;
  int64_t tokens, heads, head_dim;  // head_dim even, at most 256
  float eps;
  const void* weight;  // (head_dim); null: no norm
  const void* cos;     // (tokens, head_dim), both halves of a row alike
  const void* sin;     // (tokens, head_dim)
  const void* x;       // (tokens, heads, head_dim); the backward needs it only with a norm
  void* y;             // forward: the rotated heads; the same shape
  const void* grad_y;  // backward
  void* grad_x;        // backward
  void* grad_weight;   // backward, with a norm
  float* partial;      // backward, with a norm: workspace (rope_backward_blocks, head_dim)
};
cudaError_t rope_forward(const Rope& call, cudaStream_t stream);
cudaError_t rope_backward(const Rope& call, cudaStream_t stream);

// ---- SwiGLU: round(silu(gate)) * up
// --------------------------------------------------------------------------------

cudaError_t swiglu_forward(Type type, int64_t size, const void* gate, const void* up, void* y,
                           cudaStream_t stream);
// Also writes y again, which the weight gradient of the projection behind it needs.
cudaError_t swiglu_backward(Type type, int64_t size, const void* gate, const void* up, const void* grad_y,
                            void* y, void* grad_gate, void* grad_up, cudaStream_t stream);

// ---- Cross-entropy of logits
// ---------------------------------------------------------------------------------------

// losses[r] = logsumexp(logits[r]) - logits[r][labels[r]]; with `gradient`, logits become softmax -
// one_hot(label).
cudaError_t cross_entropy(Type type, int64_t rows, int64_t vocabulary, void* logits, const int64_t* labels,
                          float* losses, bool gradient, cudaStream_t stream);

// ---- AdamW of bfloat16 parameters with float32 masters
// -------------------------------------------------------------

struct AdamWTensor {
  void* parameter;  // bfloat16: becomes the rounded master
  float* master;
  const void* gradient;  // bfloat16 or float32
  float* exp_avg;
  float* exp_avg_sq;
  int64_t size;
};
struct AdamWSettings {
  bool gradient_is_float;
  float gradient_scale;
  float learning_rate, beta1, beta2, epsilon, weight_decay;
  float correction1, correction2_sqrt;  // 1 - beta1^step, sqrt(1 - beta2^step)
};
// Any number of tensors; several launches of one kernel.
cudaError_t adamw(const AdamWSettings& settings, const AdamWTensor* tensors, int64_t count,
                  cudaStream_t stream);

}  // namespace topk_sft::cuda
