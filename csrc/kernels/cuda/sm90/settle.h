// Exact selection inside a small superset of the kept keys, for sm_90a: see settle.cu for the method and its
// cost.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"
#include "../params.h"

namespace topk_attn::cuda::sm90 {

// A call of settle(). An entry is a (head, tile) pair, number head * num_tiles + tile. Entries with
// mark_count <= largest_share * seen_end(tile) are settled; of every other entry nothing is read or written
// but its mark_count.
struct SettleCall {
  Call call;
  // threshold and tie_index of proven rows are written (rows that see nothing: NaN and -1), those of other
  // rows are left as they are. bitmap (or null) gets the tight bitmap: exactly the keys that some row keeps;
  // it may be the same memory as marks. Where a row of the entry is not proven (unsettled is not 0), the
  // bitmap is the entry's marks, unchanged. indices must be null.
  Selection out;
  // heads x num_tiles x bitmap_words(call): of every row i of the tile at least the visible keys j with
  // score(i, j) >= lower[i] or a NaN score; keys at or beyond seen_end(tile) are never set.
  const uint32_t* marks = nullptr;
  const int32_t* mark_count = nullptr;  // heads x num_tiles: bits set
  float largest_share = 0.0f;
  // call.rows: a row is proven iff at least W of its visible marked keys have a score >= lower (or NaN). -inf
  // is allowed: all visible keys are marked then. May be the same memory as out.threshold. A row with lower
  // = NaN is not proven.
  const float* lower = nullptr;
  // call.rows, or null: a guess of a score a little above the threshold, which saves time where it is good
  // and never changes a result. May be the same memory as out.tie_index (the bits of the floats).
  const float* upper = nullptr;
  uint64_t* unsettled = nullptr;  // heads x num_tiles: bit r: row r of the tile is not proven; else 0
};

// Whether settle() serves this call: bf16 or fp16, head_dim 64 or 128, one selection per head, no always-kept
// keys. Pure: looks at sizes and strides only.
bool supports_settle(const Call& call);

// One launch, no workspace, no synchronisation, no allocation; may be captured into a graph.
cudaError_t settle(const SettleCall& call, cudaStream_t stream);

}  // namespace topk_attn::cuda::sm90
