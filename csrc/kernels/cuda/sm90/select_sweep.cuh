// Main step of the fused selection: one Q K^T pass over all keys that keeps, per row, the scores inside its
// bracket (lo, hi] and counts those above it; then the exact pick.
//
// A cluster of two CTAs takes an item of four (tile, head) slots that read the same keys; each CTA loads half
// of every key block and multicasts it to both, which halves the traffic out of L2 (it would bound the pass).
// In a CTA:
// - two product warpgroups, 64 rows each, Q in registers, take turns on the tensor cores. Behind its product,
// a
//   warp compares its scores with lo and stores those above into fixed slots of shared memory, with a bit
//   mask: three instructions per score, no pointers.
// - one drain warp per product warp walks the masks while the next product runs: scores above hi become one
// bit in
//   the tile's bitmap and a count, the others go to the candidate buffer of their lane.
// - one producer warp feeds the pipeline of key blocks.
// At the end of an item all sixteen warps pick (select_pick.cuh). A row is settled only if its counts prove
// it: keys above hi < W <= keys above hi + candidates, and no buffer overflowed.
#pragma once

#include "select_params.cuh"
#include "select_pick.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kSweepThreads = 256 + 256 + 128;  // the producer is one thread of a warpgroup
inline constexpr int kCtaRows = 2 * kTileRows;
inline constexpr int kSlotBuffers = 2;
inline constexpr int kSlotBytes = 64 * 32 * 4;  // of one warp and buffer: slot-major, then lane
inline constexpr int kMaskBytes = 32 * 8;
inline constexpr int kDrainWidth = 4;  // scores of a row that a drain lane has in flight
inline constexpr int kHalfKeys = 64;   // keys of one stage
// Lists of 32 candidates that a warp picks from: few registers, more, most.
inline constexpr int kShortLists = 16;
inline constexpr int kMiddleLists = 24;
inline constexpr int kListBytes = kShortLists * 32 * 8;  // staged candidates of a row
inline constexpr int kLongLists = 62;
inline constexpr int kMaxCapacity = kLongLists * 8;

// Named barriers.
enum Barrier : int { kTurn0 = 1, kTurn1 = 2, kPick = 3 };

template <int D>
struct SweepShared {
  static constexpr int kStages = D == 128 ? 5 : 8;
  static constexpr int kStageBytes = kHalfKeys * D * 2;
  static constexpr int kSlots = kStages * kStageBytes;
  static constexpr int kMasks = kSlots + 8 * kSlotBuffers * kSlotBytes;
  static constexpr int kCounts = kMasks + 8 * kSlotBuffers * kMaskBytes;  // int4 per row
  static constexpr int kAbove = kCounts + kCtaRows * 16;                  // int per row
  static constexpr int kTasks = kAbove + kCtaRows * 4;                    // RowTask per row
  static constexpr int kBarriers = kTasks + kCtaRows * 16;  // stage full, stage empty, slot full, slot empty
  static constexpr int kState = kBarriers + (2 * kStages + 4 * 8) * 8;
  static constexpr int kBytes = kState + 64;
  // The pick: bits of two tiles lie where the stages were, candidates where the slots were.
  static constexpr int kBitmapWords = kSlots / 4 / 2;
};

// What the pick needs to know of a row.
struct RowTask {
  int64_t at;    // its place in threshold and tie_index
  int32_t kept;  // W; negative: no such row
  int32_t pad;
};

// Of one CTA, in shared memory.
struct SweepState {
  int32_t next_item;
  int32_t pad;
  uint2* candidates;  // SelectParams::candidates; 8 bytes from the begin
  uint64_t unsettled[2];
  uint32_t rebuild[2];
};

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
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

// A score at or above `bound`, or NaN: stored, and its bit set.
template <int kOffset, uint32_t kBit>
__device__ __forceinline__ void gate(uint32_t& mask, uint32_t slots, float score, float bound) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.geu.f32 p, %2, %3;\n"
      "@p st.shared.f32 [%1 + %4], %2;\n"
      "@p or.b32 %0, %0, %5;\n}"
      : "+r"(mask)
      : "r"(slots), "f"(score), "f"(bound), "n"(kOffset), "n"(kBit)
      : "memory");
}

// Scores I .. 31 of half kHalf: see wgmma() for which is which.
template <int kHalf, int I = 0>
__device__ __forceinline__ void gate_half(uint32_t& mask0, uint32_t& mask1, uint32_t slots,
                                          const float (&scores)[32], float lo0, float lo1) {
  if constexpr (I < 32) {
    constexpr int kBit = 16 * kHalf + 2 * (I / 4) + (I & 1);
    constexpr int kUpper = I >> 1 & 1;
    gate<(32 * kUpper + kBit) * 128, 1u << kBit>(kUpper != 0 ? mask1 : mask0, slots, scores[I],
                                                 kUpper != 0 ? lo1 : lo0);
    gate_half<kHalf, I + 1>(mask0, mask1, slots, scores, lo0, lo1);
  }
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

// Position in a ring of `kSize` buffers, and the parity of its barriers.
template <int kSize>
struct Ring {
  int32_t index = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++index == kSize) index = 0, parity ^= 1;
  }
};

template <typename T, int D>
struct Sweep {
  using Shared = SweepShared<D>;
  const SelectParams& p;
  uint8_t* memory;  // shared, 1,024-byte aligned
  uint32_t shared;  // its address
  uint32_t rank;    // of this CTA in its cluster

  __device__ uint32_t stage(int i) const { return shared + i * Shared::kStageBytes; }
  __device__ uint32_t stage_full(int i) const { return shared + Shared::kBarriers + 8 * i; }
  __device__ uint32_t stage_empty(int i) const { return stage_full(Shared::kStages + i); }
  __device__ uint32_t slot_full(int warp, int buffer) const {
    return stage_full(2 * Shared::kStages + warp * kSlotBuffers + buffer);
  }
  __device__ uint32_t slot_empty(int warp, int buffer) const { return slot_full(8 + warp, buffer); }
  __device__ uint32_t slots(int warp, int buffer) const {
    return shared + Shared::kSlots + (warp * kSlotBuffers + buffer) * kSlotBytes;
  }
  __device__ uint2* masks(int warp, int buffer) const {
    return reinterpret_cast<uint2*>(memory + Shared::kMasks + (warp * kSlotBuffers + buffer) * kMaskBytes);
  }
  __device__ SweepState& state() const { return *reinterpret_cast<SweepState*>(memory + Shared::kState); }
  __device__ RowTask* tasks() const { return reinterpret_cast<RowTask*>(memory + Shared::kTasks); }
  __device__ uint2* candidates(int row) const {
    return p.candidates + (int64_t{static_cast<int>(blockIdx.x)} * kCtaRows + row) * (4 * p.capacity);
  }
  __device__ uint32_t* bitmap_of(const Slot& s) const {
    return p.out.bitmap + (int64_t{s.head} * p.call.num_tiles + s.tile) * bitmap_words(p.call);
  }

  // All threads of the cluster, between items: makes the next item known and everything in shared memory
  // free.
  __device__ int next_item() const {
    cluster_sync();
    return state().next_item;
  }

  // ---- producer ----

  __device__ void produce(const CUtensorMap* key_map) {
    const bool leader = threadIdx.x == 512;
    Ring<Shared::kStages> ring;
    for (int item = next_item(); item < p.items; item = next_item()) {
      cluster_sync();  // every thread has read next_item
      if (leader) {
        if (rank == 0) {
          const int next = atomicAdd(&p.counters->next_item, 1) + static_cast<int>(gridDim.x) / 2;
          const uint32_t address = shared + Shared::kState;
          cluster_store(cluster_address(address, 0), next);
          cluster_store(cluster_address(address, 1), next);
        }
        const int kv_head = item / p.items_per_kv;
        for (int first = 0; first < kItemSlots;) {
          const Segment s = segment_at(p, item, first);
          for (int half = 0; half < 2 * s.blocks; ++half) {
            // Both CTAs have read what the stage held; their copies land in both.
            barrier_wait(stage_empty(ring.index), ring.parity ^ 1);
            barrier_expect(stage_full(ring.index), Shared::kStageBytes);
            for (int part = 0; part < D / 64; ++part) {
              tma_load_both(stage(ring.index) + part * kHalfKeys * 128 + rank * (kHalfKeys / 2) * 128,
                            key_map, stage_full(ring.index), part * 64,
                            s.k_begin + half * kHalfKeys + static_cast<int>(rank) * (kHalfKeys / 2), kv_head,
                            s.batch);
            }
            ring.advance();
          }
          first = s.end;
        }
      }
      __syncwarp();
    }
  }

  // ---- product warps ----

  // Lane `rank` of the first two tells CTA `rank` that this warp has read the stage.
  __device__ void release(int index) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < 2) cluster_barrier_arrive(cluster_address(stage_empty(index), lane));
  }

  __device__ void multiply() {
    const int warp = threadIdx.x / 32;  // 0..7
    const int group = warp / 4;
    const int lane = threadIdx.x % 32;
    const int row = warp % 4 * 16 + lane / 4;
    Ring<Shared::kStages> ring;
    Ring<kSlotBuffers> buffer;
    if (group == 1) named_barrier_arrive(kTurn0, 256);
    for (int item = next_item(); item < p.items; item = next_item()) {
      cluster_sync();
      const int index = 2 * static_cast<int>(rank) + group;
      const Slot slot = slot_at(p, item, index);
      const Tile t = tile_of(p.call, slot);
      uint32_t q[D / 4];
      load_query<T, D>(q, p.call, t, slot.head);
      float lo[2] = {0.0f, 0.0f};
      int seen[2] = {0, 0};
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        if (row + 8 * upper < t.rows) {
          const int i = t.row0 + row + 8 * upper;
          lo[upper] = __ldcg(p.out.threshold + row_index(p.call, t, slot.head, i));
          seen[upper] = static_cast<int>(visible(i, t.tq, t.tk, p.call.causal).end);
        }
      }
      for (int first = 0; first < kItemSlots;) {
        const Segment s = segment_at(p, item, first);
        const bool mine = index >= first && index < s.end;
        first = s.end;
        for (int block = 0; block < s.blocks; ++block) {
          float scores0[32], scores1[32];
          const int stage0 = ring.index;
          named_barrier_sync(group == 0 ? kTurn0 : kTurn1, 256);
          barrier_wait(stage_full(stage0), ring.parity);
          wgmma_fence();
          product_half<T, D>(scores0, q, stage(stage0));
          ring.advance();
          const int stage1 = ring.index;
          barrier_wait(stage_full(stage1), ring.parity);
          product_half<T, D>(scores1, q, stage(stage1));
          wgmma_commit();
          ring.advance();
          named_barrier_arrive(group == 0 ? kTurn1 : kTurn0, 256);
          barrier_wait(slot_empty(warp, buffer.index), buffer.parity ^ 1);
          wgmma_wait<0>();
          release(stage0);
          release(stage1);
          const uint32_t to = slots(warp, buffer.index) + lane * 4;
          uint32_t mask0 = 0, mask1 = 0;
          gate_half<0>(mask0, mask1, to, scores0, lo[0], lo[1]);
          gate_half<1>(mask0, mask1, to, scores1, lo[0], lo[1]);
          const int key = block * kBlockKeys;
          if (!mine || min(seen[0], seen[1]) < key + kBlockKeys) {
            mask0 &= mine ? visible_mask(seen[0] - key, lane % 4) : 0;
            mask1 &= mine ? visible_mask(seen[1] - key, lane % 4) : 0;
          }
          masks(warp, buffer.index)[lane] = make_uint2(mask0, mask1);
          __syncwarp();
          if (lane == 0) barrier_arrive(slot_full(warp, buffer.index));
          buffer.advance();
        }
      }
      pick<true>(item, warp);
    }
  }

  // ---- drain warps ----

  // One row of a drain lane: byte offsets into p.candidates, where its entries lie 32 bytes apart.
  struct DrainRow {
    uint32_t to;  // of the next candidate; advances beyond the end, where nothing is stored
    uint32_t end;
    uint32_t above;  // keys above the bracket
    float hi;
  };

  // Takes up to kDrainWidth bits off a mask and loads their scores.
  __device__ static __forceinline__ void drain_load(uint32_t& mask, uint32_t (&bit)[kDrainWidth],
                                                    int (&index)[kDrainWidth], float (&score)[kDrainWidth],
                                                    uint32_t from) {
#pragma unroll
    for (int i = 0; i < kDrainWidth; ++i) {
      bit[i] = mask & -mask;
      mask ^= bit[i];
      index[i] =
          31 - __clz(static_cast<int>(bit[i]));  // -1 once the mask is used up: what is loaded is not used
    }
#pragma unroll
    for (int i = 0; i < kDrainWidth; ++i) {
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(score[i]) : "r"(from + index[i] * 128) : "memory");
    }
  }

  // Scores above the bracket into `hits`, the others onto the row's list. Without branches.
  __device__ __forceinline__ void drain_store(DrainRow& row, uint32_t& hits,
                                              const uint32_t (&bit)[kDrainWidth],
                                              const int (&index)[kDrainWidth],
                                              const float (&score)[kDrainWidth], int code,
                                              uint8_t* base) const {
#pragma unroll
    for (int i = 0; i < kDrainWidth; ++i) {
      const bool hit = score[i] > row.hi;
      hits |= hit ? bit[i] : 0;
      const bool keep = bit[i] != 0 && !hit;
      if (keep && row.to < row.end) {
        *reinterpret_cast<uint2*>(base + row.to) = make_uint2(__float_as_uint(score[i]), code + index[i]);
      }
      row.to += keep ? 32 : 0;
    }
  }

  __device__ void drain() {
    const int warp = threadIdx.x / 32 - 8;  // of the product warp that it serves
    const int lane = threadIdx.x % 32;
    const int row = warp * 16 + lane / 4;  // of the CTA
    const bool bitmap = p.out.bitmap != nullptr;
    // From shared memory, so that it stays in registers: loaded from the parameters anew, it would hold up
    // every store.
    uint8_t* base;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(base) : "r"(shared + Shared::kState + 8) : "memory");
    Ring<kSlotBuffers> buffer;
    for (int item = next_item(); item < p.items; item = next_item()) {
      cluster_sync();
      const Slot slot = slot_at(p, item, 2 * static_cast<int>(rank) + warp / 4);
      const Tile t = tile_of(p.call, slot);
      DrainRow rows[2];
      uint32_t begin[2];
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int i = row % 64 + 8 * upper;
        rows[upper].to = begin[upper] =
            static_cast<uint32_t>(reinterpret_cast<uint8_t*>(candidates(row + 8 * upper) + lane % 4) - base);
        rows[upper].end = rows[upper].to + 32 * p.capacity;
        rows[upper].above = 0;
        rows[upper].hi = 0.0f;
        if (i < t.rows) {
          rows[upper].hi =
              __int_as_float(__ldcg(p.out.tie_index + row_index(p.call, t, slot.head, t.row0 + i)));
        }
      }
      uint32_t* const words = bitmap && t.rows > 0 ? bitmap_of(slot) : nullptr;
      for (int first = 0; first < kItemSlots;) {
        const Segment s = segment_at(p, item, first);
        first = s.end;
        for (int block = 0; block < s.blocks; ++block) {
          barrier_wait(slot_full(warp, buffer.index), buffer.parity);
          uint2 mask = masks(warp, buffer.index)[lane];
          const uint32_t from = slots(warp, buffer.index) + lane * 4;
          uint2 hits = make_uint2(0, 0);
          while (__any_sync(~0u, (mask.x | mask.y) != 0)) {
            uint32_t bit0[kDrainWidth], bit1[kDrainWidth];
            int index0[kDrainWidth], index1[kDrainWidth];
            float score0[kDrainWidth], score1[kDrainWidth];
            drain_load(mask.x, bit0, index0, score0, from);
            drain_load(mask.y, bit1, index1, score1, from + 32 * 128);
            __syncwarp();  // keeps all loads ahead of all stores
            drain_store(rows[0], hits.x, bit0, index0, score0, block * 32, base);
            drain_store(rows[1], hits.y, bit1, index1, score1, block * 32, base);
          }
          __syncwarp();  // every lane has read its scores
          if (lane == 0) barrier_arrive(slot_empty(warp, buffer.index));
          buffer.advance();
          rows[0].above += __popc(hits.x);
          rows[1].above += __popc(hits.y);
          uint32_t any = hits.x | hits.y;
          any |= __shfl_xor_sync(~0u, any, 4);
          any |= __shfl_xor_sync(~0u, any, 8);
          any |= __shfl_xor_sync(~0u, any, 16);
          // In the order of the lanes for now; finish_bitmap() puts the bits in place.
          if (words != nullptr && lane < 4 && any != 0) atomicOr(words + block * 4 + lane, any);
        }
      }
      auto* const counts = reinterpret_cast<int32_t*>(memory + Shared::kCounts);
      auto* const above = reinterpret_cast<int32_t*>(memory + Shared::kAbove);
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        DrainRow& r = rows[upper];
        counts[(row + 8 * upper) * 4 + lane % 4] = static_cast<int32_t>((r.to - begin[upper]) / 32);
        r.above += __shfl_xor_sync(~0u, r.above, 1);
        r.above += __shfl_xor_sync(~0u, r.above, 2);
        if (lane % 4 == 0) above[row + 8 * upper] = static_cast<int32_t>(r.above);
      }
      pick<false>(item, warp + 8);
    }
  }

  // ---- end of an item: all product and drain warps ----

  // Warps that have few registers (kLong = false) leave the long rows to the others.
  template <bool kLong>
  __device__ void pick(int item, int warp) {
    const int thread = warp * 32 + threadIdx.x % 32;
    auto* const bits = reinterpret_cast<uint32_t*>(memory);
    const int64_t words = bitmap_words(p.call);
    const bool bitmap = p.out.bitmap != nullptr;
    const bool staged = words <= Shared::kBitmapWords;
    named_barrier_sync(kPick, 512);  // every slot is drained, every count is there
    if (bitmap && staged) {
      for (int i = thread; i < 2 * words; i += 512) bits[i] = 0;
    }
    if (thread < kCtaRows) {
      const Slot slot = slot_at(p, item, 2 * static_cast<int>(rank) + thread / kTileRows);
      const Tile t = tile_of(p.call, slot);
      const int r = thread % kTileRows;
      RowTask task{0, -1, 0};
      if (r < t.rows) {
        task.at = row_index(p.call, t, slot.head, t.row0 + r);
        task.kept = static_cast<int32_t>(row_plan(p.call, t, t.row0 + r).kept);
      }
      tasks()[thread] = task;
    }
    if (thread < 2) {
      state().unsettled[thread] = 0;
      state().rebuild[thread] = 0;
    }
    if (bitmap && !staged) finish_bitmap(item, thread, nullptr);
    named_barrier_sync(kPick, 512);
    // A warp's candidates are copied to shared memory one row ahead of the row that it picks from.
    const uint32_t staging = shared + Shared::kSlots + warp * 2 * kListBytes;
    stage_row(warp, staging);
    copy_commit();
    int turn = 0;
    for (int row = warp; row < kCtaRows; row += 16, turn ^= 1) {
      __syncwarp();
      if (row + 16 < kCtaRows) stage_row(row + 16, staging + (turn ^ 1) * kListBytes);
      copy_commit();
      copy_wait<1>();
      __syncwarp();
      pick_one<0, kShortLists>(item, row, staging + turn * kListBytes);
    }
    if (kLong && p.capacity > 8 * kShortLists) {
      for (int row = warp; row < kCtaRows; row += 8) {
        pick_one<kShortLists, kMiddleLists>(item, row, 0);
        if (p.capacity > 8 * kMiddleLists) pick_one<kMiddleLists, kLongLists>(item, row, 0);
      }
    }
    fence_async_proxy();  // the next keys land where the bits are
    named_barrier_sync(kPick, 512);
    if (bitmap && staged) finish_bitmap(item, thread, bits);
    if (thread < 2) {
      const Slot slot = slot_at(p, item, 2 * static_cast<int>(rank) + thread);
      if (slot.tile >= 0) {
        const int64_t entry = int64_t{slot.head} * p.call.num_tiles + slot.tile;
        const uint64_t unsettled = state().unsettled[thread];
        const uint32_t rebuild = state().rebuild[thread];
        p.unsettled[entry] = unsettled;
        p.rebuild[entry] = rebuild;
        if (unsettled != 0) p.repair_list[atomicAdd(&p.counters->repairs, 1)] = static_cast<int32_t>(entry);
        if (rebuild != 0) p.rebuild_list[atomicAdd(&p.counters->rebuilds, 1)] = static_cast<int32_t>(entry);
      }
    }
  }

  __device__ int4 counts_of(int row) const {
    return reinterpret_cast<const int4*>(memory + Shared::kCounts)[row];
  }
  __device__ static int longest_of(const int4& n) {
    return max(max(n.x, n.y), max(n.z, n.w));
  }

  // Starts copying the candidates of a row that is short.
  __device__ void stage_row(int row, uint32_t to) const {
    const int longest = longest_of(counts_of(row));
    if (longest > 8 * kShortLists || longest > p.capacity) return;
    const uint2* const from = candidates(row);
    for (int i = threadIdx.x % 32; i < 2 * longest; i += 32) copy16(to + i * 16, from + 2 * i, true);
  }

  // Row `row` of the CTA, if its candidates fill more than kMore and at most N lists. Rows that overflowed
  // count as short.
  template <int kMore, int N>
  __device__ void pick_one(int item, int row, uint32_t staged) const {
    const int half = row / kTileRows;
    const RowTask task = tasks()[row];
    if (task.kept < 0) return;
    const RowCandidates found{candidates(row), staged, counts_of(row),
                              reinterpret_cast<const int32_t*>(memory + Shared::kAbove)[row]};
    const int longest = longest_of(found.counts);
    const bool overflow = longest > p.capacity;
    if (overflow ? kMore != 0 : longest > 8 * N || (kMore != 0 && longest <= 8 * kMore)) return;
    const int64_t at = task.at;
    const int lane = threadIdx.x % 32;
    if (task.kept == 0) {
      if (lane == 0) {
        p.out.threshold[at] = order_score(INT32_MAX);
        p.out.tie_index[at] = -1;
      }
      return;
    }
    const int64_t words = bitmap_words(p.call);
    KeptBits bits{nullptr, 0, false};
    if (p.out.bitmap != nullptr) {
      if (words <= Shared::kBitmapWords) {
        bits.is_shared = true;
        bits.shared = shared + half * static_cast<uint32_t>(words) * 4;
      } else {
        bits.global = bitmap_of(slot_at(p, item, 2 * static_cast<int>(rank) + half));
      }
    }
    bool foreign = true;
    const bool settled = !overflow && pick_row<N, kMore == 0>(found, task.kept, p.out.threshold + at,
                                                              p.out.tie_index + at, bits, foreign);
    if (!settled && lane == 0) {
      atomicOr(reinterpret_cast<unsigned long long*>(&state().unsettled[half]), 1ull << (row % kTileRows));
      if (foreign) state().rebuild[half] = 1;
    }
  }

  // Bits above the bracket: from the order of the lanes to ascending keys, together with `bits` unless null.
  __device__ void finish_bitmap(int item, int thread, const uint32_t* bits) const {
    for (int half = 0; half < 2; ++half) {
      const Slot slot = slot_at(p, item, 2 * static_cast<int>(rank) + half);
      const Tile t = tile_of(p.call, slot);
      if (t.rows == 0) continue;
      auto* const blocks = reinterpret_cast<uint4*>(bitmap_of(slot));
      const int count = (seen_end(p.call, t) + kBlockKeys - 1) / kBlockKeys;
      for (int block = thread; block < count; block += 512) {
        const uint4 lanes = __ldcg(blocks + block);
        uint4 keys = make_uint4(ascending_bits(lanes, 0), ascending_bits(lanes, 1), ascending_bits(lanes, 2),
                                ascending_bits(lanes, 3));
        if (bits != nullptr) {
          const uint32_t* const more = bits + half * bitmap_words(p.call) + block * 4;
          keys.x |= more[0], keys.y |= more[1], keys.z |= more[2], keys.w |= more[3];
        }
        blocks[block] = keys;
      }
    }
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(kSweepThreads, 1) __cluster_dims__(2, 1, 1)
    sweep_kernel(const __grid_constant__ CUtensorMap key_map, const __grid_constant__ SelectParams p) {
  using Shared = SweepShared<D>;
  extern __shared__ uint8_t shared_raw[];
  uint8_t* const memory = shared_raw + ((1024 - (shared_address(shared_raw) & 1023)) & 1023);
  Sweep<T, D> sweep{p, memory, shared_address(memory), cluster_rank()};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      barrier_init(sweep.stage_full(i), 1);
      barrier_init(sweep.stage_empty(i), 16);  // the product warps of both CTAs
    }
    for (int warp = 0; warp < 8; ++warp) {
      for (int i = 0; i < kSlotBuffers; ++i) {
        barrier_init(sweep.slot_full(warp, i), 1);
        barrier_init(sweep.slot_empty(warp, i), 1);
      }
    }
    barrier_init_fence();
    sweep.state().next_item = blockIdx.x / 2;
    sweep.state().candidates = p.candidates;
  }
  __syncthreads();
  const int role = threadIdx.x / 256;
  if (role == 0) {
    registers_raise<128>();
    sweep.multiply();
  } else if (role == 1) {
    registers_lower<96>();
    sweep.drain();
  } else {
    registers_lower<32>();
    sweep.produce(&key_map);
  }
  cluster_sync();  // no CTA leaves while the other may still arrive at its barriers
}

}  // namespace topk_attn::cuda::sm90
