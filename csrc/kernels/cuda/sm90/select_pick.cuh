// Last step of the fused selection, by the CTA that swept the rows: among a row's candidates, the score of
// the key that makes W, and its index. One warp a row, candidates in registers.
#pragma once

#include "select_params.cuh"

namespace topk_attn::cuda::sm90 {

// What a row's sweep left: entry e of lane t lies at 4 * e + t.
struct RowCandidates {
  const uint2* entries;
  uint32_t staged;  // shared address of a copy of them, or 0
  int4 counts;      // candidates of each lane, also those beyond its capacity
  int32_t above;    // keys above the bracket
};

// Where the bits of kept keys are set: shared or global memory, or nowhere. The compiler must know which,
// because an atomic on a generic address that turns out to be shared is very slow.
struct KeptBits {
  uint32_t* global;
  uint32_t shared;
  bool is_shared;
  __device__ void set(int key) const {
    const uint32_t bit = 1u << (key % 32);
    if (is_shared) {
      asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(shared + key / 32 * 4), "r"(bit));
    } else if (global != nullptr) {
      asm volatile("red.global.or.b32 [%0], %1;" ::"l"(global + key / 32), "r"(bit));
    }
  }
};

__device__ inline int warp_sum(int x) {
  return static_cast<int>(__reduce_add_sync(~0u, x));
}

// Keeps the compiler from issuing the loads of a whole unrolled loop at once, for which there are no
// registers.
__device__ inline void few_loads_in_flight() {
  asm volatile("" ::: "memory");
}

template <int N>
__device__ inline int count_over(const int32_t (&keys)[N], int32_t bound) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) count += keys[i] > bound;
  return warp_sum(count);
}

// The rank-th largest of the keys of a warp (rank from 1; `total` of them valid, the others are INT32_MIN).
// Interpolation between two bounds, with a plain halving every third step.
template <int N>
__device__ inline int32_t kth_largest(const int32_t (&keys)[N], int rank, int total) {
  constexpr int32_t kNone = INT32_MIN;
  int32_t smallest = INT32_MAX, largest = kNone;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    largest = max(largest, keys[i]);
    if (keys[i] != kNone) smallest = min(smallest, keys[i]);
  }
  // Over `low` lie low_count >= rank keys, over `high` lie high_count < rank.
  int32_t low = __reduce_min_sync(~0u, smallest) - 1, high = __reduce_max_sync(~0u, largest);
  int low_count = total, high_count = 0;
  for (int step = 0; low_count != rank; ++step) {
    const uint32_t width = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    if (width <= 1) return high;
    const float share =
        step % 3 == 2 ? 0.5f : (low_count - rank + 0.5f) / static_cast<float>(low_count - high_count);
    uint32_t offset = static_cast<uint32_t>(static_cast<float>(width) * share);
    offset = min(max(offset, 1u), width - 1);
    const int32_t middle = static_cast<int32_t>(static_cast<uint32_t>(low) + offset);
    const int count = count_over(keys, middle);
    if (count >= rank) {
      low = middle;
      low_count = count;
    } else {
      high = middle;
      high_count = count;
    }
  }
  int32_t best = INT32_MAX;
#pragma unroll
  for (int i = 0; i < N; ++i) best = keys[i] > low ? min(best, keys[i]) : best;
  return __reduce_min_sync(~0u, best);
}

// Settles one row of at most 32 * N entries. Writes threshold and tie_index and sets the bits of the
// candidates that are kept; Returns false if the candidates do not decide the row;
// `foreign` then says whether keys above the bracket may be beyond the W best.
template <int N, bool kStaged>
__device__ inline bool pick_row(const RowCandidates& row, int kept, float* threshold, int32_t* tie_index,
                                const KeptBits& bits, bool& foreign) {
  constexpr int32_t kNone = INT32_MIN;
  const int lane = threadIdx.x % 32;
  const int t = lane % 4;
  const int mine = t == 0 ? row.counts.x : t == 1 ? row.counts.y : t == 2 ? row.counts.z : row.counts.w;
  const int total = row.counts.x + row.counts.y + row.counts.z + row.counts.w;
  const int rank = kept - row.above;
  foreign = rank < 1;
  if (rank < 1 || rank > total) return false;
  // Short lists lie in shared memory, others are read from global memory, the key codes only where needed.
  const auto read = [&](int i, int half) {
    uint32_t word;
    if constexpr (kStaged) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(row.staged + (32 * i + lane) * 8 + 4 * half));
    } else {
      word = __ldcg(reinterpret_cast<const uint32_t*>(row.entries + 32 * i + lane) + half);
    }
    return word;
  };
  int32_t keys[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool valid = 8 * i + lane / 4 < mine;
    const uint32_t score = kStaged || valid ? read(i, 0) : 0;
    keys[i] = valid ? order_key(__uint_as_float(score)) : kNone;
  }
  const auto key_index = [&](int i) {
    const int code = static_cast<int>(read(i, 1));
    return (code >> 5) * kBlockKeys + key_of_bit(code & 31, t);
  };
  const int32_t best = kth_largest(keys, rank, total);
  // A NaN comes before the keys above the bracket, which were counted as the first ones.
  if (row.above > 0 && count_over(keys, INT32_MAX - 1) > 0) {
    foreign = true;
    return false;
  }
  const int over = count_over(keys, best);
  const int ties = count_over(keys, best - 1) - over;
  int last = -1;
  if (ties == 1 || ties == rank - over) {
    // Every tie is kept: the last one has the largest index.
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!kStaged && i % 8 == 0) few_loads_in_flight();
      if (keys[i] == best) last = max(last, key_index(i));
    }
    last = __reduce_max_sync(~0u, last);
  } else {
    // The smallest index with rank - over ties at or below it.
    int low = -1, high = INT32_MAX - 1;
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      int count = 0;
#pragma unroll 1
      for (int i = 0; 8 * i < row.counts.x + row.counts.y + row.counts.z + row.counts.w && i < N; ++i) {
        if (8 * i + lane / 4 >= mine) continue;
        const uint2 entry = row.entries[32 * i + lane];
        const int code = static_cast<int>(entry.y);
        count += order_key(__uint_as_float(entry.x)) == best &&
                 (code >> 5) * kBlockKeys + key_of_bit(code & 31, t) <= middle;
      }
      (warp_sum(count) >= rank - over ? high : low) = middle;
    }
    last = high;
  }
  if (bits.is_shared || bits.global != nullptr) {
    constexpr int kTogether = 8;  // loads in flight
#pragma unroll
    for (int i0 = 0; i0 < N; i0 += kTogether) {
      int key[kTogether];
#pragma unroll
      for (int i = i0; i < min(N, i0 + kTogether); ++i) {
        key[i - i0] = keys[i] >= best && keys[i] != kNone ? key_index(i) : 0;
      }
      few_loads_in_flight();
#pragma unroll
      for (int i = i0; i < min(N, i0 + kTogether); ++i) {
        if (keys[i] != kNone && (keys[i] > best || (keys[i] == best && key[i - i0] <= last)))
          bits.set(key[i - i0]);
      }
    }
  }
  if (lane == 0) {
    *threshold = order_score(best);
    *tie_index = last;
  }
  return true;
}

}  // namespace topk_attn::cuda::sm90
