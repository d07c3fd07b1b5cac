// One row's exact top-w by a thread block or a cluster of thread blocks ("team"): the steps behind
// select_long.h.
//
// A radix select goes digit by digit, 2048 bins each, over the order keys (contract.h) of keys that lie in
// the shared memory of all blocks of the team: every block counts its own, then adds up the bins of all and
// comes to the same answer, so that a digit costs one barrier of the team and nothing is sent around.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

#include "topk_attn/contract.h"

namespace topk_attn::cuda::longrow {

inline constexpr int kBinBits = 11;
inline constexpr int kBins = 1 << kBinBits;
inline constexpr int kLowest = INT_MIN + 1;  // below every order key; INT_MIN marks what takes no part
inline constexpr int kMaxTeam = 8;

struct Candidate {
  int32_t key;
  int32_t column;
};

// In dynamic shared memory, at the same place in every block of a team.
struct alignas(16) Workspace {
  uint32_t bins[2][kBins];  // those of the digit whose turn it is are zero before it
  int totals[32];
  int bin;
  int above;
  int equal;
  int found;
  int found_column;
  int count;  // candidates of this block, also those that did not fit
  int over;   // keys of this block above the bracket
  int kept;   // kept keys of this block
};

// ---------------------------------------------------------------------------------------------------------------
// Teams
// ---------------------------------------------------------------------------------------------------------------

struct Team {
  Workspace* ws;
  int rank;
  int size;
  int turn = 0;
};

__device__ __forceinline__ int team_rank() {
  uint32_t r = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
  return static_cast<int>(r);
}

__device__ __forceinline__ int team_size() {
  uint32_t r = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
#endif
  return static_cast<int>(r);
}

// Barrier of all threads of the team; shared memory written before it is seen after it.
__device__ __forceinline__ void team_sync(int size) {
#if __CUDA_ARCH__ >= 900
  if (size > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
    return;
  }
#endif
  __syncthreads();
}

// The same variable in the shared memory of block `rank` of the team.
template <typename T>
__device__ __forceinline__ T* peer(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return mine;
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// Radix select
// ---------------------------------------------------------------------------------------------------------------

// The answer is the `rank`-th greatest among the `equal` keys in [lo, hi]; few of them are above `likely`.
struct Search {
  int lo;
  int hi;
  int rank;
  int equal;
  int likely;
  __device__ bool done() const { return lo == hi; }
};

// Inclusive prefix sum over the lanes of a warp.
__device__ __forceinline__ int warp_scan(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// One digit: `count_in(add)` calls add(key) for every key of this block, of which those in [lo, hi] take
// part. Narrows [lo, hi] to one of 2048 bins; the last bin also holds what lies above `likely`. `size` is the
// team's, or 1 for a search of this block alone.
template <int kThreads, typename CountIn>
__device__ void narrow(Search& search, Team& team, int size, const CountIn& count_in) {
  constexpr int kMine = kBins / kThreads;
  Workspace& ws = *team.ws;
  const uint32_t range = static_cast<uint32_t>(search.likely) - static_cast<uint32_t>(search.lo);
  const int bits = 32 - __clz(range);
  const int shift = bits > kBinBits ? bits - kBinBits : 0;
  uint32_t* const bins = ws.bins[team.turn];
  count_in([&](int key) {
    if (key >= search.lo && key <= search.hi) {
      const uint32_t bin = (static_cast<uint32_t>(key) - static_cast<uint32_t>(search.lo)) >> shift;
      atomicAdd(&bins[min(bin, static_cast<uint32_t>(kBins - 1))], 1u);
    }
  });
  team_sync(size);

  // Thread 0 owns the highest bins.
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int first = kBins - (threadIdx.x + 1) * kMine;
  uint32_t mine[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) mine[i] = 0;
#pragma unroll 1
  for (int block = 0; block < size; ++block) {
    const uint4* const theirs =
        reinterpret_cast<const uint4*>(size > 1 ? peer(&bins[first], block) : &bins[first]);
#pragma unroll
    for (int i = 0; i < kMine / 4; ++i) {
      const uint4 v = theirs[i];
      mine[4 * i] += v.x;
      mine[4 * i + 1] += v.y;
      mine[4 * i + 2] += v.z;
      mine[4 * i + 3] += v.w;
    }
  }
  // Nobody reads the other digit's bins any more: all have passed the barrier.
  uint4* const other = reinterpret_cast<uint4*>(&ws.bins[team.turn ^ 1][first]);
#pragma unroll
  for (int i = 0; i < kMine / 4; ++i) other[i] = make_uint4(0, 0, 0, 0);
  team.turn ^= 1;

  int own = 0;
#pragma unroll
  for (int i = 0; i < kMine; ++i) own += static_cast<int>(mine[i]);
  const int through = warp_scan(own);
  if (lane == 31) ws.totals[warp] = through;
  __syncthreads();
  int above = through - own;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) above += w < warp ? ws.totals[w] : 0;
#pragma unroll
  for (int i = kMine - 1; i >= 0; --i) {
    const int here = static_cast<int>(mine[i]);
    if (above < search.rank && search.rank <= above + here) {
      ws.bin = first + i;
      ws.above = above;
      ws.equal = here;
    }
    above += here;
  }
  __syncthreads();
  const int bin = ws.bin;
  const int64_t lo = search.lo + (int64_t{bin} << shift);
  const int64_t hi = lo + (int64_t{1} << shift) - 1;
  search.lo = static_cast<int>(lo);
  if (bin < kBins - 1 && hi < search.hi) search.hi = static_cast<int>(hi);
  search.likely = search.hi;
  search.rank -= ws.above;
  search.equal = ws.equal;
}

// Narrows to one key; key(i) and column(i) for i in [0, count) are those of this block. True: only one key is
// left, and its column is in ws.found_column.
template <int kThreads, typename Key, typename Column>
__device__ bool settle(Search& search, Team& team, int count, const Key& key, const Column& column) {
  while (!search.done()) {
    narrow<kThreads>(search, team, team.size, [&](const auto& add) {
      for (int i = threadIdx.x; i < count; i += kThreads) add(key(i));
    });
    if (search.equal != 1) continue;
    // Who has it tells all, instead of more digits.
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int k = key(i);
      if (k >= search.lo && k <= search.hi) {
#pragma unroll 1
        for (int block = 0; block < team.size; ++block) {
          *peer(&team.ws->found, block) = k;
          *peer(&team.ws->found_column, block) = column(i);
        }
      }
    }
    team_sync(team.size);
    search.lo = search.hi = team.ws->found;
    return true;
  }
  return false;
}

struct Result {
  int threshold;  // order key
  int tie_index;  // column
};

// The rank-th of the candidates (searched by key) in the contract's order. All blocks get the same answer.
template <int kThreads, typename Key>
__device__ Result settle_candidates(Search search, Team& team, const Candidate* candidates, int count,
                                    const Key& key) {
  const auto column = [&](int i) { return candidates[i].column; };
  if (settle<kThreads>(
          search, team, count, [&](int i) { return key(candidates[i]); }, column)) {
    return Result{search.lo, team.ws->found_column};
  }
  const int threshold = search.lo;
  // The rank-th smallest column among equal keys is the rank-th greatest of its complement.
  Search tie{kLowest, -1, search.rank, search.equal, -1};
  settle<kThreads>(
      tie, team, count,
      [&](int i) { return key(candidates[i]) == threshold ? ~candidates[i].column : INT_MIN; }, column);
  return Result{threshold, ~tie.lo};
}

// Sum over the threads of a block; all get it.
template <int kThreads>
__device__ int block_sum(int x, Workspace& ws) {
  x = __reduce_add_sync(~0u, x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) ws.totals[threadIdx.x / 32] = x;
  __syncthreads();
  int sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += ws.totals[w];
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------
// Bracket
// ---------------------------------------------------------------------------------------------------------------

// Keys in [lo, hi] are candidates, those above hi are kept without a look; `likely`: few are above it.
struct Bracket {
  int lo;
  int hi;
  int likely;
  bool usable;
};

// Where the w-th of n keys lies in a sample of `size`: `expected` give or take four standard deviations.
struct SampleRank {
  float expected;
  float margin;
};
__device__ inline SampleRank sample_rank(int w, int n, int size) {
  const float share = static_cast<float>(w) / static_cast<float>(n);
  const float expected = share * static_cast<float>(size);
  return SampleRank{expected, 4.0f * sqrtf(expected * fmaxf(1.0f - share, 0.0f)) + 4.0f};
}

__device__ __forceinline__ uint32_t scatter(uint32_t x) {
  x = (x ^ (x >> 15)) * 0x2c1b3c6du;
  return x ^ (x >> 13);
}

// Column of the i-th of 2^log_size samples of n >= 2^log_size: one at an irregular place of each stretch.
__device__ __forceinline__ int sample_column(int i, int log_size, int n) {
  const uint32_t start =
      static_cast<uint32_t>((static_cast<uint64_t>(i) * static_cast<uint32_t>(n)) >> log_size);
  const uint32_t width = static_cast<uint32_t>(n) >> log_size;
  return static_cast<int>(start + __umulhi(scatter(static_cast<uint32_t>(i) + 0x9e37u) << 4, width));
}

// A bracket of the w-th of n keys such that about `room` candidates at most are expected, from a sample;
// key(j) is the order key of column j. Every block of a team finds the same one. `upper` allows hi < INT_MAX.
// `sample` has room for 8192.
template <int kThreads, typename Key>
__device__ Bracket find_bracket(Team& team, int* sample, int w, int n, float room, bool upper, int least_log,
                                const Key& key) {
  Bracket bracket{kLowest, INT_MAX, INT_MAX, false};
  int log_size = least_log;
  SampleRank rank{};
  bool cut = false;
  for (; log_size <= 13 && !bracket.usable; ++log_size) {
    const float stretch = static_cast<float>(n) / static_cast<float>(1 << log_size);
    rank = sample_rank(w, n, 1 << log_size);
    rank.margin *= 1.5f;  // neighbours are alike in most rows
    cut = (rank.expected + rank.margin) * stretch > room;
    bracket.usable = stretch >= 2.0f && (!cut || (upper && 2.0f * rank.margin * stretch <= room));
  }
  if (!bracket.usable) return bracket;
  --log_size;

  const int size = 1 << log_size;
  int largest = INT_MIN;
#pragma unroll 4
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const int k = key(min(sample_column(i / 4, log_size - 2, n) + i % 4, n - 1));
    sample[i] = k;
    largest = max(largest, k);
  }
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) team.ws->totals[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kThreads / 32; ++v) largest = max(largest, team.ws->totals[v]);

  // Two digits, 22 bits, are a bound good enough.
  const auto bound = [&](float at) {
    Search search{kLowest, INT_MAX, static_cast<int>(at), size, INT_MAX};
#pragma unroll 1
    for (int digit = 0; digit < 2; ++digit) {
      narrow<kThreads>(search, team, 1, [&](const auto& add) {
        for (int i = threadIdx.x; i < size; i += kThreads) add(sample[i]);
      });
    }
    return search;
  };
  if (rank.expected + rank.margin < static_cast<float>(size))
    bracket.lo = bound(rank.expected + rank.margin).lo;
  bracket.likely = max(bracket.lo, largest);
  if (cut && rank.expected - rank.margin >= 1.0f) {
    bracket.hi = max(bracket.lo, bound(rank.expected - rank.margin).hi);
    bracket.likely = bracket.hi;
  }
  __syncthreads();  // the sample has been read: its place may be written
  return bracket;
}

// ---------------------------------------------------------------------------------------------------------------
// Lists
// ---------------------------------------------------------------------------------------------------------------

// Writes the set bits of `words` words as ascending columns: bit 0 stands for column `first`. put(i, column)
// is called for the i-th of the block; returns how many there are. All threads call it.
template <int kThreads, typename Put>
__device__ int list_bits(const uint32_t* bitmap, int words, int first, Workspace& ws, const Put& put) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int chunk = (words + 32 * kWarps - 1) / (32 * kWarps) * 32;
  const int begin = min(warp * chunk, words);
  const int end = min(begin + chunk, words);
  int own = 0;
  for (int i = begin + lane; i < end; i += 32) own += __popc(bitmap[i]);
  own = __reduce_add_sync(~0u, own);
  __syncthreads();
  if (lane == 0) ws.totals[warp] = own;
  __syncthreads();
  int at = 0;
  int all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    at += w < warp ? ws.totals[w] : 0;
    all += ws.totals[w];
  }
  for (int base = begin; base < end; base += 32) {
    uint32_t bits = base + lane < end ? bitmap[base + lane] : 0;
    const int here = __popc(bits);
    const int through = warp_scan(here);
    int to = at + through - here;
    at += __shfl_sync(~0u, through, 31);
    const int column = first + (base + lane) * 32;
    while (bits != 0) {
      put(to++, column + __ffs(static_cast<int>(bits)) - 1);
      bits &= bits - 1;
    }
  }
  return all;
}

// Keys of lower blocks of the team, given this block's own: a prefix sum over the team.
__device__ inline int team_prefix(Team& team, int own) {
  __syncthreads();
  if (threadIdx.x == 0) team.ws->kept = own;
  team_sync(team.size);
  int before = 0;
#pragma unroll 1
  for (int block = 0; block < team.rank; ++block) before += *peer(&team.ws->kept, block);
  return before;
}

}  // namespace topk_attn::cuda::longrow
