// Masked dense forward on sm_90a: out and lse of the masked tiles.
//
// One thread block takes kWarpgroups units (head, query tile) of one KV head and one sequence, a warpgroup
// each, and walks the key blocks that any of them keeps something of, in ascending order. One warp loads: Q
// once, K and V in rings of two stages by TMA. A warpgroup holds O (64 x D, float32), a block of scores (64 x
// 128) and the block's probabilities (16 bits) in registers; Q K^T of one block runs on the tensor cores
// beside P V of the block before, and the warpgroups take turns so that one's softmax hides behind the
// other's products. The schedule is that of FlashAttention-3 (Shah et al., 2024); the mask costs a comparison
// and a select per score.
//
// The exponent's reference is the row's running maximum, raised only when it is exceeded by more than 8 (in
// powers of 2), so that O is hardly ever rescaled.
//
// Cost: 2 products of 64 x 128 x D for each unit and key block, 4 * 128 * D bytes of K and V from L2 per
// block.
#pragma once

#include "masked_repair.cuh"
#include "masked_rows.cuh"

namespace topk_attn::cuda::sm90 {

template <int D>
struct ForwardShape {
  static constexpr int kWarpgroups = D == 64 ? 3 : 2;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kRegisters =
      D == 64 ? 160 : 240;  // of a thread that multiplies; the loader has 32 (24)
  static constexpr int kStages = 2;
  static constexpr int kQBytes = kTileRows * D * 2;
  static constexpr int kKBytes = kBlockKeys * D * 2;
  // Shared memory: Q [warpgroup], K [stage], V [stage], barriers and block numbers, row filters.
  static constexpr int kAtK = kWarpgroups * kQBytes;
  static constexpr int kAtV = kAtK + kStages * kKBytes;
  static constexpr int kAtBarriers = kAtV + kStages * kKBytes;
  static constexpr int kAtFilters = kAtBarriers + 128;
  static constexpr int kSharedBytes =
      kAtFilters + kWarpgroups * kTileRows * static_cast<int>(sizeof(RowFilter)) + 1024;
};

// One warpgroup's share of a thread block's work.
struct ForwardUnit {
  Tile tile;
  int head;
  int64_t entry;  // head * num_tiles + tile
  int seen;
  bool active;
};

__device__ inline bool same_sequence(const Tile& a, const Tile& b) {
  return a.batch == b.batch && a.q_begin == b.q_begin && a.k_begin == b.k_begin && a.tq == b.tq &&
         a.tk == b.tk;
}

// Unit `u` of a KV head: late tiles first (they are the heaviest), the heads of the group side by side.
__device__ inline ForwardUnit forward_unit(const ForwardCall& f, int kv_head, int u) {
  const Call& c = f.call;
  const int group = c.heads / c.kv_heads;
  ForwardUnit unit{};
  if (u >= c.num_tiles * group) return unit;
  const int index = c.num_tiles - 1 - u / group;
  unit.tile = tile_at(c, index);
  unit.head = kv_head * group + u % group;
  unit.entry = int64_t{unit.head} * c.num_tiles + index;
  unit.seen = seen_end(c, unit.tile);
  unit.active = unit.tile.rows > 0 && !gathered(f.regimes, unit.entry, unit.seen);
  return unit;
}

// The two rows of a thread of a score fragment, and what its warp knows of its 16 rows.
struct WarpRows {
  float threshold[2];
  float above[2];
  int tie[2];
  int lower;    // blocks from here on hold no sink; kNever: some threshold is not ordinary
  int upper;    // blocks up to here are seen by all rows and hold no recent key
  int recents;  // blocks up to here hold no recent key

  __device__ void init(const RowFilter& f0, const RowFilter& f1) {
    const RowFilter* f[2] = {&f0, &f1};
    int low = 0, high = kNever, recent = kNever;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      threshold[r] = f[r]->threshold;
      tie[r] = f[r]->tie_index;
      above[r] = next_above(f[r]->threshold);
      low = max(low, ordinary(*f[r]) ? f[r]->sinks : kNever);
      high = min(high, min(f[r]->seen, f[r]->recents_begin));
      recent = min(recent, f[r]->recents_begin < f[r]->seen ? f[r]->recents_begin : kNever);
    }
    lower = __reduce_max_sync(~0u, low);
    upper = __reduce_min_sync(~0u, high);
    recents = __reduce_min_sync(~0u, recent);
  }
  // For keys [k0, k1), the same for the whole warp.
  __device__ Test test(int k0, int k1) const {
    if (k0 < lower || k1 > recents) return Test::kGeneral;
    const bool tie_outside = (tie[0] < k0 || tie[0] >= k1 - 1) && (tie[1] < k0 || tie[1] >= k1 - 1);
    return k1 <= upper && __all_sync(~0u, tie_outside) ? Test::kPlain : Test::kEdge;
  }
};

// Scores that are not kept become -inf. `column` = 2 * (lane % 4): the thread's first key within each eight.
__device__ __forceinline__ void mask_scores(float (&s)[64], const WarpRows& rows, const RowFilter* f0,
                                            const RowFilter* f1, int k0, int column) {
  const Test test = rows.test(k0, k0 + kBlockKeys);
  if (test == Test::kPlain) {
    const float bound[2] = {rows.tie[0] >= k0 ? rows.threshold[0] : rows.above[0],
                            rows.tie[1] >= k0 ? rows.threshold[1] : rows.above[1]};
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = s[i] < bound[(i >> 1) & 1] ? minus_infinity() : s[i];
  } else if (test == Test::kEdge) {
    // Keys counted from the thread's first one, so that each compares with a constant.
    const int tie[2] = {rows.tie[0] - k0 - column, rows.tie[1] - k0 - column};
    const int seen[2] = {f0->seen - k0 - column, f1->seen - k0 - column};
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int r = (i >> 1) & 1;
      const int key = (i >> 2) * 8 + (i & 1);
      const float bound = key <= tie[r] ? rows.threshold[r] : rows.above[r];
      s[i] = key >= seen[r] || s[i] < bound ? minus_infinity() : s[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const RowFilter& f = (i >> 1) & 1 ? *f1 : *f0;
      const int key = k0 + column + (i >> 2) * 8 + (i & 1);
      s[i] = f.keeps(s[i], key) ? s[i] : minus_infinity();
    }
  }
}

// S = Q K^T, 64 x 128, from shared memory.
template <typename T, int D>
__device__ __forceinline__ void score_product(float (&s)[64], uint64_t q, uint64_t k) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    wgmma<T>(s, q + k_step(step, kTileRows), k + k_step(step, kBlockKeys), step > 0);
  }
}

// O += P V, P (64 x 128) in registers.
template <typename T, int D>
__device__ __forceinline__ void value_product(float (&o)[D / 2], const uint32_t (&p)[32], uint64_t v) {
#pragma unroll
  for (int step = 0; step < kBlockKeys / 16; ++step) {
    wgmma<T, Major::kMN>(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                         v + step * kMnStep, true);
  }
}

// The running softmax of a thread's two rows.
struct RunningSoftmax : RowReference {
  float sum[2] = {0.0f, 0.0f};     // of this thread's keys
  float factor[2] = {1.0f, 1.0f};  // by which O must be multiplied

  // Turns masked scores into probabilities relative to the reference. True if O must be rescaled.
  __device__ __forceinline__ bool step(float (&s)[64], float scale, float slack) {
    float high[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < 64; ++i) high[(i >> 1) & 1] = fmaxf(high[(i >> 1) & 1], s[i]);
    bool raised = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = fmaxf(high[r], __shfl_xor_sync(~0u, high[r], 1));
      high[r] = fmaxf(high[r], __shfl_xor_sync(~0u, high[r], 2));
      raised |= high[r] > reference[r] + slack;
    }
    const bool rescale = __any_sync(~0u, raised);
    if (rescale) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool up = high[r] > reference[r];
        factor[r] = up ? exp2_fast((reference[r] - high[r]) * scale) : 1.0f;
        reference[r] = up ? high[r] : reference[r];
        offset[r] = up ? high[r] * scale : offset[r];
        sum[r] *= factor[r];
      }
      large = any_large();
    }
    if (large) {
      const float raw[2] = {base(0), base(1)};
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] = exp2_fast((s[i] - raw[(i >> 1) & 1]) * scale);
    } else {
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] = exp2_fast(fmaf(s[i], scale, -offset[(i >> 1) & 1]));
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[(i >> 1) & 1] += s[i];
    return rescale;
  }
};

template <typename T>
__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[32], const float (&s)[64]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
}

// Loads Q of the active units, then K and V of every block that one of them keeps something of; ends the list
// of blocks with -1. By one warp.
template <int D>
__device__ __forceinline__ void load_blocks(const CUtensorMap& q_map, const CUtensorMap& k_map,
                                            const CUtensorMap& v_map, const ForwardCall& f,
                                            const ForwardUnit (&units)[ForwardShape<D>::kWarpgroups],
                                            int kv_head, int64_t words, uint32_t base,
                                            volatile int* block_of) {
  using Shape = ForwardShape<D>;
  const uint32_t barriers = base + Shape::kAtBarriers;
  const uint32_t q_full = barriers, k_full = barriers + 8, v_full = barriers + 24, k_empty = barriers + 40,
                 v_empty = barriers + 56, whole = barriers + 72;
  const int lane = threadIdx.x % 32;
  const uint32_t* bitmap[Shape::kWarpgroups];
  int end = 0;
  int loads = 0;
  Tile tile{};
#pragma unroll
  for (int w = 0; w < Shape::kWarpgroups; ++w) {
    if (!units[w].active) continue;
    bitmap[w] = f.bitmap == nullptr ? nullptr : f.bitmap + units[w].entry * words;
    end = max(end, units[w].seen);
    tile = units[w].tile;
    ++loads;
  }
  if (lane == 0) {
    barrier_expect(q_full, loads * Shape::kQBytes);
#pragma unroll
    for (int w = 0; w < Shape::kWarpgroups; ++w) {
      if (!units[w].active) continue;
#pragma unroll
      for (int part = 0; part < D / 64; ++part) {
        tma_load(base + w * Shape::kQBytes + part * kTileRows * 128, &q_map, q_full, part * 64,
                 units[w].tile.q_begin + units[w].tile.row0, units[w].head, units[w].tile.batch);
      }
    }
  }
  int stage = 0;
  uint32_t parity = 1;  // a fresh barrier's "previous" phase counts as complete
  uint32_t whole_parity = 0;
  const int blocks = (end + kBlockKeys - 1) / kBlockKeys;
  for (int first = 0; first < blocks; first += 32) {
    bool wanted = false;
    if (first + lane < blocks) {
#pragma unroll
      for (int w = 0; w < Shape::kWarpgroups; ++w) {
        wanted |= units[w].active && block_kept(bitmap[w], first + lane);
      }
    }
    for (uint32_t left = __ballot_sync(~0u, wanted); left != 0; left &= left - 1) {
      const int k0 = (first + __ffs(left) - 1) * kBlockKeys;
      const uint32_t k_at = base + Shape::kAtK + stage * Shape::kKBytes;
      const uint32_t v_at = base + Shape::kAtV + stage * Shape::kKBytes;
      // The rows after the last key of a packed document are the next document's.
      const bool partial = f.call.cu_k != nullptr && k0 + kBlockKeys > tile.tk;
      const uint32_t v_barrier = partial ? whole : v_full + 8 * stage;
      barrier_wait(k_empty + 8 * stage, parity);
      if (lane == 0) {
        block_of[stage] = k0;
        barrier_expect(k_full + 8 * stage, Shape::kKBytes);
#pragma unroll
        for (int part = 0; part < D / 64; ++part) {
          tma_load(k_at + part * kBlockKeys * 128, &k_map, k_full + 8 * stage, part * 64, tile.k_begin + k0,
                   kv_head, tile.batch);
        }
      }
      barrier_wait(v_empty + 8 * stage, parity);
      if (lane == 0) {
        barrier_expect(v_barrier, Shape::kKBytes);
#pragma unroll
        for (int part = 0; part < D / 64; ++part) {
          tma_load(v_at + part * kBlockKeys * 128, &v_map, v_barrier, part * 64, tile.k_begin + k0, kv_head,
                   tile.batch);
        }
      }
      if (partial) {
        barrier_wait(whole, whole_parity);
        whole_parity ^= 1;
        clear_rows<D / 64>(v_at, kBlockKeys, tile.tk - k0, lane);
        if (lane == 0) barrier_arrive(v_full + 8 * stage);
      }
      __syncwarp();
      stage ^= 1;
      if (stage == 0) parity ^= 1;
    }
  }
  barrier_wait(k_empty + 8 * stage, parity);
  if (lane == 0) {
    block_of[stage] = -1;
    barrier_arrive(k_full + 8 * stage);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(ForwardShape<D>::kThreads, 1)
    masked_forward_kernel(const __grid_constant__ CUtensorMap q_map,
                          const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ CUtensorMap v_map, const __grid_constant__ ForwardCall f,
                          int64_t words) {
  using Shape = ForwardShape<D>;
  extern __shared__ uint8_t shared_raw[];
  const Call& c = f.call;
  const int warpgroup = threadIdx.x / 128;
  const uint32_t raw = shared_address(shared_raw);
  const uint32_t base = (raw + 1023) & ~1023u;
  uint8_t* const shared = shared_raw + (base - raw);
  volatile int* const block_of = reinterpret_cast<int*>(shared + Shape::kAtBarriers + 112);
  RowFilter* const filters = reinterpret_cast<RowFilter*>(shared + Shape::kAtFilters);
  const uint32_t barriers = base + Shape::kAtBarriers;
  const uint32_t q_full = barriers, k_full = barriers + 8, v_full = barriers + 24, k_empty = barriers + 40,
                 v_empty = barriers + 56, whole = barriers + 72;

  // Units that share no sequence with an earlier one are left to the thread blocks of the next row of the
  // grid.
  const int items = (c.num_tiles * (c.heads / c.kv_heads) + Shape::kWarpgroups - 1) / Shape::kWarpgroups;
  const int kv_head = blockIdx.x / items;
  ForwardUnit units[Shape::kWarpgroups];
  int active = 0;
  int next = warpgroup;  // the warpgroup whose turn comes after this one's
#pragma unroll
  for (int w = 0; w < Shape::kWarpgroups; ++w) {
    units[w] = forward_unit(f, kv_head, blockIdx.x % items * Shape::kWarpgroups + w);
  }
#pragma unroll
  for (int w = 0; w < Shape::kWarpgroups; ++w) {
    int leader = w;
#pragma unroll
    for (int earlier = w - 1; earlier >= 0; --earlier) {
      if (same_sequence(units[w].tile, units[earlier].tile)) leader = earlier;
    }
    units[w].active &= leader == static_cast<int>(blockIdx.y);
    active += units[w].active;
  }
  if (active == 0) return;

  if (threadIdx.x == 0) {
    barrier_init(q_full, 1);
    barrier_init(whole, 1);
    for (int s = 0; s < Shape::kStages; ++s) {
      barrier_init(k_full + 8 * s, 1);
      barrier_init(v_full + 8 * s, 1);
      barrier_init(k_empty + 8 * s, 4 * active);  // every warp: it has read the block's number too
      barrier_init(v_empty + 8 * s, active);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == Shape::kWarpgroups) {
    registers_lower<Shape::kRegisters == 240 ? 24 : 32>();
    if (threadIdx.x / 32 % 4 == 0) {
      load_blocks<D>(q_map, k_map, v_map, f, units, kv_head, words, base, block_of);
    }
    return;
  }
  registers_raise<Shape::kRegisters>();
  ForwardUnit unit{};
#pragma unroll
  for (int w = 0; w < Shape::kWarpgroups; ++w) {
    if (w == warpgroup) unit = units[w];
  }
#pragma unroll
  for (int w = Shape::kWarpgroups - 1; w >= 1; --w) {
    const int other = (warpgroup + w) % Shape::kWarpgroups;
#pragma unroll
    for (int x = 0; x < Shape::kWarpgroups; ++x) {
      if (x == other && units[x].active) next = other;
    }
  }
  if (!unit.active) return;
  Tile& t = unit.tile;
  const bool turns = active > 1;
  bool last = true;  // the last active warpgroup opens the round
#pragma unroll
  for (int w = 0; w < Shape::kWarpgroups; ++w) last &= !(w > warpgroup && units[w].active);

  const int thread = threadIdx.x % 128;
  const int lane = thread % 32;
  const int row_in_tile = thread / 32 * 16 + lane / 4;
  const int column = lane % 4 * 2;
  RowFilter* const f0 = filters + warpgroup * kTileRows + row_in_tile;
  RowFilter* const f1 = f0 + 8;
  WarpRows rows;
  {
    RowFilter own[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = t.row0 + row_in_tile + 8 * r;
      float threshold = 0.0f;
      int32_t tie = -1;
      if (row < t.row0 + t.rows) {
        threshold = f.threshold[row_index(c, t, unit.head, row)];
        tie = f.tie_index[row_index(c, t, unit.head, row)];
      }
      own[r] = tile_row_filter(c, t, row, threshold, tie);
    }
    if (column == 0) {
      *f0 = own[0];
      *f1 = own[1];
    }
    __syncwarp();
    rows.init(own[0], own[1]);
  }

  const float scale = c.softmax_scale * 1.4426950408889634f;
  const float slack = 8.0f / scale;
  const uint64_t q = k_major(base + warpgroup * Shape::kQBytes);
  float o[D / 2];
  float s[64];
  uint32_t p[32];
  RunningSoftmax softmax;
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;

  if (turns && last) named_barrier_arrive(1 + next, 256);
  int stage = 0;
  uint32_t parity = 0;
  barrier_wait(q_full, 0);
  barrier_wait(k_full, 0);
  int k0 = block_of[0];
  if (k0 >= 0) {
    pin(s);
    wgmma_fence();
    score_product<T, D>(s, q, k_major(base + Shape::kAtK));
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    if (lane == 0) barrier_arrive(k_empty);
    mask_scores(s, rows, f0, f1, k0, column);
    softmax.step(s, scale, slack);
    pack_probabilities<T>(p, s);
    while (true) {
      const int v_stage = stage;
      const uint32_t v_parity = parity;
      stage ^= 1;
      if (stage == 0) parity ^= 1;
      barrier_wait(k_full + 8 * stage, parity);
      k0 = block_of[stage];
      const uint64_t v = mn_major(base + Shape::kAtV + v_stage * Shape::kKBytes, kBlockKeys);
      if (k0 < 0) {
        barrier_wait(v_full + 8 * v_stage, v_parity);
        pin(o);
        wgmma_fence();
        value_product<T, D>(o, p, v);
        wgmma_commit();
        wgmma_wait<0>();
        pin(o);
        break;
      }
      if (turns) named_barrier_sync(1 + warpgroup, 256);
      pin(s);
      pin(o);
      wgmma_fence();
      score_product<T, D>(s, q, k_major(base + Shape::kAtK + stage * Shape::kKBytes));
      wgmma_commit();
      barrier_wait(v_full + 8 * v_stage, v_parity);
      value_product<T, D>(o, p, v);
      wgmma_commit();
      if (turns) named_barrier_arrive(1 + next, 256);
      wgmma_wait<1>();
      pin(s);
      if (lane == 0) barrier_arrive(k_empty + 8 * stage);
      mask_scores(s, rows, f0, f1, k0, column);
      const bool rescale = softmax.step(s, scale, slack);
      wgmma_wait<0>();
      pin(o);
      if (thread == 0) barrier_arrive(v_empty + 8 * v_stage);
      if (rescale) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] *= softmax.factor[(i >> 1) & 1];
      }
      pack_probabilities<T>(p, s);
    }
  }

  // The unit is worked out again: its registers were needed above.
  int item = blockIdx.x;
  asm volatile("" : "+r"(item));
  unit = forward_unit(f, item / items, item % items * Shape::kWarpgroups + warpgroup);
  uint8_t* const staged = shared + warpgroup * Shape::kQBytes;
  float inverse[2];
  bool spoiled = false;  // a sum is good, its row of O is not
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = softmax.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const bool empty = sum == 0.0f;
    inverse[r] = empty ? 0.0f : 1.0f / sum;
    spoiled |= sum == sum && !row_finite(o, r);
    const int row = row_in_tile + 8 * r;
    if (column == 0 && row < t.rows) {
      f.lse[row_index(c, t, unit.head, t.row0 + row)] =
          empty ? minus_infinity() : (softmax.offset[r] + log2f(sum)) * 0.6931471805599453f;
    }
  }
  if (__any_sync(~0u, spoiled)) {
    sum_kept<T, D>(o, c, t, item / items, unit.seen, staged, row_in_tile, *f0, *f1,
                   f.bitmap == nullptr ? nullptr : f.bitmap + unit.entry * words, scale, softmax);
  }

  // out through the tile's Q in shared memory, so that global memory gets whole rows.
  named_barrier_sync(8 + warpgroup, 128);
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float lo = inverse[r] == 0.0f ? 0.0f : o[4 * j + 2 * r] * inverse[r];
      const float hi = inverse[r] == 0.0f ? 0.0f : o[4 * j + 2 * r + 1] * inverse[r];
      *reinterpret_cast<uint32_t*>(staged + j / 8 * kTileRows * 128 + swizzle128(row_in_tile + 8 * r, j % 8) +
                                   column * 2) = pack<T>(lo, hi);
    }
  }
  named_barrier_sync(8 + warpgroup, 128);
  for (int i = thread; i < t.rows * (D / 8); i += 128) {
    const int row = i / (D / 8);
    const int piece = i % (D / 8);
    T* const to = row_pointer<T>(f.out, t.batch, t.q_begin + t.row0 + row, unit.head) + piece * 8;
    *reinterpret_cast<uint4*>(to) =
        *reinterpret_cast<const uint4*>(staged + piece / 8 * kTileRows * 128 + swizzle128(row, piece % 8));
  }
}

template <typename T, int D>
cudaError_t launch_masked_forward(const ForwardCall& f, cudaStream_t stream) {
  using Shape = ForwardShape<D>;
  const Call& c = f.call;
  const int group = c.heads / c.kv_heads;
  const int64_t items = (int64_t{c.num_tiles} * group + Shape::kWarpgroups - 1) / Shape::kWarpgroups;
  if (items == 0) return cudaSuccess;
  const int64_t batch = c.cu_q == nullptr ? c.batch : 1;
  CUtensorMap q_map, k_map, v_map;
  cudaError_t error = tensor_map(&q_map, c.dtype, c.q, D, c.tq, c.heads, batch, kTileRows);
  if (error == cudaSuccess) error = tensor_map(&k_map, c.dtype, c.k, D, c.tk, c.kv_heads, batch, kBlockKeys);
  if (error == cudaSuccess) error = tensor_map(&v_map, c.dtype, c.v, D, c.tk, c.kv_heads, batch, kBlockKeys);
  if (error != cudaSuccess) return error;
  const auto kernel = masked_forward_kernel<T, D>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  // Packed calls have unused tiles, which count as another sequence.
  const bool mixed = group % Shape::kWarpgroups != 0 && (c.batch > 1 || c.tiles != nullptr);
  const dim3 grid(static_cast<unsigned>(items * c.kv_heads), mixed ? Shape::kWarpgroups : 1);
  kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(q_map, k_map, v_map, f, bitmap_words(c));
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::sm90
