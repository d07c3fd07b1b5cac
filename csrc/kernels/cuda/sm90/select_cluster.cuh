// What the two Q K^T passes of the fused selection share: rings of buffers, and bits set by adding floats.
// And the clusters of the sweep: two CTAs that take the same item (four tiles that read the same keys), each
// loading half of every key block for both, which halves the traffic out of L2 (it would bound the pass).
#pragma once

#include "select_params.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kCtaRows = 2 * kTileRows;
inline constexpr int kHalfKeys = 64;  // keys of one stage

// Named barriers.
enum Barrier : int { kTurn0 = 1, kTurn1 = 2, kPick = 3 };

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Address of a shared variable of CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}
// Of the default scope: what it tells the other CTA is that wgmma has read a stage, for which no write needs
// to be made visible (with cluster scope it would wait for all outstanding stores).
__device__ __forceinline__ void cluster_barrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}
__device__ __forceinline__ void cluster_store(uint32_t address, int32_t value) {
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
// tma_load into both CTAs, at the same place, counted by the same barrier of each.
__device__ __forceinline__ void tma_load_both(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                              int c, int token, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c), "r"(token), "r"(head), "r"(batch), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// named_barrier_sync() for code that the compiler may duplicate.
__device__ __forceinline__ void cta_barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <typename T, int D>
__device__ __forceinline__ void product_half(float (&scores)[32], const uint32_t (&q)[D / 4],
                                             uint32_t stage) {
  const uint64_t keys = k_major(stage);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    wgmma<T>(scores, q[4 * k], q[4 * k + 1], q[4 * k + 2], q[4 * k + 3], keys + k_step(k, kHalfKeys), k > 0);
  }
}

// Bits that are set one by one under a predicate, by adding a power of two to a float: comparisons take the
// integer pipe, which has half the rate of the pipe that adds floats. Bits 0 .. 15.
struct FloatBits {
  float sum = 8388608.0f;  // 2^23: the bits are those of the mantissa
  __host__ __device__ static constexpr float value(int bit) { return static_cast<float>(1 << bit); }
};
__device__ __forceinline__ uint32_t join_bits(const FloatBits& low, const FloatBits& high) {
  return __byte_perm(__float_as_uint(low.sum), __float_as_uint(high.sum), 0x5410);
}

// Position in a ring of `kSize` buffers, and the parity of its barriers.
template <int kSize>
struct Ring {
  int32_t index = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++index == kSize) index = 0, parity ^= 1;
  }
};

// The ring of key blocks that one producer thread of each CTA of the cluster fills: every stage holds
// kHalfKeys keys, half of them loaded by each CTA for both. The barriers, full and empty, lie kBarriers bytes
// behind the first stage.
template <int D, int kStages, int kBarriers>
struct KeyRing {
  static constexpr int kCount = kStages;
  static constexpr int kStageBytes = kHalfKeys * D * 2;
  uint32_t stages;  // shared address

  __device__ uint32_t stage(int i) const { return stages + i * kStageBytes; }
  __device__ uint32_t full(int i) const { return stages + kBarriers + 8 * i; }
  __device__ uint32_t empty(int i) const { return full(kStages + i); }

  __device__ void init() const {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), 16);  // the product warps of both CTAs
    }
  }

  // By a product warp: lane `rank` of the first two tells CTA `rank` that this warp has read the stage.
  __device__ void release(int index) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < 2) cluster_barrier_arrive(cluster_address(empty(index), lane));
  }

  // By the producer thread, which has few registers: all keys of an item, for the slots whose bits lie at
  // shared address `worked`.
  __device__ void load_item(Ring<kStages>& ring, const SelectParams& p, const CUtensorMap* key_map, int item,
                            uint32_t worked) const {
    for (int first = 0; first < kItemSlots;) {
      uint32_t slots;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(slots) : "r"(worked) : "memory");
      const Segment s = segment_at(p, item, first, slots);
      const int quarter =
          static_cast<int>(cluster_rank()) * (kHalfKeys / 2);  // of a block: what this CTA loads
      const int end = s.k_begin + s.blocks * kBlockKeys;
      for (int key = s.k_begin; key < end; key += kHalfKeys) {
        // Both CTAs have read what the stage held; their copies land in both.
        barrier_wait(empty(ring.index), ring.parity ^ 1);
        barrier_expect(full(ring.index), kStageBytes);
        for (int part = 0; part < D / 64; ++part) {
          tma_load_both(stage(ring.index) + (part * kHalfKeys + quarter) * 128, key_map, full(ring.index),
                        part * 64, key + quarter, item / p.items_per_kv, s.batch);
        }
        ring.advance();
      }
      first = s.end;
    }
  }
};

// By one thread of the cluster: the next item of this kernel to `state` of both CTAs.
__device__ inline void fetch_item(int32_t* counter, uint32_t state) {
  const int next = atomicAdd(counter, 1) + static_cast<int>(gridDim.x) / 2;
  cluster_store(cluster_address(state, 0), next);
  cluster_store(cluster_address(state, 1), next);
}

}  // namespace topk_attn::cuda::sm90
