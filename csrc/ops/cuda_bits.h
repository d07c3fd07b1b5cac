// The promise that all CUDA kernels see the same scores, measured on the card at hand.
//
// Selection, forward and backward compute each score anew, with other instructions and operand orders, and
// rely on getting the same bits (contract section 4). That is a property of the card's tensor cores which its
// vendor does not promise. So the first call for a device, build, dtype and head dim runs the shipped kernels
// on a small problem in which rounding alone decides who is kept, reads the sets back out of selection,
// forward and both halves of the backward, and compares them. A few milliseconds, with one wait for the
// device; calls inside a CUDA graph capture cannot wait and leave it to a later call.
#pragma once

#include <c10/core/ScalarType.h>

#include <string>

#include "cuda/plan.h"
#include "operators.h"

namespace topk_attn::bits {

enum class Verdict { kAgree, kDisagree, kUnknown };  // unknown: not measured yet, the stream is capturing

// Of the current device. `head_dim`: the larger one of q and v.
Verdict of(cuda::Build build, at::ScalarType dtype, int64_t head_dim);

// What the measurement itself runs with, on this thread: null outside it.
const cuda::Wish* forced();

// Forgets all verdicts. While `corrupt` names a build, one bit of what its kernels give is flipped before the
// comparison: for tests of what happens then. Empty: nothing is.
void reset(const std::string& corrupt);

}  // namespace topk_attn::bits

namespace topk_attn::cuda_ops {

// The operators' CUDA implementations (cuda.cpp), called past the dispatcher.
SelectResult select(const Tensor& q, const Tensor& k, const OptTensor& cu_seqlens_q,
                    const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k, bool causal,
                    OptInt topk, std::optional<double> ratio, int64_t min_keys, OptInt max_keys,
                    std::string_view select, int64_t sink, int64_t recent, bool return_indices);
FwdResult fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
              const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k, bool causal,
              OptInt topk, std::optional<double> ratio, int64_t min_keys, OptInt max_keys,
              std::string_view select, int64_t sink, int64_t recent, std::optional<double> softmax_scale,
              bool deterministic, std::string_view kept);
BwdResult bwd(const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& out, const Tensor& lse, const Tensor& threshold, const Tensor& tie_index,
              const Tensor& kept_index, const Tensor& kept_prob, const OptTensor& cu_seqlens_q,
              const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k, bool causal,
              OptInt topk, std::optional<double> ratio, int64_t min_keys, OptInt max_keys,
              std::string_view select, int64_t sink, int64_t recent, std::optional<double> softmax_scale,
              bool deterministic);

}  // namespace topk_attn::cuda_ops
