// The masked dense backward apart from its products: shared memory, the thread block's keys, the walk over
// query tiles, and the four warps that feed the two warpgroups which multiply (masked_backward.cuh).
#pragma once

#include "masked_rows.cuh"
#include "masked_scratch.h"

namespace topk_attn::cuda::sm90 {

template <int D>
struct BackwardShape {
  static constexpr int kThreads = 384;
  static constexpr int kStages = 2;
  static constexpr int kKBytes = kBlockKeys * D * 2;
  static constexpr int kQBytes = kTileRows * D * 2;
  static constexpr int kDsBytes = kBlockKeys * kTileRows * 2;
  static constexpr int kDqFloats = kTileRows * D;
  // Per-row values of a stage, arrays of kTileRows.
  enum Row : int { kLse, kDelta, kBound, kThreshold, kAbove, kTie, kSeen, kSinks, kRecents, kRowArrays };
  static constexpr int kRowBytes = kRowArrays * kTileRows * 4;
  // Shared memory: K, V, Q [stage], dO [stage], dS [2], dQ, rows [stage], barriers and tests.
  static constexpr int kAtV = kKBytes;
  static constexpr int kAtQ = 2 * kKBytes;
  static constexpr int kAtDo = kAtQ + kStages * kQBytes;
  static constexpr int kAtDs = kAtDo + kStages * kQBytes;
  static constexpr int kAtDq = kAtDs + 2 * kDsBytes;
  static constexpr int kAtRows = kAtDq + kDqFloats * 4;
  static constexpr int kAtBarriers = kAtRows + kStages * kRowBytes;
  static constexpr int kSharedBytes = kAtBarriers + 128 + 1024;
  // Barriers, in bytes from kAtBarriers; those of a ring are 8 apart. Tests: two a stage, one of each row
  // warp.
  static constexpr int kKvFull = 0, kWhole = 8, kQFull = 16, kDoFull = 32, kQEmpty = 48, kDoEmpty = 64,
                       kDqFull = 80, kDqEmpty = 88, kTests = 96;
};

// A thread block's keys.
struct KeyBlock {
  Tile sequence;
  int kv_head;
  int first_slot;  // of the sequence's tiles: in tile_of, dense: the tile's number itself
  int k0;
  BlockOrder order;
  int first_row_tile;
  int row_tiles;
};

__device__ inline KeyBlock key_block(const Call& c, const BackwardScratch& w, int item) {
  const int blocks = (c.max_k + kBlockKeys - 1) / kBlockKeys;
  const int section = item / (w.section * blocks);
  const int width = min(w.section, c.kv_heads * c.batch - section * w.section);
  const int in_section = item % (w.section * blocks);
  const int chain = section * w.section + in_section % width;
  const int position = in_section / width;
  KeyBlock b;
  const int index = chain % c.batch;
  b.kv_head = chain / c.batch;
  b.sequence = sequence_at(c, index);
  Tile& t = b.sequence;
  if (c.tiles != nullptr && t.tq > 0) {
    // A document that got no tiles (it overlaps an earlier one) has no share in anybody's gradients.
    const int first = w.tile_of[t.q_begin / kTileRows + index];
    if (first < 0 || c.tiles[first].x != index) t.tq = t.tk = 0;
  }
  b.row_tiles = (t.tq + kTileRows - 1) / kTileRows;
  b.first_slot = c.tiles == nullptr ? index * b.row_tiles : t.q_begin / kTileRows + index;
  b.order = block_order(position, (t.tk + kBlockKeys - 1) / kBlockKeys, w.wave);
  b.k0 = b.order.block * kBlockKeys;
  const int first_row = c.causal ? max(0, b.k0 - (t.tk - t.tq)) : 0;
  b.first_row_tile = first_row / kTileRows;
  return b;
}

// One tile of a walk.
struct Step {
  int head;
  int64_t entry;  // head * num_tiles + tile
  Tile tile;
  bool kept;  // some row may keep a key of the block
};

// Calls body(step) for every masked tile that sees the block, in the order that all warps share. By a whole
// warp.
template <typename Body>
__device__ __forceinline__ void walk_tiles(const BackwardCall& f, const BackwardScratch& w, const KeyBlock& b,
                                           Body body) {
  const Call& c = f.call;
  const int group = c.heads / c.kv_heads;
  const int lane = threadIdx.x % 32;
  Tile tile = b.sequence;
  for (int head = b.kv_head * group; head < (b.kv_head + 1) * group; ++head) {
    for (int base = b.first_row_tile; base < b.row_tiles; base += 32) {
      const int r = base + lane;
      bool masked = false;
      bool kept = false;
      int index = 0;
      if (r < b.row_tiles) {
        const int slot = b.first_slot + r;
        index = c.tiles == nullptr ? slot : w.tile_of[slot];
        tile.row0 = r * kTileRows;
        tile.rows = min(kTileRows, tile.tq - tile.row0);
        const int seen = seen_end(c, tile);
        const int64_t entry = int64_t{head} * c.num_tiles + index;
        masked = index >= 0 && seen > b.k0 && !gathered(f.regimes, entry, seen);
        kept =
            masked && block_kept(f.bitmap == nullptr ? nullptr : f.bitmap + entry * w.words, b.order.block);
      }
      const uint32_t keeping = __ballot_sync(~0u, kept);
      for (uint32_t left = __ballot_sync(~0u, masked); left != 0; left &= left - 1) {
        const int bit = __ffs(left) - 1;
        Step step;
        step.head = head;
        step.entry = int64_t{head} * c.num_tiles + __shfl_sync(~0u, index, bit);
        step.tile = b.sequence;
        step.tile.row0 = (base + bit) * kTileRows;
        step.tile.rows = min(kTileRows, b.sequence.tq - step.tile.row0);
        step.kept = (keeping >> bit & 1) != 0;
        body(step);
      }
    }
  }
}

// Stage and parity of a ring of two.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    stage ^= 1;
    if (stage == 0) parity ^= 1;
  }
};

template <int D>
__device__ __forceinline__ void load_box(uint32_t at, const CUtensorMap& map, uint32_t barrier, int rows,
                                         int token, int head, int batch) {
#pragma unroll
  for (int part = 0; part < D / 64; ++part) {
    tma_load(at + part * rows * 128, &map, barrier, part * 64, token, head, batch);
  }
}

// The loading warp: K and V, then Q and dO of every step.
template <int D>
__device__ __forceinline__ void load_steps(const CUtensorMap& q_map, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const CUtensorMap& do_map,
                                           const BackwardCall& f, const BackwardScratch& w, const KeyBlock& b,
                                           uint32_t base) {
  using Shape = BackwardShape<D>;
  const uint32_t bars = base + Shape::kAtBarriers;
  const uint32_t whole = bars + Shape::kWhole;
  const int lane = threadIdx.x % 32;
  uint32_t whole_parity = 0;
  // Two boxes under one barrier. In a packed batch, rows past the end are the next document's: they are
  // cleared.
  const auto load_two = [&](uint32_t at0, const CUtensorMap& map0, uint32_t at1, const CUtensorMap& map1,
                            int rows, int good_rows, int token, int head, uint32_t full) {
    const bool partial = f.call.cu_q != nullptr && good_rows < rows;
    if (lane == 0) {
      const uint32_t barrier = partial ? whole : full;
      const int boxes = at1 == 0 ? 1 : 2;
      barrier_expect(barrier, boxes * rows * D * 2);
      load_box<D>(at0, map0, barrier, rows, token, head, b.sequence.batch);
      if (boxes == 2) load_box<D>(at1, map1, barrier, rows, token, head, b.sequence.batch);
    }
    if (partial) {
      barrier_wait(whole, whole_parity);
      whole_parity ^= 1;
      clear_rows<D / 64>(at0, rows, good_rows, lane);
      if (at1 != 0) clear_rows<D / 64>(at1, rows, good_rows, lane);
      if (lane == 0) barrier_arrive(full);
    }
    __syncwarp();
  };
  load_two(base, k_map, base + Shape::kAtV, v_map, kBlockKeys, min(kBlockKeys, b.sequence.tk - b.k0),
           b.sequence.k_begin + b.k0, b.kv_head, bars + Shape::kKvFull);
  Ring ring;
  walk_tiles(f, w, b, [&](const Step& step) {
    if (!step.kept) return;
    const Tile& t = step.tile;
    const int token = t.q_begin + t.row0;
    barrier_wait(bars + Shape::kQEmpty + 8 * ring.stage, ring.parity ^ 1);
    load_two(base + Shape::kAtQ + ring.stage * Shape::kQBytes, q_map, 0, q_map, kTileRows, t.rows, token,
             step.head, bars + Shape::kQFull + 8 * ring.stage);
    barrier_wait(bars + Shape::kDoEmpty + 8 * ring.stage, ring.parity ^ 1);
    load_two(base + Shape::kAtDo + ring.stage * Shape::kQBytes, do_map, 0, do_map, kTileRows, t.rows, token,
             step.head, bars + Shape::kDoFull + 8 * ring.stage);
    ring.advance();
  });
  barrier_wait(bars + Shape::kQEmpty + 8 * ring.stage, ring.parity ^ 1);
  if (lane == 0) barrier_arrive(bars + Shape::kQFull + 8 * ring.stage);
}

// One of the two warps that prepare rows [first, first + 32) of each step. The warp's verdict on which test
// the block needs is -1 after the last step.
template <int D>
__device__ __forceinline__ void prepare_rows(const BackwardCall& f, const BackwardScratch& w,
                                             const KeyBlock& b, uint32_t base, uint8_t* shared, int first) {
  using Shape = BackwardShape<D>;
  const uint32_t bars = base + Shape::kAtBarriers;
  const int lane = threadIdx.x % 32;
  const int k0 = b.k0, k1 = b.k0 + kBlockKeys;
  volatile int* const tests =
      reinterpret_cast<int*>(shared + Shape::kAtBarriers + Shape::kTests) + first / 32;
  Ring ring;
  walk_tiles(f, w, b, [&](const Step& step) {
    if (!step.kept) return;
    const Call& c = f.call;
    const Tile& t = step.tile;
    const int row = t.row0 + first + lane;
    float threshold = 0.0f, lse = minus_infinity(), delta = 0.0f;
    int32_t tie = -1;
    if (first + lane < t.rows) {
      const int64_t at = row_index(c, t, step.head, row);
      threshold = f.threshold[at];
      tie = f.tie_index[at];
      lse = f.lse[at];
      delta = f.delta[at];
    }
    const RowFilter filter = tile_row_filter(c, t, row, threshold, tie);
    const bool general = !ordinary(filter) || k0 < filter.sinks ||
                         (filter.recents_begin < filter.seen && k1 > filter.recents_begin);
    const bool plain = filter.plain(k0, k1);
    const Test test = __any_sync(~0u, general) ? Test::kGeneral
                      : __all_sync(~0u, plain) ? Test::kPlain
                                               : Test::kEdge;
    const float above = next_above(filter.threshold);
    barrier_wait(bars + Shape::kQEmpty + 8 * ring.stage, ring.parity ^ 1);
    float* const rows =
        reinterpret_cast<float*>(shared + Shape::kAtRows + ring.stage * Shape::kRowBytes) + first + lane;
    // A row without kept mass has lse = -inf and P = 0: subtract +inf instead.
    rows[Shape::kLse * kTileRows] = lse == minus_infinity() ? -minus_infinity() : lse * 1.4426950408889634f;
    rows[Shape::kDelta * kTileRows] = delta;
    rows[Shape::kBound * kTileRows] = filter.tie_index >= k0 ? filter.threshold : above;
    rows[Shape::kThreshold * kTileRows] = filter.threshold;
    rows[Shape::kAbove * kTileRows] = above;
    rows[Shape::kTie * kTileRows] = __int_as_float(filter.tie_index);
    rows[Shape::kSeen * kTileRows] = __int_as_float(filter.seen);
    rows[Shape::kSinks * kTileRows] = __int_as_float(filter.sinks);
    rows[Shape::kRecents * kTileRows] = __int_as_float(filter.recents_begin);
    if (lane == 0) tests[2 * ring.stage] = static_cast<int>(test);
    __syncwarp();
    if (lane == 0) barrier_arrive(bars + Shape::kQFull + 8 * ring.stage);
    ring.advance();
  });
  barrier_wait(bars + Shape::kQEmpty + 8 * ring.stage, ring.parity ^ 1);
  if (lane == 0) {
    tests[2 * ring.stage] = -1;
    barrier_arrive(bars + Shape::kQFull + 8 * ring.stage);
  }
}

__device__ __forceinline__ int32_t turn_now(const int32_t* turn) {
  int32_t now;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  return now;
}
__device__ __forceinline__ void pass_turn(int32_t* turn) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
}

// The warp that adds each step's dQ to the tile's sum, in turn if the order is fixed.
//
// A turn is passed on once the addition is complete, which is waited for beside the next one. That completion
// comes from L2, where turns are counted and additions made alike, and nobody reads the sums before the
// kernel ends: the order in which L2 gets them is all that matters, so neither side needs a fence.
template <int D>
__device__ __forceinline__ void add_dq(const BackwardCall& f, const BackwardScratch& w, const KeyBlock& b,
                                       uint32_t base) {
  using Shape = BackwardShape<D>;
  const uint32_t bars = base + Shape::kAtBarriers;
  const bool ordered = w.wave != 0;
  const int lane = threadIdx.x % 32;
  uint32_t parity = 0;
  int32_t* previous = nullptr;  // turn of an addition that may not be complete yet
  walk_tiles(f, w, b, [&](const Step& step) {
    int32_t* const turn = w.turns + step.entry;
    if (!step.kept && !ordered) return;
    if (lane == 0) {
      int32_t now = ordered ? turn_now(turn) : 0;
      if (step.kept) barrier_wait(bars + Shape::kDqFull, parity);
      if (ordered) {
        const int mine = b.order.turn((seen_end(f.call, step.tile) - 1) / kBlockKeys);
        if (now != mine && previous != nullptr) {
          asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
          pass_turn(previous);
          previous = nullptr;
        }
        while (now != mine) now = turn_now(turn);
      }
      if (step.kept) {
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                         w.dq_sum + step.entry * Shape::kDqFloats),
                     "r"(base + Shape::kAtDq), "r"(Shape::kDqFloats * 4)
                     : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        if (previous != nullptr) {
          asm volatile("cp.async.bulk.wait_group 1;" ::: "memory");
          pass_turn(previous);
        }
        previous = ordered ? turn : nullptr;
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        barrier_arrive(bars + Shape::kDqEmpty);
      } else {
        pass_turn(turn);
      }
    }
    if (step.kept) parity ^= 1;
    __syncwarp();
  });
  if (previous != nullptr) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    pass_turn(previous);
  }
}

}  // namespace topk_attn::cuda::sm90
