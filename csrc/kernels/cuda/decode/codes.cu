// codes.h: a warp a key. Every rounding of the steps is covered by a share of the bound (codes.cuh).
#include "codes.cuh"

#include <algorithm>
#include <cmath>

namespace topk_attn::cuda::decode {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// 2^-e, exactly.
__device__ __forceinline__ float inverse_power(int e) {
  return __int_as_float((127 - e) << 23);
}

// Channels lane * kPer .. of the key. Squares are taken of values scaled to at most 1, so that none overflows
// or vanishes: norm = factor * sqrt(sum (x / factor)^2).
template <typename T, int kWidth>
__device__ void encode_key(const T* key, int head_dim, const float* center, const int* exponent,
                           int8_t* codes, uint32_t* word) {
  constexpr int kPer = kWidth / 32;
  const int first = static_cast<int>(threadIdx.x % 32) * kPer;
  float k[kPer];
  float x[kPer];
  float largest = 0.0f;      // of x
  float largest_key = 0.0f;  // of k
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int channel = first + i;
    const bool exists = channel < head_dim;
    k[i] = exists ? to_float(key[channel]) : 0.0f;
    x[i] = exists ? (k[i] - center[channel]) * inverse_power(exponent[channel]) : 0.0f;
    largest = fmaxf(largest, fabsf(x[i]));
    largest_key = fmaxf(largest_key, fabsf(k[i]));
    finite = finite && isfinite(k[i]) && isfinite(x[i]);
  }
  largest = warp_max(largest);
  largest_key = warp_max(largest_key);
  finite = __all_sync(~0u, finite);

  // A scale that bfloat16 holds, at least largest / 127.
  const uint32_t scale_bits = bf16_up(fmaxf(largest * (1.0f / 127.0f) * (1.0f + 0x1p-20f), 0x1p-120f));
  const float scale = bf16_value(scale_bits);
  finite = finite && isfinite(scale);
  const float unit = finite ? fmaxf(largest, 0x1p-100f) : 1.0f;
  const float unit_key = finite ? fmaxf(largest_key, 0x1p-100f) : 1.0f;
  float lost = 0.0f;  // sums of squares, in units
  float kept = 0.0f;
  float whole = 0.0f;
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const float code = finite ? fminf(fmaxf(rintf(x[i] / scale), -127.0f), 127.0f) : 0.0f;
    const float copy = code * scale;  // exact: 7 bits times 8
    const float rest = (x[i] - copy) / unit;
    const float of_copy = copy / unit;
    const float of_key = k[i] / unit_key;
    lost += rest * rest;
    kept += of_copy * of_copy;
    whole += of_key * of_key;
    packed |= (static_cast<uint32_t>(static_cast<int>(code)) & 0xffu) << (8 * i);
  }
  lost = sqrtf(warp_sum(lost)) * unit;
  kept = sqrtf(warp_sum(kept)) * unit;
  whole = sqrtf(warp_sum(whole)) * unit_key;
  if constexpr (kPer == 4) {
    *reinterpret_cast<uint32_t*>(codes + first) = packed;
  } else {
    *reinterpret_cast<uint16_t*>(codes + first) = static_cast<uint16_t>(packed);
  }
  if (threadIdx.x % 32 == 0) {
    const float width = static_cast<float>(kWidth);
    const float share = kQueryShare * sqrtf(width) + kFloatShare;
    float bound =
        lost + share * kept + kFloatShare * (lost + kept) + kRoutineShare * width * whole + kLeastBound;
    bound *= 1.0f + 0x1p-16f;  // roundings of the sums above
    *word = finite ? scale_bits << 16 | bf16_up(bound) : 0x7f80u;
  }
}

template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads) void encode_kernel(const __grid_constant__ DecodeCall c,
                                                          const __grid_constant__ Scratch scratch,
                                                          const __grid_constant__ KeyCodes codes,
                                                          const bool all_rows, const int blocks) {
  const int sequence = blockIdx.x / blocks;
  const State state = state_of(c, scratch, sequence);
  const int from = all_rows ? 0 : state.keys - c.appended;
  if (state.keys == 0 || from < 0) return;
  const int64_t total = int64_t{state.keys - from} * c.kv_heads;
  int64_t i = int64_t{blockIdx.x % blocks} * kWarps + threadIdx.x / 32;
  for (; i < total; i += int64_t{blocks} * kWarps) {
    const int j = from + static_cast<int>(i / c.kv_heads);
    const int head = static_cast<int>(i % c.kv_heads);
    const T* const key = static_cast<const T*>(c.k.data) + row_offset(c, c.k, sequence, j) + head * c.k.head;
    const int64_t row = code_row(c, codes, sequence, j) + int64_t{head} * codes.rows;
    encode_key<T, kWidth>(key, c.head_dim, codes.center + head * kWidth, codes.exponent + head * kWidth,
                          codes.codes + row * kWidth, codes.words + row);
  }
}

// A block for each KV head, a thread for each channel.
template <typename T>
__global__ void calibrate_kernel(const __grid_constant__ DecodeCall c,
                                 const __grid_constant__ Scratch scratch,
                                 const __grid_constant__ KeyCodes codes) {
  constexpr int kMost = 4096;
  __shared__ float spread[128];
  int sequence = 0;
  while (sequence < c.batch && state_of(c, scratch, sequence).keys == 0) ++sequence;
  if (sequence == c.batch) return;
  const State state = state_of(c, scratch, sequence);
  const int channel = threadIdx.x;
  const int head = blockIdx.x;
  const int count = min(state.keys - state.leftpad, kMost);
  float mean = 0.0f;
  float square = 0.0f;  // sum of squared distances from the running mean (Welford)
  int seen = 0;
  if (channel < c.head_dim) {
    for (int i = 0; i < count; ++i) {
      const int j = state.leftpad + static_cast<int>(int64_t{i} * (state.keys - state.leftpad) / count);
      const float k = to_float(
          static_cast<const T*>(c.k.data)[row_offset(c, c.k, sequence, j) + head * c.k.head + channel]);
      if (!(fabsf(k) < 1e18f)) continue;
      ++seen;
      const float step = k - mean;
      mean += step / static_cast<float>(seen);
      square += step * (k - mean);
    }
  }
  spread[channel] = seen > 1 && square > 0.0f ? log2f(square / static_cast<float>(seen)) * 0.5f : -200.0f;
  __syncthreads();
  // Exponents are at least 0, so that |q| <= |p|: the channel of least spread has 0, unless it hardly varies.
  float largest = -200.0f;
  for (int i = 0; i < c.head_dim; ++i) largest = fmaxf(largest, spread[i]);
  float least = largest;
  for (int i = 0; i < c.head_dim; ++i) {
    if (spread[i] > largest - 16.0f) least = fminf(least, spread[i]);
  }
  const int e = static_cast<int>(rintf(fminf(fmaxf(spread[channel] - least, 0.0f), 16.0f)));
  codes.center[head * codes.width + channel] = mean;
  codes.exponent[head * codes.width + channel] = e;
}

}  // namespace

KeyCodes codes_of(void* buffer, int64_t blocks, int64_t rows, int32_t kv_heads, int32_t head_dim) {
  const CodesLayout<int64_t> at = codes_layout(blocks, rows, kv_heads, head_dim);
  char* const base = static_cast<char*>(buffer);
  KeyCodes codes;
  codes.codes = reinterpret_cast<int8_t*>(base);
  codes.words = reinterpret_cast<uint32_t*>(base + at.words);
  codes.center = reinterpret_cast<float*>(base + at.center);
  codes.exponent = reinterpret_cast<int32_t*>(base + at.exponent);
  codes.stats = reinterpret_cast<CertifiedStats*>(base + at.stats);
  codes.rows = static_cast<int32_t>(rows);
  codes.width = codes_width(head_dim);
  return codes;
}

cudaError_t calibrate(const DecodeCall& c, const Scratch& scratch, const KeyCodes& codes, int64_t blocks,
                      cudaStream_t stream) {
  if (c.batch == 0 || c.kv_heads == 0) return cudaSuccess;
  const int64_t keys = blocks * c.kv_heads * codes.rows;
  const cudaError_t error = cudaMemsetAsync(codes.words, 0, static_cast<size_t>(keys) * 4, stream);
  if (error != cudaSuccess) return error;
  if (c.dtype == DType::kBFloat16) {
    calibrate_kernel<__nv_bfloat16><<<c.kv_heads, codes.width, 0, stream>>>(c, scratch, codes);
  } else if (c.dtype == DType::kFloat16) {
    calibrate_kernel<__half><<<c.kv_heads, codes.width, 0, stream>>>(c, scratch, codes);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

cudaError_t encode(const DecodeCall& c, const Scratch& scratch, const KeyCodes& codes, bool all_rows,
                   cudaStream_t stream) {
  if (c.batch == 0 || c.kv_heads == 0 || (!all_rows && c.appended == 0)) return cudaSuccess;
  if (c.dtype != DType::kBFloat16 && c.dtype != DType::kFloat16) return cudaErrorInvalidValue;
  const int64_t keys = int64_t{all_rows ? c.capacity : c.appended} * c.kv_heads;
  const int64_t most = std::max<int64_t>(1, 8192 / c.batch);
  const int blocks = static_cast<int>(std::clamp<int64_t>((keys + kWarps - 1) / kWarps, 1, most));
  const bool bf16 = c.dtype == DType::kBFloat16;
  const auto kernel = codes.width == 64
                          ? (bf16 ? encode_kernel<__nv_bfloat16, 64> : encode_kernel<__half, 64>)
                          : (bf16 ? encode_kernel<__nv_bfloat16, 128> : encode_kernel<__half, 128>);
  kernel<<<static_cast<unsigned>(int64_t{c.batch} * blocks), kThreads, 0, stream>>>(c, scratch, codes,
                                                                                    all_rows, blocks);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::decode
