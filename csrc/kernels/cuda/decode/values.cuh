// Weighted sums of rows of V, 16 bytes a lane, and their results.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace topk_attn::cuda::decode {

// sum += weight * the channels packed in 16 bytes.
template <typename T>
__device__ __forceinline__ void add_weighted(float* sum, const uint4& packed, float weight);
template <>
__device__ __forceinline__ void add_weighted<float>(float* sum, const uint4& v, float weight) {
  sum[0] = fmaf(weight, __uint_as_float(v.x), sum[0]);
  sum[1] = fmaf(weight, __uint_as_float(v.y), sum[1]);
  sum[2] = fmaf(weight, __uint_as_float(v.z), sum[2]);
  sum[3] = fmaf(weight, __uint_as_float(v.w), sum[3]);
}
template <>
__device__ __forceinline__ void add_weighted<__nv_bfloat16>(float* sum, const uint4& v, float weight) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = fmaf(weight, __uint_as_float(words[i] << 16), sum[2 * i]);
    sum[2 * i + 1] = fmaf(weight, __uint_as_float(words[i] & 0xffff0000u), sum[2 * i + 1]);
  }
}
template <>
__device__ __forceinline__ void add_weighted<__half>(float* sum, const uint4& v, float weight) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    sum[2 * i] = fmaf(weight, pair.x, sum[2 * i]);
    sum[2 * i + 1] = fmaf(weight, pair.y, sum[2 * i + 1]);
  }
}

// The four channels packed in 8 bytes.
template <typename T>
__device__ __forceinline__ void unpack(float (&x)[4], const uint2& packed);
template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(float (&x)[4], const uint2& packed) {
  x[0] = __uint_as_float(packed.x << 16);
  x[1] = __uint_as_float(packed.x & 0xffff0000u);
  x[2] = __uint_as_float(packed.y << 16);
  x[3] = __uint_as_float(packed.y & 0xffff0000u);
}
template <>
__device__ __forceinline__ void unpack<__half>(float (&x)[4], const uint2& packed) {
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&packed.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&packed.y));
  x[0] = low.x;
  x[1] = low.y;
  x[2] = high.x;
  x[3] = high.y;
}

__device__ __forceinline__ void store(float* p, float x) {
  *p = x;
}
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) {
  *p = __float2bfloat16(x);
}
__device__ __forceinline__ void store(__half* p, float x) {
  *p = __float2half(x);
}

}  // namespace topk_attn::cuda::decode
