// Data of the check programs: hashes of element and seed, so that every element can be made on its own and
// every run sees the same.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace topk_attn::cuda {

__device__ inline uint32_t hash32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Standard normal (Box and Muller).
__device__ inline float normal(uint32_t index, uint32_t seed) {
  const uint32_t a = hash32(index * 2 + seed * 2654435761u);
  const uint32_t b = hash32(index * 2 + 1 + seed * 40503u);
  const float u = fminf((a + 1.0f) * 2.3283064e-10f, 1.0f);
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * 2.3283064e-10f * b);
}

template <typename T>
__global__ void fill_normal(T* x, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x)
    x[i] = static_cast<T>(normal(static_cast<uint32_t>(i), seed));
}

// An AR(1) process of variance 1: what makes data "real-like" is that neighbouring tokens are alike.
struct SmoothSeries {
  float decay;
  float state;
  // correlation: tokens after which 1/e is left; 0: none.
  __device__ SmoothSeries(float correlation, float first)
      : decay(correlation > 0.0f ? expf(-1.0f / correlation) : 0.0f), state(first) {}
  __device__ float next(float white) {
    state = decay * state + sqrtf(1.0f - decay * decay) * white;
    return state;
  }
};

}  // namespace topk_attn::cuda
