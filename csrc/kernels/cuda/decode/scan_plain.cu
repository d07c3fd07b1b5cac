// Scores of a slab's rows, float32: one chain of fused multiply-adds in ascending channel order, as in
// plain/. One block for 16 rows of a KV head by 64 keys, through shared memory; not tuned.
#include "cache.cuh"

namespace topk_attn::cuda::decode {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;
constexpr int kKeys = 64;
constexpr int kChunk = 32;  // channels staged at a time

__global__ __launch_bounds__(kThreads, 2) void scan_plain_kernel(const __grid_constant__ DecodeCall c,
                                                                 const __grid_constant__ Slab slab,
                                                                 const __grid_constant__ Scratch scratch,
                                                                 const int tiles) {
  __shared__ float queries[kRows][kChunk];
  __shared__ float keys[kChunk][kKeys + 1];
  __shared__ int64_t offsets[kKeys];
  const int slab_sequence = static_cast<int>(blockIdx.y / (tiles * c.kv_heads));
  const int kv_head = static_cast<int>(blockIdx.y / tiles) % c.kv_heads;
  const int row0 = static_cast<int>(blockIdx.y % tiles) * kRows;
  const int rows = min(kRows, c.heads / c.kv_heads * slab.tokens - row0);
  const int sequence = slab.first_sequence + slab_sequence;
  const State state = state_of(c, scratch, sequence);
  const Span span = seen_by_slab(c, slab, state);
  const int64_t first = first_row(c, slab, slab_sequence, kv_head) + row0;
  if (blockIdx.x == 0 && threadIdx.x < rows) scratch.arrived[first + threadIdx.x] = 0;
  const int end = static_cast<int>(span.end);
  const float* const key_rows = static_cast<const float*>(c.k.data) + kv_head * c.k.head;
  const int column = threadIdx.x % kKeys;
  const int row = threadIdx.x / kKeys * 4;  // this thread's rows: row .. row + 3

  const int step = static_cast<int>(gridDim.x) * kKeys;
  const int begin = static_cast<int>(span.begin) / kKeys * kKeys + static_cast<int>(blockIdx.x) * kKeys;
#pragma unroll 1
  for (int key = begin; span.size() > 0 && key < end; key += step) {
    __syncthreads();
    if (threadIdx.x < kKeys) {
      const int j = key + static_cast<int>(threadIdx.x);
      offsets[threadIdx.x] = j < end ? row_offset(c, c.k, sequence, j) : -1;
    }
    float s[4] = {};
#pragma unroll 1
    for (int c0 = 0; c0 < c.head_dim; c0 += kChunk) {
      const int chunk = min(kChunk, c.head_dim - c0);
      __syncthreads();
      for (int i = threadIdx.x; i < kRows * kChunk; i += kThreads) {
        const int r = i / kChunk;
        const int channel = i % kChunk;
        queries[r][channel] = r < rows && channel < chunk
                                  ? query_row<float>(c, slab, slab_sequence, kv_head, row0 + r)[c0 + channel]
                                  : 0.0f;
      }
      for (int i = threadIdx.x; i < kKeys * kChunk; i += kThreads) {
        const int64_t offset = offsets[i / kChunk];
        const int channel = i % kChunk;
        keys[channel][i / kChunk] = offset >= 0 && channel < chunk ? key_rows[offset + c0 + channel] : 0.0f;
      }
      __syncthreads();
#pragma unroll 8
      for (int channel = 0; channel < chunk; ++channel) {
        const float k = keys[channel][column];
#pragma unroll
        for (int i = 0; i < 4; ++i) s[i] = __fmaf_rn(queries[row + i][channel], k, s[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i < rows && key + column < end) {
        scratch.scores[(first + row + i) * scratch.ld + key + column] = s[i];
      }
    }
  }
}

}  // namespace

cudaError_t scan_plain(const DecodeCall& call, const Slab& slab, const Scratch& scratch, int sms,
                       cudaStream_t stream) {
  const int tiles = (call.heads / call.kv_heads * slab.tokens + kRows - 1) / kRows;
  const int64_t y = int64_t{tiles} * call.kv_heads * slab.sequences;
  if (y > 65535) return cudaErrorInvalidValue;
  const int64_t wanted = (int64_t{sms} * 8 + y - 1) / y;
  const int64_t most = (int64_t{call.capacity} + kKeys - 1) / kKeys;
  const int64_t x = wanted < most ? wanted : most;
  scan_plain_kernel<<<dim3(static_cast<unsigned>(x > 0 ? x : 1), static_cast<unsigned>(y)), kThreads, 0,
                      stream>>>(call, slab, scratch, tiles);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::decode
