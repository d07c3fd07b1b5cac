// Forward over contiguous key blocks with the selection as a mask, and the score slab of the unfused
// selection.
//
// One block of four warps does one (head, query tile): 64 rows, 16 a warp. Key blocks that no row of the tile
// keeps are skipped by the tile's bitmap; the others pass through a two-stage cp.async pipeline. Online
// softmax as in FlashAttention (Dao et al. 2022), over the kept scores only. Cost of a key block: 4 * 64 *
// keys * D FLOP, 4 * keys * D bytes from L2.
#pragma once

#include "group.cuh"
#include "portable.h"

namespace topk_attn::cuda::portable {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

template <int D>
constexpr int forward_shared_bytes() {
  return kTileRows * D * 2 + Config<D>::kForwardStages * 2 * Config<D>::kKeys * D * 2;
}

// Turns the scores that a row does not keep into -inf. Row g of the fragment follows `filter[0]`, row g + 8
// `filter[1]`.
template <int N>
__device__ __forceinline__ void mask_scores(float (&s)[N][4], const RowFilter (&filter)[2], int first_key) {
  const float none = -__int_as_float(0x7f800000);
  const int last = first_key + 8 * N;
  if (__all_sync(0xffffffffu, filter[0].plain(first_key, last) && filter[1].plain(first_key, last))) {
    const float bound[2] = {filter[0].bound(first_key), filter[1].bound(first_key)};
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] < bound[e / 2] ? none : s[n][e];
    }
    return;
  }
  const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      s[n][e] = filter[e / 2].keeps(s[n][e], column + 8 * n + e % 2) ? s[n][e] : none;
  }
}

template <int N>
__device__ __forceinline__ void mask_scores(float (&s)[N][4], uint32_t kept) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = kept >> (4 * n + e) & 1 ? s[n][e] : -__int_as_float(0x7f800000);
  }
}

// Turns a block's masked scores into exponentials against the largest score so far; `out` and `sum` shrink
// with it.
template <int N, int kColumns>
__device__ __forceinline__ void online_softmax(float (&s)[N][4], float (&out)[kColumns][4],
                                               float (&largest)[2], float (&sum)[2], float scale) {
  const float none = -__int_as_float(0x7f800000);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m = largest[h];
#pragma unroll
    for (int n = 0; n < N; ++n) m = fmaxf(m, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
    const float reference = m == none ? 0.0f : m * scale;
    const float shrink = exp2_fast(largest[h] * scale - reference);
    largest[h] = m;
    float row_sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        s[n][e] = exp2_fast(fmaf(s[n][e], scale, -reference));
        row_sum += s[n][e];
      }
    }
    sum[h] = sum[h] * shrink + row_sum;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      out[n][2 * h] *= shrink;
      out[n][2 * h + 1] *= shrink;
    }
  }
}

// Writes out and lse of 16 rows from tile row `row0`, the channels from `channel0`.
template <typename T, int kColumns>
__device__ __forceinline__ void write_rows(const ForwardCall& f, const Tile& t, int head, int row0,
                                           int channel0, const float (&out)[kColumns][4],
                                           const float (&largest)[2], float (&sum)[2]) {
  const Call& c = f.call;
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    const int row = row0 + g + 8 * h;
    if (row >= t.rows) continue;
    const float inverse = sum[h] == 0.0f ? 0.0f : 1.0f / sum[h];
    if (pair == 0 && channel0 == 0) {
      f.lse[row_index(c, t, head, t.row0 + row)] =
          sum[h] == 0.0f ? -__int_as_float(0x7f800000) : largest[h] * c.softmax_scale + logf(sum[h]);
    }
    T* o = row_pointer<T>(f.out, t.batch, t.q_begin + t.row0 + row, head);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int channel = channel0 + 8 * n + pair;
      if (channel < c.v_dim) {
        *reinterpret_cast<uint32_t*>(o + channel) =
            sum[h] == 0.0f ? 0u : pack<T>(out[n][2 * h] * inverse, out[n][2 * h + 1] * inverse);
      }
    }
  }
}

template <typename T, int D, bool kGroup>
__global__ void __launch_bounds__(Config<D>::kThreads, 2 / Config<D>::kSplit)
    forward_kernel(const __grid_constant__ ForwardCall f) {
  using C = Config<D>;
  constexpr int kKeys = kGroup ? 32 : C::kKeys;  // the group's scores need registers
  constexpr int N = kKeys / 8;
  extern __shared__ __align__(512) uint8_t shared[];
  __shared__ int blocks[128];
  __shared__ int warp_counts[4];
  const Call& c = f.call;
  const Unit unit = unit_of(c, blockIdx.x);
  const Tile t = tile_at(c, unit.tile);
  const int seen = seen_end(c, t);
  const int64_t entry = int64_t{unit.head} * c.num_tiles + unit.tile;
  if (t.rows == 0 || gathered(f.regimes, entry, seen)) return;

  const uint32_t q_tile = shared_address(shared);
  const uint32_t kv_tiles = q_tile + kTileRows * D * 2;
  constexpr uint32_t kKeyBytes = kKeys * D * 2;
  const int warp = threadIdx.x / 32 % 4;
  const int channel0 = threadIdx.x / 128 * C::kChannels;
  const int g = threadIdx.x % 32 / 4;
  const int kv_head = unit.head / (c.heads / c.kv_heads);
  const T* q = row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0, unit.head);
  const T* k = row_pointer<const T>(c.k, t.batch, t.k_begin, kv_head);
  const T* v = row_pointer<const T>(c.v, t.batch, t.k_begin, kv_head);
  const uint32_t* bitmap = f.bitmap == nullptr ? nullptr : f.bitmap + entry * (bitmap_words(c));

  load_tile<T, D, kTileRows, C::kThreads>(q_tile, q, c.q.token, t.rows, c.head_dim);
  copy_commit();

  RowFilter filter[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * warp + g + 8 * h;
    if (row < t.rows) {
      const int64_t at = row_index(c, t, unit.head, t.row0 + row);
      filter[h] = row_filter(c, t, t.row0 + row, f.threshold[at], f.tie_index[at]);
    } else {
      filter[h] = RowFilter{0.0f, -1, 0, 0, 0};
    }
  }

  const float none = -__int_as_float(0x7f800000);
  const float scale = c.softmax_scale * kLog2E;
  float out[C::kChannels / 8][4] = {};
  float largest[2] = {none, none};
  float sum[2] = {0.0f, 0.0f};

  auto load_block = [&](int block, int stage) {
    const int key = block * kKeys;
    const uint32_t at = kv_tiles + stage * 2 * kKeyBytes;
    load_tile<T, D, kKeys, C::kThreads>(at, k + key * c.k.token, c.k.token, t.tk - key, c.head_dim);
    load_tile<T, D, kKeys, C::kThreads>(at + kKeyBytes, v + key * c.v.token, c.v.token, t.tk - key, c.v_dim);
  };
  const int num_blocks = (seen + kKeys - 1) / kKeys;
  for (int window = 0; window < num_blocks; window += 128) {
    const int count = compact<128>(blocks, warp_counts, window, num_blocks,
                                   [&](int block) { return block_kept<kKeys>(bitmap, block); });
    if (count > 0) load_block(blocks[0], 0);
    copy_commit();
    for (int i = 0; i < count; ++i) {
      if (i + 1 < count) load_block(blocks[i + 1], (i + 1) % 2);
      copy_commit();
      copy_wait<1>();
      __syncthreads();
      const uint32_t k_tile = kv_tiles + i % 2 * 2 * kKeyBytes;
      const int key = blocks[i] * kKeys;
      float s[N][4];
      dot_rows<T, D, N>(s, q_tile, 16 * warp, k_tile, 0);
      if constexpr (kGroup) {
        mask_scores(s, group_keeps<T, D, N>(s, filter, c, t, unit.head, 16 * warp, k_tile, key));
      } else {
        mask_scores(s, filter, key);
      }
      online_softmax(s, out, largest, sum, scale);
      uint32_t p[N / 2][4];
      as_operand<T, N>(p, s);
      multiply_rows<T, D, N, C::kChannels / 8>(out, p, k_tile + kKeyBytes, 0, channel0);
      __syncthreads();
    }
    copy_wait<0>();
  }

  write_rows<T>(f, t, unit.head, 16 * warp, channel0, out, largest, sum);
}

// Scores of one unit against kSlabKeys keys, written row-major.
inline constexpr int kSlabKeys = 512;

template <int D>
constexpr int scores_shared_bytes() {
  return kTileRows * D * 2 + 2 * Config<D>::kKeys * D * 2;
}

template <typename T, int D>
__global__ void __launch_bounds__(128)
    scores_kernel(const __grid_constant__ Call c, int64_t first, float* slab, int64_t ld) {
  using C = Config<D>;
  constexpr int N = C::kKeys / 8;
  extern __shared__ __align__(512) uint8_t shared[];
  const Unit unit = unit_at(c, first + blockIdx.y);
  const int head = unit.head;
  const Tile t = tile_at(c, unit.tile);
  const int begin = blockIdx.x * kSlabKeys;
  const int end = min(seen_end(c, t), begin + kSlabKeys);
  if (begin >= end) return;

  const uint32_t q_tile = shared_address(shared);
  const uint32_t k_tiles = q_tile + kTileRows * D * 2;
  constexpr uint32_t kKeyBytes = C::kKeys * D * 2;
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
  const T* q = row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0, head);
  const T* k = row_pointer<const T>(c.k, t.batch, t.k_begin, head / (c.heads / c.kv_heads));
  auto load_block = [&](int key, int stage) {
    load_tile<T, D, C::kKeys, 128>(k_tiles + stage * kKeyBytes, k + key * c.k.token, c.k.token, t.tk - key,
                                   c.head_dim);
  };
  load_tile<T, D, kTileRows, 128>(q_tile, q, c.q.token, t.rows, c.head_dim);
  load_block(begin, 0);
  copy_commit();
  int stage = 0;
  for (int key = begin; key < end; key += C::kKeys, stage ^= 1) {
    if (key + C::kKeys < end) load_block(key + C::kKeys, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    float s[N][4];
    dot_rows<T, D, N>(s, q_tile, 16 * warp, k_tiles + stage * kKeyBytes, 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * warp + g + 8 * h;
      if (row < t.rows) {
        float* line = slab + (blockIdx.y * int64_t{kTileRows} + row) * ld + key + pair;
#pragma unroll
        for (int n = 0; n < N; ++n)
          *reinterpret_cast<float2*>(line + 8 * n) = make_float2(s[n][2 * h], s[n][2 * h + 1]);
      }
    }
    __syncthreads();
  }
}

template <typename T, int D, bool kGroup>
cudaError_t run_forward(const ForwardCall& f, cudaStream_t stream) {
  constexpr int kBytes = forward_shared_bytes<D>();
  const int64_t blocks = int64_t{f.call.num_tiles} * f.call.heads;
  if (blocks == 0) return cudaSuccess;
  const auto kernel = forward_kernel<T, D, kGroup>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Config<D>::kThreads, kBytes, stream>>>(f);
  return cudaGetLastError();
}

template <typename T, int D>
cudaError_t run_scores(const Call& c, int64_t first, int64_t units, float* slab, int64_t ld,
                       cudaStream_t stream) {
  constexpr int kBytes = scores_shared_bytes<D>();
  cudaError_t error =
      cudaFuncSetAttribute(scores_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid((c.max_k + kSlabKeys - 1) / kSlabKeys, static_cast<unsigned>(units));
  scores_kernel<T, D><<<grid, 128, kBytes, stream>>>(c, first, slab, ld);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::portable
