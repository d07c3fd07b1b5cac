// The steps between the passes of a deterministic dK and dV (union_fixed_point.cuh). Bound by memory: the
// bitmaps are read once, the sums once by each of two kernels.
#include "union_fixed_point.cuh"

#include <algorithm>

#include "union.h"

namespace topk_attn::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kMantissaBits = 23;
constexpr int kBias = 127;
constexpr uint32_t kInfinityBits = 0x7f800000;
constexpr int kSegmentTiles = 256;  // of a thread block that counts
constexpr int kCountThreads = 128;

int64_t num_rows(const Call& c) {
  return int64_t{c.cu_q == nullptr ? c.batch : 1} * c.tk * c.kv_heads;
}

unsigned num_blocks(int64_t threads) {
  return static_cast<unsigned>(std::min<int64_t>((threads + kThreads - 1) / kThreads, 65536));
}

// counts[kv head][token] += gathered tiles that keep the key. Each thread has 32 keys (a word of the bitmaps)
// and goes through some tiles of one head, with the counts of its keys in bit planes.
__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const __grid_constant__ BackwardCall backward, int64_t words, uint32_t* counts,
                 int64_t tokens) {
  constexpr int kPlanes = 9;
  static_assert(kSegmentTiles < 1 << kPlanes);
  __shared__ int64_t first_tokens[kSegmentTiles];
  __shared__ int used_words[kSegmentTiles];
  const Call& call = backward.call;
  const int head = blockIdx.z;
  const int first_tile = blockIdx.y * kSegmentTiles;
  const int tiles = min(kSegmentTiles, call.num_tiles - first_tile);
  for (int i = threadIdx.x; i < tiles; i += kCountThreads) {
    const Tile tile = tile_at(call, first_tile + i);
    const int seen = seen_end(call, tile);
    const bool mine =
        tile.rows > 0 && gathered(backward.regimes, int64_t{head} * call.num_tiles + first_tile + i, seen);
    first_tokens[i] = int64_t{tile.batch} * call.tk + tile.k_begin;
    used_words[i] = mine ? (seen + 31) / 32 : 0;
  }
  __syncthreads();
  const int word = blockIdx.x * kCountThreads + threadIdx.x;
  const uint32_t* const bits = backward.bitmap + (int64_t{head} * call.num_tiles + first_tile) * words + word;
  uint32_t* const own = counts + head / (call.heads / call.kv_heads) * tokens + int64_t{word} * 32;

  uint32_t planes[kPlanes];
#pragma unroll
  for (int j = 0; j < kPlanes; ++j) planes[j] = 0;
  const auto hand_over = [&](int64_t first_token) {
#pragma unroll 1
    for (int bit = 0; bit < 32; ++bit) {
      uint32_t count = 0;
#pragma unroll
      for (int j = 0; j < kPlanes; ++j) count |= (planes[j] >> bit & 1) << j;
      if (count > 0) atomicAdd(own + first_token + bit, count);
    }
#pragma unroll
    for (int j = 0; j < kPlanes; ++j) planes[j] = 0;
  };
#pragma unroll 8
  for (int i = 0; i < tiles; ++i) {
    if (i > 0 && first_tokens[i] != first_tokens[i - 1]) hand_over(first_tokens[i - 1]);
    uint32_t carry = word < used_words[i] ? __ldg(bits + i * words) : 0;
#pragma unroll
    for (int j = 0; j < kPlanes; ++j) {
      const uint32_t both = planes[j] & carry;
      planes[j] ^= carry;
      carry = both;
    }
  }
  if (tiles > 0) hand_over(first_tokens[tiles - 1]);
}

// 1 / step, for the sums of `tiles` contributions up to `bound` on top of `base` (bits of floats).
__device__ float inverse_step(uint32_t bound, uint32_t base, uint32_t tiles) {
  if (bound == 0) return 0.0f;
  if (bound >= kInfinityBits || base >= kInfinityBits) return kNaN;
  constexpr float kSlack = 1.0625f;           // bounds are sums of bf16
  constexpr float kDown = 2.3283064365e-10f;  // 2^-32: no overflow
  const float terms = kSlack * static_cast<float>(max(tiles, kFewestTiles));
  const uint32_t most =
      __float_as_uint(fmaf(__uint_as_float(bound) * kDown, terms, __uint_as_float(base) * kDown));
  // |sum| < 2^exponent
  const int exponent = max(1, static_cast<int>(most >> kMantissaBits)) - kBias + 1 + 32;
  return __int_as_float((min(30 - exponent, kBias - 1) + kBias) << kMantissaBits);
}

// `kDim` / 4 neighbouring lanes agree on the largest.
template <int kDim>
__device__ uint32_t largest_of_row(uint32_t x) {
#pragma unroll
  for (int step = kDim / 8; step > 0; step /= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ uint32_t largest_bits(float4 x) {
  const auto bits = [](float y) { return __float_as_uint(y) & 0x7fffffff; };
  return max(max(bits(x.x), bits(x.y)), max(bits(x.z), bits(x.w)));
}

__device__ int4 fixed_point(float4 x, float inverse) {
  return int4{__float2int_rn(x.x * inverse), __float2int_rn(x.y * inverse), __float2int_rn(x.z * inverse),
              __float2int_rn(x.w * inverse)};
}

// A lane has four channels of a row of dV and dK.
template <int kDim>
__global__ void __launch_bounds__(kThreads) steps_kernel(float* dk_sum, float* dv_sum, KeyBound* bounds,
                                                         const uint32_t* counts, int64_t rows, int kv_heads) {
  constexpr int kLanes = kDim / 4;
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = int64_t{gridDim.x} * (kThreads / kLanes);
  // Lanes whose row is past the end stay for the shuffles.
  const int64_t rounded = (rows + 1) / 2 * 2;
  for (int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes; row < rounded; row += stride) {
    const bool exists = row < rows;
    const KeyBound bound = exists ? bounds[row] : KeyBound{0, 0};
    float4* const dv = reinterpret_cast<float4*>(dv_sum + row * kDim) + lane;
    float4* const dk = reinterpret_cast<float4*>(dk_sum + row * kDim) + lane;
    const float4 v = bound.x != 0 ? *dv : float4{};
    const float4 k = bound.y != 0 ? *dk : float4{};
    const uint32_t largest_v = largest_of_row<kDim>(largest_bits(v));
    const uint32_t largest_k = largest_of_row<kDim>(largest_bits(k));
    const uint32_t tiles = exists ? counts[row % kv_heads * (rows / kv_heads) + row / kv_heads] : 0;
    const InverseStep inverse{inverse_step(bound.x, largest_v, tiles),
                              inverse_step(bound.y, largest_k, tiles)};
    // Zeros, as where all tiles are gathered, are zeros in both forms.
    if (largest_v != 0) *reinterpret_cast<int4*>(dv) = fixed_point(v, inverse.x);
    if (largest_k != 0) *reinterpret_cast<int4*>(dk) = fixed_point(k, inverse.y);
    __syncwarp();
    if (exists && lane == 0) reinterpret_cast<InverseStep*>(bounds)[row] = inverse;
  }
}

template <typename T, int kDim>
__device__ void finish_row(const float* sums, float inverse, T* to) {
  const float4 x = reinterpret_cast<const float4*>(sums)[0];
  const float4 y = reinterpret_cast<const float4*>(sums)[1];
  const float step = 1.0f / inverse;
  const auto value = [inverse, step](float z) {
    return inverse == 0.0f ? z : static_cast<float>(__float_as_int(z)) * step;
  };
  *reinterpret_cast<uint4*>(to) = uint4{pack<T>(value(x.x), value(x.y)), pack<T>(value(x.z), value(x.w)),
                                        pack<T>(value(y.x), value(y.y)), pack<T>(value(y.z), value(y.w))};
}

// Each thread converts eight channels of a row of dK and dV.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ BackwardCall backward,
                                                          const InverseStep* inverse_steps, int64_t rows) {
  constexpr int kPieces = kDim / 8;
  const Call& call = backward.call;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows * kPieces; i += stride) {
    const int channel = static_cast<int>(i % kPieces) * 8;
    const int64_t row = i / kPieces;
    const int64_t head = row % call.kv_heads;
    const int64_t token = row / call.kv_heads % call.tk;
    const int64_t batch = row / call.kv_heads / call.tk;
    const InverseStep inverse = inverse_steps[row];
    finish_row<T, kDim>(backward.dv_sum + row * kDim + channel, inverse.x,
                        row_pointer<T>(backward.dv, batch, token, head) + channel);
    finish_row<T, kDim>(backward.dk_sum + row * kDim + channel, inverse.y,
                        row_pointer<T>(backward.dk, batch, token, head) + channel);
  }
}

template <typename T, int kDim>
cudaError_t launch_finish(const BackwardCall& backward, const InverseStep* steps, cudaStream_t stream) {
  const int64_t rows = num_rows(backward.call);
  finish_kernel<T, kDim><<<num_blocks(rows * (kDim / 8)), kThreads, 0, stream>>>(backward, steps, rows);
  return cudaGetLastError();
}

}  // namespace

size_t union_workspace(const Call& call) {
  return static_cast<size_t>(num_rows(call)) * (sizeof(KeyBound) + sizeof(uint32_t));
}

cudaError_t set_steps(const BackwardCall& backward, void* workspace, cudaStream_t stream) {
  const Call& call = backward.call;
  const int64_t rows = num_rows(call);
  if (rows == 0) return cudaSuccess;
  KeyBound* const bounds = static_cast<KeyBound*>(workspace);
  uint32_t* const counts = reinterpret_cast<uint32_t*>(bounds + rows);
  const int64_t words = bitmap_words(call);
  const dim3 grid(static_cast<unsigned>((words + kCountThreads - 1) / kCountThreads),
                  static_cast<unsigned>((call.num_tiles + kSegmentTiles - 1) / kSegmentTiles),
                  static_cast<unsigned>(call.heads));
  count_kernel<<<grid, kCountThreads, 0, stream>>>(backward, words, counts, rows / call.kv_heads);
  const auto kernel = call.head_dim == 128 ? steps_kernel<128> : steps_kernel<64>;
  kernel<<<num_blocks(rows * (call.head_dim / 4)), kThreads, 0, stream>>>(
      backward.dk_sum, backward.dv_sum, bounds, counts, rows, call.kv_heads);
  return cudaGetLastError();
}

cudaError_t finish_union_gradients(const BackwardCall& backward, const void* workspace, cudaStream_t stream) {
  const Call& call = backward.call;
  if (!supports_union(call)) return cudaErrorNotSupported;
  if (workspace == nullptr || backward.dk_sum == nullptr || backward.dv_sum == nullptr)
    return cudaErrorInvalidValue;
  if (num_rows(call) == 0) return cudaSuccess;
  const InverseStep* const steps = static_cast<const InverseStep*>(workspace);
  const bool wide = call.head_dim == 128;
  if (call.dtype == DType::kFloat16) {
    return wide ? launch_finish<__half, 128>(backward, steps, stream)
                : launch_finish<__half, 64>(backward, steps, stream);
  }
  return wide ? launch_finish<__nv_bfloat16, 128>(backward, steps, stream)
              : launch_finish<__nv_bfloat16, 64>(backward, steps, stream);
}

}  // namespace topk_attn::cuda::sm90
