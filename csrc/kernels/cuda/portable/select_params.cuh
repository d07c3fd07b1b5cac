// What the kernels of the fused selection share: their parameters, how query tiles are dealt to thread blocks
// and warps, and the product of a warp.
//
// A block of four warps takes an item: two (head, tile) slots of one KV head, 128 rows, 32 a warp. A warp
// multiplies its rows, whose Q stays in registers, with 32 keys at a time: each fragment of K that ldmatrix
// reads serves four products, so that tensor cores and not shared memory are what limits.
#pragma once

#include "select.h"
#include "tile.cuh"

namespace topk_attn::cuda::portable {

inline constexpr int kSelectThreads = 128;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kWarpRows = 32;
inline constexpr int kItemSlots = kSelectWarps * kWarpRows / kTileRows;
inline constexpr int kSelectKeys = 64;  // keys of a stage of the pipeline
inline constexpr int kStepKeys = 32;    // keys of a warp's step: one word of the bitmap
// A candidate is (bits of the score, row of the warp << 27 | key).
inline constexpr int kKeyBits = 27;

// Zeroed before every call.
struct SelectCounters {
  int32_t next_item;
  int32_t repairs;  // of repair_list
};

struct SelectParams {
  Call call;
  Selection out;
  int32_t group;         // query heads of a KV head
  int32_t items_per_kv;  // items of one KV head
  int32_t items;
  int32_t sample_step;  // one key in this many is sampled
  float margin;         // half width of the bracket in standard deviations of the sampled rank
  int32_t capacity;     // candidates of a warp's log, a multiple of 32
  int32_t sweep_blocks;
  int32_t repair_blocks;
  SelectCounters* counters;
  uint32_t* unsettled;   // (entry, half of the tile): rows that the sweep could not settle
  int32_t* repair_list;  // 2 * entry + half of those that are not zero, in any order
  uint2* logs;           // block x warp x capacity
  float* scores;         // repair: block x 16 rows x score_stride; shares the memory of the logs
  int64_t score_stride;
};

// Query tile and head of a slot: all heads of a group for one tile, then the next tile. Later tiles, which
// see more keys, come first.
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

__device__ inline int sequence_of(const Call& c, int tile) {
  if (tile < 0) return -1;
  return c.tiles != nullptr ? c.tiles[tile].x : tile / ((c.tq + kTileRows - 1) / kTileRows);
}

// Slots [first, end) of an item that lie in one sequence, and so read the same keys.
struct Segment {
  int32_t end;
  int32_t keys;  // keys [0, keys) are all that any of their rows sees
  Tile t;        // of the first of them
};

__device__ inline Segment segment_at(const SelectParams& p, int item, int first) {
  Segment s;
  const Slot slot = slot_at(p, item, first);
  s.t = tile_of(p.call, slot);
  s.keys = seen_end(p.call, s.t);
  s.end = first + 1;
  const int sequence = sequence_of(p.call, slot.tile);
  while (s.end < kItemSlots) {
    const Slot next = slot_at(p, item, s.end);
    if (sequence_of(p.call, next.tile) != sequence) break;
    s.keys = max(s.keys, seen_end(p.call, tile_of(p.call, next)));
    ++s.end;
  }
  return s;
}

// The rows of a warp: tile rows first .. first + 31 of a slot. Lane 4 g + t holds rows g + 8 i of them (i <
// 4).
struct WarpRows {
  Slot slot;
  Tile t;
  int32_t index;  // of the slot in its item
  int32_t first;
  int32_t count;  // how many exist
};

__device__ inline WarpRows warp_rows(const SelectParams& p, int item) {
  WarpRows w;
  const int warp = threadIdx.x / 32;
  w.index = warp / (kTileRows / kWarpRows);
  w.slot = slot_at(p, item, w.index);
  w.t = tile_of(p.call, w.slot);
  w.first = warp % (kTileRows / kWarpRows) * kWarpRows;
  w.count = max(0, min(kWarpRows, w.t.rows - w.first));
  return w;
}

// A fragments of a warp's 32 rows of Q, straight from global memory: [rows 16 m ..][step of 16 channels].
// Rows and channels that do not exist are zeros.
template <typename T, int D>
__device__ __forceinline__ void load_query(uint32_t (&q)[2][D / 16][4], const Call& c, const WarpRows& w) {
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * i;
    const bool exists = row < w.count;
    const T* source = row_pointer<const T>(
        c.q, w.t.batch, int64_t{w.t.q_begin} + w.t.row0 + w.first + (exists ? row : 0), w.slot.head);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = 16 * step + 8 * half + pair;
        q[i / 2][step][i % 2 + 2 * half] =
            exists && channel < c.head_dim ? __ldg(reinterpret_cast<const uint32_t*>(source + channel)) : 0;
      }
    }
  }
}

// Scores of a warp's rows with 32 keys, the rows of `tile` from `row`. Lane 4 g + t holds in s[m][n][e] row
// 16 m + 8 (e / 2) + g and key 8 n + 2 t + e % 2.
template <typename T, int D>
__device__ __forceinline__ void product(float (&s)[2][4][4], const uint32_t (&q)[2][D / 16][4], uint32_t tile,
                                        int row) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
  }
  const uint32_t at = b_address<D>(tile, row);
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t b[4];
      load_matrix_x4(b, (at ^ (32 * step)) + n * 8 * (D * 2));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_16816<T>(s[m][n], q[m][step], b[0], b[1]);
        mma_16816<T>(s[m][n + 1], q[m][step], b[2], b[3]);
      }
    }
  }
}

// The same with the rows of Q from `q_row` of a tile in shared memory.
template <typename T, int D>
__device__ __forceinline__ void product(float (&s)[2][4][4], uint32_t q_tile, int q_row, uint32_t tile,
                                        int row) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
  }
  const uint32_t at = b_address<D>(tile, row);
  const uint32_t q_at = a_address<D>(q_tile, q_row);
#pragma unroll 2
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_matrix_x4(a[m], (q_at ^ (32 * step)) + m * 16 * (D * 2));
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t b[4];
      load_matrix_x4(b, (at ^ (32 * step)) + n * 8 * (D * 2));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_16816<T>(s[m][n], a[m], b[0], b[1]);
        mma_16816<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// How many keys row `row` of a warp sees; 0 if it does not exist.
__device__ __forceinline__ int seen_by(const Call& c, const WarpRows& w, int row) {
  const int index = w.t.row0 + w.first + row;
  return row < w.count ? static_cast<int>(visible(index, w.t.tq, w.t.tk, c.causal).end) : 0;
}

// Of the 32 keys from `key` the lane's bits 8 i + 2 n + e stand for its row g + 8 i and key 8 n + 2 t + e (e
// < 2). The bits of rows that see their key.
__device__ __forceinline__ uint32_t visible_bits(const Call& c, const WarpRows& w, int key) {
  const int lane = threadIdx.x % 32;
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int seen = max(seen_by(c, w, lane / 4 + 8 * i) - key, 0);
    const int bits = 2 * (seen >> 3) + min(max((seen & 7) - lane % 4 * 2, 0), 2);
    mask |= (bits >= 8 ? 0xffu : (1u << bits) - 1) << (8 * i);
  }
  return mask;
}

// Calls step(tile, row of the tile, first key of the step) for every 32 keys of `keys`, the copies of the
// next stage running meanwhile. All threads of the block call it. Key i lies at k + i * stride.
template <typename T, int D, int kStages, typename Step>
__device__ __forceinline__ void for_each_step(uint32_t stages, const T* k, int64_t stride, int keys,
                                              int channels, const Step& step) {
  constexpr uint32_t kBytes = kSelectKeys * D * 2;
  const int blocks = (keys + kSelectKeys - 1) / kSelectKeys;
  const auto load = [&](int block) {
    const int key = block * kSelectKeys;
    const uint32_t to = stages + block % kStages * kBytes;
    if (keys - key >= kSelectKeys && channels == D) {
      load_whole_tile<T, D, kSelectKeys, kSelectThreads>(to, k + key * stride, stride);
    } else {
      load_tile<T, D, kSelectKeys, kSelectThreads>(to, k + key * stride, stride, keys - key, channels);
    }
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < blocks) load(i);
    copy_commit();
  }
  for (int block = 0; block < blocks; ++block) {
    copy_wait<kStages - 2>();
    __syncthreads();  // the block's keys are there, and every warp is done with the stage that is filled now
    if (block + kStages - 1 < blocks) load(block + kStages - 1);
    copy_commit();
    const uint32_t tile = stages + block % kStages * kBytes;
#pragma unroll 1
    for (int row = 0; row < kSelectKeys; row += kStepKeys) step(tile, row, block * kSelectKeys + row);
  }
  copy_wait<0>();
  __syncthreads();
}

}  // namespace topk_attn::cuda::portable
