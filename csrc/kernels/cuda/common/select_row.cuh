// One row's exact top-w by one thread block: the encoding, the kept keys as bits, the kept keys as a list.
//
// select_row() takes one of three ways, all exact:
// - the row fits in shared memory: every key is a candidate;
// - a sample gives a bound that an estimated few more than w keys reach: these are the candidates, if they
// are at least
//   w and fit;
// - otherwise a radix select over the order keys reads the row itself, 11 bits a read, until the keys that
// are still in
//   doubt fit.
// The threshold is the w-th greatest order key of the candidates, found by the same radix select, 2048 bins
// over their range; tie_index is found by the same routine over the indices of the keys equal to it.
//
// A source gives float4 vector(i): the scores of columns i .. i + 3, i a multiple of 4; what it gives for
// columns outside the span [begin, end) is ignored.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

#include "topk_attn/contract.h"

namespace topk_attn::cuda::select {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kBinBits = 11;
inline constexpr int kBins = 1 << kBinBits;
inline constexpr int kBinsPerThread = kBins / kThreads;
inline constexpr int kMinCapacity = 2048;    // candidates; also the largest sample
inline constexpr int kMaxCapacity = 4864;    // 38 KiB, so that the whole stays below 48 KiB
inline constexpr float kFill = 0.9f;         // share of the room that the estimate may take
inline constexpr int kLowest = INT_MIN + 1;  // below every order key; INT_MIN marks what takes no part

struct Candidate {
  int32_t key;
  int32_t index;
};

struct alignas(16) Workspace {
  uint32_t bins[kBins];  // all zero between uses
  int totals[kWarps];
  int bin;
  int above;
  int equal;
  int count;
  int lowest;
  int highest;
  unsigned long long last;
};

struct Result {
  float threshold;
  int32_t tie_index;
  int candidates;    // that include all kept keys of the span; -1: read the row
  bool all = false;  // every key of the span is kept
};

// Keys of the sample: one vector in 16, between 128 and 512 of them.
TOPK_HD int64_t sample_vectors(int64_t vectors) {
  const int64_t size = vectors / 16;
  return size < 128 ? 128 : size > kMinCapacity / 4 ? kMinCapacity / 4 : size;
}

// The rank in a sample of `size` keys whose key w of n keys will very likely reach: four standard deviations.
TOPK_HD float sample_rank(int64_t w, int64_t n, int64_t size) {
  const float expected = static_cast<float>(w) * static_cast<float>(size) / static_cast<float>(n > 0 ? n : 1);
  return expected + 4.0f * sqrtf(expected) + 4.0f;
}

__device__ __forceinline__ float component(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Calls body(score, column) for the columns of [begin, end), four adjacent ones a thread, 1024 a step.
template <typename Source, typename Body>
__device__ void for_each(const Source& source, int begin, int end, const Body& body) {
#pragma unroll 1
  for (int i = (begin & ~3) + threadIdx.x * 4; i < end; i += kThreads * 4) {
    const float4 v = source.vector(i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j >= begin && i + j < end) body(component(v, j), i + j);
    }
  }
}

// A radix select in progress: the answer is the `rank`-th greatest among the `equal` keys in [lo, hi].
struct Search {
  int lo;
  int hi;
  int rank;
  int equal;
  __device__ bool done() const { return lo == hi; }
};

// One digit: `count_in(add)` calls add(key) for every key, of which those in [lo, hi] take part. Narrows [lo,
// hi] to one of up to 2048 bins. All threads call it and get the same answer.
template <typename CountIn>
__device__ void narrow(Search& search, Workspace& ws, const CountIn& count_in) {
  const uint32_t range = static_cast<uint32_t>(search.hi) - static_cast<uint32_t>(search.lo);
  const int bits = 32 - __clz(range);
  const int shift = bits > kBinBits ? bits - kBinBits : 0;
  count_in([&](int key) {
    if (key >= search.lo && key <= search.hi) {
      atomicAdd(&ws.bins[(static_cast<uint32_t>(key) - static_cast<uint32_t>(search.lo)) >> shift], 1u);
    }
  });
  __syncthreads();

  // Thread 0 owns the highest bins.
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int first = kBins - (threadIdx.x + 1) * kBinsPerThread;
  uint4* const mine = reinterpret_cast<uint4*>(&ws.bins[first]);
  int own = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread / 4; ++i) {
    const uint4 v = mine[i];
    own += static_cast<int>(v.x + v.y + v.z + v.w);
  }
  int through = own;  // keys in bins of threads up to and with this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, through, step);
    if (lane >= step) through += other;
  }
  if (lane == 31) ws.totals[warp] = through;
  __syncthreads();
  int above = through - own;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) above += w < warp ? ws.totals[w] : 0;
  if (above < search.rank && search.rank <= above + own) {
    int bin = first + kBinsPerThread - 1;
    while (search.rank > above + static_cast<int>(ws.bins[bin])) above += static_cast<int>(ws.bins[bin--]);
    ws.bin = bin;
    ws.above = above;
    ws.equal = static_cast<int>(ws.bins[bin]);
  }
#pragma unroll
  for (int i = 0; i < kBinsPerThread / 4; ++i) mine[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  const int64_t lo = search.lo + (int64_t{ws.bin} << shift);
  const int64_t hi = lo + (int64_t{1} << shift) - 1;
  search.lo = static_cast<int>(lo);
  search.hi = hi < search.hi ? static_cast<int>(hi) : search.hi;
  search.rank -= ws.above;
  search.equal = ws.equal;
}

// Narrows to one key; key(i) for i in [0, count) are the keys.
template <typename Key>
__device__ void settle(Search& search, Workspace& ws, int count, int max_digits, const Key& key) {
  for (int digit = 0; digit < max_digits && !search.done(); ++digit) {
    narrow(search, ws, [&](const auto& add) {
      for (int i = threadIdx.x; i < count; i += kThreads) add(key(i));
    });
    if (search.equal == 1 && max_digits > 2) {
      // One key is left: no need to find its lower bits digit by digit.
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const int k = key(i);
        if (k >= search.lo && k <= search.hi) ws.lowest = k;
      }
      __syncthreads();
      search.lo = search.hi = ws.lowest;
    }
  }
}

// Moves the keys of [begin, end) that are not below `bound` (bound NaN: all) to `candidates`, as far as these
// reach; returns how many there are, and the least and greatest order key of the moved ones in ws.
template <typename Source>
__device__ int collect(const Source& source, int begin, int end, float bound, Candidate* candidates,
                       int capacity, Workspace& ws) {
  constexpr int kVectors = 4;  // in flight a thread
  if (threadIdx.x == 0) {
    ws.count = 0;
    ws.lowest = INT_MAX;
    ws.highest = INT_MIN;
  }
  __syncthreads();
  const int last = (end - 1) & ~3;
  for (int first = (begin & ~3) + threadIdx.x * 4; first < end; first += kVectors * kThreads * 4) {
    float4 v[kVectors];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) v[u] = source.vector(min(first + u * kThreads * 4, last));
    uint32_t passed = 0;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int i = first + u * kThreads * 4;
      uint32_t here = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) here |= !(component(v[u], j) < bound) ? 1u << j : 0u;
      if (i < begin) here &= 0xfu << (begin - i);
      if (i + 4 > end) here = i >= end ? 0u : here & (0xfu >> (i + 4 - end));
      passed |= here << (4 * u);
    }
    if (passed != 0) {
      int at = atomicAdd(&ws.count, __popc(passed));
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        if ((passed >> (4 * u) & 0xfu) == 0) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (passed >> (4 * u + j) & 1u) {
            if (at < capacity) {
              candidates[at] = Candidate{order_key(component(v[u], j)), first + u * kThreads * 4 + j};
            }
            ++at;
          }
        }
      }
    }
  }
  __syncthreads();
  const int count = ws.count;
  int lowest = INT_MAX;
  int highest = INT_MIN;
  for (int i = threadIdx.x; i < min(count, capacity); i += kThreads) {
    lowest = min(lowest, candidates[i].key);
    highest = max(highest, candidates[i].key);
  }
  lowest = __reduce_min_sync(~0u, lowest);
  highest = __reduce_max_sync(~0u, highest);
  if (threadIdx.x % 32 == 0) {
    atomicMin(&ws.lowest, lowest);
    atomicMax(&ws.highest, highest);
  }
  __syncthreads();
  return count;
}

// The encoding from candidates, `search` being about their keys.
__device__ inline Result settle_candidates(Search search, const Candidate* candidates, int count,
                                           Workspace& ws) {
  settle(search, ws, count, INT_MAX, [&](int i) { return candidates[i].key; });
  const int threshold = search.lo;
  // The rank-th smallest index among the equal ones is the rank-th greatest of its complement.
  Search tie{kLowest, -1, search.rank, search.equal};
  if (search.equal == search.rank) {
    // All of them are kept: the last one.
    __syncthreads();
    if (threadIdx.x == 0) ws.highest = -1;
    __syncthreads();
    int last = -1;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (candidates[i].key == threshold) last = max(last, candidates[i].index);
    }
    if (last >= 0) atomicMax(&ws.highest, last);
    __syncthreads();
    tie.lo = tie.hi = ~ws.highest;
  } else {
    settle(tie, ws, count, INT_MAX,
           [&](int i) { return candidates[i].key == threshold ? ~candidates[i].index : INT_MIN; });
  }
  return Result{order_score(threshold), ~tie.lo, count};
}

// Every key of [begin, end) is kept: the last key of the least order.
template <typename Source>
__device__ Result keep_all(const Source& source, int begin, int end, Workspace& ws) {
  if (threadIdx.x == 0) ws.last = ~0ull;
  __syncthreads();
  // Order keys shifted to unsigned, above complemented indices.
  unsigned long long last = ~0ull;
  for_each(source, begin, end, [&](float score, int j) {
    const uint32_t key = static_cast<uint32_t>(order_key(score)) ^ 0x80000000u;
    const unsigned long long both = static_cast<unsigned long long>(key) << 32 | static_cast<uint32_t>(~j);
    last = both < last ? both : last;
  });
  for (int step = 16; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(~0u, last, step);
    last = other < last ? other : last;
  }
  if (threadIdx.x % 32 == 0) atomicMin(&ws.last, last);
  __syncthreads();
  last = ws.last;
  const int key = static_cast<int>(static_cast<uint32_t>(last >> 32) ^ 0x80000000u);
  return Result{order_score(key), static_cast<int32_t>(~static_cast<uint32_t>(last)), -1, true};
}

// The radix select that reads the row itself.
template <typename Source>
__device__ Result select_long_row(const Source& source, int begin, int end, int w, Candidate* candidates,
                                  int capacity, Workspace& ws) {
  Search search{kLowest, INT_MAX, w, end - begin};
  while (!search.done() && search.equal > capacity) {
    narrow(search, ws, [&](const auto& add) {
      for_each(source, begin, end, [&](float score, int) { add(order_key(score)); });
    });
  }
  if (search.equal <= capacity) {
    if (threadIdx.x == 0) ws.count = 0;
    __syncthreads();
    for_each(source, begin, end, [&](float score, int j) {
      const int key = order_key(score);
      if (key >= search.lo && key <= search.hi) candidates[atomicAdd(&ws.count, 1)] = Candidate{key, j};
    });
    __syncthreads();
    Result result = settle_candidates(search, candidates, search.equal, ws);
    result.candidates = -1;  // keys above the last bin are not among them
    return result;
  }
  // Too many keys equal to the threshold: the same select over their complemented indices.
  const int threshold = search.lo;
  Search tie{~(end - 1), ~begin, search.rank, search.equal};
  while (!tie.done()) {
    narrow(tie, ws, [&](const auto& add) {
      for_each(source, begin, end, [&](float score, int j) {
        if (order_key(score) == threshold) add(~j);
      });
    });
  }
  return Result{order_score(threshold), ~tie.lo, -1};
}

// The first w (0 <= w <= end - begin) of the keys [begin, end) in the contract's order. `candidates` has room
// for `capacity` (at least kMinCapacity) of them. All threads get the result.
template <typename Source>
__device__ Result select_row(const Source& source, int begin, int end, int w, Candidate* candidates,
                             int capacity, Workspace& ws) {
  const int n = end - begin;
  if (w <= 0) return Result{__int_as_float(0x7fc00000), -1, 0};
  const float everything = __int_as_float(0x7fc00000);
  if (w >= n && n > capacity) return keep_all(source, begin, end, ws);

  for (int i = threadIdx.x; i < kBins; i += kThreads) ws.bins[i] = 0;
  __syncthreads();
  if (n <= capacity) {
    const int count = collect(source, begin, end, everything, candidates, capacity, ws);
    return settle_candidates(Search{ws.lowest, ws.highest, w, count}, candidates, count, ws);
  }

  // Vectors wholly inside the span, one in `step` of them.
  const int first = (begin + 3) & ~3;
  const int vectors = (end - first) / 4;
  const int sampled = static_cast<int>(sample_vectors(vectors));
  const int size = 4 * sampled;
  const float rank = sample_rank(w, n, size);
  if (rank * static_cast<float>(n) < kFill * static_cast<float>(capacity) * static_cast<float>(size)) {
    const int step = vectors / sampled;
    for (int i = threadIdx.x; i < sampled; i += kThreads) {
      const float4 v = source.vector(first + i * step * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) candidates[4 * i + j] = Candidate{order_key(component(v, j)), 0};
    }
    __syncthreads();
    // Two digits, 22 bits, are a bound good enough.
    Search bound{kLowest, INT_MAX, static_cast<int>(rank), size};
    settle(bound, ws, size, 2, [&](int i) { return candidates[i].key; });
    const int count = collect(source, begin, end, order_score(bound.lo), candidates, capacity, ws);
    if (count >= w && count <= capacity) {
      return settle_candidates(Search{ws.lowest, ws.highest, w, count}, candidates, count, ws);
    }
  }
  return select_long_row(source, begin, end, w, candidates, capacity, ws);
}

// ---------------------------------------------------------------------------------------------------------------
// What is made of a selection
// ---------------------------------------------------------------------------------------------------------------

// Rows of a tile keep much the same keys: most bits are set already, and a look is cheaper than an atomic.
__device__ __forceinline__ void set_bits(uint32_t* word, uint32_t bits) {
  if ((__ldcg(word) & bits) != bits) atomicOr(word, bits);
}

// Bits [begin, end) of a bitmap.
__device__ inline void set_range(uint32_t* bitmap, int begin, int end) {
  if (begin >= end) return;
  for (int word = begin / 32 + threadIdx.x; word <= (end - 1) / 32; word += kThreads) {
    uint32_t bits = ~0u;
    if (word == begin / 32) bits &= ~0u << (begin % 32);
    if (word == (end - 1) / 32) bits &= ~0u >> (31 - (end - 1) % 32);
    set_bits(bitmap + word, bits);
  }
}

// The kept keys of [begin, end).
template <typename Source>
__device__ void set_kept(const Source& source, int begin, int end, const Result& result,
                         const Candidate* candidates, uint32_t* bitmap) {
  if (result.tie_index < 0) return;
  if (result.all) {
    set_range(bitmap, begin, end);
    return;
  }
  const int threshold = order_key(result.threshold);
  if (result.candidates >= 0) {
    for (int i = threadIdx.x; i < result.candidates; i += kThreads) {
      const Candidate c = candidates[i];
      if (c.key > threshold || (c.key == threshold && c.index <= result.tie_index)) {
        set_bits(bitmap + c.index / 32, 1u << (c.index % 32));
      }
    }
    return;
  }
  // Eight lanes hold one word's 32 columns.
  const int lane = threadIdx.x % 32;
  for (int base = (begin & ~127) + threadIdx.x / 32 * 128; base < end; base += kThreads * 4) {
    const int i = base + lane * 4;
    uint32_t bits = 0;
    if (i < end && i + 4 > begin) {
      const float4 v = source.vector(i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = order_key(component(v, j));
        const bool kept = key > threshold || (key == threshold && i + j <= result.tie_index);
        if (kept && i + j >= begin && i + j < end) bits |= 1u << (lane % 8 * 4 + j);
      }
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) bits |= __shfl_xor_sync(~0u, bits, step);
    if (lane % 8 == 0 && bits != 0) set_bits(bitmap + i / 32, bits);
  }
}

// The columns of [begin, end) that keeps(score, column) accepts, ascending, then -1 up to `width`.
template <typename Source, typename Keeps>
__device__ void write_indices(const Source& source, int begin, int end, const Keeps& keeps, int32_t* out,
                              int64_t width, Workspace& ws) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int64_t written = 0;
  for (int base = begin & ~3; base < end; base += kThreads * 4) {
    const int i = base + static_cast<int>(threadIdx.x) * 4;
    uint32_t kept = 0;
    if (i < end) {
      const float4 v = source.vector(i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i + j >= begin && i + j < end && keeps(component(v, j), i + j)) kept |= 1u << j;
      }
    }
    const int own = __popc(kept);
    int through = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, through, step);
      if (lane >= step) through += other;
    }
    __syncthreads();  // the last step's totals are read
    if (lane == 31) ws.totals[warp] = through;
    __syncthreads();
    int64_t at = written + through - own;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      at += w < warp ? ws.totals[w] : 0;
      written += ws.totals[w];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (kept >> j & 1u) {
        if (at < width) out[at] = i + j;
        ++at;
      }
    }
  }
  for (int64_t at = written + threadIdx.x; at < width; at += kThreads) out[at] = -1;
}

}  // namespace topk_attn::cuda::select
