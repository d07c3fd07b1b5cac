// Vectors of one instruction set: types, conversions, fused multiply-add, compression, exponential.
//
// Included once per instruction set, inside namespace topk_attn::cpu::TOPK_ISA (see isa.cpp). GCC/Clang
// vector extensions carry the plain arithmetic; intrinsics are used only where the extensions have no word
// for it.

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kTileRows = 12;  // 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kTileRows = 6;  // 6 x 2 accumulators of 16 registers
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kTileRows = 4;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename A>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
  typedef int32_t ints_unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};

template <>
struct Vec<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <typename A>
using vec_t = typename Vec<A>::type;

template <typename To, typename From>
inline To as(From x) {
  return __builtin_bit_cast(To, x);
}

// An array of uninitialised elements. Used instead of std::vector<float> and the like, whose out-of-line
// members the linker would merge across instruction sets.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) : data_(new T[n]), size_(n) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { delete[] data_; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Accumulation type of a storage type.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

// ---- scalars
// ----------------------------------------------------------------------------------------------------

inline float to_acc(float x) {
  return x;
}
inline double to_acc(double x) {
  return x;
}
inline float to_acc(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
inline float to_acc(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  float magnitude;
  if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    memcpy(&magnitude, &bits, sizeof magnitude);
  }
  uint32_t bits;
  memcpy(&bits, &magnitude, sizeof bits);
  bits |= sign;
  memcpy(&magnitude, &bits, sizeof bits);
  return magnitude;
#endif
}

template <typename T>
inline T from_acc(acc_t<T> x);
template <>
inline float from_acc<float>(float x) {
  return x;
}
template <>
inline double from_acc<double>(double x) {
  return x;
}
// Round to nearest even; NaN stays NaN.
template <>
inline BFloat16 from_acc<BFloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return BFloat16{0x7fc0};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Float16 from_acc<Float16>(float x) {
#if defined(__F16C__)
  return Float16{static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Float16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return Float16{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal in float16: let the adder round at 2^-24
    float f;
    memcpy(&f, &magnitude, sizeof f);
    f += 0.5f;
    uint32_t rounded;
    memcpy(&rounded, &f, sizeof rounded);
    return Float16{static_cast<uint16_t>(sign | (rounded - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u);
  return Float16{static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

// ---- vectors
// ----------------------------------------------------------------------------------------------------

// x - 0 is x for every x, so this folds to a bare broadcast (x + 0 would not: it turns -0 into +0).
template <typename A>
inline vec_t<A> splat(A x) {
  return x - vec_t<A>{};
}

inline vec_t<float> load(const float* p) {
  return *reinterpret_cast<const Vec<float>::unaligned*>(p);
}
inline vec_t<double> load(const double* p) {
  return *reinterpret_cast<const Vec<double>::unaligned*>(p);
}

inline vec_t<float> load(const BFloat16* p) {
  typedef uint16_t halves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t words __attribute__((vector_size(kVectorBytes)));
  const halves h = *reinterpret_cast<const halves*>(p);
  const words w = __builtin_convertvector(h, words) << 16;
  return as<vec_t<float>>(w);
}

inline vec_t<float> load(const Float16* p) {
#if defined(__AVX512F__)
  return (vec_t<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vec_t<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vec_t<float> v;
  for (int i = 0; i < Vec<float>::kLanes; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

template <typename A>
inline void store(A* p, vec_t<A> v) {
  *reinterpret_cast<typename Vec<A>::unaligned*>(p) = v;
}

// a * b + c, rounded once where the hardware can.
inline vec_t<float> fma(vec_t<float> a, vec_t<float> b, vec_t<float> c) {
#if defined(__AVX512F__)
  return (vec_t<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vec_t<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  vec_t<float> r;
  for (int i = 0; i < Vec<float>::kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}
inline vec_t<double> fma(vec_t<double> a, vec_t<double> b, vec_t<double> c) {
#if defined(__AVX512F__)
  return (vec_t<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (vec_t<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__FP_FAST_FMA)
  vec_t<double> r;
  for (int i = 0; i < Vec<double>::kLanes; ++i) r[i] = __builtin_fma(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

template <typename A>
inline A horizontal_sum(vec_t<A> v) {
  A lanes[Vec<A>::kLanes];
  memcpy(lanes, &v, sizeof lanes);
  for (int width = Vec<A>::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// {sum of a, sum of b, sum of c, sum of d}: four dot products finished together.
template <typename A>
inline void horizontal_sums(vec_t<A> a, vec_t<A> b, vec_t<A> c, vec_t<A> d, A* sums) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
#if defined(__AVX512F__)
    const auto halve = [](vec_t<float> x) {
      return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
    };
    const __m256 x = halve(a), y = halve(b), z = halve(c), w = halve(d);
#else
    const __m256 x = (__m256)a, y = (__m256)b, z = (__m256)c, w = (__m256)d;
#endif
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(x, y), _mm256_hadd_ps(z, w));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
    return;
  }
#endif
  sums[0] = horizontal_sum<A>(a);
  sums[1] = horizontal_sum<A>(b);
  sums[2] = horizontal_sum<A>(c);
  sums[3] = horizontal_sum<A>(d);
}

// exp(x) for x <= 0 (or NaN), about 1 ulp; below -87.3 the result is 0.
inline vec_t<float> exp_nonpositive(vec_t<float> x) {
  using F = vec_t<float>;
  using I = Vec<float>::ints;
  const I vanish = x < splat(-87.3f);
  const F shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F biased = x * splat(1.44269504088896341f) + shift;
  const F n = biased - shift;
  F r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y, r * r, r + splat(1.0f));
  const I exponent = (as<I>(biased) - 0x4b400000) << 23;
  const I scaled = as<I>(y) + exponent;
  const I ordered = x == x;  // a NaN's exponent bits must not be touched
  const I result = ordered ? (scaled & ~vanish) : as<I>(x);
  return as<F>(result);
}

// Order keys of a vector of scores (contract.h's order_key, lane by lane).
inline Vec<float>::ints order_keys(vec_t<float> x) {
  using I = Vec<float>::ints;
  const I bits = as<I>(x);
  I key = bits ^ ((bits >> 31) & 0x7fffffff);
  key = key & ~(x == 0.0f);
  return x == x ? key : I{} + 0x7fffffff;
}

// Appends the lanes of v whose mask lane is set (-1) to dst, in order, and returns how many. May write a
// whole vector at dst: the buffer needs that much slack.
#if defined(__AVX512F__)
inline int compress(int32_t* dst, Vec<float>::ints v, Vec<float>::ints mask) {
  const __mmask16 m = _mm512_movepi32_mask((__m512i)mask);
  _mm512_storeu_si512(dst, _mm512_maskz_compress_epi32(m, (__m512i)v));
  return __builtin_popcount(m);
}
inline bool any(Vec<float>::ints mask) {
  return _mm512_movepi32_mask((__m512i)mask) != 0;
}
#elif defined(__AVX2__)
// For each of the 256 masks, the lanes to move to the front.
struct CompressTable {
  alignas(32) int32_t lanes[256][8];
  constexpr CompressTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int n = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask][n++] = lane;
      }
      while (n < 8) lanes[mask][n++] = 0;
    }
  }
};
inline constexpr CompressTable kCompress{};

inline int compress(int32_t* dst, Vec<float>::ints v, Vec<float>::ints mask) {
  const int m = _mm256_movemask_ps((__m256)mask);
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompress.lanes[m]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_permutevar8x32_epi32((__m256i)v, order));
  return __builtin_popcount(m);
}
inline bool any(Vec<float>::ints mask) {
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
}
#else
inline int compress(int32_t* dst, Vec<float>::ints v, Vec<float>::ints mask) {
  int n = 0;
  for (int i = 0; i < Vec<float>::kLanes; ++i) {
    dst[n] = v[i];
    n -= mask[i];
  }
  return n;
}
inline bool any(Vec<float>::ints mask) {
  int32_t bits = 0;
  for (int i = 0; i < Vec<float>::kLanes; ++i) bits |= mask[i];
  return bits != 0;
}
#endif
