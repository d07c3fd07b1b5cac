// Counts the keys that each query tile keeps: one warp per (head, tile) adds up the bits of the tile's bitmap
// as far as its rows see. Reads each bitmap once (1 bit per key and tile: at S = 32k and 32 heads 64 MB).
#include "union_size.h"

#include "sequence.cuh"

namespace topk_attn::cuda {
namespace {

constexpr int kWarps = 4;

__global__ void __launch_bounds__(kWarps * 32)
    union_size_kernel(const __grid_constant__ Call call, const uint32_t* bitmap, int64_t words,
                      int32_t* union_size) {
  const int64_t entry = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (entry >= int64_t{call.heads} * call.num_tiles) return;
  const int lane = threadIdx.x % 32;
  const Tile tile = tile_at(call, static_cast<int>(entry % call.num_tiles));
  const int quads = (seen_end(call, tile) + 127) / 128;  // of 4 words
  const uint4* row = reinterpret_cast<const uint4*>(bitmap + entry * words);
  int count = 0;
#pragma unroll 4
  for (int i = lane; i < quads; i += 32) {
    const uint4 w = row[i];
    count += __popc(w.x) + __popc(w.y) + __popc(w.z) + __popc(w.w);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(~0u, count, step);
  if (lane == 0) union_size[entry] = count;
}

}  // namespace

cudaError_t count_union(const Call& call, const uint32_t* bitmap, int32_t* union_size, cudaStream_t stream) {
  const int64_t entries = int64_t{call.heads} * call.num_tiles;
  if (entries == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((entries + kWarps - 1) / kWarps);
  union_size_kernel<<<blocks, kWarps * 32, 0, stream>>>(call, bitmap, bitmap_words(call), union_size);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda
