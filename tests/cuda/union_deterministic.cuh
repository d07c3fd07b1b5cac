// Check of the deterministic dK and dV (csrc/kernels/cuda/sm90/union_fixed_point.cuh), for union_check.cu:
// bits over many runs beside a competing stream, against the float sums, on top of other sums, and times.
#pragma once

#include "cuda/common/delta.h"
#include "cuda/sm90/union.h"
#include "union_reference.cuh"

namespace topk_attn::cuda::reference {

enum Failure { kRuns, kFloatRuns, kZeros, kNonFinite, kFinished, kBase, kFailures };

__device__ inline bool finite(float x) {
  return (__float_as_uint(x) & 0x7f800000) != 0x7f800000;
}

// The number that `sum` stands for; inverse step 0: it is a float already.
__device__ inline float decoded(float sum, float inverse) {
  return inverse == 0.0f ? sum : static_cast<float>(__float_as_int(sum)) / inverse;
}

// Sums of dK (which = 1) or dV (0), `dim` of each row, to floats.
__global__ void decode(const float* sums, const float2* inverse, int which, int dim, int64_t n, float* to) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = decoded(sums[i], which == 1 ? inverse[i / dim].y : inverse[i / dim].x);
  }
}

// Counts differing words.
__global__ void count_differences(const uint32_t* a, const uint32_t* b, int64_t n, int* count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    if (a[i] != b[i]) atomicAdd(count, 1);
  }
}

// What other tiles may have left: some rows zero, the others of different sizes.
__global__ void fill_base(float* sums, int dim, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t row = hash32(static_cast<uint32_t>(i / dim));
    sums[i] = row % 3 == 0
                  ? 0.0f
                  : ldexpf(normal(static_cast<uint32_t>(i), 77), static_cast<int>(row / 3 % 17) - 12);
  }
}

// Compares decoded sums with those of the float reductions (rows of zeros, non-finite values), and with the
// converted gradients, bit for bit.
template <typename T>
__global__ void compare_forms(const float* decoded_sums, const float* float_sums, const T* finished, int dim,
                              int64_t n, int* failures) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float x = decoded_sums[i];
    const float y = to_float(finished[i]);
    bool nothing = true;  // no gathered row gives the key any weight
    for (int64_t j = i / dim * dim; j < (i / dim + 1) * dim; ++j) nothing &= float_sums[j] == 0.0f;
    if (nothing && (x != 0.0f || y != 0.0f)) atomicAdd(failures + kZeros, 1);
    if (!finite(float_sums[i]) && finite(x)) atomicAdd(failures + kNonFinite, 1);
    if (finite(x) ? y != to_float(from_float<T>(x)) : finite(y)) atomicAdd(failures + kFinished, 1);
  }
}

// Sums on top of fill_base() against base + sums, within a few steps and float roundings.
__global__ void compare_base(const float* with_base, const float2* inverse, const float* base,
                             const float* sums, int which, int dim, int64_t n, int* failures) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float s = which == 1 ? inverse[i / dim].y : inverse[i / dim].x;
    if (!finite(sums[i])) continue;
    // Hundreds of contributions, each rounded to a step.
    const float step = s == 0.0f ? 0.0f : 64.0f / s;
    const float expected = base[i] + sums[i];
    const float allowed = 3e-7f * (fabsf(base[i]) + fabsf(sums[i])) + step;
    if (!(fabsf(decoded(with_base[i], s) - expected) <= allowed)) atomicAdd(failures + kBase, 1);
  }
}

}  // namespace topk_attn::cuda::reference
