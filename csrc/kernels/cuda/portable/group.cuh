// select="kv_group": a key's place is decided by its largest score over the heads of the group, so the passes
// recompute the other heads' scores. The other heads' queries come straight from global memory: this mode is
// right, not fast.
#pragma once

#include "tile.cuh"

namespace topk_attn::cuda::portable {

// Two adjacent channels of a query row as one register; zeros where the row or the channel does not exist.
template <typename T>
__device__ __forceinline__ uint32_t query_pair(const Call& c, const Tile& t, int head, int row, int channel) {
  if (row >= t.rows || channel >= c.head_dim) return 0;
  const T* q = row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0 + row, head);
  return *reinterpret_cast<const uint32_t*>(q + channel);
}

// Bit 4 * n + e: the row keeps the key of result (n, e). `own` holds the scores of `head` itself; rows are
// queries from tile row `row` (row g follows filter[0], row g + 8 filter[1]), columns the 8 * N keys of
// `key_tile`, the first of which is `first_key`.
template <typename T, int D, int N>
__device__ __noinline__ uint32_t group_keeps(const float (&own)[N][4], const RowFilter (&filter)[2],
                                             const Call& c, const Tile& t, int head, int row,
                                             uint32_t key_tile, int first_key) {
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
  float best[N][4];
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) best[n][e] = own[n][e];
  }
  const int group = c.heads / c.kv_heads;
#pragma unroll 1
  for (int other = head / group * group; other < (head / group + 1) * group; ++other) {
    if (other == head) continue;
    float s[N][4] = {};
#pragma unroll 1
    for (int step = 0; step < D / 16; ++step) {
      const int channel = 16 * step + pair;
      const uint32_t a[4] = {query_pair<T>(c, t, other, row + g, channel),
                             query_pair<T>(c, t, other, row + g + 8, channel),
                             query_pair<T>(c, t, other, row + g, channel + 8),
                             query_pair<T>(c, t, other, row + g + 8, channel + 8)};
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b[4];
        load_matrix_x4(b, (b_address<D>(key_tile, 8 * n)) ^ (32 * step));
        mma_16816<T>(s[n], a, b[0], b[1]);
        mma_16816<T>(s[n + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) best[n][e] = best_score(best[n][e], s[n][e]);
    }
  }
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (filter[e / 2].keeps(best[n][e], first_key + 8 * n + pair + e % 2)) kept |= 1u << (4 * n + e);
    }
  }
  return kept;
}

// Whether tile row `row` keeps key j, from its encoding in global memory.
__device__ inline bool keeps_key(const BackwardCall& f, const Tile& t, int head, int row, float score,
                                 int j) {
  if (row >= t.rows) return false;
  const int64_t at = row_index(f.call, t, head, t.row0 + row);
  return row_filter(f.call, t, t.row0 + row, f.threshold[at], f.tie_index[at]).keeps(score, j);
}

// The same, also for select="head" (!kGroup), with keys as rows (16 of `key_tile` from key_row, the first of
// the tile being `first_key`) and the queries from tile row `row` as columns.
template <typename T, int D, int N, bool kGroup>
__device__ __noinline__ uint32_t keeps_by_key(const float (&own)[N][4], const BackwardCall& f, const Tile& t,
                                              int head, int row, uint32_t key_tile, int key_row,
                                              int first_key) {
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
  float best[N][4];
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) best[n][e] = own[n][e];
  }
  const Call& c = f.call;
  const int group = c.heads / c.kv_heads;
#pragma unroll 1
  for (int other = head / group * group; kGroup && other < (head / group + 1) * group; ++other) {
    if (other == head) continue;
    float s[N][4] = {};
#pragma unroll 1
    for (int step = 0; step < D / 16; ++step) {
      const int channel = 16 * step + pair;
      uint32_t a[4];
      load_matrix_x4(a, a_address<D>(key_tile, key_row) ^ (32 * step));
#pragma unroll
      for (int n = 0; n < N; ++n) {
        mma_16816<T>(s[n], a, query_pair<T>(c, t, other, row + 8 * n + g, channel),
                     query_pair<T>(c, t, other, row + 8 * n + g, channel + 8));
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) best[n][e] = best_score(best[n][e], s[n][e]);
    }
  }
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (keeps_key(f, t, head, row + 8 * n + pair + e % 2, best[n][e],
                    first_key + key_row + g + e / 2 * 8)) {
        kept |= 1u << (4 * n + e);
      }
    }
  }
  return kept;
}

}  // namespace topk_attn::cuda::portable
