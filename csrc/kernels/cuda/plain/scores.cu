// plain.h: scores of a slab. One block for 64 rows by 64 keys.
#include "../common/select_scores.h"
#include "plain.h"
#include "tile.cuh"

namespace topk_attn::cuda::plain {
namespace {

__global__ __launch_bounds__(kThreads) void scores_kernel(const Call call, const int64_t first_unit,
                                                          float* const slab, const int64_t ld) {
  __shared__ Stage stage;
  const Unit unit = unit_at(call, first_unit + blockIdx.x);
  const Tile tile = tile_at(call, unit.tile);
  const int seen = seen_end(call, tile);
  const int kv_head = unit.head / (call.heads / call.kv_heads);
  const int x = threadIdx.x % 16;
  const int y = threadIdx.x / 16;
  const Rows q = rows_at(call.q, tile.batch, tile.q_begin + tile.row0, unit.head, tile.rows);
  for (int k0 = blockIdx.y * kTile; k0 < seen; k0 += gridDim.y * kTile) {
    const Rows k = rows_at(call.k, tile.batch, tile.k_begin + k0, kv_head, tile.tk - k0);
    float s[4][4];
    dot_rows(s, q, k, call.head_dim, stage);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Columns up to the next multiple of 4 belong to the row (ld is one).
      if (4 * y + i < tile.rows && k0 + 4 * x < seen) {
        float* const row = slab + (int64_t{blockIdx.x} * kTile + 4 * y + i) * ld + k0;
        *reinterpret_cast<float4*>(row + 4 * x) = make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
      }
    }
  }
}

}  // namespace

cudaError_t scores(const Call& call, int64_t first_unit, int64_t units, float* slab, int64_t ld,
                   cudaStream_t stream) {
  const int64_t left = num_units(call) - first_unit;
  if (units > left) units = left;
  if (units <= 0 || call.max_k <= 0) return cudaSuccess;
  const int blocks = (call.max_k + kTile - 1) / kTile;
  const dim3 grid(static_cast<unsigned>(units), static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
  scores_kernel<<<grid, kThreads, 0, stream>>>(call, first_unit, slab, ld);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::plain
