// Backward over gathered unions: dQ, and dK and dV. See gathered.cuh.
#pragma once

#include "gathered.cuh"

namespace topk_attn::cuda::portable {

template <int D>
constexpr int dq_gathered_bytes() {
  return (2 * kTileRows + 2 * 2 * kGatherKeys) * D * 2;
}

template <typename T, int D>
__global__ void __launch_bounds__(kGatherThreads, 3)
    dq_gathered_kernel(const __grid_constant__ BackwardCall f) {
  constexpr int N = kGatherKeys / 8;
  constexpr uint32_t kKeyBytes = kGatherKeys * D * 2;
  extern __shared__ __align__(512) uint8_t shared[];
  __shared__ KeyList list;
  const Call& c = f.call;
  const Unit unit = unit_of(c, blockIdx.x);
  const Tile t = tile_at(c, unit.tile);
  const int seen = seen_end(c, t);
  const int64_t entry = int64_t{unit.head} * c.num_tiles + unit.tile;
  if (t.rows == 0 || !gathered(f.regimes, entry, seen)) return;

  const uint32_t q_tile = shared_address(shared);
  const uint32_t dout_tile = q_tile + kTileRows * D * 2;
  const uint32_t kv_tiles = dout_tile + kTileRows * D * 2;
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
  const int kv_head = unit.head / (c.heads / c.kv_heads);
  const T* k = row_pointer<const T>(c.k, t.batch, t.k_begin, kv_head);
  const T* v = row_pointer<const T>(c.v, t.batch, t.k_begin, kv_head);
  load_tile<T, D, kTileRows, kGatherThreads>(
      q_tile, row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0, unit.head), c.q.token, t.rows,
      c.head_dim);
  load_tile<T, D, kTileRows, kGatherThreads>(
      dout_tile, row_pointer<const T>(f.dout, t.batch, t.q_begin + t.row0, unit.head), f.dout.token, t.rows,
      c.v_dim);
  copy_commit();

  const float infinity = __int_as_float(0x7f800000);
  const float scale = c.softmax_scale * kLog2E;
  __shared__ RowFilter filters[kTileRows];  // for the sake of registers
  float lse[2] = {infinity, infinity};      // in base 2; +inf: the row keeps nothing
  float delta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    RowFilter filter{0.0f, -1, 0, 0, 0};
    const int row = 16 * warp + g + 8 * h;
    if (row < t.rows) {
      const int64_t at = row_index(c, t, unit.head, t.row0 + row);
      filter = row_filter(c, t, t.row0 + row, f.threshold[at], f.tie_index[at]);
      lse[h] = f.lse[at] == -infinity ? infinity : f.lse[at] * kLog2E;
      delta[h] = f.delta[at];
    }
    if (pair == 0) filters[row] = filter;
  }
  float dq[D / 8][4] = {};
  const int64_t words = bitmap_words(c);
  for (int window = 0; window < seen; window += kListKeys) {
    const int count = list_keys(list, f.bitmap + entry * words, words, window);
    const auto load = [&](int first, int stage) {
      const uint32_t at = kv_tiles + stage * 2 * kKeyBytes;
      gather_tile<T, D, kGatherKeys>(at, k, c.k.token, list, window, first, c.head_dim);
      gather_tile<T, D, kGatherKeys>(at + kKeyBytes, v, c.v.token, list, window, first, c.v_dim);
    };
    if (count > 0) load(0, 0);
    copy_commit();
    int stage = 0;
    for (int first = 0; first < count; first += kGatherKeys, stage ^= 1) {
      if (first + kGatherKeys < count) load(first + kGatherKeys, stage ^ 1);
      copy_commit();
      copy_wait<1>();
      __syncthreads();
      const uint32_t k_tile = kv_tiles + stage * 2 * kKeyBytes;
      float s[N][4];
      dot_rows<T, D, N>(s, q_tile, 16 * warp, k_tile, 0);
      const RowFilter filter[2] = {filters[16 * warp + g], filters[16 * warp + g + 8]};
      mask_listed(s, filter, list, window, first);
      float dp[N][4];
      dot_rows<T, D, N>(dp, dout_tile, 16 * warp, k_tile + kKeyBytes, 0);
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = exp2_fast(fmaf(s[n][e], scale, -lse[e / 2]));
          s[n][e] = p * (dp[n][e] - delta[e / 2]);
        }
      }
      uint32_t ds[N / 2][4];
      as_operand<T, N>(ds, s);
      multiply_rows<T, D, N, D / 8>(dq, ds, k_tile, 0, 0);
      __syncthreads();
    }
    copy_wait<0>();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * warp + g + 8 * h;
    if (row >= t.rows) continue;
    // A row that keeps nothing finite has no gradient, whatever its keys hold (0 * inf is not 0).
    const float factor = lse[h] == infinity ? 0.0f : c.softmax_scale;
    T* o = row_pointer<T>(f.dq, t.batch, t.q_begin + t.row0 + row, unit.head);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int channel = 8 * n + pair;
      if (channel < c.head_dim) {
        *reinterpret_cast<uint32_t*>(o + channel) =
            factor == 0.0f ? 0u : pack<T>(dq[n][2 * h] * factor, dq[n][2 * h + 1] * factor);
      }
    }
  }
}

// Adds four adjacent floats in L2: one instruction where the GPU has it.
__device__ __forceinline__ void add4(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

// Adds a warp's sums of 16 keys, times `factor`. Lanes of a pair exchange halves, so that each adds four
// adjacent channels: the even one of column block n, the odd one of n + 1. rows: this lane's keys g and g +
// 8, null where there is none.
template <int kColumns>
__device__ __forceinline__ void add_rows(float* const (&rows)[2], const float (&x)[kColumns][4], float factor,
                                         int channels) {
  const int t = threadIdx.x % 4;
  const bool odd = t % 2 != 0;
#pragma unroll
  for (int n = 0; n < kColumns; n += 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float give0 = odd ? x[n][2 * h] : x[n + 1][2 * h];
      const float give1 = odd ? x[n][2 * h + 1] : x[n + 1][2 * h + 1];
      const float got0 = __shfl_xor_sync(~0u, give0, 1) * factor;
      const float got1 = __shfl_xor_sync(~0u, give1, 1) * factor;
      const float own0 = (odd ? x[n + 1][2 * h] : x[n][2 * h]) * factor;
      const float own1 = (odd ? x[n + 1][2 * h + 1] : x[n][2 * h + 1]) * factor;
      const int channel = 8 * (n + (odd ? 1 : 0)) + 4 * (t / 2);
      if (rows[h] == nullptr || channel >= channels) continue;
      if (odd) {
        add4(rows[h] + channel, got0, got1, own0, own1);
      } else {
        add4(rows[h] + channel, own0, own1, got0, got1);
      }
    }
  }
}

template <int D>
constexpr int dkv_gathered_bytes() {
  return (2 * kTileRows + 2 * kGatherKeysDkv) * D * 2;
}

// Warp w computes S^T and dP^T of 16 of a block's 64 keys and all 64 rows, 32 at a time, and adds its sums to
// dk_sum and dv_sum.
template <typename T, int D>
__global__ void __launch_bounds__(kGatherThreads, 2)
    dkv_gathered_kernel(const __grid_constant__ BackwardCall f) {
  constexpr int kRows = 32;  // rows of one product, bounded by registers
  constexpr int N = kRows / 8;
  extern __shared__ __align__(512) uint8_t shared[];
  __shared__ KeyList list;
  __shared__ RowFilter filters[kTileRows];
  __shared__ float bounds[kTileRows];
  __shared__ float lses[kTileRows];
  __shared__ float deltas[kTileRows];
  __shared__ bool all_plain[kTileRows / kRows];
  const Call& c = f.call;
  const Unit unit = unit_of(c, blockIdx.x);
  __shared__ Tile t;  // for the sake of registers
  if (threadIdx.x == 0) t = tile_at(c, unit.tile);
  __syncthreads();
  const int seen = seen_end(c, t);
  const int64_t entry = int64_t{unit.head} * c.num_tiles + unit.tile;
  if (t.rows == 0 || !gathered(f.regimes, entry, seen)) return;

  const uint32_t q_tile = shared_address(shared);
  const uint32_t dout_tile = q_tile + kTileRows * D * 2;
  const uint32_t k_tile = dout_tile + kTileRows * D * 2;
  const uint32_t v_tile = k_tile + kGatherKeysDkv * D * 2;
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
  const int kv_head = unit.head / (c.heads / c.kv_heads);
  load_tile<T, D, kTileRows, kGatherThreads>(
      q_tile, row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0, unit.head), c.q.token, t.rows,
      c.head_dim);
  load_tile<T, D, kTileRows, kGatherThreads>(
      dout_tile, row_pointer<const T>(f.dout, t.batch, t.q_begin + t.row0, unit.head), f.dout.token, t.rows,
      c.v_dim);
  copy_commit();
  const float infinity = __int_as_float(0x7f800000);
  if (threadIdx.x < kTileRows) {
    const int row = threadIdx.x;
    filters[row] = RowFilter{0.0f, -1, 0, 0, 0};
    lses[row] = infinity;  // in base 2; +inf: the row keeps nothing
    deltas[row] = 0.0f;
    if (row < t.rows) {
      const int64_t at = row_index(c, t, unit.head, t.row0 + row);
      filters[row] = row_filter(c, t, t.row0 + row, f.threshold[at], f.tie_index[at]);
      lses[row] = f.lse[at] == -infinity ? infinity : f.lse[at] * kLog2E;
      deltas[row] = f.delta[at];
    }
  }
  const float scale = c.softmax_scale * kLog2E;
  const int64_t words = bitmap_words(c);
  for (int window = 0; window < seen; window += kListKeys) {
    const int count = list_keys(list, f.bitmap + entry * words, words, window);
    for (int first = 0; first < count; first += kGatherKeysDkv) {
      gather_tile<T, D, kGatherKeysDkv>(k_tile, row_pointer<const T>(c.k, t.batch, t.k_begin, kv_head),
                                        c.k.token, list, window, first, c.head_dim);
      gather_tile<T, D, kGatherKeysDkv>(v_tile, row_pointer<const T>(c.v, t.batch, t.k_begin, kv_head),
                                        c.v.token, list, window, first, c.v_dim);
      copy_commit();
      if (threadIdx.x < kTileRows) {
        const int begin = list.key(window, first);
        const int last = list.key(window, min(first + kGatherKeysDkv, count) - 1);
        const RowFilter filter = filters[threadIdx.x];
        const bool plain = filter.plain(begin, last + 1);  // false for rows that do not exist
        bounds[threadIdx.x] = plain ? filter.bound(begin) : infinity;
        const bool every = __all_sync(~0u, plain);
        if (threadIdx.x % kRows == 0) all_plain[threadIdx.x / kRows] = every;
      }
      copy_wait<0>();
      __syncthreads();
      float dk[D / 8][4] = {};
      float dv[D / 8][4] = {};
#pragma unroll 1
      for (int row = 0; row < kTileRows; row += kRows) {
        float s[N][4];
        dot_rows<T, D, N>(s, k_tile, 16 * warp, q_tile, row);
        // P^T: column 8 n + pair + e % 2 is a row of the tile, row g or g + 8 a key.
        const bool plain = all_plain[row / kRows];  // else key by key
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = row + 8 * n + pair + e % 2;
            const float p = exp2_fast(fmaf(s[n][e], scale, -lses[column]));
            bool keep = !(s[n][e] < bounds[column]);
            if (!plain) {
              keep = filters[column].keeps(s[n][e], list.key(window, first + 16 * warp + g + e / 2 * 8));
            }
            s[n][e] = keep ? p : 0.0f;
          }
        }
        uint32_t p[N / 2][4];
        as_operand<T, N>(p, s);
        multiply_rows<T, D, N, D / 8>(dv, p, dout_tile, row, 0);
        float dp[N][4];
        dot_rows<T, D, N>(dp, v_tile, 16 * warp, dout_tile, row);
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] *= dp[n][e] - deltas[row + 8 * n + pair + e % 2];
        }
        as_operand<T, N>(p, s);
        multiply_rows<T, D, N, D / 8>(dk, p, q_tile, row, 0);
      }
      // The sums are contiguous: (batch, token, head, channel).
      float* k_rows[2];
      float* v_rows[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = list.key(window, first + 16 * warp + g + 8 * h);
        const int64_t token = t.batch * int64_t{c.tk} + t.k_begin + key;
        const int64_t at = token * c.kv_heads + kv_head;
        k_rows[h] = key == INT_MAX ? nullptr : f.dk_sum + at * c.head_dim;
        v_rows[h] = key == INT_MAX ? nullptr : f.dv_sum + at * c.v_dim;
      }
      __syncthreads();  // the tiles are free
      add_rows(k_rows, dk, c.softmax_scale, c.head_dim);
      add_rows(v_rows, dv, 1.0f, c.v_dim);
    }
  }
}

template <typename T, int D>
cudaError_t run_backward_gathered(const BackwardCall& f, cudaStream_t stream) {
  if (f.dk_sum == nullptr || f.dv_sum == nullptr || f.bitmap == nullptr) return cudaErrorInvalidValue;
  const int64_t blocks = int64_t{f.call.num_tiles} * f.call.heads;
  if (blocks == 0) return cudaSuccess;
  constexpr int kDqBytes = dq_gathered_bytes<D>();
  constexpr int kDkvBytes = dkv_gathered_bytes<D>();
  const auto dq = dq_gathered_kernel<T, D>;
  cudaError_t error = cudaFuncSetAttribute(dq, cudaFuncAttributeMaxDynamicSharedMemorySize, kDqBytes);
  if (error != cudaSuccess) return error;
  dq<<<static_cast<unsigned>(blocks), kGatherThreads, kDqBytes, stream>>>(f);
  const auto dkv = dkv_gathered_kernel<T, D>;
  error = cudaFuncSetAttribute(dkv, cudaFuncAttributeMaxDynamicSharedMemorySize, kDkvBytes);
  if (error != cudaSuccess) return error;
  dkv<<<static_cast<unsigned>(blocks), kGatherThreads, kDkvBytes, stream>>>(f);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::portable
