// Exact top-w of one row of scores, in the contract's order: the threshold, the tie index and the kept
// positions.
//
// A sample of the row guesses a lower bound of the threshold; one pass keeps the keys above it (a superset of
// the answer whenever it holds at least w of them, which is counted, not assumed; else the whole row is
// taken); the exact threshold is then found by bisection on the integer order keys of those candidates,
// counting with vectors. Cost: one read of the row, plus about ten passes over a few times w candidates.

template <typename A>
using key_t = decltype(order_key(A{}));

// Room that selecting from rows of up to n scores needs; a vector of slack behind each list.
template <typename A>
struct SelectScratch {
  Buffer<key_t<A>> keys;      // order keys of the candidates
  Buffer<int32_t> positions;  // their positions, ascending
  Buffer<key_t<A>> active;    // keys still inside the bisection's interval
  explicit SelectScratch(int64_t n) : keys(n + 64), positions(n + 64), active(n + 64) {}
};

inline int64_t count_at_least(const int32_t* keys, int64_t n, int32_t bound) {
  using I = Vec<float>::ints;
  constexpr int L = Vec<float>::kLanes;
  I counts{};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    counts -= *reinterpret_cast<const Vec<float>::ints_unaligned*>(keys + i) >= bound;
  }
  int64_t total = 0;
  for (int lane = 0; lane < L; ++lane) total += counts[lane];
  for (; i < n; ++i) total += keys[i] >= bound;
  return total;
}

inline int64_t count_at_least(const int64_t* keys, int64_t n, int64_t bound) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += keys[i] >= bound;
  return total;
}

// Moves the keys at or above `bound` (kAbove) or those below it to the front, in order; returns how many.
template <bool kAbove>
inline int64_t keep_side(int32_t* keys, int64_t n, int32_t bound) {
  using I = Vec<float>::ints_unaligned;
  constexpr int L = Vec<float>::kLanes;
  int64_t m = 0;
  int64_t i = 0;
  // A whole vector is written at m <= i: what it overwrites has been read.
  for (; i + L <= n; i += L) {
    const Vec<float>::ints key = *reinterpret_cast<const I*>(keys + i);
    m += compress(keys + m, key, kAbove ? key >= bound : key < bound);
  }
  for (; i < n; ++i) {
    const int32_t key = keys[i];
    keys[m] = key;
    m += kAbove ? key >= bound : key < bound;
  }
  return m;
}

template <bool kAbove>
inline int64_t keep_side(int64_t* keys, int64_t n, int64_t bound) {
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t key = keys[i];
    keys[m] = key;
    m += kAbove ? key >= bound : key < bound;
  }
  return m;
}

// The w-th greatest of n keys (1 <= w <= n). `active` is overwritten and may be the keys' own copy.
template <typename Key>
Key kth_greatest(Key* active, int64_t n, int64_t w) {
  Key lo = active[0];
  Key hi = active[0];
  for (int64_t i = 1; i < n; ++i) {
    lo = active[i] < lo ? active[i] : lo;
    hi = active[i] > hi ? active[i] : hi;
  }
  // Invariant: the answer lies in [lo, hi]; `active` holds every key in there, w counts among them and above
  // them.
  while (lo < hi) {
    // Upper middle without overflow, so that [mid, hi] and [lo, mid - 1] are both smaller than [lo, hi].
    using U = std::make_unsigned_t<Key>;
    const Key mid = static_cast<Key>(static_cast<U>(lo) + (static_cast<U>(hi) - static_cast<U>(lo)) / 2 + 1);
    const int64_t count = count_at_least(active, n, mid);
    if (count >= w) {
      lo = mid;
      if (count == w) {  // the answer is the least key at or above mid
        Key least = hi;
        for (int64_t i = 0; i < n; ++i) least = active[i] >= mid && active[i] < least ? active[i] : least;
        return least;
      }
      if (count * 2 < n) n = keep_side<true>(active, n, mid);
    } else {
      hi = mid - 1;
      if ((n - count) * 2 < n) {
        n = keep_side<false>(active, n, mid);
        w -= count;
      }
    }
  }
  return lo;
}

// A score that at least w of the n scores probably reach, from a strided sample; nothing if sampling cannot
// pay.
template <typename A>
inline bool guess_bound(const A* scores, int64_t n, int64_t w, SelectScratch<A>& scratch, A* bound) {
  if (n < 256 || w * 4 > n) return false;
  int64_t size = n / 16;
  size = size < 128 ? 128 : size > 1024 ? 1024 : size;
  const int64_t stride = n / size;
  const double expected = static_cast<double>(w) * static_cast<double>(size) / static_cast<double>(n);
  const int64_t rank = static_cast<int64_t>(expected + 3.0 * std::sqrt(expected) + 2.0);
  if (rank * 2 > size) return false;
  key_t<A>* sample = scratch.active.data();
  for (int64_t i = 0; i < size; ++i) sample[i] = order_key(scores[i * stride]);
  *bound = order_score(kth_greatest(sample, size, rank));
  return true;
}

// Appends the candidates of scores[0, n) that are not below `bound` (NaN scores included); returns how many.
inline int64_t filter(const float* scores, int64_t n, float bound, SelectScratch<float>& scratch) {
  using I = Vec<float>::ints;
  constexpr int L = Vec<float>::kLanes;
  int32_t* keys = scratch.keys.data();
  int32_t* positions = scratch.positions.data();
  int64_t m = 0;
  int64_t i = 0;
  I lanes;
  for (int lane = 0; lane < L; ++lane) lanes[lane] = lane;
  const vec_t<float> limit = splat(bound);
  for (; i + 4 * L <= n; i += 4 * L) {
    vec_t<float> s[4];
    I pass[4];
    for (int u = 0; u < 4; ++u) {
      s[u] = load(scores + i + u * L);
      pass[u] = ~(s[u] < limit);
    }
    if (!any(pass[0] | pass[1] | pass[2] | pass[3])) continue;
    for (int u = 0; u < 4; ++u) {
      compress(keys + m, as<I>(s[u]), pass[u]);
      m += compress(positions + m, lanes + static_cast<int32_t>(i + u * L), pass[u]);
    }
  }
  for (; i < n; ++i) {
    memcpy(keys + m, scores + i, sizeof *keys);
    positions[m] = static_cast<int32_t>(i);
    m += !(scores[i] < bound);
  }
  // Few pass: their order keys are made here rather than above. The lists have a vector of slack.
  for (i = 0; i < m; i += L) {
    const I key = order_keys(load(reinterpret_cast<const float*>(keys + i)));
    memcpy(keys + i, &key, sizeof key);
  }
  return m;
}

inline int64_t filter(const double* scores, int64_t n, double bound, SelectScratch<double>& scratch) {
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    scratch.keys[m] = order_key(scores[i]);
    scratch.positions[m] = static_cast<int32_t>(i);
    m += !(scores[i] < bound);
  }
  return m;
}

// Every score is a candidate.
template <typename A>
inline int64_t take_all(const A* scores, int64_t n, SelectScratch<A>& scratch) {
  int64_t i = 0;
  if constexpr (sizeof(A) == 4) {
    constexpr int L = Vec<float>::kLanes;
    for (; i + L <= n; i += L) {
      const Vec<float>::ints key = order_keys(load(scores + i));
      memcpy(scratch.keys.data() + i, &key, sizeof key);
    }
  }
  for (; i < n; ++i) scratch.keys[i] = order_key(scores[i]);
  for (i = 0; i < n; ++i) scratch.positions[i] = static_cast<int32_t>(i);
  return n;
}

template <typename A>
struct Encoding {
  A threshold = std::numeric_limits<A>::quiet_NaN();
  int32_t tie_index = -1;
};

// Writes the positions of the w best of scores[0, n), ascending and shifted by `offset`, to kept (a vector of
// slack behind it), and returns the encoding. 0 <= w <= n.
template <typename A>
Encoding<A> select_row(const A* scores, int64_t n, int64_t w, int64_t offset, SelectScratch<A>& scratch,
                       int32_t* kept) {
  Encoding<A> encoding;
  if (w <= 0) return encoding;
  int64_t m = 0;
  A bound;
  if (guess_bound(scores, n, w, scratch, &bound)) m = filter(scores, n, bound, scratch);
  if (m < w) m = take_all(scores, n, scratch);

  key_t<A>* keys = scratch.keys.data();
  const int32_t* positions = scratch.positions.data();
  memcpy(scratch.active.data(), keys, m * sizeof *keys);
  const key_t<A> threshold = kth_greatest(scratch.active.data(), m, w);

  // Of the keys equal to the threshold, the first ones in index order are kept; tie_index is the last of
  // them.
  int64_t above = 0;
  for (int64_t i = 0; i < m; ++i) above += keys[i] > threshold;
  int64_t equal = w - above;
  int32_t tie = -1;
  for (int64_t i = 0; equal > 0; ++i) {
    if (keys[i] == threshold) {
      tie = positions[i];
      --equal;
    }
  }

  int64_t count = 0;
  const int32_t shift = static_cast<int32_t>(offset);
  int64_t i = 0;
  if constexpr (sizeof(A) == 4) {
    using I = Vec<float>::ints_unaligned;
    constexpr int L = Vec<float>::kLanes;
    for (; i + L <= m; i += L) {
      const Vec<float>::ints key = *reinterpret_cast<const I*>(keys + i);
      const Vec<float>::ints at = *reinterpret_cast<const I*>(positions + i);
      count += compress(kept + count, at + shift, (key > threshold) | ((key == threshold) & (at <= tie)));
    }
  }
  for (; i < m; ++i) {
    if (keys[i] > threshold || (keys[i] == threshold && positions[i] <= tie))
      kept[count++] = positions[i] + shift;
  }
  encoding.threshold = order_score(threshold);
  encoding.tie_index = tie + shift;
  return encoding;
}
