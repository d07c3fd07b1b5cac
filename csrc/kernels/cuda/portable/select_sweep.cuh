// Main step of the fused selection: one Q K^T pass over all keys that logs, per row, the scores at or above
// the bracket's lower end; then the exact pick.
//
// Blocks are persistent and take items in turn, long ones first. Behind each product of 32 rows and 32 keys a
// warp compares its scores with lo and stores those above into fixed slots of shared memory, with a bit mask:
// three instructions a score, no pointers. The few bits are then walked, one a lane and turn, and the
// candidates packed, a vote giving each its place, into a ring of the warp that leaves for its log in global
// memory 256 bytes at a time: what candidates cost is their traffic, and that is all full sectors. No warp
// waits for another but for the stages of K.
#pragma once

#include "select_params.cuh"
#include "select_pick.cuh"

namespace topk_attn::cuda::portable {

inline constexpr int kSweepStages = 2;
inline constexpr int kSlotBytes = 32 * 32 * 4;  // of a warp: bit-major, then lane
inline constexpr int kRing = 64;                // candidates of a warp that have not left
inline constexpr int kRingBytes = kRing * 8;    // behind the warp's slots
inline constexpr int kSweepWarpBytes = kSlotBytes + kRingBytes;

template <int D>
struct SweepShared {
  static constexpr int kSlots = kSweepStages * kSelectKeys * D * 2;
  static constexpr int kSweepEnd = kSlots + kSelectWarps * kSweepWarpBytes;
  // The pick's bins and lists lie where stages and slots were.
  static constexpr int kPickEnd = kSelectWarps * kPickBytes;
  static constexpr int kRows = kSweepEnd > kPickEnd ? kSweepEnd : kPickEnd;
  static constexpr int kListed = kRows + kSelectWarps * kWarpRows * 32;
  static constexpr int kBytes = kListed + kSelectWarps * kWarpRows * 4;
};

// A score at or above `bound`, or NaN: stored, and its bit set.
template <int kBit>
__device__ __forceinline__ void gate(uint32_t& mask, uint32_t slots, float score, float bound) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.geu.f32 p, %2, %3;\n"
      "@p st.shared.f32 [%1 + %4], %2;\n"
      "@p or.b32 %0, %0, %5;\n}"
      : "+r"(mask)
      : "r"(slots), "f"(score), "f"(bound), "n"(kBit * 128), "n"(1u << kBit)
      : "memory");
}

template <int kBit = 0>
__device__ __forceinline__ void gate_all(uint32_t& mask, uint32_t slots, const float (&s)[2][4][4],
                                         const float (&lo)[4]) {
  if constexpr (kBit < 32) {
    constexpr int i = kBit / 8;
    gate<kBit>(mask, slots, s[i / 2][kBit / 2 % 4][i % 2 * 2 + kBit % 2], lo[i]);
    gate_all<kBit + 1>(mask, slots, s, lo);
  }
}

// A warp's log: the candidates of the last 32 begun lie in the ring, those before in global memory.
struct Log {
  uint32_t slots;  // shared address of this lane's slots
  int32_t count;

  __device__ static uint2* memory(const SelectParams& p) {
    const int warp = static_cast<int>(blockIdx.x) * kSelectWarps + static_cast<int>(threadIdx.x) / 32;
    return p.logs + int64_t{warp} * p.capacity;
  }

  // Sends `n` candidates from `first`, a multiple of 32. What does not fit is dropped; `count` tells.
  __device__ __forceinline__ void send(const SelectParams& p, int first, int n) const {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    uint2 entry;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(entry.x), "=r"(entry.y)
                 : "r"((slots & ~127u) + kSlotBytes + (static_cast<uint32_t>(first + lane) % kRing) * 8)
                 : "memory");
    if (lane < n && first < p.capacity) memory(p)[first + lane] = entry;
    __syncwarp();
  }

  // The scores whose bits are set, from the slots of this lane. `code` is that of bit 0.
  __device__ __forceinline__ void append(const SelectParams& p, uint32_t mask, uint32_t code) {
    const uint32_t ring = (slots & ~127u) + kSlotBytes;
    const uint32_t below = (1u << (threadIdx.x % 32)) - 1;
    uint32_t active;
    while ((active = __ballot_sync(~0u, mask != 0)) != 0) {
      const int bit = 31 - __clz(static_cast<int>(mask));
      const uint32_t at = ring + static_cast<uint32_t>(count + __popc(active & below)) % kRing * 8;
      if (mask != 0) {
        float score;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(score) : "r"(slots + bit * 128) : "memory");
        // Row 8 * (bit / 8), key 8 * (bit / 2 % 4) + bit % 2.
        const uint32_t mine = code + ((bit & 24) << kKeyBits) + ((bit & 6) << 2) + (bit & 1);
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(__float_as_uint(score)), "r"(mine)
                     : "memory");
        mask ^= 1u << bit;
      }
      const int full = count & ~31;
      count += __popc(active);
      if (count - full >= 32) send(p, full, 32);
    }
  }
};

// Logs the candidates of the warp's rows among the slots of one sequence, from slot `first` of an item.
// Returns where the next sequence begins.
template <typename T, int D>
__device__ __forceinline__ int sweep_segment(const SelectParams& p, const volatile int& current, int first,
                                             uint32_t base, Log& log) {
  const int item = current;
  const Call& c = p.call;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const WarpRows w = warp_rows(p, item);
  uint32_t q[2][D / 16][4];
  load_query<T, D>(q, c, w);
  float lo[4];
  const int row0 = w.t.row0 + w.first + g;
  int most = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // What a row that does not exist lets pass, NaN, the pick ignores.
    lo[i] = __int_as_float(0x7f800000);
    if (g + 8 * i < w.count) lo[i] = __ldcg(p.out.threshold + row_index(c, w.t, w.slot.head, row0 + 8 * i));
    most = max(most, seen_by(c, w, g + 8 * i));
  }
  const int kv_head = item / p.items_per_kv;
  const Segment s = segment_at(p, item, first);
  const int end = w.index >= first && w.index < s.end ? __reduce_max_sync(~0u, most) : 0;
  const T* k = row_pointer<const T>(c.k, s.t.batch, s.t.k_begin, kv_head);
  for_each_step<T, D, kSweepStages>(
      base, k, c.k.token, s.keys, c.head_dim, [&](uint32_t tile, int row, int key) {
        if (key >= end) return;
        float scores[2][4][4];
        product<T, D>(scores, q, tile, row);
        uint32_t mask = 0;
        gate_all(mask, log.slots, scores, lo);
        if (key + kStepKeys + kWarpRows > end) {  // some row may not see all of the keys
          // Seldom: what is needed for it is worked out again, for the sake of registers.
          mask &= visible_bits(c, warp_rows(p, current), key);
        }
        log.append(p, mask, static_cast<uint32_t>(lane / 4 << kKeyBits | (key + lane % 4 * 2)));
      });
  return s.end;
}

// Settles the warp's rows, lane r row r.
static __device__ __noinline__ void pick_item(const SelectParams& p, int item, const Log& log,
                                              const PickShared& pick) {
  const Call& c = p.call;
  const int lane = threadIdx.x % 32;
  const WarpRows w = warp_rows(p, item);
  const bool exists = lane < w.count;
  const int row = w.t.row0 + w.first + (exists ? lane : 0);
  const int64_t at = exists ? row_index(c, w.t, w.slot.head, row) : 0;
  const int kept = exists ? static_cast<int>(row_plan(c, w.t, row).kept) : -1;
  const int64_t entry = int64_t{w.slot.head} * c.num_tiles + w.slot.tile;
  const bool overflow = log.count > p.capacity;
  Picked picked{__ballot_sync(~0u, kept > 0), INT32_MAX, -1};
  if (!overflow) {
    uint32_t* const words =
        p.out.bitmap == nullptr || w.count == 0 ? nullptr : p.out.bitmap + entry * bitmap_words(c);
    const float lo = exists ? __ldcg(p.out.threshold + at) : 0.0f;
    const float hint = exists ? __int_as_float(__ldcg(p.out.tie_index + at)) : 0.0f;
    picked = pick_rows(Log::memory(p), log.count, kept, lo, hint, pick, words);
  }
  if (exists && (picked.unsettled >> lane & 1u) == 0) {
    p.out.threshold[at] = order_score(picked.threshold);
    p.out.tie_index[at] = picked.tie_index;
  }
  if (lane == 0 && w.count > 0 && picked.unsettled != 0) {
    const int64_t half = 2 * entry + w.first / kWarpRows;
    p.unsettled[half] = picked.unsettled;
    p.repair_list[atomicAdd(&p.counters->repairs, 1)] = static_cast<int32_t>(half);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kSelectThreads, 3) sweep_kernel(const __grid_constant__ SelectParams p) {
  using Shared = SweepShared<D>;
  extern __shared__ __align__(512) uint8_t shared[];
  __shared__ volatile int current;  // the item
  const uint32_t base = shared_address(shared);
  Log log;
  log.slots = base + Shared::kSlots + threadIdx.x / 32 * kSweepWarpBytes + threadIdx.x % 32 * 4;
  if (threadIdx.x == 0) current = blockIdx.x;
  __syncthreads();
  while (current < p.items) {
    log.count = 0;
    for (int first = 0; first < kItemSlots;) first = sweep_segment<T, D>(p, current, first, base, log);
    log.send(p, log.count & ~31, log.count % 32);
    const uint32_t warp = threadIdx.x / 32;
    PickShared pick;
    pick.bins = reinterpret_cast<uint32_t*>(shared + warp * kPickBytes);
    pick.list = reinterpret_cast<uint2*>(pick.bins + kWarpRows * kPickBins);
    pick.rows = reinterpret_cast<PickRow*>(shared + Shared::kRows) + warp * kWarpRows;
    pick.listed = reinterpret_cast<int32_t*>(shared + Shared::kListed) + warp * kWarpRows;
    pick_item(p, current, log, pick);
    __syncthreads();  // everybody has picked
    if (threadIdx.x == 0) current = atomicAdd(&p.counters->next_item, 1) + p.sweep_blocks;
    __syncthreads();
  }
}

}  // namespace topk_attn::cuda::portable
