// Which instances of the tensor-core kernels this build holds (TOPK_CUDA_DTYPES, TOPK_CUDA_HEAD_DIMS and
// TOPK_CUDA_ARCHS of the build), and the step from run-time types to them. A kernel that is not built is
// neither compiled nor linked:
//
//   return with_instance(call.dtype, padded_head_dim(call.head_dim),
//                        [&]<typename T, int D>() { return run_forward<T, D>(forward, stream); });
//
// Without the definitions, which the build gives, everything counts as built.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

#ifndef TOPK_CUDA_SM90
#define TOPK_CUDA_BF16 1
#define TOPK_CUDA_FP16 1
#define TOPK_CUDA_D64 1
#define TOPK_CUDA_D128 1
#define TOPK_CUDA_D256 1
#define TOPK_CUDA_SM90 1
#endif

namespace topk_attn::cuda {

// The kernels under sm90/.
inline constexpr bool kBuiltSm90 = TOPK_CUDA_SM90 != 0;

constexpr bool built_dtype(DType dtype) {
  return (dtype == DType::kBFloat16 && TOPK_CUDA_BF16 != 0) ||
         (dtype == DType::kFloat16 && TOPK_CUDA_FP16 != 0);
}

// Whether there is an instance for exactly this head dim.
constexpr bool built_head_dim(int dim) {
  return (dim == 64 && TOPK_CUDA_D64 != 0) || (dim == 128 && TOPK_CUDA_D128 != 0) ||
         (dim == 256 && TOPK_CUDA_D256 != 0);
}

// The smallest built instance that holds `dim` channels; 0: none.
constexpr int padded_head_dim(int dim) {
  for (int instance = 64; instance <= kMaxHeadDim; instance *= 2) {
    if (dim <= instance && built_head_dim(instance)) return instance;
  }
  return 0;
}

// body.operator()<T, D>() of the instance, with D at most kLargest; cudaErrorNotSupported where there is
// none.
template <int kLargest = kMaxHeadDim, typename Body>
cudaError_t with_instance(DType dtype, int dim, Body&& body) {
  const auto with_dim = [&]<typename T>() {
    if constexpr (built_head_dim(64)) {
      if (dim == 64) return body.template operator()<T, 64>();
    }
    if constexpr (built_head_dim(128) && kLargest >= 128) {
      if (dim == 128) return body.template operator()<T, 128>();
    }
    if constexpr (built_head_dim(256) && kLargest >= 256) {
      if (dim == 256) return body.template operator()<T, 256>();
    }
    return cudaErrorNotSupported;
  };
  if constexpr (built_dtype(DType::kBFloat16)) {
    if (dtype == DType::kBFloat16) return with_dim.template operator()<__nv_bfloat16>();
  }
  if constexpr (built_dtype(DType::kFloat16)) {
    if (dtype == DType::kFloat16) return with_dim.template operator()<__half>();
  }
  return cudaErrorNotSupported;
}

}  // namespace topk_attn::cuda
