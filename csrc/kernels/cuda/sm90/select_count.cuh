// Optional second step of the fused selection: one Q K^T pass without candidates. Per row it counts the keys
// at or above the bracket's lower end and those above its upper end, and narrows the bracket by interpolating
// between the two counts; per tile it marks the keys at or above the lower end of any row.
//
// Then it decides: where few keys of a tile are marked, the tile is settled from its marks (settle.h) and the
// sweep leaves it alone; elsewhere the marks are wiped and the sweep finds a bracket that holds some dozens
// of candidates, however many keys are kept. The counts only guide: what the sweep and settle() prove does
// not rest on them.
//
// Four instructions a score, hidden behind the products; nothing leaves the multiprocessor but the marks.
#pragma once

#include "select_cluster.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kCountThreads = 256 + 128;  // the producer is one thread of a warpgroup

template <int D>
struct CountShared {
  static constexpr int kStages = 8;
  static constexpr int kBarriers = kStages * kHalfKeys * D * 2;
  static constexpr int kState = kBarriers + 2 * kStages * 8;
  static constexpr int kBytes = kState + 64;
  using Keys = KeyRing<D, kStages, kBarriers>;
};

struct CountState {
  int32_t next_item;
  uint32_t worked;  // slots that the item is counted for
  int32_t pad[2];
  int32_t marked[2][4];  // of each product warp
};

// Which of 32 keys of a row are at or above the bracket's lower end (or NaN), and which above its upper end.
struct CountMasks {
  FloatBits marked[2];  // of each half of 16 keys
  FloatBits above[2];
};

template <int kHalf, int kBit>
__device__ __forceinline__ void count_score(CountMasks& masks, float score, float lo, float hi) {
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.geu.f32 p, %2, %3;\n"
      "setp.gt.f32 q, %2, %4;\n"
      "@p add.f32 %0, %0, %5;\n"
      "@q add.f32 %1, %1, %5;\n}"
      : "+f"(masks.marked[kHalf].sum), "+f"(masks.above[kHalf].sum)
      : "f"(score), "f"(lo), "f"(hi), "f"(FloatBits::value(kBit)));
}

template <int kHalf, int I = 0>
__device__ __forceinline__ void count_half(CountMasks (&masks)[2], const float (&scores)[32],
                                           const float (&lo)[2], const float (&hi)[2]) {
  if constexpr (I < 32) {
    constexpr int kUpper = I >> 1 & 1;
    count_score<kHalf, 2 * (I / 4) + (I & 1)>(masks[kUpper], scores[I], lo[kUpper], hi[kUpper]);
    count_half<kHalf, I + 1>(masks, scores, lo, hi);
  }
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
  using Keys = typename Shared::Keys;
  const SelectParams& p;
  uint8_t* memory;  // shared, 1,024-byte aligned
  uint32_t shared;  // its address
  uint32_t rank;    // of this CTA in its cluster

  __device__ Keys keys() const { return {shared}; }
  __device__ CountState& state() const { return *reinterpret_cast<CountState*>(memory + Shared::kState); }

  // All threads of the cluster, between items.
  __device__ int next_item() const {
    cluster_sync();
    return state().next_item;
  }

  // All threads of the cluster, once they know the item: which of its slots are counted. Their tiles' numbers
  // are replaced only after that.
  __device__ uint32_t choose_slots(int item) const {
    if (threadIdx.x == 0) state().worked = slots_of<true>(p, item);
    cluster_sync();
    return state().worked;
  }

  __device__ void produce(const CUtensorMap* key_map) const {
    const bool leader = threadIdx.x == 256;
    Ring<Keys::kCount> ring;
    for (int item = next_item(); item < p.items; item = next_item()) {
      choose_slots(item);
      if (leader) {
        if (rank == 0) fetch_item(&p.counters->next_count_item, shared + Shared::kState);
        keys().load_item(ring, p, key_map, item, shared + Shared::kState + 4);
      }
      __syncwarp();
    }
  }

  __device__ void multiply() const {
    const int group = threadIdx.x / 128;
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const Keys keys = this->keys();
    Ring<Keys::kCount> ring;
    if (group == 1) named_barrier_arrive(kTurn0, 256);
    for (int item = next_item(); item < p.items; item = next_item()) {
      const uint32_t worked = choose_slots(item);
      if (worked == 0) continue;
      const int index = 2 * static_cast<int>(rank) + group;
      const bool mine = (worked >> index & 1) != 0;
      const Slot slot = slot_at(p, item, index);
      const Tile t = mine ? tile_of(p.call, slot) : Tile{};
      const int64_t entry = int64_t{slot.head} * p.call.num_tiles + slot.tile;
      uint32_t* const words =
          mine && p.out.bitmap != nullptr ? p.out.bitmap + entry * bitmap_words(p.call) : nullptr;
      uint32_t q[D / 4];
      load_query<T, D>(q, p.call, t, slot.head);
      float lo[2] = {0.0f, 0.0f}, hi[2] = {0.0f, 0.0f};
      int seen[2] = {0, 0}, at_lo[2] = {0, 0}, above_hi[2] = {0, 0};
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        if (row + 8 * upper < t.rows) {
          const int i = t.row0 + row + 8 * upper;
          const int64_t at = row_index(p.call, t, slot.head, i);
          lo[upper] = __ldcg(p.out.threshold + at);
          hi[upper] = __int_as_float(__ldcg(p.out.tie_index + at));
          seen[upper] = static_cast<int>(visible(i, t.tq, t.tk, p.call.causal).end);
        }
      }
      for (int first = 0; first < kItemSlots;) {
        const Segment s = segment_at(p, item, first, worked);
        const bool reads = index >= first && index < s.end;  // this slot's keys
        first = s.end;
        for (int block = 0; block < s.blocks; ++block) {
          float scores0[32], scores1[32];
          const int stage0 = ring.index;
          named_barrier_sync(group == 0 ? kTurn0 : kTurn1, 256);
          barrier_wait(keys.full(stage0), ring.parity);
          wgmma_fence();
          product_half<T, D>(scores0, q, keys.stage(stage0));
          wgmma_commit();
          ring.advance();
          const int stage1 = ring.index;
          barrier_wait(keys.full(stage1), ring.parity);
          product_half<T, D>(scores1, q, keys.stage(stage1));
          wgmma_commit();
          ring.advance();
          named_barrier_arrive(group == 0 ? kTurn1 : kTurn0, 256);
          CountMasks masks[2];
          wgmma_wait<1>();
          keys.release(stage0);
          count_half<0>(masks, scores0, lo, hi);
          wgmma_wait<0>();
          keys.release(stage1);
          count_half<1>(masks, scores1, lo, hi);
          const int key = block * kBlockKeys;
          uint32_t marked[2], above[2];
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            marked[upper] = join_bits(masks[upper].marked[0], masks[upper].marked[1]);
            above[upper] = join_bits(masks[upper].above[0], masks[upper].above[1]);
          }
          if (!reads || min(seen[0], seen[1]) < key + kBlockKeys) {
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
              const uint32_t sees = reads ? visible_mask(seen[upper] - key, lane % 4) : 0;
              marked[upper] &= sees;
              above[upper] &= sees;
            }
          }
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            at_lo[upper] += __popc(marked[upper]);
            above_hi[upper] += __popc(above[upper]);
          }
          uint32_t any = marked[0] | marked[1];
          any |= __shfl_xor_sync(~0u, any, 4);
          any |= __shfl_xor_sync(~0u, any, 8);
          any |= __shfl_xor_sync(~0u, any, 16);
          // In the order of the lanes for now; decide() puts the bits in place.
          if (words != nullptr && lane < 4 && any != 0) atomicOr(words + block * 4 + lane, any);
        }
      }
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          at_lo[upper] += __shfl_xor_sync(~0u, at_lo[upper], step);
          above_hi[upper] += __shfl_xor_sync(~0u, above_hi[upper], step);
        }
        if (row + 8 * upper < t.rows && lane % 4 == 0) {
          const int i = t.row0 + row + 8 * upper;
          const int64_t at = row_index(p.call, t, slot.head, i);
          const Bracket b = narrow({lo[upper], hi[upper]}, static_cast<int>(row_plan(p.call, t, i).kept),
                                   seen[upper], at_lo[upper], above_hi[upper]);
          p.out.threshold[at] = b.lo;
          p.out.tie_index[at] = __float_as_int(b.hi);
        }
      }
      if (mine) decide(entry, t, words, group);
    }
  }

  // By a warpgroup: its tile's marks in ascending order and their number, or no marks if they are too many.
  __device__ void decide(int64_t entry, const Tile& t, uint32_t* words, int group) const {
    const int thread = threadIdx.x % 128;
    const int barrier = group == 0 ? kGroup0 : kGroup1;
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
__global__ void __launch_bounds__(kCountThreads, 1) __cluster_dims__(2, 1, 1)
    count_kernel(const __grid_constant__ CUtensorMap key_map, const __grid_constant__ SelectParams p) {
  extern __shared__ uint8_t shared_raw[];
  uint8_t* const memory = shared_raw + ((1024 - (shared_address(shared_raw) & 1023)) & 1023);
  const Count<T, D> count{p, memory, shared_address(memory), cluster_rank()};
  if (threadIdx.x == 0) {
    count.keys().init();
    barrier_init_fence();
    count.state().next_item = blockIdx.x / 2;
  }
  __syncthreads();
  if (threadIdx.x < 256) {
    count.multiply();
  } else {
    count.produce(&key_map);
  }
  cluster_sync();  // no CTA leaves while the other may still arrive at its barriers
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
