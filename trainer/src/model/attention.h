// Attention over packed documents, dense or top-k: as a differentiable function, and, where the kernels allow
// it, as a forward and a gradient of their own, so that activation checkpointing keeps the result and not the
// heads.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "topk_attn/topk_attn.h"

namespace topk_sft {

// One layer's attention: q (T, H, D), k and v (T, Hkv, D), after RoPE -> (T, H, D).
class PackedAttention {
 public:
  virtual ~PackedAttention() = default;

  // Differentiable.
  virtual at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const = 0;

  // Whether heads of this type, device and head_dim have the two calls below.
  virtual bool separable(const at::TensorOptions& heads, int64_t head_dim) const = 0;
  // Not differentiable. The first is the result; with the others it is what `gradients` needs besides the
  // heads.
  virtual std::vector<at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                          const at::Tensor& v) const = 0;
  // The gradients of q, k and v, the same to the bit as those of `attend`.
  virtual std::array<at::Tensor, 3> gradients(const at::Tensor& grad, const at::Tensor& q,
                                              const at::Tensor& k, const at::Tensor& v,
                                              const std::vector<at::Tensor>& results) const = 0;
};

// Causal attention inside each document, on torch's kernels; cu_seqlens int32 (docs + 1) on the heads' device
// and `bounds`, the same on the host. No KV head is repeated in memory.
//
// CUDA, 16-bit: documents of one length run on cuDNN, others in one call of the varlen flash kernels, which
// also serve runs that must be deterministic; both are separable. Elsewhere each document is one call of
// scaled_dot_product_attention.
std::shared_ptr<const PackedAttention> dense_attention(const at::Tensor& cu_seqlens,
                                                       const std::vector<int64_t>& bounds);

// Exact top-k attention inside each document; always separable.
std::shared_ptr<const PackedAttention> topk_attention(const at::Tensor& cu_seqlens, int64_t max_seqlen,
                                                      const topk_attn::Options& options);

}  // namespace topk_sft
