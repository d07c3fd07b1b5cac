// Step 1 of the certified scan: quantised queries, and a first bound from a sample. A block for each KV head
// of each sequence.
#include "../common/select_long.cuh"
#include "certified.cuh"
#include "certified_steps.h"
#include "launch.cuh"

namespace topk_attn::cuda::decode {
namespace {

using namespace longrow;

constexpr int kThreads = 384;
constexpr int kWarps = kThreads / 32;
constexpr int kGroups = 2;  // of 16 keys that a warp has under way

// Row m as p = q * 2^exponent in two planes: p ~ scale * (254 * high + low). By one warp.
template <typename T, int kWidth>
__device__ void quantise_row(const DecodeCall& c, const T* q, const int* exponent, int8_t* planes,
                             CertifiedRow* meta) {
  constexpr int kPer = kWidth / 32;
  const int first = static_cast<int>(threadIdx.x % 32) * kPer;
  float p[kPer];
  float largest = 0.0f;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int channel = first + i;
    p[i] =
        channel < c.head_dim ? to_float(q[channel]) * __int_as_float((127 + exponent[channel]) << 23) : 0.0f;
    largest = fmaxf(largest, fabsf(p[i]));
    finite = finite && isfinite(p[i]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  finite = __all_sync(~0u, finite);
  const float unit = fmaxf(largest, 0x1p-100f);
  const float scale = unit * (1.0f / 127.0f) * (1.0f + 0x1p-20f);
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const float high = finite ? rintf(p[i] / scale) : 0.0f;
    const float low =
        finite ? fminf(fmaxf(rintf(fmaf(-high, scale, p[i]) / scale * 254.0f), -127.0f), 127.0f) : 0.0f;
    planes[first + i] = static_cast<int8_t>(high);
    planes[kWidth + first + i] = static_cast<int8_t>(low);
    square += (p[i] / unit) * (p[i] / unit);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
  if (threadIdx.x % 32 == 0) {
    // Rounded up, with room for the roundings of the scan.
    const float norm = finite ? sqrtf(square) * unit * (1.0f + 0x1p-16f) : __int_as_float(0x7f800000);
    meta->scale = scale * (1.0f / 254.0f);
    meta->norm = norm;
  }
}

// The rank-th greatest of each row's 2^log_size sampled keys, rounded down to a multiple of 2^10: a radix
// search of all rows at once, two digits of 11 bits. All threads count, then a warp searches a row's bins.
struct Digit {
  int lo;
  int rank;
};
__device__ __forceinline__ void clear_bins(uint32_t* bins, int rows) {
  for (int i = threadIdx.x; i < rows * kBins / 4; i += kThreads) {
    reinterpret_cast<uint4*>(bins)[i] = make_uint4(0, 0, 0, 0);
  }
}
__device__ __forceinline__ void count_digit(uint32_t* bins, const int* sample, const Digit* digits, int rows,
                                            int log_size, int shift) {
  for (int i = threadIdx.x; i < rows << log_size; i += kThreads) {
    const int m = i >> log_size;
    const uint32_t bin = (static_cast<uint32_t>(sample[i]) - static_cast<uint32_t>(digits[m].lo)) >> shift;
    if (bin < kBins) atomicAdd(bins + m * kBins + bin, 1u);
  }
}
// By one warp. Lane 0 has the highest bins.
__device__ __forceinline__ void search_bins(const uint32_t* bins, Digit& digit, int shift) {
  constexpr int kMine = kBins / 32;
  const int lane = threadIdx.x % 32;
  const int rank = digit.rank;
  const uint32_t* const mine = bins + kBins - (lane + 1) * kMine;
  int own = 0;
#pragma unroll 16
  for (int i = 0; i < kMine; ++i) own += static_cast<int>(mine[(i + lane) % kMine]);  // a bank a lane
  const int through = warp_scan(own);
  const uint32_t reached = __ballot_sync(~0u, through >= rank);
  const int owner = __ffs(static_cast<int>(reached)) - 1;
  const int above = __shfl_sync(~0u, through - own, owner);
  const uint32_t* const theirs = bins + kBins - (owner + 1) * kMine;
  // Its bins, from the highest: two a lane.
  const int first = static_cast<int>(theirs[kMine - 1 - 2 * lane]);
  const int second = static_cast<int>(theirs[kMine - 2 - 2 * lane]);
  const int until = above + warp_scan(first + second);
  const uint32_t found = __ballot_sync(~0u, until >= rank);
  if (lane == __ffs(static_cast<int>(found)) - 1) {
    const int before = until - first - second;
    const bool in_first = before + first >= rank;
    const int bin = kBins - (owner + 1) * kMine + kMine - 1 - 2 * lane - (in_first ? 0 : 1);
    digit.lo = static_cast<int>(static_cast<uint32_t>(digit.lo) + (static_cast<uint32_t>(bin) << shift));
    digit.rank = rank - before - (in_first ? 0 : first);
  }
}

template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads, 2) void bound_kernel(const __grid_constant__ DecodeCall c,
                                                            const __grid_constant__ Slab slab,
                                                            const __grid_constant__ Scratch scratch,
                                                            const __grid_constant__ KeyCodes codes,
                                                            const __grid_constant__ CertifiedScratch own) {
  extern __shared__ __align__(16) uint8_t memory[];
  __shared__ Digit digits[kCertifiedRows];
  __shared__ CertifiedRow row_of[kCertifiedRows];
  uint32_t* const bins = reinterpret_cast<uint32_t*>(memory);  // (rows, kBins)
  let_next_start();
  const Pair pair = pair_at(c, slab, blockIdx.x);
  const int rows = c.heads / c.kv_heads * slab.tokens;
  clear_bins(bins, rows);
  wait_for_previous();
  const State state = state_of(c, scratch, pair.sequence);
  int* const sample = reinterpret_cast<int*>(bins + rows * kBins);  // (rows, size)
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  int8_t* const queries = own.queries + int64_t{blockIdx.x} * (2 * kCertifiedRows) * kWidth;
  CertifiedRow* const meta = own.rows + int64_t{blockIdx.x} * kCertifiedRows;
  const int64_t row0 = first_row(c, slab, pair.slab_sequence, pair.kv_head);
  if (static_cast<int>(threadIdx.x) < rows) {
    own.counts[row0 + threadIdx.x] = 0;
    scratch.arrived[row0 + threadIdx.x] = 0;
  }
  if (threadIdx.x < kCertifiedRows) {
    CertifiedRow row{};
    if (static_cast<int>(threadIdx.x) < rows) {
      const RowPlan plan = plan_of(c, slab, state, threadIdx.x);
      row.begin = static_cast<int>(plan.contested().begin);
      row.end = static_cast<int>(plan.contested().end);
      row.kept = static_cast<int>(plan.contested_kept());
      row.seen_begin = static_cast<int>(plan.seen.begin);
      row.seen_end = static_cast<int>(plan.seen.end);
    }
    row.bound = __int_as_float(0x7fc00000);
    row_of[threadIdx.x] = row;
  }
  __syncthreads();
  for (int m = warp; m < kCertifiedRows; m += kWarps) {
    if (m < rows) {
      quantise_row<T, kWidth>(c, query_row<T>(c, slab, pair.slab_sequence, pair.kv_head, m),
                              codes.exponent + pair.kv_head * kWidth, queries + 2 * m * kWidth, row_of + m);
    } else {
      for (int i = lane; i < 2 * kWidth; i += 32) queries[2 * m * kWidth + i] = 0;
    }
  }
  __syncthreads();

  // Rows of different tokens see almost the same keys: one sample, of those that the first token may keep.
  const int begin = row_of[0].begin;
  const int n = row_of[0].end - begin;
  const int w = row_of[0].kept;
  const int log_size = certified_sample_log(n);
  const int size = 1 << log_size;
  const SampleRank rank = sample_rank(max(w, 1), max(n, 1), size);
  const float at = rank.expected + rank.margin;
  if (n < 2 * size || at >= static_cast<float>(size)) {  // every key is listed
    if (threadIdx.x < kCertifiedRows) meta[threadIdx.x] = row_of[threadIdx.x];
    return;
  }
  if (static_cast<int>(threadIdx.x) < rows) digits[threadIdx.x] = Digit{kLowest, static_cast<int>(at)};
  const int g = lane / 4;
  const int t = lane % 4;
  const int8_t* const codes_base = codes.codes + int64_t{pair.kv_head} * codes.rows * kWidth;
  const uint32_t* const words = codes.words + int64_t{pair.kv_head} * codes.rows;
  const int tiles = (rows + 3) / 4;
#pragma unroll 1
  for (int base = warp * (16 * kGroups); base < size; base += kWarps * 16 * kGroups) {
    Share<kWidth> a[2 * kGroups];
    uint32_t word[2 * kGroups];
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      const int64_t row =
          code_row(c, codes, pair.sequence, begin + sample_column(base + g + 8 * i, log_size, n));
      a[i].load(codes_base + row * kWidth);
      word[i] = __ldg(words + row);
    }
    for (int tile = 0; tile < tiles; ++tile) {
      Share<kWidth> q;
      q.load_written(queries + (8 * tile + g) * kWidth);
      const int m = 4 * tile + t;
      const float scale = row_of[m].scale;
      const float norm = row_of[m].norm;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        int sums[4];
        multiply<kWidth>(sums, a[2 * group], a[2 * group + 1], q);
        if (m < rows) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Bounds b =
                bounds_of(combine(sums[2 * half], sums[2 * half + 1]), word[2 * group + half], scale, norm);
            sample[(m << log_size) + base + 16 * group + 8 * half + g] = lower_key(b);
          }
        }
      }
    }
  }
  __syncthreads();
  constexpr int kShifts[2] = {32 - kBinBits, 32 - 2 * kBinBits};
#pragma unroll 1
  for (const int shift : kShifts) {
    count_digit(bins, sample, digits, rows, log_size, shift);
    __syncthreads();
    if (warp < rows) search_bins(bins + warp * kBins, digits[warp], shift);
    __syncthreads();
    if (shift == kShifts[0]) clear_bins(bins, rows);
    __syncthreads();
  }
  if (threadIdx.x < kCertifiedRows) {
    CertifiedRow row = row_of[threadIdx.x];
    const int key = static_cast<int>(threadIdx.x) < rows ? digits[threadIdx.x].lo & kKeyMask : kNoBound;
    if (key > kNoBound) row.bound = order_score(key);
    meta[threadIdx.x] = row;
  }
}

}  // namespace

cudaError_t certified_bound(const DecodeCall& c, const Slab& slab, const Scratch& scratch,
                            const KeyCodes& codes, const CertifiedScratch& own, cudaStream_t stream) {
  const bool bf16 = c.dtype == DType::kBFloat16;
  const auto kernel = codes.width == 64
                          ? (bf16 ? bound_kernel<__nv_bfloat16, 64> : bound_kernel<__half, 64>)
                          : (bf16 ? bound_kernel<__nv_bfloat16, 128> : bound_kernel<__half, 128>);
  const int rows = c.heads / c.kv_heads * slab.tokens;
  const int bytes = rows * (kBins + (1 << certified_sample_log(c.capacity))) * 4;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const LaunchShape shape{static_cast<unsigned>(slab.sequences * c.kv_heads), kThreads,
                          static_cast<size_t>(bytes)};
  return launch(kernel, shape, true, stream, c, slab, scratch, codes, own);
}

}  // namespace topk_attn::cuda::decode
