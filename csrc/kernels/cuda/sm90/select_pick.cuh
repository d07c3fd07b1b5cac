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
  // The key of `code` of lane `t` of a quad: see key_of_bit(). Predicated, no branch.
  __device__ void set(bool kept, uint32_t code, int t) const {
    const uint32_t bit = 1u << (((code & 6) << 2) + (code & 1) + 2 * t);
    if (is_shared) {
      asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p red.shared.or.b32 [%0], %1;\n}" ::"r"(
                       shared + (code >> 3) * 4),
                   "r"(bit), "r"(static_cast<uint32_t>(kept)));
    } else {
      asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p red.global.or.b32 [%0], %1;\n}" ::"l"(
                       global + (code >> 3)),
                   "r"(bit), "r"(static_cast<uint32_t>(kept)));
    }
  }
};

__device__ inline int key_of_code(int code, int t) {
  return (code >> 5) * kBlockKeys + key_of_bit(code & 31, t);
}

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

struct Kth {
  int32_t key;
  int32_t largest;  // of all keys
  int32_t ties;     // how many of the keys equal to `key` count; 0: all of them
};

// The rank-th largest of the keys of a warp (rank from 1; `total` of them valid, the others are INT32_MIN).
// Interpolation between two bounds, with a plain halving every third step: about six steps for a few hundred
// keys.
template <int N>
__device__ inline Kth kth_largest(const int32_t (&keys)[N], int rank, int total) {
  constexpr int32_t kNone = INT32_MIN;
  int32_t largest = kNone;
  uint32_t smallest = 0xffffffffu;  // of key + INT32_MIN - 1, which puts kNone last
#pragma unroll
  for (int i = 0; i < N; ++i) {
    largest = max(largest, keys[i]);
    smallest = min(smallest, (static_cast<uint32_t>(keys[i]) ^ 0x80000000u) - 1);
  }
  // Over `low` lie low_count >= rank keys, over `high` lie high_count < rank.
  Kth result;
  result.largest = __reduce_max_sync(~0u, largest);
  result.ties = 0;
  int32_t low = static_cast<int32_t>(__reduce_min_sync(~0u, smallest) ^ 0x80000000u), high = result.largest;
  int low_count = total, high_count = 0;
  for (int step = 0; low_count != rank; ++step) {
    const uint32_t width = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    if (width <= 1) {
      result.key = high;
      result.ties = rank - high_count;
      return result;
    }
    const float share = step % 3 == 2
                            ? 0.5f
                            : __fdividef(low_count - rank + 0.5f, static_cast<float>(low_count - high_count));
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
  result.key = __reduce_min_sync(~0u, best);
  return result;
}

// Settles one row of at most 32 * N entries. Writes threshold and tie_index and sets the bits of the
// candidates that are kept. Returns false if the candidates do not decide the row; `foreign` then says
// whether keys above the bracket may be beyond the W best.
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
  const uint32_t staged = row.staged + lane * 8;
  const uint32_t* const entries = reinterpret_cast<const uint32_t*>(row.entries + lane);
  const auto read = [&](int i, int half, bool wanted) {
    uint32_t word = 0;
    if constexpr (kStaged) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(staged + 256 * i + 4 * half));
    } else {
      if (wanted) word = __ldcg(entries + 64 * i + half);
    }
    return word;
  };
  int32_t keys[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool valid = 8 * i + lane / 4 < mine;
    const uint32_t score = read(i, 0, valid);
    keys[i] = valid ? order_key(__uint_as_float(score)) : kNone;
  }
  const Kth kth = kth_largest(keys, rank, total);
  const int32_t best = kth.key;
  // A NaN comes before the keys above the bracket, which were counted as the first ones.
  if (row.above > 0 && kth.largest == INT32_MAX) {
    foreign = true;
    return false;
  }
  int last = -1;
  if (kth.ties == 0) {
    // Every tie is kept: the last one has the largest index. In one lane, codes ascend with the keys.
    int code = -1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (keys[i] == best) code = max(code, static_cast<int>(read(i, 1, true)));
    }
    last = __reduce_max_sync(~0u, code < 0 ? -1 : key_of_code(code, t));
  } else {
    // The smallest index with kth.ties ties at or below it.
    int low = -1, high = INT32_MAX - 1;
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      int count = 0;
#pragma unroll 1
      for (int i = 0; 8 * i < total && i < N; ++i) {
        if (8 * i + lane / 4 >= mine) continue;
        const uint2 entry = row.entries[32 * i + lane];
        count += order_key(__uint_as_float(entry.x)) == best &&
                 key_of_code(static_cast<int>(entry.y), t) <= middle;
      }
      (warp_sum(count) >= kth.ties ? high : low) = middle;
    }
    last = high;
  }
  if (bits.is_shared || bits.global != nullptr) {
    constexpr int kTogether = 8;  // loads in flight
#pragma unroll
    for (int i0 = 0; i0 < N; i0 += kTogether) {
      uint32_t code[kTogether];
#pragma unroll
      for (int i = i0; i < min(N, i0 + kTogether); ++i) code[i - i0] = read(i, 1, keys[i] >= best);
      few_loads_in_flight();
#pragma unroll
      for (int i = i0; i < min(N, i0 + kTogether); ++i) {
        bool take = keys[i] >= best;
        if (kth.ties != 0 && keys[i] == best) take = key_of_code(static_cast<int>(code[i - i0]), t) <= last;
        bits.set(take, code[i - i0], t);
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
