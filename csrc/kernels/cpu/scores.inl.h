// Raw scores q . k: the one routine every path uses, so that a score has the same bits wherever it is
// computed.
//
// Keys are packed into panels of kPanel keys, channel-major, so that lane l of a vector is key l: each score
// is one chain of fused multiply-adds from zero in ascending channel order, whatever the tile around it.
// Cost: rows * keys * head_dim multiply-adds at close to the machine's peak; packing costs one transpose of
// K.

template <typename A>
inline constexpr int kPanel = 2 * Vec<A>::kLanes;

template <typename A>
inline int64_t panels_of(int64_t keys) {
  return (keys + kPanel<A> - 1) / kPanel<A>;
}

#if defined(__AVX2__)
// Eight channels as float32, whatever the width of this instruction set's own vectors.
inline __m256 load8(const float* p) {
  return _mm256_loadu_ps(p);
}
inline __m256 load8(const BFloat16* p) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
inline __m256 load8(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Transposes eight channels of eight rows in registers: out[c * out_stride + i] is channel c of row i.
template <typename T>
inline void transpose8(const T* const* rows, int64_t channel, float* out, int64_t out_stride) {
  __m256 r[8];
  __m256 t[8];
  for (int i = 0; i < 8; ++i) r[i] = load8(rows[i] + channel);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const __m256 a = t[4 * half], b = t[4 * half + 1], c = t[4 * half + 2], d = t[4 * half + 3];
    r[4 * half] = _mm256_shuffle_ps(a, c, 0x44);
    r[4 * half + 1] = _mm256_shuffle_ps(a, c, 0xee);
    r[4 * half + 2] = _mm256_shuffle_ps(b, d, 0x44);
    r[4 * half + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// Transposes an L x L block: lane i of out[c] is channel c of row i.
template <typename T, typename A = acc_t<T>>
inline void transpose_block(const T* const* rows, int64_t channel, A* out, int64_t out_stride) {
  constexpr int L = Vec<A>::kLanes;
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    for (int i = 0; i < L; i += 8) {
      for (int c = 0; c < L; c += 8) transpose8(rows + i, channel + c, out + c * out_stride + i, out_stride);
    }
    return;
  }
#endif
  for (int i = 0; i < L; ++i) {
    A lanes[L];
    store(lanes, load(rows[i] + channel));
    for (int c = 0; c < L; ++c) out[c * out_stride + i] = lanes[c];
  }
}

// Packs `count` (1 .. kPanel) key rows into one panel (head_dim x kPanel); missing keys repeat the last row.
// row(i) gives the address of the i-th row.
template <typename T, typename Row>
inline void pack_panel(Row row, int count, int64_t head_dim, acc_t<T>* panel) {
  using A = acc_t<T>;
  constexpr int L = Vec<A>::kLanes;
  const T* rows[kPanel<A>];
  for (int i = 0; i < kPanel<A>; ++i) rows[i] = row(i < count ? i : count - 1);
  int64_t c = 0;
  for (; c + L <= head_dim; c += L) {
    for (int half = 0; half < 2; ++half) {
      transpose_block<T>(rows + half * L, c, panel + c * kPanel<A> + half * L, kPanel<A>);
    }
  }
  for (; c < head_dim; ++c) {  // a head_dim that is no multiple of the vector
    for (int i = 0; i < kPanel<A>; ++i) panel[c * kPanel<A> + i] = to_acc(rows[i][c]);
  }
}

// scores[r][0 .. kPanel) = q[r] . panel for R rows.
template <typename A, int R>
inline void score_tile(const A* q, int64_t q_stride, const A* panel, int64_t head_dim, A* scores,
                       int64_t scores_stride) {
  constexpr int L = Vec<A>::kLanes;
  vec_t<A> acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = vec_t<A>{};
  for (int64_t c = 0; c < head_dim; ++c) {
    const vec_t<A> k0 = load(panel + c * kPanel<A>);
    const vec_t<A> k1 = load(panel + c * kPanel<A> + L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec_t<A> x = splat(q[r * q_stride + c]);
      acc[r][0] = fma(x, k0, acc[r][0]);
      acc[r][1] = fma(x, k1, acc[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(scores + r * scores_stride, acc[r][0]);
    store(scores + r * scores_stride + L, acc[r][1]);
  }
}

template <typename A, int R>
inline void score_rest(int rows, const A* q, int64_t q_stride, const A* panel, int64_t head_dim, A* scores,
                       int64_t scores_stride) {
  if constexpr (R > 0) {
    if (rows == R) {
      score_tile<A, R>(q, q_stride, panel, head_dim, scores, scores_stride);
    } else {
      score_rest<A, R - 1>(rows, q, q_stride, panel, head_dim, scores, scores_stride);
    }
  }
}

// Scores of `rows` query rows (A, contiguous rows of head_dim) against one packed panel.
template <typename A>
inline void score_panel(int64_t rows, const A* q, int64_t head_dim, const A* panel, A* scores,
                        int64_t scores_stride) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    score_tile<A, kTileRows>(q + r * head_dim, head_dim, panel, head_dim, scores + r * scores_stride,
                             scores_stride);
  }
  score_rest<A, kTileRows - 1>(static_cast<int>(rows - r), q + r * head_dim, head_dim, panel, head_dim,
                               scores + r * scores_stride, scores_stride);
}
