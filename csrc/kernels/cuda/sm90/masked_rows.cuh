// What the masked dense kernels share: how a warp applies its rows' selection to a fragment of scores.
#pragma once

#include "../common/sequence.cuh"
#include "hopper.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kBlockKeys = 128;  // keys of one block: one 16-byte load of a tile's bitmap
inline constexpr int kNever = 0x7fffffff;

__device__ __forceinline__ float minus_infinity() {
  return __int_as_float(0xff800000);
}

// Ties the values to this place in the program: products in flight write their registers behind the
// compiler's back.
template <int N>
__device__ __forceinline__ void pin(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// The exponent's reference of a thread's two rows: a score s has the probability exp2((s - reference) *
// scale).
struct RowReference {
  // Where reference * scale is beyond this, its rounding shows in probabilities (2^-12 here), and the
  // difference is taken first, at an instruction more a score.
  static constexpr float kLarge = 2048.0f;

  float reference[2] = {minus_infinity(), minus_infinity()};  // raw scores
  float offset[2] = {0.0f, 0.0f};                             // reference * scale, 0 while that is -inf
  bool large = false;                                         // of the warp: some offset is

  // The raw score of probability 1.
  __device__ __forceinline__ float base(int r) const { return offset[r] == 0.0f ? 0.0f : reference[r]; }
  __device__ __forceinline__ bool any_large() const {
    return __any_sync(~0u, fmaxf(fabsf(offset[0]), fabsf(offset[1])) > kLarge);
  }
  __device__ __forceinline__ float probability(float score, int r, float scale) const {
    return large ? exp2_fast((score - base(r)) * scale) : exp2_fast(fmaf(score, scale, -offset[r]));
  }
};

// The bound that admits only scores above the threshold: the next float up.
__device__ __forceinline__ float next_above(float threshold) {
  return order_score(order_key(threshold) + 1);
}

// Whether the threshold can be a bound of plain comparisons: not NaN, not +inf, and something is admitted.
__device__ __forceinline__ bool ordinary(const RowFilter& f) {
  return f.tie_index >= 0 && f.threshold < __int_as_float(0x7f800000);
}

// The filter of row `row` of tile `t`. A row that sees nothing keeps nothing, a row that does not exist is
// plain everywhere and keeps no number, so that neither sends its warp down the slow ways.
__device__ inline RowFilter tile_row_filter(const Call& c, const Tile& t, int row, float threshold,
                                            int32_t tie_index) {
  constexpr float kLargest = 3.402823466e38f;
  if (row >= t.tq || row >= t.row0 + t.rows) return RowFilter{kLargest, kNever, kNever, 0, kNever};
  const int seen = static_cast<int>(visible(row, t.tq, t.tk, c.causal).end);
  if (seen == 0) return RowFilter{kLargest, kNever, 0, 0, 0};
  if (c.sink == 0 && c.recent == 0) return RowFilter{threshold, tie_index, seen, 0, seen};
  return row_filter(c, t, row, threshold, tie_index);
}

// Whether any key of block `block` is kept by a row of the tile with these bitmap words (null: assume so).
__device__ __forceinline__ bool block_kept(const uint32_t* words, int block) {
  if (words == nullptr) return true;
  const uint4 w = __ldg(reinterpret_cast<const uint4*>(words) + block);
  return (w.x | w.y | w.z | w.w) != 0;
}

// Zeroes rows [first, rows) of a block in shared memory, by one warp; ends visible to the asynchronous proxy.
// For tokens of the next document that a TMA copy brought along: their values must not even meet a zero.
template <int kParts>
__device__ inline void clear_rows(uint32_t block, int rows, int first, int lane) {
  for (int i = lane; i < (rows - first) * 8 * kParts; i += 32) {
    const uint32_t at =
        block + i / ((rows - first) * 8) * rows * 128 + first * 128 + i % ((rows - first) * 8) * 16;
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
  }
  fence_async_proxy();
  __syncwarp();
}

// Which test a block of keys needs.
enum class Test : int {
  kPlain,    // one bound per row decides
  kEdge,     // the tie index or the edge of visibility lies inside
  kGeneral,  // always-kept keys, or a threshold that is not an ordinary number: key by key
};

}  // namespace topk_attn::cuda::sm90
