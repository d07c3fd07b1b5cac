// Step 2 of the certified scan: bounds of all keys, and lists of those that reach the row's bound.
//
// A warp is on its own: it takes chunks of a KV head's keys, loads codes from global memory straight into
// operands (32 keys at a time, a row by four lanes), and collects what passes in shared memory, 64 entries a
// row, which it appends to the rows' lists. The order of a list differs from run to run; nothing that is made
// of it does.
#include "certified.cuh"
#include "certified_steps.h"
#include "launch.cuh"

namespace topk_attn::cuda::decode {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int blocks_per_sm(int tiles) {
  return tiles == 1 ? 3 : 2;
}
constexpr int kStaged = 64;  // entries of a row

// Chunks of the sequences of a slab before each of them.
__device__ void count_chunks(const DecodeCall& c, const Slab& slab, const Scratch& scratch, int chunk,
                             int (&before)[kMaxSlabSequences + 1]) {
  for (int s = threadIdx.x; s < slab.sequences; s += kThreads) {
    const Span span = seen_by_slab(c, slab, state_of(c, scratch, slab.first_sequence + s));
    before[s + 1] = static_cast<int>((span.size() + chunk - 1) / chunk) * c.kv_heads;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = 0;
    for (int s = 0; s < slab.sequences; ++s) before[s + 1] += before[s];
  }
  __syncthreads();
}

// Moves the staged entries of all rows to their lists. `counts` of row 4 i + t is in lanes t of register i.
template <int kTiles>
__device__ void flush(int (&counts)[kTiles], unsigned long long* staged, int rows, int64_t row0,
                      const CertifiedScratch& own) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    // Places of all rows at once: a lane a row.
    const int own_row = 4 * i + lane;
    int places = 0;
    if (lane < 4 && own_row < rows && counts[i] > 0)
      places = atomicAdd(own.counts + row0 + own_row, counts[i]);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int m = 4 * i + t;
      const int count = __shfl_sync(~0u, counts[i], t);
      const int base = __shfl_sync(~0u, places, t);
      if (m >= rows || count == 0) continue;
      unsigned long long* const list = own.lists + (row0 + m) * own.room;
      for (int e = lane; e < count; e += 32) {
        if (base + e < own.room) list[base + e] = staged[m * kStaged + e];
      }
    }
    counts[i] = 0;
  }
  __syncwarp();
}

template <int kWidth, int kTiles>
__global__ __launch_bounds__(kThreads, blocks_per_sm(kTiles)) void scan_kernel(
    const __grid_constant__ DecodeCall c, const __grid_constant__ Slab slab,
    const __grid_constant__ Scratch scratch, const __grid_constant__ KeyCodes codes,
    const __grid_constant__ CertifiedScratch own) {
  __shared__ int before[kMaxSlabSequences + 1];
  __shared__ unsigned long long staging[kWarps][4 * kTiles * kStaged];
  let_next_start();
  wait_for_previous();
  count_chunks(c, slab, scratch, own.chunk, before);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int rows = c.heads / c.kv_heads * slab.tokens;
  unsigned long long* const staged = staging[warp];
  const int total = before[slab.sequences];
  int s = 0;
#pragma unroll 1
  for (int unit = blockIdx.x * kWarps + warp; unit < total; unit += gridDim.x * kWarps) {
    while (unit >= before[s + 1]) ++s;
    const int kv_head = (unit - before[s]) % c.kv_heads;
    const int sequence = slab.first_sequence + s;
    const Span span = seen_by_slab(c, slab, state_of(c, scratch, sequence));
    const int first = static_cast<int>(span.begin) + (unit - before[s]) / c.kv_heads * own.chunk;
    const int last = min(first + own.chunk, static_cast<int>(span.end));
    const int pair = s * c.kv_heads + kv_head;
    Share<kWidth> q[kTiles];
    float scale[kTiles], norm[kTiles], bound[kTiles];
    int begin[kTiles], end[kTiles], counts[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      q[i].load_written(own.queries + (int64_t{pair} * (2 * kCertifiedRows) + 8 * i + g) * kWidth);
      const CertifiedRow* const row = own.rows + int64_t{pair} * kCertifiedRows + 4 * i + t;
      scale[i] = row->scale;
      norm[i] = row->norm;
      bound[i] = row->bound;
      begin[i] = row->begin;
      end[i] = min(row->end, last);
      counts[i] = 0;
    }
    const int8_t* const codes_base = codes.codes + int64_t{kv_head} * codes.rows * kWidth;
    const uint32_t* const words = codes.words + int64_t{kv_head} * codes.rows;
#pragma unroll 1
    for (int base = first; base < last; base += 32) {
      Share<kWidth> a[4];
      uint32_t word[4];
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const int j = min(base + 8 * f + g, last - 1);
        const int64_t row = code_row(c, codes, sequence, j);
        a[f].load(codes_base + row * kWidth);
        word[f] = __ldg(words + row);
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int sums[4];
          multiply<kWidth>(sums, a[2 * half], a[2 * half + 1], q[i]);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const int j = base + 16 * half + 8 * n + g;
            const Bounds b =
                bounds_of(combine(sums[2 * n], sums[2 * n + 1]), word[2 * half + n], scale[i], norm[i]);
            const bool passes = j >= begin[i] && j < end[i] && !(b.score + b.error < bound[i]);
            const uint32_t all = __ballot_sync(~0u, passes);
            if (all == 0) continue;
            const uint32_t mine = all & (0x11111111u << t);
            if (passes) {
              const int at = counts[i] + __popc(mine & ((1u << lane) - 1));
              staged[(4 * i + t) * kStaged + at] = make_entry(b, j);
            }
            counts[i] += __popc(mine);
          }
        }
      }
      bool full = false;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) full = full || counts[i] > kStaged - 32;
      if (__any_sync(~0u, full)) flush<kTiles>(counts, staged, rows, first_row(c, slab, s, kv_head), own);
    }
    flush<kTiles>(counts, staged, rows, first_row(c, slab, s, kv_head), own);
  }
}

}  // namespace

cudaError_t certified_scan(const DecodeCall& c, const Slab& slab, const Scratch& scratch,
                           const KeyCodes& codes, const CertifiedScratch& own, int sms, cudaStream_t stream) {
  const bool few = c.heads / c.kv_heads * slab.tokens <= 4;
  const auto kernel = codes.width == 64 ? (few ? scan_kernel<64, 1> : scan_kernel<64, 2>)
                                        : (few ? scan_kernel<128, 1> : scan_kernel<128, 2>);
  const LaunchShape shape{static_cast<unsigned>(sms * blocks_per_sm(few ? 1 : 2)), kThreads};
  return launch(kernel, shape, true, stream, c, slab, scratch, codes, own);
}

}  // namespace topk_attn::cuda::decode
