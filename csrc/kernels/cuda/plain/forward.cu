// plain.h: forward. One block a (tile, head): online softmax over the key blocks that some row of the tile
// keeps.
#include "plain.h"
#include "tile.cuh"

namespace topk_attn::cuda::plain {
namespace {

// kBlocks: 64-channel blocks of v.
template <int kBlocks>
__global__ __launch_bounds__(kThreads) void forward_kernel(const ForwardCall f, const int64_t words) {
  __shared__ Shared shared;
  __shared__ RowFilter filters[kTile];
  const Call& c = f.call;
  const Tile tile = tile_at(c, blockIdx.x);
  if (tile.rows == 0) return;
  const int head = blockIdx.y;
  const int group = c.heads / c.kv_heads;
  const int kv_head = head / group;
  const int64_t entry = int64_t{head} * c.num_tiles + blockIdx.x;
  const int x = threadIdx.x % 16;
  const int y = threadIdx.x / 16;
  const float infinity = __int_as_float(0x7f800000);
  const int64_t first_row = tile.q_begin + tile.row0;
  const Rows q = rows_at(c.q, tile.batch, first_row, head, tile.rows);
  load_filters(filters, c, tile, head, f.threshold, f.tie_index);

  float out[kBlocks][4][4];
  clear(out);
  float largest[4] = {-infinity, -infinity, -infinity, -infinity};  // scaled score, NaN aside
  float total[4] = {};                                              // of this thread's columns
  const int seen = seen_end(c, tile);
#pragma unroll 1
  for (int k0 = 0; k0 < seen; k0 += kTile) {
    if (!any_kept(f.bitmap, entry, words, k0)) continue;
    const Rows k = rows_at(c.k, tile.batch, tile.k_begin + k0, kv_head, tile.tk - k0);
    float s[4][4];
    dot_rows(s, q, k, c.head_dim, shared.stage);
    float best[4][4];
    best_of_group(best, s, c, tile, head, k, shared.stage);
    uint32_t kept = 0;  // bit 4 i + j
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (filters[4 * y + i].keeps(best[i][j], k0 + 4 * x + j)) kept |= 1u << (4 * i + j);
      }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float now = largest[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = kept >> (4 * i + j) & 1u ? s[i][j] * c.softmax_scale : -infinity;
        now = fmaxf(now, s[i][j]);
      }
      // The 16 threads of a row are neighbours in a warp.
#pragma unroll
      for (int step = 8; step > 0; step /= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, step));
      // Nothing but -inf so far: any finite number will do, since all terms are exp(-inf).
      const float base = now == -infinity ? 0.0f : now;
      const float shrink = expf(largest[i] - base);
      largest[i] = now;
      total[i] *= shrink;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float p = expf(s[i][j] - base);
        total[i] += p;
        shared.weights[4 * x + j][4 * y + i] = p;
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[block][i][j] *= shrink;
      }
    }
    multiply_rows(out, rows_at(c.v, tile.batch, tile.k_begin + k0, kv_head, tile.tk - k0), c.v_dim, shared);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) total[i] += __shfl_xor_sync(~0u, total[i], step);
    const int r = 4 * y + i;
    if (r >= tile.rows) continue;
    const bool empty = total[i] == 0.0f;  // nothing kept, or only -inf
    if (empty) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[block][i][j] = 0.0f;
      }
    }
    store_row(row_pointer<float>(f.out, tile.batch, first_row + r, head), out, i, c.v_dim,
              empty ? 0.0f : 1.0f / total[i]);
    if (x == 0)
      f.lse[row_index(c, tile, head, tile.row0 + r)] = empty ? -infinity : largest[i] + logf(total[i]);
  }
}

}  // namespace

cudaError_t forward(const ForwardCall& call, cudaStream_t stream) {
  const Call& c = call.call;
  if (c.num_tiles <= 0 || c.heads <= 0) return cudaSuccess;
  const auto kernel = c.v_dim <= 64    ? forward_kernel<1>
                      : c.v_dim <= 128 ? forward_kernel<2>
                                       : forward_kernel<4>;
  kernel<<<dim3(c.num_tiles, c.heads), kThreads, 0, stream>>>(call, bitmap_words(c));
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::plain
