// What the kernels of the fused selection share: their parameters, how query tiles are grouped into items,
// and the layout of a warp's scores.
#pragma once

#include <cstdint>

#include "../../params.h"
#include "../common/sequence.cuh"
#include "../params.h"
#include "hopper.cuh"

namespace topk_attn::cuda::sm90 {

// Keys of one step of the sweep, and of one mask word quadruple.
inline constexpr int kBlockKeys = 128;

// Zeroed before every call.
struct SelectCounters {
  int32_t next_item;        // of the sweep
  int32_t next_count_item;  // of the counting pass
  int32_t repairs;          // of repair_list
  int32_t rebuilds;         // of rebuild_list
};

// Values of SelectParams::mark_count beyond any count: what is still to be done with a tile.
inline constexpr int32_t kToSweep = 0x7fffffff;  // the sweep takes it
inline constexpr int32_t kToCount = 0x7ffffffe;  // the counting pass takes it and then decides

struct SelectParams {
  Call call;
  Selection out;
  int32_t group;         // query heads of a KV head
  int32_t items_per_kv;  // items of one KV head
  int32_t items;
  int32_t sample_step;  // one key in this many is sampled
  float margin;         // half width of the bracket in standard deviations of the sampled rank
  int32_t capacity;     // candidates that one lane may keep for one row
  float settled_share;  // of its keys marked: a tile is settled up to here, swept beyond
  SelectCounters* counters;
  int32_t* mark_count;    // heads x num_tiles: marked keys, or kToSweep, kToCount; null: sweep every tile
  uint64_t* unsettled;    // heads x num_tiles: rows that the certificate refused
  uint32_t* rebuild;      // heads x num_tiles: nonzero: the bitmap holds keys that no row keeps
  int32_t* repair_list;   // entries (head * num_tiles + tile) with unsettled rows, in any order
  int32_t* rebuild_list;  // entries to rebuild, in any order
  uint2* candidates;      // CTA x row x capacity x 4 lanes: (score, key code)
  int32_t* scores;        // repair: CTA x max_k order keys; shares the memory of candidates
  int32_t repair_ctas;
};

// Query tile and head of a slot. An item is 4 consecutive slots of one KV head, so that they share its keys:
// all heads of a group for one tile, then the next tile. Later tiles, which see more keys, come first.
inline constexpr int kItemSlots = 4;

struct Slot {
  int32_t tile;  // negative: unused
  int32_t head;
};

__device__ inline Slot slot_at(const SelectParams& p, int item, int index) {
  const int kv_head = item / p.items_per_kv;
  const int slot = (item - kv_head * p.items_per_kv) * kItemSlots + index;
  Slot s;
  s.tile = p.call.num_tiles - 1 - slot / p.group;
  s.head = kv_head * p.group + slot % p.group;
  return s;
}

__device__ inline Tile tile_of(const Call& c, const Slot& s) {
  return s.tile < 0 ? Tile{} : tile_at(c, s.tile);
}

// Whether the tile of a slot is settled from its marks: the sweep then leaves it alone.
__device__ inline bool is_settled(const SelectParams& p, int64_t entry, int seen) {
  return p.mark_count != nullptr && static_cast<float>(p.mark_count[entry]) <= p.settled_share * seen;
}

// Slots of an item, as bits, that the counting pass (kCount) or the sweep works for.
template <bool kCount>
__device__ inline uint32_t slots_of(const SelectParams& p, int item) {
  if (!kCount && p.mark_count == nullptr) return (1u << kItemSlots) - 1;
  uint32_t slots = 0;
  for (int i = 0; i < kItemSlots; ++i) {
    const Slot s = slot_at(p, item, i);
    if (s.tile < 0) continue;
    const int64_t entry = int64_t{s.head} * p.call.num_tiles + s.tile;
    const bool mine = kCount ? __ldcg(p.mark_count + entry) == kToCount
                             : !is_settled(p, entry, seen_end(p.call, tile_at(p.call, s.tile)));
    if (mine) slots |= 1u << i;
  }
  return slots;
}

// Slots [first, end) of an item that lie in one sequence: the part of an item that reads the same keys.
struct Segment {
  int32_t end;
  int32_t blocks;  // blocks of kBlockKeys keys that cover what any of their rows sees, of slots worked for
  int32_t k_begin;
  int32_t batch;
};

__device__ inline int sequence_of(const Call& c, int tile) {
  if (tile < 0) return -1;
  return c.tiles != nullptr ? c.tiles[tile].x : tile / ((c.tq + kTileRows - 1) / kTileRows);
}

__device__ inline Segment segment_at(const SelectParams& p, int item, int first, uint32_t slots) {
  const Call& c = p.call;
  Segment s{first, 0, 0, 0};
  const int sequence = sequence_of(c, slot_at(p, item, first).tile);
  while (s.end < kItemSlots) {
    const Slot slot = slot_at(p, item, s.end);
    if (sequence_of(c, slot.tile) != sequence) break;
    const Tile t = tile_of(c, slot);
    if ((slots >> s.end & 1) != 0) {
      s.blocks = max(s.blocks, (seen_end(c, t) + kBlockKeys - 1) / kBlockKeys);
    }
    s.k_begin = t.k_begin;
    s.batch = t.batch;
    ++s.end;
  }
  return s;
}

// A fragments of 64 rows of Q for wgmma, straight from global memory: this thread's rows are 16 * warp + lane
// / 4 and 8 more. Rows beyond the tile are zeros.
template <typename T, int D>
__device__ inline void load_query(uint32_t (&q)[D / 4], const Call& c, const Tile& t, int head) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const bool exists = row + 8 * upper < t.rows;
    const auto* source = reinterpret_cast<const uint32_t*>(
        row_pointer<const T>(c.q, t.batch, int64_t{t.q_begin} + t.row0 + row + 8 * upper, head));
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      q[4 * step + upper] = exists ? __ldg(source + step * 8 + lane % 4) : 0;
      q[4 * step + 2 + upper] = exists ? __ldg(source + step * 8 + 4 + lane % 4) : 0;
    }
  }
}

// Of a block of 128 keys, lane `quad_lane` of a quad holds the keys 8 g + 2 quad_lane + e (g < 16, e < 2) of
// a row. Bit 2 g + e of its mask word stands for that key.
__device__ inline int key_of_bit(int bit, int quad_lane) {
  return 8 * (bit >> 1) + 2 * quad_lane + (bit & 1);
}

// Mask word with the first `visible` keys of the block.
__device__ inline uint32_t visible_mask(int visible, int quad_lane) {
  const int bits = 2 * (visible >> 3) + min(max((visible & 7) - 2 * quad_lane, 0), 2);
  return visible <= 0 ? 0u : bits >= 32 ? ~0u : (1u << bits) - 1;
}

// Bits of keys [32 * word, 32 * word + 32) in ascending order, from the mask words of the four lanes.
__device__ inline uint32_t ascending_bits(const uint4& masks, int word) {
  const uint32_t lanes[4] = {masks.x, masks.y, masks.z, masks.w};
  uint32_t bits = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const uint32_t x = lanes[t] >> (8 * word) & 0xff;
    bits |= ((x & 0x03) | (x & 0x0c) << 6 | (x & 0x30) << 12 | (x & 0xc0) << 18) << (2 * t);
  }
  return bits;
}

}  // namespace topk_attn::cuda::sm90
