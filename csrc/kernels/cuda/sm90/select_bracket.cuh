// First step of the fused selection: brackets every row's threshold from a sample of the keys.
//
// One CTA per query tile and head sweeps one key in `sample_step` and keeps, per row, the maxima of 128
// groups of sampled keys (one instruction per score). How many group maxima exceed the W-th largest score of
// all keys has a known mean and standard deviation; the maxima of rank mean -+ margin * deviation become the
// bracket (lo, hi). The bracket is a guess: the sweep counts, and a row whose bracket missed is repaired. It
// is parked in the row's outputs: lo in threshold, the bits of hi in tie_index.
#pragma once

#include "select_params.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kSampleStages = 3;

template <int D>
constexpr int bracket_shared_bytes() {
  return kSampleStages * kBlockKeys * D * 2 + 1024 + 128;
}

// Expected number of group maxima above the W-th largest of n scores, and its standard deviation, if
// `samples` keys are dealt to `groups` groups in turn.
__device__ inline void occupied_groups(float share, int samples, int groups, float& mean, float& deviation) {
  const int each = samples / groups;
  const float more = static_cast<float>(samples % groups), less = groups - more;
  const float log_outside = share < 1.0f ? log1pf(-share) : -1e30f;
  const float p_more = -expm1f(log_outside * (each + 1));
  const float p_less = -expm1f(log_outside * each);
  mean = more * p_more + less * p_less;
  deviation = sqrtf(more * p_more * (1 - p_more) + less * p_less * (1 - p_less));
}

// Count, over the quad's group maxima of row `kUpper`, of those above x.
template <int kUpper, int N>
__device__ inline int count_above(const float (&maxima)[N], float x) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (((i >> 1) & 1) == kUpper) count += maxima[i] > x;
  }
  count += __shfl_xor_sync(~0u, count, 1);
  return count + __shfl_xor_sync(~0u, count, 2);
}

template <int kUpper, int N>
__device__ inline void bracket_row(const SelectParams& p, const Tile& t, int head, int row,
                                   const float (&maxima)[N], int samples) {
  const Call& c = p.call;
  const float inf = __int_as_float(0x7f800000);
  const bool exists = row < t.rows;
  const RowPlan plan = row_plan(c, t, t.row0 + (exists ? row : 0));
  const int n = static_cast<int>(plan.seen.size());
  float smallest = inf, largest = -inf;
  int occupied = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (((i >> 1) & 1) != kUpper) continue;
    largest = fmaxf(largest, maxima[i]);
    if (maxima[i] > -inf) smallest = fminf(smallest, maxima[i]), ++occupied;
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    smallest = fminf(smallest, __shfl_xor_sync(~0u, smallest, step));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    occupied += __shfl_xor_sync(~0u, occupied, step);
  }
  float mean, deviation;
  occupied_groups(n > 0 ? static_cast<float>(plan.kept) / static_cast<float>(n) : 0.0f, samples, 2 * N, mean,
                  deviation);
  const int rank_lo = static_cast<int>(ceilf(mean + p.margin * deviation + 0.5f));
  const int rank_hi = static_cast<int>(floorf(mean - p.margin * deviation));
  smallest -= fabsf(smallest) * 1e-6f + 1e-20f;
  // Above `lo` lie at least rank_lo maxima, above `hi` fewer than rank_hi.
  float lo = smallest, lo_end = largest, hi = largest, hi_begin = smallest;
  for (int i = 0; i < 8; ++i) {
    const float x = 0.5f * (lo + lo_end), y = 0.5f * (hi + hi_begin);
    const bool deep = count_above<kUpper>(maxima, x) >= rank_lo;
    const bool high = count_above<kUpper>(maxima, y) < rank_hi;
    lo = deep ? x : lo;
    lo_end = deep ? lo_end : x;
    hi = high ? y : hi;
    hi_begin = high ? hi_begin : y;
  }
  const bool finite = smallest > -inf && largest < inf;
  const bool all = n <= 2 * p.capacity;  // too few keys for a bracket to save anything
  if (all || occupied < rank_lo || !finite) lo = -inf;
  if (all || rank_hi < 1 || !finite) hi = inf;
  if (exists && threadIdx.x % 4 == 0) {
    const int64_t at = row_index(c, t, head, t.row0 + row);
    p.out.threshold[at] = lo;
    p.out.tie_index[at] = __float_as_int(hi);
  }
}

template <typename T, int D, int kGroups>
__global__ void __launch_bounds__(128, 2)
    bracket_kernel(const __grid_constant__ CUtensorMap sample_map, const __grid_constant__ SelectParams p) {
  extern __shared__ uint8_t shared_raw[];
  constexpr int kBytes = kBlockKeys * D * 2;
  const Call& c = p.call;
  const uint32_t stages = (shared_address(shared_raw) + 1023) & ~1023u;
  const uint32_t barriers = stages + kSampleStages * kBytes;
  // Tiles in the order of the sweep: one KV head after the other.
  const int per_kv = c.num_tiles * p.group;
  const int kv_head = blockIdx.x / per_kv;
  const int slot = blockIdx.x % per_kv;
  const int head = kv_head * p.group + slot % p.group;
  const Tile t = tile_at(c, c.num_tiles - 1 - slot / p.group);
  const int64_t entry = int64_t{head} * c.num_tiles + (c.num_tiles - 1 - slot / p.group);
  if (p.mark_count != nullptr && threadIdx.x == 0) {
    p.mark_count[entry] = t.rows > 0 ? kToCount : kToSweep;
  }
  if (t.rows == 0) return;
  const int step = p.sample_step;
  const int begin = (t.k_begin + step - 1) / step;  // first sampled key, in units of `step` tokens
  // Sampled keys among the first `seen` keys of the sequence.
  const auto samples_in = [&](int seen) { return max(0, (t.k_begin + seen + step - 1) / step - begin); };
  const int blocks = (samples_in(seen_end(c, t)) + kBlockKeys - 1) / kBlockKeys;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSampleStages; ++i) barrier_init(barriers + 8 * i, 1);
    barrier_init_fence();
  }
  __syncthreads();
  // The load number `number` of this CTA: of sampled keys from 128 * block on.
  const auto load = [&](int number, int block) {
    const int stage = number % kSampleStages;
    barrier_expect(barriers + 8 * stage, kBytes);
    for (int part = 0; part < D / 64; ++part) {
      tma_load(stages + stage * kBytes + part * kBlockKeys * 128, &sample_map, barriers + 8 * stage,
               part * 64, begin + block * kBlockKeys, kv_head, t.batch);
    }
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < min(kSampleStages, blocks); ++i) load(i, i);
  }
  uint32_t q[D / 4];
  load_query<T, D>(q, c, t, head);
  const int quad_lane = threadIdx.x % 4;
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const auto row_samples = [&](int r) {
    return r < t.rows ? samples_in(static_cast<int>(visible(t.row0 + r, t.tq, t.tk, c.causal).end)) : 0;
  };
  const int samples0 = row_samples(row), samples1 = row_samples(row + 8);
  const float inf = __int_as_float(0x7f800000);
  float maxima[kGroups / 2], scores[64];
#pragma unroll
  for (int i = 0; i < kGroups / 2; ++i) maxima[i] = -inf;
  const auto multiply = [&](int number) {
    const int stage = number % kSampleStages;
    barrier_wait(barriers + 8 * stage, number / kSampleStages & 1);
    const uint64_t keys = k_major(stages + stage * kBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      wgmma<T>(scores, q[4 * k], q[4 * k + 1], q[4 * k + 2], q[4 * k + 3], keys + k_step(k, kBlockKeys),
               k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
  };
  const auto sweep = [&](int block, int offset) {
    multiply(block);
    __syncthreads();
    const int next = block + kSampleStages;
    if (threadIdx.x == 0 && next < blocks) load(next, next);
    const int first = block * kBlockKeys;
    if (min(samples0, samples1) < first + kBlockKeys) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int key = first + 8 * (i / 4) + 2 * quad_lane + (i & 1);
        if (key >= ((i & 2) != 0 ? samples1 : samples0)) scores[i] = -inf;
      }
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) maxima[offset + i] = fmaxf(maxima[offset + i], scores[i]);
  };
  // Blocks go to the sets of 128 groups in turn.
  for (int block = 0; block < blocks; block += kGroups / 128) {
    sweep(block, 0);
    if constexpr (kGroups == 256) {
      if (block + 1 < blocks) sweep(block + 1, 64);
    }
  }
  bracket_row<0, kGroups / 2>(p, t, head, row, maxima, samples0);
  bracket_row<1, kGroups / 2>(p, t, head, row + 8, maxima, samples1);
}

}  // namespace topk_attn::cuda::sm90
