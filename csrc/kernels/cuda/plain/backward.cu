// plain.h: backward. One block a query tile for dQ, one block a key tile for dK and dV.
#include "plain.h"
#include "tile.cuh"

namespace topk_attn::cuda::plain {
namespace {

// Per-row values of a query tile.
struct RowState {
  RowFilter filters[kTile];
  float lse[kTile];
  float delta[kTile];
};

__device__ inline void load_rows(RowState& rows, const BackwardCall& b, const Tile& t, int head) {
  load_filters(rows.filters, b.call, t, head, b.threshold, b.tie_index);
  const int r = threadIdx.x;
  if (r < t.rows) {
    const int64_t row = row_index(b.call, t, head, t.row0 + r);
    rows.lse[r] = b.lse[row];
    rows.delta[r] = b.delta[row];
  }
}

// The probability of a kept key. A row whose kept scores are all -inf has no gradient.
__device__ __forceinline__ float probability(float score, float scale, float lse) {
  return lse == __int_as_float(static_cast<int>(0xff800000)) ? 0.0f : expf(score * scale - lse);
}

// kBlocks: 64-channel blocks of q.
template <int kBlocks>
__global__ __launch_bounds__(kThreads) void dq_kernel(const BackwardCall b, const int64_t words) {
  __shared__ Shared shared;
  __shared__ RowState rows;
  const Call& c = b.call;
  const Tile tile = tile_at(c, blockIdx.x);
  if (tile.rows == 0) return;
  const int head = blockIdx.y;
  const int kv_head = head / (c.heads / c.kv_heads);
  const int64_t entry = int64_t{head} * c.num_tiles + blockIdx.x;
  const int x = threadIdx.x % 16;
  const int y = threadIdx.x / 16;
  const int64_t first_row = tile.q_begin + tile.row0;
  const Rows q = rows_at(c.q, tile.batch, first_row, head, tile.rows);
  const Rows dout = rows_at(b.dout, tile.batch, first_row, head, tile.rows);
  load_rows(rows, b, tile, head);

  float dq[kBlocks][4][4];
  clear(dq);
  const int seen = seen_end(c, tile);
#pragma unroll 1
  for (int k0 = 0; k0 < seen; k0 += kTile) {
    if (!any_kept(b.bitmap, entry, words, k0)) continue;
    const Rows k = rows_at(c.k, tile.batch, tile.k_begin + k0, kv_head, tile.tk - k0);
    const Rows v = rows_at(c.v, tile.batch, tile.k_begin + k0, kv_head, tile.tk - k0);
    float s[4][4];
    float best[4][4];
    dot_rows(s, q, k, c.head_dim, shared.stage);
    best_of_group(best, s, c, tile, head, k, shared.stage);
    uint32_t kept = 0;  // bit 4 i + j
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (rows.filters[4 * y + i].keeps(best[i][j], k0 + 4 * x + j)) kept |= 1u << (4 * i + j);
      }
    }
    float dp[4][4];
    dot_rows(dp, dout, v, c.v_dim, shared.stage);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 4 * y + i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool keep = kept >> (4 * i + j) & 1u;
        shared.weights[4 * x + j][r] =
            keep ? probability(s[i][j], c.softmax_scale, rows.lse[r]) * (dp[i][j] - rows.delta[r]) : 0.0f;
      }
    }
    multiply_rows(dq, k, c.head_dim, shared);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = 4 * y + i;
    if (r >= tile.rows) continue;
    store_row(row_pointer<float>(b.dq, tile.batch, first_row + r, head), dq, i, c.head_dim, c.softmax_scale);
  }
}

// First of the query tiles of a document, in the order of make_tiles().
__device__ inline int first_tile_of(const Call& c, int document) {
  int lo = 0;
  int hi = c.num_tiles;
  while (lo < hi) {
    const int middle = (lo + hi) / 2;
    const int at = c.tiles[middle].x;
    if (at >= 0 && at < document) {
      lo = middle + 1;
    } else {
      hi = middle;
    }
  }
  return lo;
}

// kBlocks: 64-channel blocks of the wider of q and v.
template <int kBlocks>
__global__ __launch_bounds__(kThreads) void dkv_kernel(const BackwardCall b, const int2* const key_tiles,
                                                       const int64_t words) {
  __shared__ Shared shared;
  __shared__ RowState rows;
  const Call& c = b.call;
  int index;  // batch entry or document
  int key0;
  int first_tile;
  if (c.cu_k == nullptr) {
    const int per_sequence = (c.tk + kTile - 1) / kTile;
    index = blockIdx.x / per_sequence;
    key0 = blockIdx.x % per_sequence * kTile;
    first_tile = index * ((c.tq + kTile - 1) / kTile);
  } else {
    const int2 at = key_tiles[blockIdx.x];
    if (at.x < 0) return;
    index = at.x;
    key0 = at.y;
    first_tile = first_tile_of(c, index);
  }
  Tile tile = sequence_at(c, index);
  const int keys = tile.tk - key0;
  if (keys <= 0) return;
  const int kv_head = blockIdx.y;
  const int group = c.heads / c.kv_heads;
  const int x = threadIdx.x % 16;
  const int y = threadIdx.x / 16;
  const int64_t first_key = tile.k_begin + key0;
  const Rows k = rows_at(c.k, tile.batch, first_key, kv_head, keys);
  const Rows v = rows_at(c.v, tile.batch, first_key, kv_head, keys);

  float dk[kBlocks][4][4];
  float dv[kBlocks][4][4];
  clear(dk);
  clear(dv);
#pragma unroll 1
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
#pragma unroll 1
    for (int row0 = 0; row0 < tile.tq; row0 += kTile) {
      const int64_t entry = int64_t{head} * c.num_tiles + first_tile + row0 / kTile;
      tile.row0 = row0;
      tile.rows = min(kTile, tile.tq - row0);
      if (seen_end(c, tile) <= key0 || !any_kept(b.bitmap, entry, words, key0)) continue;
      const int64_t first_row = tile.q_begin + row0;
      const Rows q = rows_at(c.q, tile.batch, first_row, head, tile.rows);
      const Rows dout = rows_at(b.dout, tile.batch, first_row, head, tile.rows);
      load_rows(rows, b, tile, head);  // nobody has read the last ones since the last product began
      float p[4][4];
      float best[4][4];
      dot_rows(p, k, q, c.head_dim, shared.stage);
      best_of_group<true>(best, p, c, tile, head, k, shared.stage);
      uint32_t kept = 0;  // bit 4 i + j: query j keeps key i
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = 4 * x + j;
          const bool keep = rows.filters[r].keeps(best[i][j], key0 + 4 * y + i);
          if (keep) kept |= 1u << (4 * i + j);
          p[i][j] = keep ? probability(p[i][j], c.softmax_scale, rows.lse[r]) : 0.0f;
          shared.weights[r][4 * y + i] = p[i][j];
        }
      }
      multiply_rows(dv, dout, c.v_dim, shared);
      float dp[4][4];
      dot_rows(dp, v, dout, c.v_dim, shared.stage);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = 4 * x + j;
          const bool keep = kept >> (4 * i + j) & 1u;
          shared.weights[r][4 * y + i] = keep ? p[i][j] * (dp[i][j] - rows.delta[r]) : 0.0f;
        }
      }
      multiply_rows(dk, q, c.head_dim, shared);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = 4 * y + i;
    if (r >= keys) continue;
    store_row(row_pointer<float>(b.dk, tile.batch, first_key + r, kv_head), dk, i, c.head_dim,
              c.softmax_scale);
    store_row(row_pointer<float>(b.dv, tile.batch, first_key + r, kv_head), dv, i, c.v_dim, 1.0f);
  }
}

// Zeros in every row of a packed tensor, four channels a thread.
__global__ __launch_bounds__(kThreads) void zero_kernel(const View v, const int64_t tokens, const int heads,
                                                        const int dim) {
  const int64_t fours = tokens * heads * (dim / 4);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < fours; i += stride) {
    const int64_t row = i / (dim / 4);
    float* const to = row_pointer<float>(v, 0, row / heads, row % heads);
    *reinterpret_cast<float4*>(to + i % (dim / 4) * 4) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

void zero(const View& v, int64_t tokens, int heads, int dim, cudaStream_t stream) {
  const int64_t blocks = (tokens * heads * (dim / 4) + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  zero_kernel<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kThreads, 0, stream>>>(v, tokens,
                                                                                               heads, dim);
}

}  // namespace

cudaError_t backward(const BackwardCall& call, const int2* key_tiles, int32_t num_key_tiles,
                     cudaStream_t stream) {
  const Call& c = call.call;
  if (c.heads <= 0 || c.kv_heads <= 0) return cudaSuccess;
  if (c.cu_q != nullptr) {
    zero(call.dq, c.tq, c.heads, c.head_dim, stream);
    zero(call.dk, c.tk, c.kv_heads, c.head_dim, stream);
    zero(call.dv, c.tk, c.kv_heads, c.v_dim, stream);
  } else {
    num_key_tiles = c.batch * ((c.tk + kTile - 1) / kTile);
  }
  const int64_t words = bitmap_words(c);
  if (c.num_tiles > 0) {
    const int d = c.head_dim;
    const auto kernel = d <= 64 ? dq_kernel<1> : d <= 128 ? dq_kernel<2> : dq_kernel<4>;
    kernel<<<dim3(c.num_tiles, c.heads), kThreads, 0, stream>>>(call, words);
  }
  if (num_key_tiles > 0) {
    const int d = c.head_dim > c.v_dim ? c.head_dim : c.v_dim;
    const auto kernel = d <= 64 ? dkv_kernel<1> : d <= 128 ? dkv_kernel<2> : dkv_kernel<4>;
    kernel<<<dim3(num_key_tiles, c.kv_heads), kThreads, 0, stream>>>(call, key_tiles, words);
  }
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::plain
