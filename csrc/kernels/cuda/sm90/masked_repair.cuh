// The slow way for rows that meet a non-finite V: zero times such a value is NaN, so a product over whole
// blocks carries it into rows that do not keep its key. A warp whose output is not finite although its sums
// are adds up its 16 rows again, kept keys only, with mma.sync scores (the same bits) straight from global
// memory.
#pragma once

#include "masked_rows.cuh"

namespace topk_attn::cuda::sm90 {

// Of row `r` (0 or 1) of a thread's accumulator.
template <int N>
__device__ __forceinline__ bool row_finite(const float (&o)[N], int r) {
  bool good = true;
#pragma unroll
  for (int i = 0; i < N; ++i) good &= ((i >> 1) & 1) != r || fabsf(o[i]) < __int_as_float(0x7f800000);
  return good;
}

// o, laid out as a wgmma accumulator, becomes the sum over kept keys of P V. `q` is the tile's block in
// shared memory, `row` the first of the thread's two rows in it, f0 and f1 their filters.
template <typename T, int D>
__device__ inline void sum_kept(float (&o)[D / 2], const Call& c, const Tile& t, int kv_head, int seen,
                                const uint8_t* q, int row, const RowFilter& f0, const RowFilter& f1,
                                const uint32_t* bitmap, float scale, const RowReference& reference) {
  constexpr float kOut = -1.0f;  // in place of a probability: not kept
  const int lane = threadIdx.x % 32;
  const int column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
  const auto q_pair = [&](int r, int channel) {
    return *reinterpret_cast<const uint32_t*>(q + channel / 64 * kTileRows * 128 +
                                              swizzle128(r, channel % 64 / 8) + channel % 8 * 2);
  };
  for (int j0 = 0; j0 < seen; j0 += 8) {
    if (bitmap != nullptr && (bitmap[j0 / 32] >> (j0 % 32) & 0xff) == 0) continue;
    const int own = j0 + lane / 4;
    const T* const k = row_pointer<T>(c.k, t.batch, t.k_begin + own, kv_head);
    float p[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int channel = column; channel < D; channel += 16) {
      const uint32_t a[4] = {q_pair(row, channel), q_pair(row + 8, channel), q_pair(row, channel + 8),
                             q_pair(row + 8, channel + 8)};
      const uint32_t b0 = own < t.tk ? *reinterpret_cast<const uint32_t*>(k + channel) : 0;
      const uint32_t b1 = own < t.tk ? *reinterpret_cast<const uint32_t*>(k + channel + 8) : 0;
      mma_16816<T>(p, a, b0, b1);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool kept = (i < 2 ? f0 : f1).keeps(p[i], j0 + column + (i & 1));
      p[i] = kept ? reference.probability(p[i], i / 2, scale) : kOut;
    }
#pragma unroll 1
    for (int x = 0; x < 8 && j0 + x < seen; ++x) {
      const int from = lane / 4 * 4 + x / 2;
      const float p0 = __shfl_sync(~0u, x & 1 ? p[1] : p[0], from);
      const float p1 = __shfl_sync(~0u, x & 1 ? p[3] : p[2], from);
      const T* const v = row_pointer<T>(c.v, t.batch, t.k_begin + j0 + x, kv_head) + column;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const float lo = static_cast<float>(v[8 * j]), hi = static_cast<float>(v[8 * j + 1]);
        if (p0 != kOut) {
          o[4 * j] += p0 * lo;
          o[4 * j + 1] += p0 * hi;
        }
        if (p1 != kOut) {
          o[4 * j + 2] += p1 * lo;
          o[4 * j + 3] += p1 * hi;
        }
      }
    }
  }
}

}  // namespace topk_attn::cuda::sm90
