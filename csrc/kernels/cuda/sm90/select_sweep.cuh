// Main step of the fused selection: one Q K^T pass over all keys that keeps, per row, the scores inside its
// bracket (lo, hi] and counts those above it; then the exact pick.
//
// A cluster of two CTAs takes an item of four (tile, head) slots (select_cluster.cuh). In a CTA:
// - two product warpgroups, 64 rows each, Q in registers, take turns on the tensor cores. Behind its product,
//   a warp compares its scores with the bracket: those inside go into fixed slots of shared memory, with a
//   bit mask, those above into another mask: five instructions per score, no pointers. Where the bracket
//   holds most of the keys above lo (kFewInside = false) it compares with lo alone, in three.
// - one drain warp per product warp walks the masks while the next product runs: scores above hi become one
//   bit in the tile's bitmap and a count, those inside go to the candidate buffer of their lane.
// - one producer warp feeds the pipeline of key blocks.
// At the end of an item all sixteen warps pick (select_pick.cuh). A row is settled only if its counts prove
// it: keys above hi < W <= keys above hi + candidates, and no buffer overflowed.
#pragma once

#include "select_cluster.cuh"
#include "select_pick.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kSweepThreads = 256 + 256 + 128;  // the producer is one thread of a warpgroup
inline constexpr int kSlotBuffers = 2;
inline constexpr int kSlotBytes = 64 * 32 * 4;  // of one warp and buffer: slot-major, then lane
inline constexpr int kMaskBytes = 32 * 16;
template <bool kFewInside>
inline constexpr int kDrainWidth = kFewInside ? 2 : 4;  // scores of a row that a drain lane has in flight
// Lists of 32 candidates that a warp picks from: few registers, more, most.
inline constexpr int kShortLists = 16;
inline constexpr int kMiddleLists = 24;
inline constexpr int kListBytes = kShortLists * 32 * 8;  // staged candidates of a row
inline constexpr int kLongLists = 62;
inline constexpr int kMaxCapacity = kLongLists * 8;

template <int D>
struct SweepShared {
  static constexpr int kStages = D == 128 ? 5 : 8;
  static constexpr int kSlots = kStages * kHalfKeys * D * 2;
  static constexpr int kMasks = kSlots + 8 * kSlotBuffers * kSlotBytes;
  static constexpr int kCounts = kMasks + 8 * kSlotBuffers * kMaskBytes;  // int4 per row
  static constexpr int kAbove = kCounts + kCtaRows * 16;                  // int per row
  static constexpr int kTasks = kAbove + kCtaRows * 4;                    // RowTask per row
  static constexpr int kBarriers = kTasks + kCtaRows * 16;  // stage full, stage empty, slot full, slot empty
  static constexpr int kState = kBarriers + (2 * kStages + 4 * 8) * 8;
  static constexpr int kBytes = kState + 64;
  using Keys = KeyRing<D, kStages, kBarriers>;
  // The pick: bits of two tiles lie where the stages were, candidates where the slots were.
  static constexpr int kBitmapWords = kSlots / 4 / 2;
};

// What the pick needs to know of a row, and, while the item is swept, how many keys it sees.
struct RowTask {
  int64_t at;    // its place in threshold and tie_index
  int32_t kept;  // W; negative: no such row
  int32_t seen;
};

// Of one CTA, in shared memory.
struct SweepState {
  int32_t next_item;
  uint32_t worked;    // slots that the item is swept for
  uint2* candidates;  // SelectParams::candidates; 8 bytes from the begin
  uint64_t unsettled[2];
  uint32_t rebuild[2];
};

// Which of 32 keys of a row are above the bracket, and which are inside it, in halves of 16 keys.
struct GateMasks {
  FloatBits above[2];
  FloatBits inside[2];
};

// A score above hi: its bit in `above`. Otherwise, at or above lo, or NaN: stored, and its bit in `inside`.
template <int kHalf, int kBit, int kOffset>
__device__ __forceinline__ void gate(GateMasks& masks, uint32_t slots, float score, float lo, float hi) {
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.gt.f32 p, %3, %5;\n"
      "@p add.f32 %0, %0, %7;\n"
      "setp.geu.and.f32 q, %3, %4, !p;\n"
      "@q st.shared.f32 [%2 + %6], %3;\n"
      "@q add.f32 %1, %1, %7;\n}"
      : "+f"(masks.above[kHalf].sum), "+f"(masks.inside[kHalf].sum)
      : "r"(slots), "f"(score), "f"(lo), "f"(hi), "n"(kOffset), "f"(FloatBits::value(kBit))
      : "memory");
}

// Scores I .. 31 of half kHalf: see wgmma() for which is which.
template <int kHalf, int I = 0>
__device__ __forceinline__ void gate_half(GateMasks (&masks)[2], uint32_t slots, const float (&scores)[32],
                                          const float (&lo)[2], const float (&hi)[2]) {
  if constexpr (I < 32) {
    constexpr int kBit = 2 * (I / 4) + (I & 1);
    constexpr int kUpper = I >> 1 & 1;
    gate<kHalf, kBit, (32 * kUpper + 16 * kHalf + kBit) * 128>(masks[kUpper], slots, scores[I], lo[kUpper],
                                                               hi[kUpper]);
    gate_half<kHalf, I + 1>(masks, slots, scores, lo, hi);
  }
}

// The gate for brackets that hold most of the keys above lo: these are all stored, the drain warps tell which
// are above hi. Three instructions a score.
template <int kHalf, int I = 0>
__device__ __forceinline__ void gate_low_half(uint32_t (&masks)[2], uint32_t slots, const float (&scores)[32],
                                              const float (&lo)[2]) {
  if constexpr (I < 32) {
    constexpr int kBit = 16 * kHalf + 2 * (I / 4) + (I & 1);
    constexpr int kUpper = I >> 1 & 1;
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.geu.f32 p, %2, %3;\n"
        "@p st.shared.f32 [%1 + %4], %2;\n"
        "@p or.b32 %0, %0, %5;\n}"
        : "+r"(masks[kUpper])
        : "r"(slots), "f"(scores[I]), "f"(lo[kUpper]), "n"((32 * kUpper + kBit) * 128), "n"(1u << kBit)
        : "memory");
    gate_low_half<kHalf, I + 1>(masks, slots, scores, lo);
  }
}

// kFewInside: for brackets that the counting pass has narrowed, which hold few of the keys above lo.
template <typename T, int D, bool kFewInside>
struct Sweep {
  static constexpr int kWidth = kDrainWidth<kFewInside>;
  using Shared = SweepShared<D>;
  const SelectParams& p;
  uint8_t* memory;  // shared, 1,024-byte aligned
  uint32_t shared;  // its address
  uint32_t rank;    // of this CTA in its cluster

  __device__ typename Shared::Keys keys() const { return {shared}; }
  __device__ uint32_t slot_full(int warp, int buffer) const {
    return shared + Shared::kBarriers + 8 * (2 * Shared::kStages + warp * kSlotBuffers + buffer);
  }
  __device__ uint32_t slot_empty(int warp, int buffer) const { return slot_full(8 + warp, buffer); }
  __device__ uint32_t slots(int warp, int buffer) const {
    return shared + Shared::kSlots + (warp * kSlotBuffers + buffer) * kSlotBytes;
  }
  // Of one lane: the rows' keys above the bracket (x, y) and inside it (z, w).
  __device__ uint4* masks(int warp, int buffer) const {
    return reinterpret_cast<uint4*>(memory + Shared::kMasks + (warp * kSlotBuffers + buffer) * kMaskBytes);
  }
  __device__ SweepState& state() const { return *reinterpret_cast<SweepState*>(memory + Shared::kState); }
  __device__ RowTask* tasks() const { return reinterpret_cast<RowTask*>(memory + Shared::kTasks); }
  __device__ uint2* candidates(int row) const {
    return p.candidates + (int64_t{static_cast<int>(blockIdx.x)} * kCtaRows + row) * (4 * p.capacity);
  }
  // Without rows where the item is not swept for this slot.
  __device__ Tile worked_tile(int index, const Slot& s) const {
    return (state().worked >> index & 1) != 0 ? tile_of(p.call, s) : Tile{};
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

  // All threads of the cluster, once they know the item: makes known which of its slots are swept. False:
  // none.
  __device__ bool choose_slots(int item) const {
    if (threadIdx.x == 0) state().worked = slots_of<false>(p, item);
    cluster_sync();
    return state().worked != 0;
  }

  // ---- producer ----

  __device__ void produce(const CUtensorMap* key_map) {
    const bool leader = threadIdx.x == 512;
    Ring<Shared::kStages> ring;
    for (int item = next_item(); item < p.items; item = next_item()) {
      choose_slots(item);
      if (leader) {
        if (rank == 0) fetch_item(&p.counters->next_item, shared + Shared::kState);
        keys().load_item(ring, p, key_map, item, shared + Shared::kState + 4);
      }
      __syncwarp();
    }
  }

  // ---- product warps ----

  __device__ void multiply() {
    const int warp = threadIdx.x / 32;  // 0..7
    const int group = warp / 4;
    const int lane = threadIdx.x % 32;
    const int row = warp % 4 * 16 + lane / 4;
    const auto keys = this->keys();
    Ring<Shared::kStages> ring;
    Ring<kSlotBuffers> buffer;
    if (group == 1) named_barrier_arrive(kTurn0, 256);
    for (int item = next_item(); item < p.items; item = next_item()) {
      if (!choose_slots(item)) continue;
      const int index = 2 * static_cast<int>(rank) + group;
      const Slot slot = slot_at(p, item, index);
      const Tile t = worked_tile(index, slot);
      uint32_t q[D / 4];
      load_query<T, D>(q, p.call, t, slot.head);
      float lo[2] = {0.0f, 0.0f};
      [[maybe_unused]] float hi[2] = {0.0f, 0.0f};
      int least_seen = INT32_MAX;
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        int seen = 0;
        if (row + 8 * upper < t.rows) {
          const int i = t.row0 + row + 8 * upper;
          const int64_t at = row_index(p.call, t, slot.head, i);
          lo[upper] = __ldcg(p.out.threshold + at);
          if constexpr (kFewInside) hi[upper] = __int_as_float(__ldcg(p.out.tie_index + at));
          seen = static_cast<int>(visible(i, t.tq, t.tk, p.call.causal).end);
        }
        least_seen = min(least_seen, seen);
        tasks()[group * kTileRows + row + 8 * upper].seen = seen;
      }
      __syncwarp();
      for (int first = 0; first < kItemSlots;) {
        const Segment s = segment_at(p, item, first, state().worked);
        const bool mine = index >= first && index < s.end;
        first = s.end;
        for (int block = 0; block < s.blocks; ++block) {
          float scores0[32], scores1[32];
          const int stage0 = ring.index;
          named_barrier_sync(group == 0 ? kTurn0 : kTurn1, 256);
          barrier_wait(keys.full(stage0), ring.parity);
          wgmma_fence();
          product_half<T, D>(scores0, q, keys.stage(stage0));
          if constexpr (kFewInside) wgmma_commit();
          ring.advance();
          const int stage1 = ring.index;
          barrier_wait(keys.full(stage1), ring.parity);
          product_half<T, D>(scores1, q, keys.stage(stage1));
          wgmma_commit();
          ring.advance();
          named_barrier_arrive(group == 0 ? kTurn1 : kTurn0, 256);
          barrier_wait(slot_empty(warp, buffer.index), buffer.parity ^ 1);
          const uint32_t to = this->slots(warp, buffer.index) + lane * 4;
          uint32_t above[2] = {0, 0}, inside[2] = {0, 0};
          if constexpr (kFewInside) {
            GateMasks masks[2];
            wgmma_wait<1>();
            keys.release(stage0);
            gate_half<0>(masks, to, scores0, lo, hi);
            wgmma_wait<0>();
            keys.release(stage1);
            gate_half<1>(masks, to, scores1, lo, hi);
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
              above[upper] = join_bits(masks[upper].above[0], masks[upper].above[1]);
              inside[upper] = join_bits(masks[upper].inside[0], masks[upper].inside[1]);
            }
          } else {
            wgmma_wait<0>();
            keys.release(stage0);
            keys.release(stage1);
            gate_low_half<0>(inside, to, scores0, lo);
            gate_low_half<1>(inside, to, scores1, lo);
          }
          const int key = block * kBlockKeys;
          if (!mine || least_seen < key + kBlockKeys) {
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
              const int seen = tasks()[group * kTileRows + row + 8 * upper].seen;
              const uint32_t sees = mine ? visible_mask(seen - key, lane % 4) : 0;
              if constexpr (kFewInside) above[upper] &= sees;
              inside[upper] &= sees;
            }
          }
          this->masks(warp, buffer.index)[lane] = make_uint4(above[0], above[1], inside[0], inside[1]);
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

  // Takes up to kWidth bits off a mask and loads their scores.
  __device__ static __forceinline__ void drain_load(uint32_t& mask, uint32_t (&bit)[kWidth],
                                                    int (&index)[kWidth], float (&score)[kWidth],
                                                    uint32_t from) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      bit[i] = mask & -mask;
      mask ^= bit[i];
      index[i] = 31 - __clz(static_cast<int>(bit[i] | 1));  // 0 once the mask is used up: read, not used
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(score[i]) : "r"(from + index[i] * 128) : "memory");
    }
  }

  // Scores onto the row's list, unless they are above the bracket: then into `hits`. Without branches.
  __device__ static __forceinline__ void drain_store(DrainRow& row, uint32_t& hits,
                                                     const uint32_t (&bit)[kWidth],
                                                     const int (&index)[kWidth], const float (&score)[kWidth],
                                                     int code, uint8_t* base) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      bool keep = bit[i] != 0;
      if constexpr (!kFewInside) {
        const bool hit = score[i] > row.hi;
        hits |= hit ? bit[i] : 0;
        keep = keep && !hit;
      }
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
      if (!choose_slots(item)) continue;
      const int index = 2 * static_cast<int>(rank) + warp / 4;
      const Slot slot = slot_at(p, item, index);
      const Tile t = worked_tile(index, slot);
      DrainRow rows[2];
      uint32_t begin[2];
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        rows[upper].to = begin[upper] =
            static_cast<uint32_t>(reinterpret_cast<uint8_t*>(candidates(row + 8 * upper) + lane % 4) - base);
        rows[upper].end = rows[upper].to + 32 * p.capacity;
        rows[upper].above = 0;
        rows[upper].hi = 0.0f;
        const int i = row % 64 + 8 * upper;
        if (!kFewInside && i < t.rows) {
          rows[upper].hi =
              __int_as_float(__ldcg(p.out.tie_index + row_index(p.call, t, slot.head, t.row0 + i)));
        }
      }
      uint32_t* const words = bitmap && t.rows > 0 ? bitmap_of(slot) : nullptr;
      for (int first = 0; first < kItemSlots;) {
        const Segment s = segment_at(p, item, first, state().worked);
        first = s.end;
        for (int block = 0; block < s.blocks; ++block) {
          barrier_wait(slot_full(warp, buffer.index), buffer.parity);
          uint4 mask = masks(warp, buffer.index)[lane];
          const uint32_t from = slots(warp, buffer.index) + lane * 4;
          while (__any_sync(~0u, (mask.z | mask.w) != 0)) {
            uint32_t bit0[kWidth], bit1[kWidth];
            int index0[kWidth], index1[kWidth];
            float score0[kWidth], score1[kWidth];
            drain_load(mask.z, bit0, index0, score0, from);
            drain_load(mask.w, bit1, index1, score1, from + 32 * 128);
            __syncwarp();  // keeps all loads ahead of all stores
            drain_store(rows[0], mask.x, bit0, index0, score0, block * 32, base);
            drain_store(rows[1], mask.y, bit1, index1, score1, block * 32, base);
          }
          __syncwarp();  // every lane has read its scores
          if (lane == 0) barrier_arrive(slot_empty(warp, buffer.index));
          buffer.advance();
          rows[0].above += __popc(mask.x);
          rows[1].above += __popc(mask.y);
          uint32_t any = mask.x | mask.y;
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
    // Nothing that follows from the warp is to be kept in a register while the item is swept.
    asm volatile("" : "+r"(warp));
    const int thread = warp * 32 + threadIdx.x % 32;
    auto* const bits = reinterpret_cast<uint32_t*>(memory);
    const int64_t words = bitmap_words(p.call);
    const bool bitmap = p.out.bitmap != nullptr;
    const bool staged = words <= Shared::kBitmapWords;
    cta_barrier_sync(kPick, 512);  // every slot is drained, every count is there
    if (bitmap && staged) {
      for (int i = thread; i < 2 * words; i += 512) bits[i] = 0;
    }
    if (thread < kCtaRows) {
      const int index = 2 * static_cast<int>(rank) + thread / kTileRows;
      const Slot slot = slot_at(p, item, index);
      const Tile t = worked_tile(index, slot);
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
    cta_barrier_sync(kPick, 512);
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
    cta_barrier_sync(kPick, 512);
    if (bitmap && staged) finish_bitmap(item, thread, bits);
    if (thread < 2) {
      const int index = 2 * static_cast<int>(rank) + thread;
      const Slot slot = slot_at(p, item, index);
      if (slot.tile >= 0 && (state().worked >> index & 1) != 0) {
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
      const int index = 2 * static_cast<int>(rank) + half;
      const Slot slot = slot_at(p, item, index);
      const Tile t = worked_tile(index, slot);
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

template <typename T, int D, bool kFewInside>
__global__ void __launch_bounds__(kSweepThreads, 1) __cluster_dims__(2, 1, 1)
    sweep_kernel(const __grid_constant__ CUtensorMap key_map, const __grid_constant__ SelectParams p) {
  using Shared = SweepShared<D>;
  extern __shared__ uint8_t shared_raw[];
  uint8_t* const memory = shared_raw + ((1024 - (shared_address(shared_raw) & 1023)) & 1023);
  Sweep<T, D, kFewInside> sweep{p, memory, shared_address(memory), cluster_rank()};
  if (threadIdx.x == 0) {
    sweep.keys().init();
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
