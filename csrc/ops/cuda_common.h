// What the CUDA implementations of the operators share.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <limits>

#include "common.h"

namespace topk_attn {

inline void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, "topk_attn: ", what, " failed: ", cudaGetErrorString(error));
}

inline int32_t narrow(int64_t value, const char* what) {
  TORCH_CHECK(value <= std::numeric_limits<int32_t>::max(), "topk_attn: ", what, " must be below 2^31, got ",
              value);
  return static_cast<int32_t>(value);
}

// Whether the kernels can read rows 16 bytes at a time. Strides of dimensions of size 1 mean nothing.
inline bool is_aligned(const Tensor& t) {
  const int64_t unit = 16 / t.element_size();
  bool good = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  good = good && (t.size(-1) == 1 || t.stride(-1) == 1);
  for (int64_t d = 0; d + 1 < t.dim(); ++d) good = good && (t.size(d) <= 1 || t.stride(d) % unit == 0);
  return good;
}

// t, or a copy of it whose rows are aligned.
inline Tensor aligned(const Tensor& t) {
  return is_aligned(t) ? t : t.clone(at::MemoryFormat::Contiguous);
}

}  // namespace topk_attn
