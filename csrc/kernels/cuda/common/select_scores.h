// Exact top-W of rows of scores in the contract's order: the encoding of each row, and the kept keys.
//
// One thread block a row. A sample of the row guesses a bound that a few more than W keys reach; one pass
// over the row moves those keys to shared memory, where a radix select over their order keys finds the
// threshold. That they are at least W is counted, not assumed: otherwise, and where W is too large for shared
// memory, the radix select reads the row itself until what is left fits. Cost: 1.1 to 1.25 reads of the row,
// or 2 to 5; short rows one read.
#pragma once

#include "../params.h"

namespace topk_attn::cuda {

// A unit of a slab: the 64 rows of one (head, tile).
struct Unit {
  int32_t head;
  int32_t tile;
};

inline int64_t num_units(const Call& c) {
  return int64_t{c.heads} * c.num_tiles;
}

// The order in which slabs walk over the units of a call: all tiles of a head, then the next head. With
// kv_group the heads of a group lie side by side, (kv head, tile, head of the group), so that a slab holds
// all that a selection needs.
TOPK_HD Unit unit_at(const Call& c, int64_t unit) {
  if (!c.kv_group) {
    return Unit{static_cast<int32_t>(unit / c.num_tiles), static_cast<int32_t>(unit % c.num_tiles)};
  }
  const int32_t group = c.heads / c.kv_heads;
  const int64_t set = unit / group;
  return Unit{static_cast<int32_t>(set / c.num_tiles * group + unit % group),
              static_cast<int32_t>(set % c.num_tiles)};
}

// Scores of the units [first_unit, first_unit + units) of a call: row r of unit u and key j at
// scores[((u - first_unit) * 64 + r) * ld + j], for every key that any row of the tile sees. The rest of a
// row, up to ld, is read and ignored. scores is 16-byte aligned; ld is a multiple of 4 and at least max_k.
// With kv_group first_unit and units are multiples of heads / kv_heads.
struct ScoreSlab {
  const float* scores = nullptr;
  int64_t ld = 0;
  int64_t first_unit = 0;
  int64_t units = 0;
};

// The selection of the slab's rows. With kv_group a row's score is the largest over the group's heads, and
// the result is repeated on them. Rows outside every tile are not written (packed calls: init_rows(), and -1
// in the indices). Of `selection` the bitmap is zeroed by the caller; row i of the indices (numbered as
// call.rows) starts at indices + i * index_width and costs one more read of the row. Units past the end are
// skipped.
cudaError_t select_rows(const Call& call, const ScoreSlab& slab, const Selection& selection,
                        cudaStream_t stream);

// The operator select_scores (contract section 10). lengths (may be null) are clamped to [0, n]; a row of
// length 0 gives NaN, -1. scores may have any row stride; params.indices may be null.
cudaError_t select_scores(const SelectScoresParams& params, cudaStream_t stream);

}  // namespace topk_attn::cuda
