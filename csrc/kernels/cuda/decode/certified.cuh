// What the steps of the certified scan share: bounds as 64-bit entries, and int8 products.
#pragma once

#include <climits>

#include "certified.h"
#include "codes.cuh"

namespace topk_attn::cuda::decode {

// ---------------------------------------------------------------------------------------------------------------
// Entries: bits 63-38 the lower bound, as its order key rounded down to a multiple of 64; bits 37-24 the
// width, upper minus lower bound, 8 bits of exponent and 6 of mantissa rounded up; bits 23-0 the key's
// position.
// ---------------------------------------------------------------------------------------------------------------

inline constexpr int kPositionBits = 24;
inline constexpr int kKeyMask = ~63;
inline constexpr int kNoBound = static_cast<int>(0x807fffffu) & kKeyMask;  // order key of -inf, rounded down

struct Bounds {
  float score;  // of the codes
  float error;  // infinite where nothing is known
};

// error = norm * bound, both rounded up generously; see docs/decode.md.
__device__ __forceinline__ Bounds bounds_of(int sum, uint32_t word, float scale, float norm) {
  Bounds b;
  b.score = static_cast<float>(sum) * (bf16_value(word >> 16) * scale);
  b.error = fmaf(norm, bf16_value(word & 0xffffu), kAbsoluteError);
  if (word == 0 || !(b.error <= kLargestError)) b.error = __int_as_float(0x7f800000);
  return b;
}

__device__ __forceinline__ int lower_key(const Bounds& b) {
  return b.error == __int_as_float(0x7f800000) ? kNoBound : order_key(b.score - b.error) & kKeyMask;
}

__device__ __forceinline__ unsigned long long make_entry(const Bounds& b, int position) {
  const uint32_t width = (__float_as_uint(2.0f * b.error) + 0x1ffffu) >> 17;
  return static_cast<unsigned long long>(static_cast<uint32_t>(lower_key(b)) | (width >> 8)) << 32 |
         (width & 0xffu) << kPositionBits | static_cast<uint32_t>(position);
}

// Of the halves of an entry.
__device__ __forceinline__ int entry_lower(int high) {
  return high & kKeyMask;
}
__device__ __forceinline__ int entry_position(int low) {
  return low & ((1 << kPositionBits) - 1);
}
// Order key of the upper bound.
__device__ __forceinline__ int entry_upper(int high, int low) {
  const uint32_t width =
      (static_cast<uint32_t>(high) & 63u) << 8 | static_cast<uint32_t>(low) >> kPositionBits;
  if (width >= 0x7f800000u >> 17) return INT_MAX;
  return order_key(__fadd_ru(order_score(high | 63), __uint_as_float(width << 17)));
}

// ---------------------------------------------------------------------------------------------------------------
// Products: 16 keys with 4 rows, that is 8 columns. Channels are summed in any order, since the sums are
// exact: lane (g, t) holds channels [t * width / 4, (t + 1) * width / 4) of keys g and g + 8, and of column
// g.
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mma_16832(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A lane's share of a row of codes or queries.
template <int kWidth>
struct Share {
  static constexpr int kVectors = kWidth / 64;
  uint4 v[kVectors];
  __device__ void load(const int8_t* row) {
    const uint4* const from = reinterpret_cast<const uint4*>(row) + threadIdx.x % 4 * kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) v[i] = __ldg(from + i);
  }
  // What this kernel or the one before it has written must not come from the read-only cache.
  __device__ void load_written(const int8_t* row) {
    const uint4* const from = reinterpret_cast<const uint4*>(row) + threadIdx.x % 4 * kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) v[i] = from[i];
  }
};

// sums[0], [1]: planes of row t for key g; [2], [3]: for key g + 8.
template <int kWidth>
__device__ __forceinline__ void multiply(int (&sums)[4], const Share<kWidth>& a, const Share<kWidth>& b,
                                         const Share<kWidth>& q) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = 0;
#pragma unroll
  for (int i = 0; i < Share<kWidth>::kVectors; ++i) {
    mma_16832(sums, a.v[i].x, b.v[i].x, a.v[i].y, b.v[i].y, q.v[i].x, q.v[i].y);
    mma_16832(sums, a.v[i].z, b.v[i].z, a.v[i].w, b.v[i].w, q.v[i].z, q.v[i].w);
  }
}
// The planes of a score in one integer.
__device__ __forceinline__ int combine(int high, int low) {
  return high * 254 + low;
}

// A KV head of a sequence of the slab.
struct Pair {
  int slab_sequence;
  int sequence;
  int kv_head;
};
__device__ __forceinline__ Pair pair_at(const DecodeCall& c, const Slab& slab, int pair) {
  const int s = pair / c.kv_heads;
  return Pair{s, slab.first_sequence + s, pair % c.kv_heads};
}

// What slab row m of a KV head may keep.
__device__ __forceinline__ RowPlan plan_of(const DecodeCall& c, const Slab& slab, const State& state, int m) {
  return plan_row(seen_by(c, state, slab.first_token + m % slab.tokens), c.budget, c.sink, c.recent);
}

}  // namespace topk_attn::cuda::decode
