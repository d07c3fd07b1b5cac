// The selection contract: who sees whom, how many keys are kept, in which order, and how a row's selection is
// encoded.
//
// Every path (CPU, CUDA, training, prefill, decode) includes this file and calls these functions; none
// repeats them. Torch-free and usable from host and device code. All functions are pure.
//
// Vocabulary: query row i of a sequence with Tq queries and Tk keys sees the keys [begin, end). It keeps W of
// them: first the always-kept ones (sinks = the first visible keys, recent = the last visible keys), then the
// best by score. The kept set is encoded by (threshold, tie_index): the raw score of the last kept key that
// is not always kept, and its index among the keys of exactly that score.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define TOPK_HD __host__ __device__ inline
#else
#define TOPK_HD inline
#endif

namespace topk_attn {

// ---------------------------------------------------------------------------------------------------------------
// Budget
// ---------------------------------------------------------------------------------------------------------------

inline constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// How many keys a row keeps. Exactly one of `topk` (>= 1) and `ratio` (0 < ratio <= 1) is set; the other is
// 0.
struct Budget {
  int64_t topk = 0;             // keys kept, absolute; 0: not given
  double ratio = 0.0;           // share of the visible keys; 0: not given
  int64_t min_keys = 1;         // floor, >= 1
  int64_t max_keys = kNoLimit;  // ceiling, >= min_keys
};

// W(n): number of keys a row keeps when it sees n keys. clamp(topk or ceil(ratio * n - 1e-6), min_keys,
// max_keys), then clamped to [1, n]; 0 when n = 0. The 1e-6 keeps rounding noise of the product from adding a
// key; product and subtraction are rounded separately, so host and device agree.
TOPK_HD int64_t budget(int64_t n, const Budget& b) {
  if (n <= 0) return 0;
  int64_t w = b.topk;
  if (b.topk <= 0) {
#if defined(__CUDA_ARCH__)
    const double product = __dmul_rn(b.ratio, static_cast<double>(n));
    w = static_cast<int64_t>(ceil(__dsub_rn(product, 1e-6)));
#else
    // volatile forbids contraction into one fused multiply-add.
    volatile double product = b.ratio * static_cast<double>(n);
    w = static_cast<int64_t>(std::ceil(product - 1e-6));
#endif
  }
  w = w < b.min_keys ? b.min_keys : w;
  w = w > b.max_keys ? b.max_keys : w;
  w = w > n ? n : w;
  return w < 1 ? 1 : w;
}

// ---------------------------------------------------------------------------------------------------------------
// Visibility
// ---------------------------------------------------------------------------------------------------------------

// Keys [begin, end) of its sequence that a query row sees; end >= begin.
struct Span {
  int64_t begin;
  int64_t end;
  TOPK_HD int64_t size() const { return end - begin; }
};

// Visible keys of query row i (0 <= i < tq) of a sequence with tk keys, the first `leftpad` of which are
// padding. Causal is bottom-right aligned: key j is visible iff j <= i + (tk - tq).
TOPK_HD Span visible(int64_t i, int64_t tq, int64_t tk, bool causal, int64_t leftpad = 0) {
  int64_t end = causal ? i + (tk - tq) + 1 : tk;
  end = end > tk ? tk : end;
  const int64_t begin = leftpad < 0 ? 0 : leftpad;
  return Span{begin, end < begin ? begin : end};
}

// The visible keys of one row, split into its always-kept ends and the middle that competes by score.
struct RowPlan {
  Span seen;        // all visible keys
  int64_t kept;     // W: keys kept in all
  int64_t sinks;    // the first `sinks` visible keys are always kept
  int64_t recents;  // the last `recents` visible keys are always kept
  // Keys that compete by score, and how many of them are kept.
  TOPK_HD Span contested() const { return Span{seen.begin + sinks, seen.end - recents}; }
  TOPK_HD int64_t contested_kept() const { return kept - sinks - recents; }
  TOPK_HD bool always_kept(int64_t j) const {
    return (j >= seen.begin && j < seen.begin + sinks) || (j >= seen.end - recents && j < seen.end);
  }
};

// Always-kept keys count inside W and never raise it: sinks first by ascending index, then recent keys newest
// first.
TOPK_HD RowPlan plan_row(Span seen, const Budget& b, int64_t sink, int64_t recent) {
  RowPlan p;
  p.seen = seen;
  p.kept = budget(seen.size(), b);
  p.sinks = sink < p.kept ? sink : p.kept;
  const int64_t rest = p.kept - p.sinks;
  p.recents = recent < rest ? recent : rest;
  return p;
}

// ---------------------------------------------------------------------------------------------------------------
// Order
// ---------------------------------------------------------------------------------------------------------------

// Maps a score to a signed integer whose order is the contract's: higher first, -0 equal to +0, every NaN
// equal and before everything else. Between keys of equal order the lower index comes first.
TOPK_HD int32_t order_key(float score) {
  if (score != score) return 0x7fffffff;
  int32_t bits;
  memcpy(&bits, &score, sizeof bits);
  bits = bits ^ ((bits >> 31) & 0x7fffffff);
  return score == 0.0f ? 0 : bits;
}

TOPK_HD int64_t order_key(double score) {
  if (score != score) return 0x7fffffffffffffffLL;
  int64_t bits;
  memcpy(&bits, &score, sizeof bits);
  bits = bits ^ ((bits >> 63) & 0x7fffffffffffffffLL);
  return score == 0.0 ? 0 : bits;
}

// The score that `order_key` came from, with +0 for zeros and one quiet NaN for NaN: what `threshold` stores.
TOPK_HD float order_score(int32_t key) {
  const int32_t bits = key == 0x7fffffff ? 0x7fc00000 : key ^ ((key >> 31) & 0x7fffffff);
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

TOPK_HD double order_score(int64_t key) {
  const int64_t bits =
      key == 0x7fffffffffffffffLL ? 0x7ff8000000000000LL : key ^ ((key >> 63) & 0x7fffffffffffffffLL);
  double score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

// ---------------------------------------------------------------------------------------------------------------
// Encoding
// ---------------------------------------------------------------------------------------------------------------

// True iff key j, of score `score`, is admitted by a row's encoding (always-kept keys are not asked here). A
// row with tie_index = -1 and threshold NaN admits nothing.
template <typename Score>
TOPK_HD bool admitted(Score score, int64_t j, Score threshold, int32_t tie_index) {
  if (tie_index < 0) return false;
  const auto s = order_key(score);
  const auto t = order_key(threshold);
  return s > t || (s == t && j <= tie_index);
}

}  // namespace topk_attn
