// What the kernels share: element types, vectors of eight elements, sums over a warp and a block.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace topk_sft::cuda {

constexpr int kVector = 8;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return __float2bfloat16_rn(x);
  }
}

// x as T holds it.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <typename T>
struct alignas(16) Vector {
  T value[kVector];
};

template <typename T>
__device__ __forceinline__ void load(const T* p, float (&out)[kVector]) {
  const Vector<T> v = *reinterpret_cast<const Vector<T>*>(p);
#pragma unroll
  for (int i = 0; i < kVector; ++i) out[i] = to_float(v.value[i]);
}

template <typename T>
__device__ __forceinline__ void store(T* p, const float (&x)[kVector]) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kVector; ++i) v.value[i] = from_float<T>(x[i]);
  *reinterpret_cast<Vector<T>*>(p) = v;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over all threads of the block, in every thread. `shared` holds one float a warp.
__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  const int warps = (blockDim.x + 31) / 32;
  if (warps == 1) return x;
  __syncthreads();  // of an earlier sum
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(static_cast<int>(threadIdx.x % 32) < warps ? shared[threadIdx.x % 32] : 0.0f);
}

// out[c] = the sum of column c of partial (rows, columns).
cudaError_t column_sums(Type type, const float* partial, int64_t rows, int64_t columns, void* out,
                        cudaStream_t stream);

}  // namespace topk_sft::cuda
