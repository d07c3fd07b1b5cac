// dK and dV of gathered tiles, the same bits whatever the order of the additions (deterministic = true).
//
// The key gradients of a gathered tile are added to sums in L2 by bulk reductions, in no fixed order. Float
// addition depends on that order, integer addition does not. So every key (of a KV head) gets a step, a power
// of two; contributions are rounded to multiples of it and summed as int32 by the same reductions.
// Steps have to be the same in every run too: they come from a bound that is a maximum, which
// knows no order either.
//
// 1. dQ's pass has the probabilities p and ds of every tile at hand. For each key of the tile it takes bounds
//    on what the tile can add to any channel, sums running over the tile's rows:
//      dV: max |dO| * sum of p        dK: max |q| * softmax_scale * sum of |ds|
//    and the largest over all tiles of each, by atomicMax on the bits of non-negative floats. NaN orders
//    above infinity there, so that it shows.
// 2. set_steps() counts the gathered tiles that keep the key. Their number times the largest bound, plus what
//    the masked tiles left in the sums, is below 2^F; step = 2^(F - 30), so that sums cannot overflow. The
//    sums are turned into multiples of it in place.
// 3. The dK/dV pass divides by the step, rounds and reduces integers.
// 4. finish_union_gradients(): times step, to the input's dtype. A non-finite bound gives NaN.
//
// A key that no gathered row gives weight keeps its float sums: inverse step 0. At least kFewestTiles are
// counted, so that a single contribution (of two tiles) is below 2^22 steps and adding 1.5 * 2^23 rounds it.
//
// The bounds hold because both passes compute the same p and ds: products of the same rows give the same bits
// with the operands swapped, on which the selection relies too.
//
// Precision: step <= 2^-29 x tiles x largest bound of one tile (2^-20 of it up to 512 tiles), and n roundings
// add up to 0.3 sqrt(n) steps. Bounds are per key, so keys with small gradients lose nothing to the large
// ones. Float32 sums of such multiples would be exact as well, but have 2^24 steps instead of 2^31: not
// enough for bounds this cheap.
//
// Not taken, by arithmetic at S = 32k: int64 or two float bins double the reductions that bound the pass; a
// fixed order of tiles costs about 2 us for each hand-over, 1,024 pairs of tiles a KV head, 16 ms; bounds
// from a pass of their own compute the scores again, about 0.9 ms. Measured there on an H100 (D 128, 32 heads
// over 8, real-like 1 %): dQ 2.22 -> 2.79 ms, the other steps 5.76 -> 6.24 ms. Column sums through shared
// memory instead of shuffles: dQ 2.90 ms.
#pragma once

#include <cuda_bf16.h>

#include "union_common.cuh"

namespace topk_attn::cuda::sm90 {

// Of one key of one KV head, in the order of the sums' rows. The workspace of the deterministic backward:
// first bounds (bits of floats), then inverse steps.
using KeyBound = uint2;      // x: dV, y: dK
using InverseStep = float2;  // x: dV, y: dK; 0: the row holds floats; NaN: the row is NaN
static_assert(sizeof(KeyBound) == sizeof(InverseStep));

inline constexpr uint32_t kFewestTiles = 512;

// A contribution in steps: x * factor below 2^22, rounded to the nearest.
__device__ __forceinline__ int in_steps(float x, float factor) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the unit of such numbers is 1
  return __float_as_int(fmaf(x, factor, kRounder)) - __float_as_int(kRounder);
}

// The part of dQ's thread block (128 threads, one tile) in step 1. Per chunk: open(), add() with the chunk's
// values, then after a barrier settle().
class ChunkBounds {
 public:
  static constexpr int kWarpBytes = kChunkKeys * 4;  // one packed pair of sums a key
  static constexpr int kStageBytes = 4 * kWarpBytes;
  static constexpr int kBytes = 2 * kStageBytes + 32;

  // `bounds`: of key 0 of the sequence, `kv_heads` apart.
  __device__ ChunkBounds(uint32_t shared, KeyBound* bounds, int kv_heads, float scale, int warp, int lane)
      : shared_(shared),
        bounds_(reinterpret_cast<uint32_t*>(bounds) + lane % 2),
        stride_(2 * kv_heads),
        scale_(scale),
        warp_(warp),
        lane_(lane) {}

  // The largest magnitudes among the thread's elements of dO and Q, as pairs of 16-bit patterns without sign;
  // seen by settle() after a barrier.
  __device__ void add_largest(uint32_t out_gradient, uint32_t queries) const {
    const uint32_t g = __reduce_max_sync(~0u, max(out_gradient & 0xffff, out_gradient >> 16));
    const uint32_t q = __reduce_max_sync(~0u, max(queries & 0xffff, queries >> 16));
    if (lane_ < 2) store_shared_int(largest(warp_, lane_), static_cast<int>(lane_ == 0 ? g : q));
  }

  // Takes the key that this thread settles: a thread has one bound of one of the warp's 16 keys. The bound so
  // far is read ahead; few chunks then have to raise it.
  __device__ void open(uint32_t chunk, int count) {
    const int slot = warp_ * 16 + lane_ / 2;
    known_ = ~0u;
    if (slot < count) {
      key_ = load_shared_int(chunk + slot * 4);
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(known_) : "l"(bound_of(key_)) : "memory");
    }
  }

  // Sums of p and |ds| over the warp's 16 rows for each of the 64 columns, in bf16, from the layout of a
  // product. In `stage` (0 or 1) until settle(). fp16 (T): a |ds| that it cannot hold counts as infinity.
  template <typename T>
  __device__ __forceinline__ void add(const float (&p)[32], const float (&ds)[32], int stage) const {
    float size[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) size[i] = fabsf(ds[i / 2 * 4 + i % 2]) + fabsf(ds[i / 2 * 4 + i % 2 + 2]);
    if constexpr (std::is_same_v<T, __half>) {
      constexpr float kOverflow = 65520.0f;
      float most = size[0];
#pragma unroll
      for (int i = 1; i < 16; ++i) most = fmaxf(most, size[i]);
      if (most >= kOverflow) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const float larger = fmaxf(fabsf(ds[i / 2 * 4 + i % 2]), fabsf(ds[i / 2 * 4 + i % 2 + 2]));
          if (larger >= kOverflow) size[i] = kInfinity;
        }
      }
    }
    uint32_t sums[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      sums[i] = pack<__nv_bfloat16>(p[i / 2 * 4 + i % 2] + p[i / 2 * 4 + i % 2 + 2], size[i]);
    // Eight lanes hold the same columns: three times half of them are handed to a partner.
    halve<8>(sums);
    halve<4>(sums);
    halve<2>(sums);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared_ + stage * kStageBytes + warp_ * kWarpBytes +
                                                          lane_ * 8),
                 "r"(sums[0]), "r"(sums[1])
                 : "memory");
  }

  // After a barrier: the tile's bounds of the chunk's keys.
  template <typename T>
  __device__ __forceinline__ void settle(int stage) {
    if (weight_ < 0.0f) weight_ = tile_weight<T>();
    const uint32_t at = shared_ + stage * kStageBytes + (warp_ * 16 + lane_ / 2) * 4;
    uint32_t total = load(at);
#pragma unroll
    for (int w = 1; w < 4; ++w) total = sum(total, load(at + w * kWarpBytes));
    const float column = __uint_as_float(lane_ % 2 == 0 ? total << 16 : total & 0xffff0000);
    const float bound = column * weight_;
    const uint32_t bits = __float_as_uint(bound) & 0x7fffffff;
    if (bits > known_) atomicMax(bound_of(key_), bits);
  }

 private:
  __device__ uint32_t* bound_of(int key) const {
    return bounds_ + int64_t{key} * stride_;
  }
  __device__ uint32_t largest(int warp, int which) const {
    return shared_ + 2 * kStageBytes + (which * 4 + warp) * 4;
  }
  __device__ static uint32_t load(uint32_t address) {
    return static_cast<uint32_t>(load_shared_int(address));
  }
  // max |dO|, or max |q| * softmax_scale, over the tile.
  template <typename T>
  __device__ float tile_weight() const {
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) bits = max(bits, load(largest(w, lane_ % 2)));
    const float x = std::is_same_v<T, __half>
                        ? __half2float(__ushort_as_half(static_cast<unsigned short>(bits)))
                        : __uint_as_float(bits << 16);
    return x * (lane_ % 2 == 0 ? 1.0f : scale_);
  }
  // Keeps kKept columns and takes the partner's sums of them.
  template <int kKept>
  __device__ __forceinline__ void halve(uint32_t (&sums)[16]) const {
    const bool second = lane_ & (2 * kKept);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const uint32_t own = second ? sums[i + kKept] : sums[i];
      const uint32_t other = second ? sums[i] : sums[i + kKept];
      sums[i] = sum(own, __shfl_xor_sync(~0u, other, 2 * kKept));
    }
  }
  // Of two pairs of bf16.
  __device__ static uint32_t sum(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
  }

  uint32_t shared_;
  uint32_t* bounds_;
  int stride_;
  float scale_;
  int warp_;
  int lane_;
  float weight_ = -1.0f;  // below 0: not known yet
  int key_ = 0;
  uint32_t known_ = ~0u;
};

// The largest of two pairs of 16-bit patterns without sign.
__device__ __forceinline__ uint32_t largest_pair(uint32_t a, uint32_t b) {
  return __vmaxu2(a & 0x7fff7fff, b & 0x7fff7fff);
}

// Step 2: workspace from bounds to inverse steps, backward.dk_sum and dv_sum to fixed point.
cudaError_t set_steps(const BackwardCall& backward, void* workspace, cudaStream_t stream);

}  // namespace topk_attn::cuda::sm90
