// Exact top-W of long rows of scores in the contract's order, with the kept keys as ascending lists.
//
// A row is worked on by one thread block, or by a cluster of up to 8 where rows are few and long (sm_90).
// Every block of the row looks at the same sample of the row, which brackets the threshold; one pass over its
// part of the row moves the keys inside the bracket to shared memory and counts those above it. That the W-th
// key lies in the bracket, and that the bracket fits, is counted and not assumed: otherwise a radix select
// over the order keys reads the row itself until what is left fits (up to three reads, up to two more where
// equal scores alone do not fit). A radix select over the candidates of all blocks then finds the threshold,
// and bits over the row put the kept keys in order. Cost: one read of the row and 10 to 15 us; no scratch
// memory, no host synchronisation. Deterministic.
#pragma once

#include "../params.h"

namespace topk_attn::cuda {

struct ScoreRows {
  DType dtype = DType::kFloat32;  // float32, bfloat16 or float16
  const void* scores = nullptr;   // score j of row r at scores[r * row_stride + j], any alignment
  int64_t row_stride = 0;
  int64_t rows = 0;
  int64_t n = 0;  // the most scores that a row can have: the shape of the launch depends on it alone
  // Row r has lengths[r / rows_per_length] scores, clamped to [0, n]; null: n. On the device.
  const int32_t* lengths = nullptr;
  int64_t rows_per_length = 1;
  Budget budget;  // W of a row = budget(its length)
  // Column j of row r stands for key columns[r * column_stride + j], ascending in j; null: key j.
  const int32_t* columns = nullptr;
  int64_t column_stride = 0;

  float* threshold = nullptr;    // (rows); NaN where W is 0
  int32_t* tie_index = nullptr;  // (rows); -1 where W is 0
  int32_t* indices = nullptr;    // (rows, index_width): ascending keys, then -1; null: not wanted
  int64_t index_width = 0;       // keys beyond it are dropped
  int32_t* kept = nullptr;       // (rows): W; null: not wanted
};

cudaError_t select_long(const ScoreRows& rows, cudaStream_t stream);

}  // namespace topk_attn::cuda
