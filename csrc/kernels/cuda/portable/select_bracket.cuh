// First step of the fused selection: brackets every row's threshold from a sample of the keys.
//
// One block per item sweeps one key in `sample_step` and keeps, per row, the maxima of 128 groups of sampled
// keys (one instruction a score). How many group maxima exceed the W-th largest score of all keys has a known
// mean and standard deviation. The maximum of rank mean + margin * deviation becomes the bracket's lower end
// lo, which the sweep trusts only as far as it counts W keys at or above it; the one of rank mean - margin *
// deviation is a hint at where the threshold's digits spread (select_pick.cuh). They are parked in the row's
// outputs: lo in threshold, the bits of the hint in tie_index.
#pragma once

#include "select_params.cuh"

namespace topk_attn::cuda::portable {

inline constexpr int kSampleGroups = 128;
inline constexpr int kSampleStages = 2;
inline constexpr int kLaneGroups = kSampleGroups / 4;  // of one row, in one lane of its quad

template <int D>
constexpr int bracket_shared_bytes() {
  return (kItemSlots * kTileRows + kSampleStages * kSelectKeys) * D * 2;
}

// Expected number of group maxima above the W-th largest of n scores, and its standard deviation, if
// `samples` keys are dealt to the groups in turn.
__device__ inline void occupied_groups(float share, int samples, float& mean, float& deviation) {
  const int each = samples / kSampleGroups;
  const float more = static_cast<float>(samples % kSampleGroups);
  const float less = kSampleGroups - more;
  const float log_outside = share < 1.0f ? log1pf(-share) : -1e30f;
  const float p_more = -expm1f(log_outside * (each + 1));
  const float p_less = -expm1f(log_outside * each);
  mean = more * p_more + less * p_less;
  deviation = sqrtf(more * p_more * (1 - p_more) + less * p_less * (1 - p_less));
}

// Count, over the quad, of a row's group maxima above x.
__device__ inline int count_above(const float (&maxima)[kLaneGroups], float x) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kLaneGroups; ++i) count += maxima[i] > x;
  count += __shfl_xor_sync(~0u, count, 1);
  return count + __shfl_xor_sync(~0u, count, 2);
}

__device__ inline void bracket_row(const SelectParams& p, const WarpRows& w, int row,
                                   const float (&maxima)[kLaneGroups], int samples) {
  const Call& c = p.call;
  const float inf = __int_as_float(0x7f800000);
  const bool exists = row < w.count;
  const RowPlan plan = row_plan(c, w.t, w.t.row0 + w.first + (exists ? row : 0));
  const int n = static_cast<int>(plan.seen.size());
  float smallest = inf;
  float largest = -inf;
  int occupied = 0;
#pragma unroll
  for (int i = 0; i < kLaneGroups; ++i) {
    largest = fmaxf(largest, maxima[i]);
    if (maxima[i] > -inf) {
      smallest = fminf(smallest, maxima[i]);
      ++occupied;
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    smallest = fminf(smallest, __shfl_xor_sync(~0u, smallest, step));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    occupied += __shfl_xor_sync(~0u, occupied, step);
  }
  float mean, deviation;
  occupied_groups(n > 0 ? static_cast<float>(plan.kept) / static_cast<float>(n) : 0.0f, samples, mean,
                  deviation);
  const int rank_lo = static_cast<int>(ceilf(mean + p.margin * deviation + 0.5f));
  const int rank_hi = static_cast<int>(floorf(mean - p.margin * deviation));
  smallest -= fabsf(smallest) * 1e-6f + 1e-20f;
  // Above `lo` lie at least rank_lo maxima, above `hi` fewer than rank_hi.
  float lo = smallest, lo_end = largest, hi = largest, hi_begin = smallest;
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const float x = 0.5f * (lo + lo_end);
    const float y = 0.5f * (hi + hi_begin);
    const bool deep = count_above(maxima, x) >= rank_lo;
    const bool high = count_above(maxima, y) < rank_hi;
    lo = deep ? x : lo;
    lo_end = deep ? lo_end : x;
    hi = high ? y : hi;
    hi_begin = high ? hi_begin : y;
  }
  const bool finite = smallest > -inf && largest < inf;
  if (occupied < rank_lo || !finite) lo = -inf;
  if (rank_hi < 1 || !finite) hi = inf;
  if (exists && threadIdx.x % 4 == 0) {
    const int64_t at = row_index(c, w.t, w.slot.head, w.t.row0 + w.first + row);
    p.out.threshold[at] = lo;
    p.out.tie_index[at] = __float_as_int(hi);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kSelectThreads, 2) bracket_kernel(const __grid_constant__ SelectParams p) {
  extern __shared__ __align__(512) uint8_t shared[];
  const Call& c = p.call;
  const int item = blockIdx.x;
  const int kv_head = item / p.items_per_kv;
  const WarpRows w = warp_rows(p, item);
  // Q lies in shared memory: the maxima fill the registers.
  const uint32_t q_tile = shared_address(shared);
#pragma unroll 1
  for (int i = 0; i < kItemSlots; ++i) {
    const Slot slot = slot_at(p, item, i);
    const Tile t = tile_of(c, slot);
    const T* q = t.rows == 0 ? static_cast<const T*>(c.q.data)
                             : row_pointer<const T>(c.q, t.batch, int64_t{t.q_begin} + t.row0, slot.head);
    load_tile<T, D, kTileRows, kSelectThreads>(q_tile + i * kTileRows * D * 2, q, c.q.token, t.rows,
                                               c.head_dim);
  }
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
  const auto samples_in = [&](int seen) { return (seen + p.sample_step - 1) / p.sample_step; };
  // What row g sees; a causal row 8 further down 8 keys more.
  const int seen0 = w.t.row0 + w.first + g + w.t.tk - w.t.tq + 1;
  const auto samples = [&](int i) {
    const int keys = c.causal ? max(0, min(seen0 + 8 * i, w.t.tk)) : w.t.tk;
    return g + 8 * i < w.count ? samples_in(keys) : 0;
  };
  const int fewest = g + 24 < w.count ? samples(0) : 0;
  const float inf = __int_as_float(0x7f800000);
  float maxima[4][kLaneGroups];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < kLaneGroups; ++j) maxima[i][j] = -inf;
  }
  for (int first = 0; first < kItemSlots;) {
    const Segment s = segment_at(p, item, first);
    const bool mine = w.index >= first && w.index < s.end && w.count > 0;
    first = s.end;
    const T* k = row_pointer<const T>(c.k, s.t.batch, s.t.k_begin, kv_head);
    // Four steps of 32 keys fill the groups once.
    constexpr uint32_t kBytes = kSelectKeys * D * 2;
    const int keys = samples_in(s.keys);
    const int blocks = (keys + kSelectKeys - 1) / kSelectKeys;
    const int64_t stride = c.k.token * p.sample_step;
    const uint32_t stages = q_tile + kItemSlots * kTileRows * D * 2;
    const auto load = [&](int block) {
      const int key = block * kSelectKeys;
      load_tile<T, D, kSelectKeys, kSelectThreads>(stages + block % kSampleStages * kBytes, k + key * stride,
                                                   stride, keys - key, c.head_dim);
    };
    const auto sweep = [&](int block, int half, float(&best)[4][kLaneGroups], int offset) {
      const int key = block * kSelectKeys + half * kStepKeys;
      float scores[2][4][4];
      product<T, D>(scores, q_tile, threadIdx.x / 32 * kWarpRows, stages + block % kSampleStages * kBytes,
                    half * kStepKeys);
      if (!__all_sync(~0u, fewest >= key + kStepKeys)) {
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          const int i = j / 8;
          if (key + 8 * (j / 2 % 4) + pair + j % 2 >= samples(i))
            scores[i / 2][j / 2 % 4][i % 2 * 2 + j % 2] = -inf;
        }
      }
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const int i = j / 8;
        float& b = best[i][offset + j % 8];
        b = fmaxf(b, scores[i / 2][j / 2 % 4][i % 2 * 2 + j % 2]);
      }
    };
#pragma unroll
    for (int i = 0; i < kSampleStages - 1; ++i) {
      if (i < blocks) load(i);
      copy_commit();
    }
    const auto step = [&](int block, float(&best)[4][kLaneGroups], int offset) {
      copy_wait<kSampleStages - 2>();
      __syncthreads();
      if (block + kSampleStages - 1 < blocks) load(block + kSampleStages - 1);
      copy_commit();
      if (!mine) return;
      sweep(block, 0, best, offset);
      sweep(block, 1, best, offset + 8);
    };
    for (int block = 0; block < blocks; block += 2) {
      step(block, maxima, 0);
      if (block + 1 < blocks) step(block + 1, maxima, 16);
    }
    copy_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) bracket_row(p, w, g + 8 * i, maxima[i], samples(i));
}

}  // namespace topk_attn::cuda::portable
