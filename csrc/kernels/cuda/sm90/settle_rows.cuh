// What is known of the rows of a tile while settle.cu narrows down their thresholds, and how scores are dealt
// to bins.
#pragma once

#include "union_common.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kBins = 32;

// Order key of +inf. Above it there is only NaN.
inline constexpr int32_t kInfinityKey = 0x7f800000;
inline constexpr int32_t kNaNKey = 0x7fffffff;
// No score has this order key.
inline constexpr int32_t kNoTie = INT32_MIN;

// In shared memory. The W-th key of a row lies among its `inside` keys whose item is in [low, high]; `above`
// keys come before all of these. An item is the order key of a score; or, once only the ties of one score are
// left, ~index of the keys of that score (so that a greater item comes first here too).
struct SettleRows {
  int32_t seen[kTileRows];  // keys [0, seen) are visible
  int32_t kept[kTileRows];  // W; 0: the row sees nothing or does not exist
  float lower[kTileRows];
  float gain[kTileRows];  // BinScale of the first count
  float offset[kTileRows];
  int32_t low[kTileRows];  // low > high: nothing is sought
  int32_t high[kTileRows];
  int32_t tie[kTileRows];  // order key of the ties, or kNoTie
  int32_t above[kTileRows];
  int32_t inside[kTileRows];
  int32_t begin[kTileRows];   // of the row's candidates
  int32_t filled[kTileRows];  // candidates so far
  uint32_t hits[4][2];        // of the last chunks: keys that are kept for certain
  uint32_t unproven[2];       // rows
  int32_t fits;               // there is room for the keys in question of all rows
  int32_t plain;              // all of them are told by comparing scores
};

// ---------------------------------------------------------------------------------------------------------------
// Bins of equal width
// ---------------------------------------------------------------------------------------------------------------

// bin(score) = low five bits of clamp(score * gain + offset), monotone for scores >= lower: the sum lies
// where floats are integers, from kOrigin on. A NaN falls into the last bin, and so does +inf.
struct BinScale {
  static constexpr float kOrigin = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kEnd = kOrigin + (kBins - 1);
  float gain;
  float offset;

  __device__ __forceinline__ uint32_t position(float score) const {
    return __float_as_uint(fminf(fmaf(score, gain, offset), kEnd));
  }
  __device__ __forceinline__ int bin(float score) const { return static_cast<int>(position(score) % kBins); }
};

// Bins for scores >= lower, the last of which begins near `upper` where that is a sensible bound. Where no
// scale serves, all finite scores fall into bin 0.
__device__ inline BinScale bin_scale(float lower, float upper) {
  constexpr float kFlat = 7.17464814e-43f;  // 2^-140: no finite score reaches 1/2 with it
  if (!(upper > lower && upper < kInfinity)) upper = lower + fmaxf(0.25f * fabsf(lower), 1e-30f);
  const float gain = (kBins - 2) / (upper - lower);
  const float offset = fmaf(-lower, gain, BinScale::kOrigin);
  const float at = fmaf(lower, gain, offset);
  // `offset` is rounded to an integer, which must not move `lower` out of the first bins.
  const bool good = fabsf(lower) < kInfinity && gain > 0.0f && gain < 1e30f && at >= BinScale::kOrigin &&
                    at <= BinScale::kOrigin + 1;
  return good ? BinScale{gain, offset} : BinScale{kFlat, BinScale::kOrigin};
}

// The smallest order key from `lowest` on that falls into bin `bin` or a later one.
__device__ inline int32_t bin_begin(const BinScale& scale, int bin, int32_t lowest) {
  const auto reaches = [&](int32_t key) { return scale.bin(order_score(key)) >= bin; };
  if (reaches(lowest)) return lowest;
  int32_t low = lowest;  // does not reach it
  int32_t high = kInfinityKey;
  // The inverse of the scale is right but for its rounding.
  constexpr int32_t kSlack = 2;
  const float inverse = (bin - 0.5f + (BinScale::kOrigin - scale.offset)) / scale.gain;
  const int32_t guess = fabsf(inverse) < kInfinity ? order_key(inverse) : 0;
  if (guess - kSlack > low && !reaches(guess - kSlack)) low = guess - kSlack;
  if (guess < kInfinityKey - kSlack && guess + kSlack > low && reaches(guess + kSlack)) high = guess + kSlack;
  while (static_cast<uint32_t>(high) - static_cast<uint32_t>(low) > 1) {
    const uint32_t half = (static_cast<uint32_t>(high) - static_cast<uint32_t>(low)) / 2;
    const int32_t middle = static_cast<int32_t>(static_cast<uint32_t>(low) + half);
    (reaches(middle) ? high : low) = middle;
  }
  return high;
}

// ---------------------------------------------------------------------------------------------------------------
// Counting in bit planes
// ---------------------------------------------------------------------------------------------------------------

// 32 counters in the bit positions of a few words: counter b is the number with bits (plane[i] >> b) & 1.
// One-hot words are added by carry-save adders, about three logic instructions a word for all 32 bins.
struct BinCounter {
  static constexpr int kPlanes = 9;
  static constexpr int kAtOnce = 16;  // words a thread adds for each row and chunk
  static constexpr int kChunks = ((1 << kPlanes) - 1) / kAtOnce;  // until a counter might overflow
  uint32_t plane[kPlanes];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) plane[i] = 0;
  }

  // sum += a + b; returns the carry.
  __device__ __forceinline__ static uint32_t add(uint32_t& sum, uint32_t a, uint32_t b) {
    const uint32_t carry = (sum & a) | (sum & b) | (a & b);
    sum = sum ^ a ^ b;
    return carry;
  }

  __device__ __forceinline__ void add(const uint32_t (&x)[kAtOnce]) {
    uint32_t carry[kAtOnce / 2];
#pragma unroll
    for (int i = 0; i < 8; ++i) carry[i] = add(plane[0], x[2 * i], x[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) carry[i] = add(plane[1], carry[2 * i], carry[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) carry[i] = add(plane[2], carry[2 * i], carry[2 * i + 1]);
    uint32_t rest = add(plane[3], carry[0], carry[1]);
#pragma unroll
    for (int i = 4; i < kPlanes; ++i) {
      const uint32_t next = plane[i] & rest;
      plane[i] ^= rest;
      rest = next;
    }
  }
};

// Counts of the bins of a row lie side by side, one word apart from the next row's.
inline constexpr int kCountStride = kBins + 1;

// Adds the counters of a quad's two rows (`upper`, and the one 8 below it) to `counts` in shared memory, and
// clears them. Every lane owns half of the bins of one row, so that nothing is atomic.
__device__ __forceinline__ void flush_counters(BinCounter (&counters)[2], int32_t* counts, int upper,
                                               int column_pair) {
  constexpr int kPlanes = BinCounter::kPlanes;
  uint32_t sum[kPlanes + 2];
  // The first exchange leaves the upper row in even lanes and the lower one in odd lanes.
  const bool odd = column_pair & 1;
  uint32_t carry = 0;
#pragma unroll
  for (int i = 0; i < kPlanes; ++i) {
    const uint32_t mine = odd ? counters[1].plane[i] : counters[0].plane[i];
    const uint32_t other = odd ? counters[0].plane[i] : counters[1].plane[i];
    sum[i] = mine;
    carry = BinCounter::add(sum[i], __shfl_xor_sync(~0u, other, 1), carry);
  }
  sum[kPlanes] = carry;
  carry = 0;
#pragma unroll
  for (int i = 0; i <= kPlanes; ++i) {
    const uint32_t other = __shfl_xor_sync(~0u, sum[i], 2);
    carry = BinCounter::add(sum[i], other, carry);
  }
  sum[kPlanes + 1] = carry;

  const int first = column_pair / 2 * (kBins / 2);
  int32_t* const to = counts + (upper + (odd ? 8 : 0)) * kCountStride + first;
#pragma unroll
  for (int bin = 0; bin < kBins / 2; bin += 4) {
    // Four bits of every plane, spread over the bytes of a word.
    uint32_t low = 0;
    uint32_t high = 0;
#pragma unroll
    for (int i = 0; i < kPlanes + 2; ++i) {
      const uint32_t bits = (((sum[i] >> (first + bin)) & 0xf) * 0x00204081u) & 0x01010101u;
      if (i < 8) {
        low += bits << i;
      } else {
        high += bits << (i - 8);
      }
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      to[bin + b] += static_cast<int32_t>((low >> (8 * b) & 0xff) + (high >> (8 * b) & 0xff) * 256);
    }
  }
  counters[0].clear();
  counters[1].clear();
}

// The bin that holds the rank-th of a row's counted keys, from the last bin on. Returns -1 if there are fewer
// keys than that.
__device__ inline int find_bin(const int32_t* counts, int rank, int& before, int& inside) {
  constexpr int kTogether = 8;  // loads in flight
  int found = -1;
  before = 0;
  inside = 0;
#pragma unroll 1
  for (int last = kBins - 1; last >= 0 && found < 0; last -= kTogether) {
    int count[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) count[i] = counts[last - i];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (found >= 0) continue;
      if (before + count[i] >= rank) {
        found = last - i;
        inside = count[i];
      } else {
        before += count[i];
      }
    }
  }
  return found;
}

// ---------------------------------------------------------------------------------------------------------------
// Row states between the sweeps
// ---------------------------------------------------------------------------------------------------------------

// Candidates of one row, at most: picking among them takes quadratic time.
inline constexpr int kRowCandidates = 256;

// From the first count: which rows are proven, and the scores in question of each. All threads.
__device__ inline void place_rows(SettleRows& rows, const int32_t* counts) {
  const int row = threadIdx.x % kTileRows;
  const float lower = rows.lower[row];
  __syncthreads();  // the counts are there
  if (threadIdx.x < kTileRows) {
    const int kept = rows.kept[row];
    int before = 0;
    int inside = 0;
    const int bin = kept == 0 ? -1 : find_bin(counts + row * kCountStride, kept, before, inside);
    const bool proven = kept == 0 || (bin >= 0 && lower == lower);
    rows.above[row] = before;
    rows.inside[row] = proven && kept > 0 ? inside : 0;
    rows.filled[row] = bin;
    const uint32_t unproven = __ballot_sync(~0u, !proven);
    if (threadIdx.x % 32 == 0) rows.unproven[threadIdx.x / 32] = unproven;
  }
  __syncthreads();
  // One half of the threads looks for the lower ends, the other for the upper ones.
  const bool sought = rows.inside[row] > 0;
  const int bin = rows.filled[row];
  const BinScale scale{rows.gain[row], rows.offset[row]};
  if (threadIdx.x < kTileRows) {
    rows.low[row] = sought ? bin_begin(scale, bin, order_key(lower)) : 1;
  } else {
    rows.high[row] = !sought            ? 0
                     : bin == kBins - 1 ? kNaNKey
                                        : bin_begin(scale, bin + 1, order_key(lower)) - 1;
  }
  __syncthreads();
}

// Where each row's candidates go, and whether there is room for them. All threads.
__device__ inline void plan_candidates(SettleRows& rows, int capacity) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    const int first = rows.inside[2 * lane];
    const int second = rows.inside[2 * lane + 1];
    int upto = first + second;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int x = __shfl_up_sync(~0u, upto, step);
      if (lane >= step) upto += x;
    }
    bool plain = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * lane + i;
      rows.begin[row] = upto - second - (i == 0 ? first : 0);
      rows.filled[row] = 0;
      plain = plain && (rows.inside[row] == 0 || (rows.tie[row] == kNoTie && rows.high[row] < kInfinityKey));
    }
    plain = __all_sync(~0u, plain);
    const bool few = __all_sync(~0u, max(first, second) <= kRowCandidates);
    if (lane == 31) {
      rows.fits = upto <= capacity && few;
      rows.plain = plain;
    }
  }
  __syncthreads();
}

}  // namespace topk_attn::cuda::sm90
