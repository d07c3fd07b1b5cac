// The rank-th best of a few thousand candidates by one thread block; all of them are in its shared memory.
//
// One pass over bins of equal width in the score, of which there are about as many as candidates, leaves a
// handful, and these are compared with each other. Where that does not serve (many equal scores, infinities,
// NaN) a radix select over the order keys does (common/select_long.cuh). Either way the answer is exact.
#pragma once

#include "../common/select_long.cuh"
#include "params.h"

namespace topk_attn::cuda::decode {

// Narrows to one key, or to one candidate, whose key and column are then in ws.found; of this block alone,
// also where it belongs to a cluster.
template <int kThreads, typename At, typename Key>
__device__ inline void settle_alone(longrow::Search& search, longrow::Team& team, int count, const At& at,
                                    const Key& key) {
  while (!search.done() && search.equal > 1) {
    longrow::narrow<kThreads>(search, team, 1, [&](const auto& add) {
      for (int i = threadIdx.x; i < count; i += kThreads) add(key(at(i)));
    });
  }
  if (search.equal != 1) return;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const ScoredKey x = at(i);
    const int k = key(x);
    if (k >= search.lo && k <= search.hi) {
      team.ws->found = k;
      team.ws->found_column = x.column;
    }
  }
  __syncthreads();
}

// By radix; the bins are zero before it.
template <int kThreads, typename At>
__device__ inline longrow::Result rank_by_digits(longrow::Workspace& ws, const At& at, int count, int rank,
                                                 int lowest, int highest) {
  longrow::Team team{&ws, 0, 1};
  longrow::Search search{lowest, highest, rank, count, highest};
  settle_alone<kThreads>(search, team, count, at, [](const ScoredKey& x) { return x.key; });
  if (search.equal == 1) return longrow::Result{ws.found, ws.found_column};
  const int key = search.lo;
  // The rank-th smallest column among equal keys is the rank-th greatest of its complement.
  longrow::Search tie{longrow::kLowest, -1, search.rank, search.equal, -1};
  settle_alone<kThreads>(tie, team, count, at,
                         [&](const ScoredKey& x) { return x.key == key ? ~x.column : INT_MIN; });
  return longrow::Result{key, tie.equal == 1 ? ws.found_column : ~tie.lo};
}

// The rank-th (from 1) of the candidates at(0) .. at(count - 1) in the contract's order. All threads call it,
// after a barrier behind the last write of candidates and bins, which are zero; `low` and `high` are the
// extreme keys that this thread has seen. All get the answer.
template <int kThreads, typename At>
__device__ inline longrow::Result find_rank(longrow::Workspace& ws, const At& at, int count, int rank,
                                            int low, int high) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kMine = longrow::kBins / kThreads;
  __shared__ int lows[kWarps];
  __shared__ int highs[kWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  low = __reduce_min_sync(~0u, low);
  high = __reduce_max_sync(~0u, high);
  if (lane == 0) {
    lows[warp] = low;
    highs[warp] = high;
  }
  if (threadIdx.x == 0) ws.count = 0;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    low = min(low, lows[w]);
    high = max(high, highs[w]);
  }
  const float from = order_score(low);
  const float per_score = static_cast<float>(longrow::kBins) / (order_score(high) - from);
  // Not so: equal, infinite or NaN scores, or so close that the quotient overflows. All threads agree.
  const bool spread = per_score > 0.0f && per_score < 1e30f && isfinite(from);
  if (!spread) return rank_by_digits<kThreads>(ws, at, count, rank, low, high);

  // Subtraction, product and truncation are monotonic, so bins are ordered as scores are.
  const auto bin_of = [&](int key) {
    const int bin = static_cast<int>((order_score(key) - from) * per_score);
    return min(bin, longrow::kBins - 1);
  };
  uint32_t* const bins = ws.bins[0];
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) atomicAdd(&bins[bin_of(at(i).key)], 1u);
  __syncthreads();
  // Thread 0 owns the highest bins.
  const int first = longrow::kBins - (static_cast<int>(threadIdx.x) + 1) * kMine;
  int mine[kMine];
  int own = 0;
#pragma unroll
  for (int i = 0; i < kMine; i += 4) {
    const int4 four = *reinterpret_cast<const int4*>(bins + first + i);
    mine[i] = four.x;
    mine[i + 1] = four.y;
    mine[i + 2] = four.z;
    mine[i + 3] = four.w;
    own += four.x + four.y + four.z + four.w;
  }
  const int through = longrow::warp_scan(own);
  if (lane == 31) ws.totals[warp] = through;
  __syncthreads();
  int above = through - own;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) above += w < warp ? ws.totals[w] : 0;
  if (above < rank && rank <= above + own) {
#pragma unroll
    for (int i = kMine - 1; i >= 0; --i) {
      if (above < rank && rank <= above + mine[i]) {
        ws.bin = first + i;
        ws.above = above;
        ws.equal = mine[i];
      }
      above += mine[i];
    }
  }
  __syncthreads();
  const int few = ws.equal;
  if (few > kThreads) {
    for (int i = threadIdx.x; i < longrow::kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    return rank_by_digits<kThreads>(ws, at, count, rank, low, high);
  }
  const int bin = ws.bin;
  auto* const left = reinterpret_cast<ScoredKey*>(ws.bins[1]);
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const ScoredKey x = at(i);
    if (bin_of(x.key) == bin) left[atomicAdd(&ws.count, 1)] = x;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < few) {
    const ScoredKey x = left[threadIdx.x];
    int before = ws.above;
    for (int i = 0; i < few; ++i) {
      const ScoredKey y = left[i];
      before += y.key > x.key || (y.key == x.key && y.column < x.column) ? 1 : 0;
    }
    if (before == rank - 1) {
      ws.found = x.key;
      ws.found_column = x.column;
    }
  }
  __syncthreads();
  return longrow::Result{ws.found, ws.found_column};
}

}  // namespace topk_attn::cuda::decode
