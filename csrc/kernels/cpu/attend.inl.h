// One row's attention over its kept keys: softmax, weighted sum of V rows, and the gathers of the backward.

// Rows asked for this many list entries ahead: kept rows lie anywhere in K and V, so the hardware cannot
// guess them.
inline constexpr int64_t kRowsAhead = 16;

template <typename T>
inline void prefetch_channels(const T* x, int64_t channels) {
  const char* line = reinterpret_cast<const char*>(x);
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(line + b);
}

// out = (initial ? out : 0) + sum over the list of weights[i] * row(positions[i]), in list order, for N
// vectors of channels from `c0`. positions[0, known) may be asked for ahead: 0 asks for nothing.
template <typename T, int N, typename Row>
inline void gather_sum(const int32_t* positions, const acc_t<T>* weights, int64_t count, int64_t known,
                       Row row, int64_t c0, bool initial, acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr int L = Vec<A>::kLanes;
  vec_t<A> acc[N];
#pragma GCC unroll 8
  for (int u = 0; u < N; ++u) acc[u] = initial ? load(out + c0 + u * L) : vec_t<A>{};
  for (int64_t i = 0; i < count; ++i) {
    if (i + kRowsAhead < known) prefetch_channels(row(positions[i + kRowsAhead]) + c0, N * L);
    const T* x = row(positions[i]) + c0;
    const vec_t<A> weight = splat(weights[i]);
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) acc[u] = fma(weight, load(x + u * L), acc[u]);
  }
#pragma GCC unroll 8
  for (int u = 0; u < N; ++u) store(out + c0 + u * L, acc[u]);
}

// dots[i] = x . row(positions[i]) over N vectors of channels from `c0`; added to dots when `accumulate`.
// positions[0, known) may be asked for ahead.
template <typename T, int N, typename Row>
inline void gather_dot(const int32_t* positions, int64_t count, int64_t known, Row row, int64_t c0,
                       const acc_t<T>* x, bool accumulate, acc_t<T>* dots) {
  using A = acc_t<T>;
  constexpr int L = Vec<A>::kLanes;
  vec_t<A> mine[N];
#pragma GCC unroll 8
  for (int u = 0; u < N; ++u) mine[u] = load(x + c0 + u * L);
  const auto products = [&](const T* other) {
    vec_t<A> sum{};
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) sum = fma(mine[u], load(other + u * L), sum);
    return sum;
  };
  for (int64_t i = 0; i < count; i += 4) {
    if (i + 4 + kRowsAhead <= known) {
#pragma GCC unroll 4
      for (int e = 0; e < 4; ++e) prefetch_channels(row(positions[i + e + kRowsAhead]) + c0, N * L);
    }
    A dot[4];
    const int64_t here = count - i < 4 ? count - i : 4;
    const int32_t* four = positions + i;
    const vec_t<A> first = products(row(four[0]) + c0);
    const vec_t<A> second = products(row(four[here > 1 ? 1 : 0]) + c0);
    const vec_t<A> third = products(row(four[here > 2 ? 2 : 0]) + c0);
    const vec_t<A> fourth = products(row(four[here > 3 ? 3 : 0]) + c0);
    horizontal_sums<A>(first, second, third, fourth, dot);
    for (int e = 0; e < here; ++e) dots[i + e] = accumulate ? dots[i + e] + dot[e] : dot[e];
  }
}

// Calls body(std::integral_constant<int, N>, first channel) over `channels` in pieces of up to 8 vectors.
template <typename A, typename Body>
inline void for_channel_pieces(int64_t channels, Body body) {
  constexpr int L = Vec<A>::kLanes;
  int64_t c = 0;
  for (; c + 8 * L <= channels; c += 8 * L) body(std::integral_constant<int, 8>{}, c);
  switch ((channels - c) / L) {
    case 1:
      return body(std::integral_constant<int, 1>{}, c);
    case 2:
      return body(std::integral_constant<int, 2>{}, c);
    case 3:
      return body(std::integral_constant<int, 3>{}, c);
    case 4:
      return body(std::integral_constant<int, 4>{}, c);
    case 5:
      return body(std::integral_constant<int, 5>{}, c);
    case 6:
      return body(std::integral_constant<int, 6>{}, c);
    case 7:
      return body(std::integral_constant<int, 7>{}, c);
    default:
      return;
  }
}

// Softmax of the kept raw scores in place: scores become probabilities. Returns lse. A row whose kept scores
// are all -inf (or that keeps nothing) gives probability 0 everywhere and lse = -inf; a NaN or +inf gives
// NaN.
inline float softmax_kept(float* scores, int64_t count, float scale) {
  constexpr int L = Vec<float>::kLanes;
  float top = -std::numeric_limits<float>::infinity();
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) {
    top = scores[i] > top ? scores[i] : top;
    nan |= scores[i] != scores[i];
  }
  if (top == -std::numeric_limits<float>::infinity() && !nan) {
    for (int64_t i = 0; i < count; ++i) scores[i] = 0.0f;
    return top;
  }
  // The tail is padded with -inf to whole vectors: callers leave a vector of slack behind the list.
  const int64_t padded = (count + L - 1) / L * L;
  for (int64_t i = count; i < padded; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  vec_t<float> sums{};
  for (int64_t i = 0; i < padded; i += L) {
    const vec_t<float> e = exp_nonpositive((load(scores + i) - splat(top)) * splat(scale));
    sums += e;
    store(scores + i, e);
  }
  const float sum = horizontal_sum<float>(sums);
  const float inverse = 1.0f / sum;
  for (int64_t i = 0; i < padded; i += L) store(scores + i, load(scores + i) * splat(inverse));
  return scale * top + std::log(sum);
}

inline double softmax_kept(double* scores, int64_t count, double scale) {
  double top = -std::numeric_limits<double>::infinity();
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) {
    top = scores[i] > top ? scores[i] : top;
    nan |= scores[i] != scores[i];
  }
  if (top == -std::numeric_limits<double>::infinity() && !nan) {
    for (int64_t i = 0; i < count; ++i) scores[i] = 0.0;
    return top;
  }
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = std::exp((scores[i] - top) * scale);
    sum += scores[i];
  }
  for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
  return scale * top + std::log(sum);
}

// What a worker needs to select and attend rows of up to n keys with head dims up to `channels`.
template <typename A>
struct RowScratch {
  SelectScratch<A> select;
  Buffer<int32_t> kept;
  Buffer<A> weights;
  Buffer<A> group;  // the group's maximum scores (select = kv_group)
  Buffer<A> channels;
  RowScratch(int64_t n, int64_t dim)
      : select(n), kept(n + 64), weights(n + 64), group(n + 64), channels(dim + 64) {}
};

// Selects the kept keys of one row from its raw scores (indexed by key position): scratch.kept, ascending.
template <typename A>
Encoding<A> keep_row(const A* scores, const RowPlan& plan, RowScratch<A>& scratch) {
  int32_t* kept = scratch.kept.data();
  for (int64_t i = 0; i < plan.sinks; ++i) *kept++ = static_cast<int32_t>(plan.seen.begin + i);
  const Span contested = plan.contested();
  const Encoding<A> encoding = select_row(scores + contested.begin, contested.size(), plan.contested_kept(),
                                          contested.begin, scratch.select, kept);
  kept += plan.contested_kept();
  for (int64_t j = contested.end; j < plan.seen.end; ++j) *kept++ = static_cast<int32_t>(j);
  return encoding;
}

// group[j] = the largest score of the group at key j, NaN if any is NaN.
template <typename A>
void group_maximum(const A* scores, int64_t stride, int64_t heads, const Span& seen, A* group) {
  for (int64_t j = seen.begin; j < seen.end; ++j) group[j] = scores[j];
  for (int64_t h = 1; h < heads; ++h) {
    const A* row = scores + h * stride;
    for (int64_t j = seen.begin; j < seen.end; ++j)
      group[j] = row[j] > group[j] || row[j] != row[j] ? row[j] : group[j];
  }
}

// Probabilities of the kept keys of one row: softmax of its scores, left in `weights` (a vector of slack
// behind them). Returns lse.
template <typename A>
A kept_weights(const A* scores, const int32_t* kept, int64_t count, A scale, A* weights) {
  for (int64_t i = 0; i < count; ++i) weights[i] = scores[kept[i]];
  return softmax_kept(weights, count, scale);
}

// Attention of one row over scratch.kept[0, count): softmax of its scores, then the V rows.
// Leaves the probabilities in scratch.weights and writes `out` (T); returns lse.
template <typename T, typename Row>
acc_t<T> attend_row(const acc_t<T>* scores, int64_t count, acc_t<T> scale, Row v_row, int64_t v_dim,
                    RowScratch<acc_t<T>>& scratch, T* out) {
  using A = acc_t<T>;
  const int32_t* kept = scratch.kept.data();
  A* weights = scratch.weights.data();
  const A lse = kept_weights(scores, kept, count, scale, weights);
  A* sum = scratch.channels.data();
  if (lse == -std::numeric_limits<A>::infinity()) {
    for (int64_t c = 0; c < v_dim; ++c) sum[c] = 0;
  } else {
    for_channel_pieces<A>(v_dim, [&](auto n, int64_t c) {
      gather_sum<T, decltype(n)::value>(kept, weights, count, count, v_row, c, false, sum);
    });
  }
  for (int64_t c = 0; c < v_dim; ++c) out[c] = from_acc<T>(sum[c]);
  return lse;
}
