// Optional second step of the fused selection: one Q K^T pass without candidates. Per row it counts the keys
// at or above the bracket's lower end and those above its upper end, and narrows the bracket by interpolating
// between the two counts; per tile it marks the keys at or above the lower end of any row.
//
// Then it decides: where few keys of a tile are marked, the tile is settled from its marks (settle.h) and the
// sweep leaves it alone; elsewhere the marks are wiped and the sweep finds a bracket that holds some dozens
// of candidates, however many keys are kept. The counts only guide: what the sweep and settle() prove does
// not rest on them.
//
// A CTA takes an item of four tiles that read the same keys, one warpgroup each, all fed from one ring of key
// blocks. While one warpgroup counts (four instructions a score), the products of the other three keep the
// tensor cores busy, without any order among them. There is no room for a producer: one thread of the first
// warpgroup loads the keys. What a block is for lies beside it in the ring, so that warpgroups need nothing
// else to go from item to item. Nothing leaves the multiprocessor but the marks.
#pragma once

#include "select_cluster.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kCountThreads = kItemSlots * 128;

inline constexpr int kNoItem = -1;
inline constexpr int kLastItem = -2;

// What a block in the ring is for.
struct CountBlock {
  int32_t item;     // kLastItem: there are no more
  int32_t key;      // its first key
  uint32_t slots;   // slots of the item that read it
  uint32_t worked;  // slots that the item is counted for
};

// Where the loading thread is.
struct CountLoader {
  int32_t next_item;
  int32_t item;
  uint32_t worked;  // of the item
  int32_t slot;     // first of the next sequence
  uint32_t slots;   // of the present sequence
  int32_t key;      // next to load of it
  int32_t end;
  int32_t k_begin;
  int32_t batch;
  int32_t kv_head;
  bool unseen;  // no block of the item has been loaded
  bool ended;
};

struct CountState {
  CountLoader loader;
  int32_t marked[kItemSlots][4];  // of each warp
};

template <int D>
struct CountShared {
  static constexpr int kStages = D == 128 ? 6 : 12;
  static constexpr int kStageBytes = kBlockKeys * D * 2;
  static constexpr int kBlocks = kStages * kStageBytes;
  static constexpr int kBarriers = kBlocks + kStages * static_cast<int>(sizeof(CountBlock));  // full, empty
  static constexpr int kState = kBarriers + 2 * kStages * 8;
  static constexpr int kBytes = kState + static_cast<int>(sizeof(CountState));
};

// Which of 16 keys of a row are at or above the bracket's lower end (or NaN), and which above its upper end.
struct CountMasks {
  FloatBits marked;
  FloatBits above;
};

template <int kBit>
__device__ __forceinline__ void count_score(CountMasks& masks, float score, float lo, float hi) {
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.geu.f32 p, %2, %3;\n"
      "setp.gt.f32 q, %2, %4;\n"
      "@p add.f32 %0, %0, %5;\n"
      "@q add.f32 %1, %1, %5;\n}"
      : "+f"(masks.marked.sum), "+f"(masks.above.sum)
      : "f"(score), "f"(lo), "f"(hi), "f"(FloatBits::value(kBit)));
}

// Scores I .. 31 of half a block: see wgmma() for which is which.
template <int I = 0>
__device__ __forceinline__ void count_scores(CountMasks (&masks)[2], const float (&scores)[32],
                                             const float (&lo)[2], const float (&hi)[2]) {
  if constexpr (I < 32) {
    constexpr int kUpper = I >> 1 & 1;
    count_score<2 * (I / 4) + (I & 1)>(masks[kUpper], scores[I], lo[kUpper], hi[kUpper]);
    count_scores<I + 1>(masks, scores, lo, hi);
  }
}

// Puts the bits of half a block behind those of the half before it.
__device__ __forceinline__ void append_bits(uint32_t& bits, const FloatBits& half) {
  bits = __byte_perm(bits, __float_as_uint(half.sum), 0x5432);
}

struct Bracket {
  float lo;
  float hi;
};

// A narrower bracket for the W-th score, from the exact numbers of keys at or above `lo` and above `hi`. A
// bracket that lies too low is moved up; one that lies too high stays, since only keys above it are marked,
// and its row will be repaired.
__device__ inline Bracket narrow(Bracket b, int kept, int seen, int at_lo, int above_hi) {
  const float inf = __int_as_float(0x7f800000);
  if (!(b.lo > -inf && b.hi < inf && b.hi > b.lo) || kept < 1) return b;
  const float length = b.hi - b.lo;
  if (above_hi >= kept) return {b.hi, b.hi + length};
  if (at_lo < kept) return b;
  // log(rank / (n - rank)) falls about linearly with the score: exactly so where the tails of the scores are
  // exponential. Those of a normal distribution bend it by `bend` ranks at most.
  const float w = static_cast<float>(kept), most = static_cast<float>(at_lo), n = static_cast<float>(seen);
  const float least = fmaxf(static_cast<float>(above_hi), 0.5f);
  const auto place = [&](float rank) { return logf(rank / (n - rank + 0.5f)); };
  const float begin = place(most), fall = begin - place(least);
  if (!(fall > 1e-6f)) return b;
  const float inside = static_cast<float>(at_lo - above_hi);
  const float deviation = sqrtf(fmaxf(w - least, 0.0f) * (most - w) / inside);
  const float bend = 0.03f * fall * fall * w * (n - w) / n;
  const float margin = 4.0f * deviation + bend + 3.0f;
  const auto score_of = [&](float rank) { return b.lo + length * ((begin - place(rank)) / fall); };
  Bracket result = b;
  if (w + margin < most) result.lo = fmaxf(b.lo, score_of(w + margin));
  if (w - margin > least) result.hi = fminf(b.hi, score_of(w - margin));
  return result.hi > result.lo ? result : b;
}

template <typename T, int D>
struct Count {
  using Shared = CountShared<D>;
  using StageRing = Ring<Shared::kStages>;
  const SelectParams& p;
  uint8_t* memory;  // shared, 1,024-byte aligned
  uint32_t shared;  // its address

  __device__ uint32_t stage(int i) const { return shared + i * Shared::kStageBytes; }
  __device__ CountBlock& block(int i) const {
    return reinterpret_cast<CountBlock*>(memory + Shared::kBlocks)[i];
  }
  __device__ uint32_t full(int i) const { return shared + Shared::kBarriers + 8 * i; }
  __device__ uint32_t empty(int i) const { return full(Shared::kStages + i); }
  __device__ CountState& state() const { return *reinterpret_cast<CountState*>(memory + Shared::kState); }

  __device__ void init() const {
    for (int i = 0; i < Shared::kStages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), kCountThreads / 32);
    }
    barrier_init_fence();
    CountLoader& l = state().loader;
    l = CountLoader{};
    l.next_item = blockIdx.x;
    l.slot = kItemSlots;
  }

  // ---- loading, by one thread ----

  // Goes to the next item that is counted. False: there is none.
  __device__ bool load_item(CountLoader& l) const {
    do {
      l.item = l.next_item;
      if (l.item >= p.items) return false;
      l.next_item = atomicAdd(&p.counters->next_count_item, 1) + static_cast<int>(gridDim.x);
      l.worked = slots_of<true>(p, l.item);
    } while (l.worked == 0);
    l.kv_head = l.item / p.items_per_kv;
    l.slot = 0;
    l.unseen = true;
    return true;
  }

  // Fills stage `index`, which is empty.
  __device__ void load(const CUtensorMap* key_map, int index) const {
    CountLoader& l = state().loader;
    if (l.ended) return;
    while (l.key >= l.end) {
      if (l.slot < kItemSlots) {
        const Segment s = segment_at(p, l.item, l.slot, l.worked);
        l.slots = l.worked & ((1u << s.end) - (1u << l.slot));
        l.slot = s.end;
        l.key = 0;
        l.end = s.blocks * kBlockKeys;
        l.k_begin = s.k_begin;
        l.batch = s.batch;
        continue;
      }
      if (l.unseen) {  // its rows see nothing, but are to be decided
        l.unseen = false;
        block(index) = CountBlock{l.item, 0, 0, l.worked};
        barrier_arrive(full(index));
        return;
      }
      if (!load_item(l)) {
        l.ended = true;
        block(index) = CountBlock{kLastItem, 0, 0, 0};
        barrier_arrive(full(index));
        return;
      }
    }
    l.unseen = false;
    block(index) = CountBlock{l.item, l.key, l.slots, l.worked};
    barrier_expect(full(index), Shared::kStageBytes);
    for (int part = 0; part < D / 64; ++part) {
      tma_load(stage(index) + part * kBlockKeys * 128, key_map, full(index), part * 64, l.k_begin + l.key,
               l.kv_head, l.batch);
    }
    l.key += kBlockKeys;
  }

  // ---- counting ----

  // The rows of a thread.
  struct CountRows {
    float lo[2];
    float hi[2];
    int seen[2];
    int at_lo[2];
    int above_hi[2];
  };

  // By a warpgroup: multiplies its rows with a block of keys, adds to the counts, and marks keys in `words`
  // of the tile's bitmap, unless null.
  __device__ __forceinline__ void add_block(CountRows& rows, const uint32_t (&q)[D / 4], uint32_t stage,
                                            int key, uint32_t* words) const {
    const int lane = threadIdx.x % 32;
    uint32_t marked[2] = {0, 0}, above[2] = {0, 0};
    // Not unrolled: the scores of one half are all that there are registers for.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float scores[32];
      CountMasks masks[2];
      // The lower half of the descriptor, made known as the same in all lanes, and its steps, which do not
      // carry.
      const uint64_t keys = k_major(stage + half * kHalfKeys * 128);
      const uint32_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(keys));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const uint64_t at =
            (keys & ~uint64_t{0xffffffff}) | (low + static_cast<uint32_t>(k_step(k, kBlockKeys)));
        wgmma<T>(scores, q[4 * k], q[4 * k + 1], q[4 * k + 2], q[4 * k + 3], at, k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      count_scores(masks, scores, rows.lo, rows.hi);
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        append_bits(marked[upper], masks[upper].marked);
        append_bits(above[upper], masks[upper].above);
      }
    }
    if (min(rows.seen[0], rows.seen[1]) < key + kBlockKeys) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const uint32_t sees = visible_mask(rows.seen[upper] - key, lane % 4);
        marked[upper] &= sees;
        above[upper] &= sees;
      }
    }
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      rows.at_lo[upper] += __popc(marked[upper]);
      rows.above_hi[upper] += __popc(above[upper]);
    }
    uint32_t any = marked[0] | marked[1];
    any |= __shfl_xor_sync(~0u, any, 4);
    any |= __shfl_xor_sync(~0u, any, 8);
    any |= __shfl_xor_sync(~0u, any, 16);
    // In the order of the lanes for now; decide() puts the bits in place.
    if (words != nullptr && lane < 4 && any != 0) atomicOr(words + key / 32 + lane, any);
  }

  __device__ void run(const CUtensorMap* key_map) const {
    const int group = threadIdx.x / 128;
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shared::kStages; ++i) load(key_map, i);
    }
    __syncwarp();
    StageRing ring, refill;
    int item = kNoItem;
    bool mine = false;
    int end = 0;  // of the keys that the tile sees
    uint32_t* words = nullptr;
    uint32_t q[D / 4];
    CountRows rows;
    for (int step = 0;; ++step) {
      barrier_wait(full(ring.index), ring.parity);
      const CountBlock b = block(ring.index);
      if (b.item != item) {
        if (mine) finish(item, rows, words);
        item = b.item;
        if (item == kLastItem) break;
        mine = (b.worked >> group & 1) != 0;
        const Slot slot = slot_at(p, item, group);
        const Tile t = mine ? tile_of(p.call, slot) : Tile{};
        end = mine ? seen_end(p.call, t) : 0;
        const int64_t entry = int64_t{slot.head} * p.call.num_tiles + slot.tile;
        words = mine && p.out.bitmap != nullptr ? p.out.bitmap + entry * bitmap_words(p.call) : nullptr;
        load_query<T, D>(q, p.call, t, slot.head);
        rows = CountRows{};
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          if (row + 8 * upper < t.rows) {
            const int i = t.row0 + row + 8 * upper;
            const int64_t at = row_index(p.call, t, slot.head, i);
            rows.lo[upper] = __ldcg(p.out.threshold + at);
            rows.hi[upper] = __int_as_float(__ldcg(p.out.tie_index + at));
            rows.seen[upper] = static_cast<int>(visible(i, t.tq, t.tk, p.call.causal).end);
          }
        }
      }
      if ((b.slots >> group & 1) != 0 && b.key < end) {
        add_block(rows, q, stage(ring.index), b.key, words);
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(empty(ring.index));
      ring.advance();
      // Two blocks behind, so that the other warpgroups need not keep up exactly.
      if (step >= 2) {
        if (threadIdx.x == 0) {
          barrier_wait(empty(refill.index), refill.parity);
          load(key_map, refill.index);
        }
        __syncwarp();
        refill.advance();
      }
    }
  }

  // By a warpgroup, whose tile of `item` is counted.
  __device__ void finish(int item, const CountRows& rows, uint32_t* words) const {
    const int group = threadIdx.x / 128;
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const Slot slot = slot_at(p, item, group);
    const Tile t = tile_of(p.call, slot);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      int at_lo = rows.at_lo[upper], above_hi = rows.above_hi[upper];
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        at_lo += __shfl_xor_sync(~0u, at_lo, step);
        above_hi += __shfl_xor_sync(~0u, above_hi, step);
      }
      if (row + 8 * upper < t.rows && threadIdx.x % 4 == 0) {
        const int i = t.row0 + row + 8 * upper;
        const int64_t at = row_index(p.call, t, slot.head, i);
        const Bracket b =
            narrow({rows.lo[upper], rows.hi[upper]}, static_cast<int>(row_plan(p.call, t, i).kept),
                   rows.seen[upper], at_lo, above_hi);
        p.out.threshold[at] = b.lo;
        p.out.tie_index[at] = __float_as_int(b.hi);
      }
    }
    decide(int64_t{slot.head} * p.call.num_tiles + slot.tile, t, words, group);
  }

  // By a warpgroup: its tile's marks in ascending order and their number, or no marks if they are too many.
  __device__ void decide(int64_t entry, const Tile& t, uint32_t* words, int group) const {
    const int thread = threadIdx.x % 128;
    const int barrier = 1 + group;
    __threadfence();
    cta_barrier_sync(barrier, 128);  // every mark is there
    int32_t next = kToSweep;
    if (words != nullptr) {
      auto* const blocks = reinterpret_cast<uint4*>(words);
      const int seen = seen_end(p.call, t);
      const int count = (seen + kBlockKeys - 1) / kBlockKeys;
      int marked = 0;
      for (int block = thread; block < count; block += 128) {
        const uint4 lanes = __ldcg(blocks + block);
        marked += __popc(lanes.x) + __popc(lanes.y) + __popc(lanes.z) + __popc(lanes.w);
        blocks[block] = make_uint4(ascending_bits(lanes, 0), ascending_bits(lanes, 1),
                                   ascending_bits(lanes, 2), ascending_bits(lanes, 3));
      }
      marked = static_cast<int>(__reduce_add_sync(~0u, marked));
      if (thread % 32 == 0) state().marked[group][thread / 32] = marked;
      cta_barrier_sync(barrier, 128);
      const int32_t* const parts = state().marked[group];
      marked = parts[0] + parts[1] + parts[2] + parts[3];
      if (static_cast<float>(marked) <= p.settled_share * seen) {
        next = marked;
      } else {
        for (int block = thread; block < count; block += 128) blocks[block] = make_uint4(0, 0, 0, 0);
      }
    }
    if (thread == 0) p.mark_count[entry] = next;
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(kCountThreads, 1)
    count_kernel(const __grid_constant__ CUtensorMap key_map, const __grid_constant__ SelectParams p) {
  extern __shared__ uint8_t shared_raw[];
  uint8_t* const memory = shared_raw + ((1024 - (shared_address(shared_raw) & 1023)) & 1023);
  const Count<T, D> count{p, memory, shared_address(memory)};
  if (threadIdx.x == 0) count.init();
  __syncthreads();
  count.run(&key_map);
}

// Settled tiles whose marks did not prove every row: to be repaired, and their bitmaps rebuilt, since they
// hold all marks.
__global__ void __launch_bounds__(256) list_unproven_kernel(const __grid_constant__ SelectParams p) {
  const int64_t entry = int64_t{blockIdx.x} * 256 + threadIdx.x;
  const Call& c = p.call;
  if (entry >= int64_t{c.heads} * c.num_tiles) return;
  const int seen = seen_end(c, tile_at(c, static_cast<int>(entry % c.num_tiles)));
  if (!is_settled(p, entry, seen)) return;
  const bool unproven = p.unsettled[entry] != 0;
  p.rebuild[entry] = unproven;
  if (!unproven) return;
  p.repair_list[atomicAdd(&p.counters->repairs, 1)] = static_cast<int32_t>(entry);
  p.rebuild_list[atomicAdd(&p.counters->rebuilds, 1)] = static_cast<int32_t>(entry);
}

}  // namespace topk_attn::cuda::sm90
