// Step 1 of the certified scan: quantised queries, and a first bound from a sample. A block for each KV head
// of each sequence.
#include "../common/select_long.cuh"
#include "certified.cuh"
#include "certified_steps.h"

namespace topk_attn::cuda::decode {
namespace {

using namespace longrow;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMostSample = 4096;
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

template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads, 1) void bound_kernel(const __grid_constant__ DecodeCall c,
                                                            const __grid_constant__ Slab slab,
                                                            const __grid_constant__ Scratch scratch,
                                                            const __grid_constant__ KeyCodes codes,
                                                            const __grid_constant__ CertifiedScratch own) {
  extern __shared__ __align__(16) uint8_t memory[];
  Workspace& ws = *reinterpret_cast<Workspace*>(memory);
  int* const sample = reinterpret_cast<int*>(memory + sizeof(Workspace));  // (rows, kMostSample)
  const Pair pair = pair_at(c, slab, blockIdx.x);
  const State state = state_of(c, scratch, pair.sequence);
  const int rows = c.heads / c.kv_heads * slab.tokens;
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
    meta[threadIdx.x] = row;
  }
  __syncthreads();
  for (int m = warp; m < kCertifiedRows; m += kWarps) {
    if (m < rows) {
      quantise_row<T, kWidth>(c, query_row<T>(c, slab, pair.slab_sequence, pair.kv_head, m),
                              codes.exponent + pair.kv_head * kWidth, queries + 2 * m * kWidth, meta + m);
    } else {
      for (int i = lane; i < 2 * kWidth; i += 32) queries[2 * m * kWidth + i] = 0;
    }
  }
  for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) ws.bins[0][i] = 0;
  __syncthreads();

  // Rows of different tokens see almost the same keys: one sample, of those that the first token may keep.
  const int begin = meta[0].begin;
  const int n = meta[0].end - begin;
  const int w = meta[0].kept;
  const int log_size = certified_sample_log(n);
  const int size = 1 << log_size;
  const SampleRank rank = sample_rank(max(w, 1), max(n, 1), size);
  const float at = rank.expected + rank.margin;
  if (n < 2 * size || at >= static_cast<float>(size)) {
    return;  // every key is listed
  }
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
      const float scale = meta[m].scale;
      const float norm = meta[m].norm;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        int sums[4];
        multiply<kWidth>(sums, a[2 * group], a[2 * group + 1], q);
        if (m < rows) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Bounds b =
                bounds_of(combine(sums[2 * half], sums[2 * half + 1]), word[2 * group + half], scale, norm);
            sample[m * kMostSample + base + 16 * group + 8 * half + g] = lower_key(b);
          }
        }
      }
    }
  }
  __syncthreads();
  Team team{&ws, 0, 1};
  for (int m = 0; m < rows; ++m) {
    Search search{kLowest, INT_MAX, static_cast<int>(at), size, INT_MAX};
#pragma unroll 1
    for (int digit = 0; digit < 2; ++digit) {
      narrow<kThreads>(search, team, 1, [&](const auto& add) {
        for (int i = threadIdx.x; i < size; i += kThreads) add(sample[m * kMostSample + i]);
      });
    }
    const int key = search.lo & kKeyMask;
    if (threadIdx.x == 0 && key > kNoBound) meta[m].bound = order_score(key);
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
  const int bytes = static_cast<int>(sizeof(Workspace)) + rows * kMostSample * 4;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(slab.sequences * c.kv_heads), kThreads, static_cast<size_t>(bytes),
           stream>>>(c, slab, scratch, codes, own);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::decode
