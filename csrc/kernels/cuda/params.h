// Torch-free interface of the CUDA kernels: what the operators (csrc/ops/cuda.cpp) hand to them.
//
// Unit of work: a query tile, 64 consecutive rows of one head of one sequence (kTileRows). A tile is the unit
// of scheduling, of the key bitmap that selection leaves behind, and of the choice between the two regimes of
// the attention passes (gathered union, masked dense).
//
// Scores are raw dot products accumulated in float32 from zero in chunks of 16 channels in ascending order on
// the tensor cores (float32 inputs: one chain of fused multiply-adds), the same bits in every kernel
// (contract section 4). Channels beyond head_dim are zeros in shared memory and add nothing.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

#include "../params.h"

namespace topk_attn::cuda {

inline constexpr int kTileRows = 64;
inline constexpr int kMaxHeadDim = 256;

// A call of select, fwd or bwd. Passed to kernels by value; all pointers are device pointers.
struct Call {
  DType dtype = DType::kBFloat16;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;  // of q and k; a multiple of 8, at most 256
  int32_t v_dim = 0;     // of v and out; likewise
  // Dense: `batch` sequences of tq queries and tk keys. Packed: `batch` documents of at most max_q queries
  // and max_k keys, bounded by cu_q and cu_k (batch + 1, int32); tq and tk are the packed totals.
  int32_t batch = 0;
  int32_t tq = 0;
  int32_t tk = 0;
  int32_t max_q = 0;  // longest sequence that the host knows of; dense: tq and tk
  int32_t max_k = 0;
  const int32_t* cu_q = nullptr;
  const int32_t* cu_k = nullptr;
  bool causal = true;
  bool kv_group = false;  // one selection per KV group, by the largest score of its heads
  Budget budget;
  int64_t sink = 0;
  int64_t recent = 0;
  float softmax_scale = 1.0f;
  RowLayout rows;  // of threshold, tie_index, lse: (B, H, Tq) or (H, total_q)
  // Rows are 16-byte aligned: base pointers, and strides that are multiples of 8 elements (float32: 4).
  View q, k, v;
  // Query tiles, numbered from 0. Dense: batch * ceil(tq / 64). Packed: at most ceil(total_q / 64) + batch.
  int32_t num_tiles = 0;
  const int2* tiles = nullptr;  // packed: (document, first row) of each tile, document < 0: unused
};

// What selection writes. `bitmap` has heads x num_tiles x bitmap_words(call) words: bit j % 32 of word j / 32
// of (head, tile) is set iff some row of the tile keeps key j of its sequence (always-kept keys included). It
// is zeroed by the caller.
struct Selection {
  float* threshold = nullptr;    // call.rows
  int32_t* tie_index = nullptr;  // call.rows
  uint32_t* bitmap = nullptr;    // may be null: not wanted
  int32_t* indices = nullptr;    // (rows, index_width) ascending, -1 padded; null: not wanted
  int64_t index_width = 0;
};

// Words of one tile's bitmap: a multiple of 4, so that 128 keys are one 16-byte load.
TOPK_HD int64_t bitmap_words(const Call& c) {
  return (int64_t{c.max_k} + 127) / 128 * 4;
}

// The choice between the two regimes of the attention passes, made per (head, tile) on the device: a tile
// whose union of kept keys is a small share of what its rows see is left to the gathered kernels, every other
// tile to the masked dense kernels. Both read the same numbers, so each tile is done exactly once.
struct Regimes {
  const int32_t* union_size =
      nullptr;                 // heads x num_tiles: bits set in the tile's bitmap; null: all masked dense
  float largest_share = 0.0f;  // gathered iff union_size <= largest_share * seen_end(tile)
};

struct ForwardCall {
  Call call;
  const float* threshold = nullptr;
  const int32_t* tie_index = nullptr;
  const uint32_t* bitmap = nullptr;  // null: every key may be kept
  Regimes regimes;
  View out;
  float* lse = nullptr;
};

struct BackwardCall {
  Call call;
  const float* threshold = nullptr;
  const int32_t* tie_index = nullptr;
  const uint32_t* bitmap = nullptr;
  Regimes regimes;
  const float* lse = nullptr;
  const float* delta = nullptr;  // call.rows: sum over channels of dout * out, minus dlse
  View dout;
  View dq;  // the input's dtype, contiguous rows
  // Where both regimes meet, dK and dV are summed in float32: the masked kernel writes every row of the sums
  // first, the gathered one adds to them, finish_gradients() converts (deterministic:
  // finish_union_gradients(), the sums being integers by then). Otherwise the masked kernel writes dk
  // and dv itself.
  View dk, dv;              // the input's dtype
  float* dk_sum = nullptr;  // (tokens, kv_heads, head_dim) as k is laid out; null: not wanted
  float* dv_sum = nullptr;  // (tokens, kv_heads, v_dim)
};

}  // namespace topk_attn::cuda
