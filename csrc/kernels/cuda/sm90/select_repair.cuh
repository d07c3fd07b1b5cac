// Exact selection of the rows that the sweep could not prove, dealt to the CTAs in turn: all scores of the
// row, then its W-th by bisection. And the bitmaps of tiles in which keys were marked too early. Both return
// at once where there is nothing to do; both are right, if slow, when every row needs them. Scores come from
// mma.sync in the sweep's chunk order.
#pragma once

#include "select_params.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kRepairThreads = 1024;
inline constexpr int kRepairTiles = 256;  // whose rows a CTA counts at once
inline constexpr int kRebuildKeys = 512;  // of one CTA's unit

// Scores of row `q` (channels contiguous) with the keys key .. key + 7: lane t < 4 gets keys 2 t and 2 t + 1.
// `query` (shared) holds the row's A fragments of the lanes 0..3; the rows of the others are zeros.
template <typename T, int D>
__device__ inline void score_keys(float (&c)[4], const uint32_t (&query)[D / 8][4], const Call& call,
                                  const Tile& t, int kv_head, int key) {
  const int lane = threadIdx.x % 32;
  const int mine = min(key + lane / 4, t.tk - 1);
  const auto* source = reinterpret_cast<const uint32_t*>(
      row_pointer<const T>(call.k, t.batch, int64_t{t.k_begin} + mine, kv_head));
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = 0.0f;
  uint32_t b[D / 8];
#pragma unroll
  for (int i = 0; i < D / 8; ++i) b[i] = __ldg(source + 4 * i + lane % 4);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const uint32_t a[4] = {lane < 4 ? query[2 * k][lane] : 0, 0, lane < 4 ? query[2 * k + 1][lane] : 0, 0};
    mma_16816<T>(c, a, b[2 * k], b[2 * k + 1]);
  }
}

// Keys above `bound`, counted by the whole CTA.
__device__ inline int count_keys(const int32_t* keys, int n, int32_t bound, int& total) {
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int count = 0;
#pragma unroll 16
  for (int j = threadIdx.x; j < n; j += kRepairThreads) count += keys[j] > bound;
  count = static_cast<int>(__reduce_add_sync(~0u, count));
  if (threadIdx.x % 32 == 0 && count != 0) atomicAdd(&total, count);
  __syncthreads();
  count = total;
  __syncthreads();
  return count;
}

template <typename T, int D>
__global__ void __launch_bounds__(kRepairThreads, 1) repair_kernel(const __grid_constant__ SelectParams p) {
  __shared__ int total;
  __shared__ uint32_t query[D / 8][4];
  __shared__ uint64_t unsettled[kRepairTiles];
  const Call& c = p.call;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int32_t* const keys = p.scores + int64_t{static_cast<int>(blockIdx.x)} * c.max_k;
  const int repairs = p.counters->repairs;
  int turn = 0;  // CTA that gets the next row
  for (int index = 0; index < repairs; ++index) {
    const int slot = index % kRepairTiles;
    if (slot == 0) {
      __syncthreads();
      const int ahead = index + static_cast<int>(threadIdx.x);
      if (threadIdx.x < kRepairTiles && ahead < repairs) {
        unsettled[threadIdx.x] = p.unsettled[p.repair_list[ahead]];
      }
      __syncthreads();
    }
    uint64_t rows = unsettled[slot];
    const int first = (static_cast<int>(blockIdx.x) + p.repair_ctas - turn) % p.repair_ctas;
    const int count = __popcll(rows);
    turn = (turn + count) % p.repair_ctas;
    if (first >= count) continue;
    const int64_t entry = p.repair_list[index];
    const int head = static_cast<int>(entry / c.num_tiles);
    const int kv_head = head / p.group;
    const Tile t = tile_at(c, static_cast<int>(entry % c.num_tiles));
    for (int number = 0; rows != 0; rows &= rows - 1, ++number) {
      if (number % p.repair_ctas != first) continue;
      const int i = t.row0 + __ffsll(static_cast<long long>(rows)) - 1;
      const RowPlan plan = row_plan(c, t, i);
      const int n = static_cast<int>(plan.seen.end);
      const int64_t at = row_index(c, t, head, i);
      // 1. The order keys of all scores.
      if (threadIdx.x < D / 2) {
        const auto* source = reinterpret_cast<const uint32_t*>(
            row_pointer<const T>(c.q, t.batch, int64_t{t.q_begin} + i, head));
        query[threadIdx.x / 4][threadIdx.x % 4] = __ldg(source + threadIdx.x);
      }
      __syncthreads();
      for (int key = warp * 8; key < n; key += kRepairThreads / 32 * 8) {
        float score[4];
        score_keys<T, D>(score, query, c, t, kv_head, key);
        if (lane < 4) {
          if (key + 2 * lane < n) keys[key + 2 * lane] = order_key(score[0]);
          if (key + 2 * lane + 1 < n) keys[key + 2 * lane + 1] = order_key(score[1]);
        }
      }
      __syncthreads();
      // 2. The W-th of them, and how many of its equals are kept: interpolation between two bounds with a
      // halving every third step. Over `low` lie low_count >= W keys, over `high` lie high_count < W.
      const int kept = static_cast<int>(plan.kept);
      int32_t low = INT32_MIN, high = INT32_MAX;
      int low_count = n, high_count = 0;
      for (int step = 0;; ++step) {
        const uint32_t width = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
        if (width <= 1) break;
        const float share =
            step % 3 == 2 ? 0.5f : (low_count - kept + 0.5f) / static_cast<float>(low_count - high_count);
        const uint32_t offset = static_cast<uint32_t>(static_cast<float>(width) * share);
        const int32_t middle =
            static_cast<int32_t>(static_cast<uint32_t>(low) + min(max(offset, 1u), width - 1));
        const int count = count_keys(keys, n, middle, total);
        if (count >= kept) {
          low = middle;
          low_count = count;
        } else {
          high = middle;
          high_count = count;
        }
      }
      const int32_t best = high;
      int rank = kept - high_count;
      // 3. The index of the last one kept.
      int last = -1;
      for (int j0 = 0; last < 0; j0 += kRepairThreads) {
        const int j = j0 + static_cast<int>(threadIdx.x);
        const bool equal = j < n && keys[j] == best;
        const int count = __syncthreads_count(equal);
        if (count >= rank) {
          // Bisect inside this stretch: the first position with `rank` equals at or before it.
          int low = j0 - 1, high = j0 + kRepairThreads - 1;
          while (high - low > 1) {
            const int middle = (low + high) / 2;
            (__syncthreads_count(equal && j <= middle) >= rank ? high : low) = middle;
          }
          last = high;
        }
        rank -= count;
      }
      if (threadIdx.x == 0) {
        p.out.threshold[at] = order_score(best);
        p.out.tie_index[at] = last;
      }
      // 4. Its keys in the tile's bitmap, next to those of other CTAs; a tile that is rebuilt gets them
      // there.
      if (p.out.bitmap != nullptr && p.rebuild[entry] == 0) {
        uint32_t* const words = p.out.bitmap + entry * bitmap_words(c);
        for (int j0 = warp * 32; j0 < n; j0 += kRepairThreads) {
          const int j = j0 + lane;
          const int32_t key = j < n ? keys[j] : INT32_MIN;
          const uint32_t bits = __ballot_sync(~0u, j < n && (key > best || (key == best && j <= last)));
          if (lane == 0 && bits != 0) atomicOr(words + j0 / 32, bits);
        }
      }
      __syncthreads();
    }
  }
}

// Bitmaps from the finished encodings. Unit of work: a tile and kRebuildKeys keys; a warp takes 8 keys and
// all 64 rows at a time.
template <typename T, int D>
__global__ void __launch_bounds__(256) rebuild_kernel(const __grid_constant__ SelectParams p) {
  __shared__ uint4 query[4][D / 16][32];  // A fragments of 16 rows: step, lane
  const Call& c = p.call;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int chunks = (c.max_k + kRebuildKeys - 1) / kRebuildKeys;
  for (int64_t index = 0; index < p.counters->rebuilds; ++index) {
    // The units of all tiles are dealt to the CTAs in turn.
    const int first = static_cast<int>((blockIdx.x + gridDim.x - index * chunks % gridDim.x) % gridDim.x);
    if (first >= chunks) continue;
    const int64_t entry = p.rebuild_list[index];
    const int head = static_cast<int>(entry / c.num_tiles);
    const Tile t = tile_at(c, static_cast<int>(entry % c.num_tiles));
    __syncthreads();
    if (warp < 4) {
      uint32_t q[D / 4];
      load_query<T, D>(q, c, t, head);
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        query[warp][k][lane] = make_uint4(q[4 * k], q[4 * k + 1], q[4 * k + 2], q[4 * k + 3]);
      }
    }
    // This thread's rows 8 i + lane / 4: a key is kept iff (order key, -index) >= (bound, -last) and it is
    // seen.
    int32_t bound[8], last[8], seen[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = 8 * i + lane / 4;
      bound[i] = INT32_MAX;
      last[i] = -1;
      seen[i] = 0;
      if (r < t.rows) {
        const int64_t at = row_index(c, t, head, t.row0 + r);
        bound[i] = order_key(p.out.threshold[at]);
        last[i] = p.out.tie_index[at];
        seen[i] = last[i] < 0 ? 0 : static_cast<int>(visible(t.row0 + r, t.tq, t.tk, c.causal).end);
      }
    }
    __syncthreads();
    auto* const bytes = reinterpret_cast<uint8_t*>(p.out.bitmap + entry * bitmap_words(c));
    const int end = seen_end(c, t);
    for (int chunk = first; chunk < chunks; chunk += gridDim.x) {
      for (int key = chunk * kRebuildKeys + warp * 8; key < min((chunk + 1) * kRebuildKeys, end); key += 64) {
        const int mine = min(key + lane / 4, t.tk - 1);
        const auto* source = reinterpret_cast<const uint32_t*>(
            row_pointer<const T>(c.k, t.batch, int64_t{t.k_begin} + mine, head / p.group));
        uint32_t b[D / 8];
#pragma unroll
        for (int i = 0; i < D / 8; ++i) b[i] = __ldg(source + 4 * i + lane % 4);
        uint32_t bits = 0;
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int k = 0; k < D / 16; ++k) {
            const uint4 q = query[block][k][lane];
            const uint32_t a[4] = {q.x, q.y, q.z, q.w};
            mma_16816<T>(s, a, b[2 * k], b[2 * k + 1]);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = 2 * block + (e >> 1), column = 2 * (lane % 4) + (e & 1), j = key + column;
            const int32_t score = order_key(s[e]);
            if (j < seen[i] && (score > bound[i] || (score == bound[i] && j <= last[i])))
              bits |= 1u << column;
          }
        }
        bits = __reduce_or_sync(~0u, bits);
        if (lane == 0) bytes[key / 8] = static_cast<uint8_t>(bits);
      }
    }
  }
}

}  // namespace topk_attn::cuda::sm90
