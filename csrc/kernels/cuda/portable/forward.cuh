// Forward over contiguous key blocks with the selection as a mask, and the score slab of the unfused
// selection.
//
// One block does one (head, query tile), 64 rows. Key blocks that no row of the tile keeps are skipped by the
// tile's bitmap; the others pass through a two-stage cp.async pipeline. Online softmax as in FlashAttention
// (Dao et al. 2022), over the kept scores only. Cost of a key block: 4 * 64 * keys * D FLOP, 4 * keys * D
// bytes from L2.
#pragma once

#include <climits>

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

// The filter of tile row `row`; a row that does not exist keeps nothing.
__device__ __forceinline__ RowFilter filter_of(const Call& c, const Tile& t, int head, int row,
                                               const float* threshold, const int32_t* tie_index) {
  if (row >= t.rows) return RowFilter{0.0f, 0, 0, 0, 0};
  const int64_t at = row_index(c, t, head, t.row0 + row);
  return row_filter(c, t, t.row0 + row, threshold[at], tie_index[at]);
}

// Turns into -inf the scores that a warp's 32 rows do not keep; lane r has the filter of row r. Column i is
// key keys[i]; keys ascend, INT_MAX: none.
template <int N, typename Keys>
__device__ __forceinline__ void mask_block(float (&s)[2][N][4], const RowFilter& own, const Keys& keys) {
  const float infinity = __int_as_float(0x7f800000);
  const int from = keys[0];
  const int last = keys[8 * N - 1];
  const int g = threadIdx.x % 32 / 4;
  if (last != INT_MAX && __all_sync(~0u, own.plain(from, last + 1))) {
    const float bound = own.bound(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float b = __shfl_sync(~0u, bound, 8 * i + g);
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e)
          s[i / 2][n][e] = s[i / 2][n][e] < b ? -infinity : s[i / 2][n][e];
      }
    }
    return;
  }
  // A tie or the edge of what a row sees lies among the keys, which is common where lists are short: the
  // bound then depends on the key.
  const int column = threadIdx.x % 4 * 2;
  const bool usual =
      own.sinks == 0 && own.recents_begin >= own.seen && own.tie_index >= 0 && own.threshold < infinity;
  if (__all_sync(~0u, usual)) {
    const float next = order_score(order_key(own.threshold) + 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float threshold = __shfl_sync(~0u, own.threshold, 8 * i + g);
      const float above = __shfl_sync(~0u, next, 8 * i + g);
      const int tie_index = __shfl_sync(~0u, own.tie_index, 8 * i + g);
      const int seen = __shfl_sync(~0u, own.seen, 8 * i + g);
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = keys[column + 8 * n + e];
          float& x = s[i / 2][n][i % 2 * 2 + e];
          x = key >= seen || x < (key <= tie_index ? threshold : above) ? -infinity : x;
        }
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    RowFilter filter;
    filter.threshold = __shfl_sync(~0u, own.threshold, 8 * i + g);
    filter.tie_index = __shfl_sync(~0u, own.tie_index, 8 * i + g);
    filter.seen = __shfl_sync(~0u, own.seen, 8 * i + g);
    filter.sinks = __shfl_sync(~0u, own.sinks, 8 * i + g);
    filter.recents_begin = __shfl_sync(~0u, own.recents_begin, 8 * i + g);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = keys[column + 8 * n + e];
        float& x = s[i / 2][n][i % 2 * 2 + e];
        x = filter.keeps(x, key) ? x : -infinity;
      }
    }
  }
}

// The keys from `first`.
struct NextKeys {
  int first;
  __device__ __forceinline__ int operator[](int i) const { return first + i; }
};

// Where a row's largest exponent is beyond this, rounding it shows in probabilities (2^-12 here), and the
// difference of scores is taken first, at an instruction more a score.
inline constexpr float kLargeExponent = 2048.0f;

// Turns a block's masked scores into exponentials against the largest score so far; `out` and `sum` shrink
// with it, which is seldom needed.
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
    const float base = m == none ? 0.0f : m;
    if (__any_sync(0xffffffffu, m != largest[h])) {
      const float shrink = exp2_fast((largest[h] - base) * scale);
      largest[h] = m;
      sum[h] *= shrink;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        out[n][2 * h] *= shrink;
        out[n][2 * h + 1] *= shrink;
      }
    }
    const float reference = base * scale;
    if (__any_sync(0xffffffffu, fabsf(reference) > kLargeExponent)) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) s[n][e] = (s[n][e] - base) * scale;
      }
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) s[n][e] = fmaf(s[n][e], scale, -reference);
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        s[n][e] = exp2_fast(s[n][e]);
        sum[h] += s[n][e];
      }
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

// Head dims up to 128, select="head": two warps of 32 rows, so that each fragment of K and V serves two
// products, and 32 keys a block, so that four thread blocks fit a multiprocessor.
inline constexpr int kWideRows = 32;
inline constexpr int kForwardThreads = kTileRows / kWideRows * 32;
inline constexpr int kForwardKeys = 32;

// One block of keys: scores, mask, softmax and values of a warp's 32 rows.
template <typename T, int D, typename Keys>
__device__ __forceinline__ void attend_block(uint32_t q_tile, int row0, uint32_t k_tile, uint32_t v_tile,
                                             const RowFilter& filter, const Keys& keys, float scale,
                                             float (&out)[2][D / 8][4], float (&largest)[2][2],
                                             float (&sum)[2][2]) {
  constexpr int N = kForwardKeys / 8;
  float s[2][N][4];
  dot_block<T, D>(s, q_tile, row0, k_tile, 0);
  mask_block(s, filter, keys);
  uint32_t p[2][N / 2][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    online_softmax(s[m], out[m], largest[m], sum[m], scale);
    as_operand<T, N>(p[m], s[m]);
  }
  multiply_block<T, D, 2, N>(out, p, v_tile, 0, 0);
}

template <int D>
constexpr int forward_wide_bytes() {
  return (kTileRows + 2 * 2 * kForwardKeys) * D * 2;
}

template <typename T, int D>
__global__ void __launch_bounds__(kForwardThreads, 4)
    forward_wide_kernel(const __grid_constant__ ForwardCall f) {
  constexpr int kWindow = kForwardThreads;  // blocks whose bits are looked at together
  constexpr uint32_t kKeyBytes = kForwardKeys * D * 2;
  extern __shared__ __align__(512) uint8_t shared[];
  __shared__ int blocks[kWindow];
  __shared__ int warp_counts[kWindow / 32];
  const Call& c = f.call;
  const Unit unit = unit_of(c, blockIdx.x);
  const Tile t = tile_at(c, unit.tile);
  const int seen = seen_end(c, t);
  const int64_t entry = int64_t{unit.head} * c.num_tiles + unit.tile;
  if (t.rows == 0 || gathered(f.regimes, entry, seen)) return;

  const uint32_t q_tile = shared_address(shared);
  const uint32_t kv_tiles = q_tile + kTileRows * D * 2;
  const int row0 = threadIdx.x / 32 * kWideRows;
  const int kv_head = unit.head / (c.heads / c.kv_heads);
  const T* k = row_pointer<const T>(c.k, t.batch, t.k_begin, kv_head);
  const T* v = row_pointer<const T>(c.v, t.batch, t.k_begin, kv_head);
  const uint32_t* bitmap = f.bitmap == nullptr ? nullptr : f.bitmap + entry * bitmap_words(c);
  load_tile<T, D, kTileRows, kForwardThreads>(
      q_tile, row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0, unit.head), c.q.token, t.rows,
      c.head_dim);
  copy_commit();

  const RowFilter filter = filter_of(c, t, unit.head, row0 + threadIdx.x % 32, f.threshold, f.tie_index);
  const float none = -__int_as_float(0x7f800000);
  float out[2][D / 8][4] = {};
  float largest[2][2] = {{none, none}, {none, none}};
  float sum[2][2] = {};
  const auto load = [&](int block, int stage) {
    const int key = block * kForwardKeys;
    const uint32_t to = kv_tiles + stage * 2 * kKeyBytes;
    load_tile<T, D, kForwardKeys, kForwardThreads>(to, k + key * c.k.token, c.k.token, t.tk - key,
                                                   c.head_dim);
    load_tile<T, D, kForwardKeys, kForwardThreads>(to + kKeyBytes, v + key * c.v.token, c.v.token, t.tk - key,
                                                   c.v_dim);
  };
  const int num_blocks = (seen + kForwardKeys - 1) / kForwardKeys;
  for (int window = 0; window < num_blocks; window += kWindow) {
    const int count = compact<kWindow>(blocks, warp_counts, window, num_blocks,
                                       [&](int block) { return block_kept<kForwardKeys>(bitmap, block); });
    if (count > 0) load(blocks[0], 0);
    copy_commit();
    for (int i = 0; i < count; ++i) {
      if (i + 1 < count) load(blocks[i + 1], (i + 1) % 2);
      copy_commit();
      copy_wait<1>();
      __syncthreads();
      const uint32_t k_tile = kv_tiles + i % 2 * 2 * kKeyBytes;
      attend_block<T, D>(q_tile, row0, k_tile, k_tile + kKeyBytes, filter, NextKeys{blocks[i] * kForwardKeys},
                         c.softmax_scale * kLog2E, out, largest, sum);
      __syncthreads();
    }
    copy_wait<0>();
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) write_rows<T>(f, t, unit.head, row0 + 16 * m, 0, out[m], largest[m], sum[m]);
}

// select="kv_group", and head dims above 128: four warps of 16 rows, or eight that share them.
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
  constexpr bool kWide = D <= 128 && !kGroup;
  constexpr int kBytes = kWide ? forward_wide_bytes<D>() : forward_shared_bytes<D>();
  constexpr int kThreads = kWide ? kForwardThreads : Config<D>::kThreads;
  const int64_t blocks = int64_t{f.call.num_tiles} * f.call.heads;
  if (blocks == 0) return cudaSuccess;
  const auto kernel = [] {
    if constexpr (kWide) {
      return forward_wide_kernel<T, D>;
    } else {
      return forward_kernel<T, D, kGroup>;
    }
  }();
  const cudaError_t error = allow_shared<kBytes>(kernel);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, kBytes, stream>>>(f);
  return cudaGetLastError();
}

template <typename T, int D>
cudaError_t run_scores(const Call& c, int64_t first, int64_t units, float* slab, int64_t ld,
                       cudaStream_t stream) {
  constexpr int kBytes = scores_shared_bytes<D>();
  cudaError_t error = allow_shared<kBytes>(scores_kernel<T, D>);
  if (error != cudaSuccess) return error;
  const dim3 grid((c.max_k + kSlabKeys - 1) / kSlabKeys, static_cast<unsigned>(units));
  scores_kernel<T, D><<<grid, 128, kBytes, stream>>>(c, first, slab, ld);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::portable
