// The query tiles of packed calls, and the values that rows outside every document keep.
#pragma once

#include "../params.h"

namespace topk_attn::cuda {

// Packed calls: fills call.num_tiles entries (document, first row), ascending by document and row; the unused
// ones, document -1, come last. A document gets no tile when its offsets are bad: begin below an earlier
// offset, end below begin or beyond the total, longer than max_q or max_k. One thread block; call.tiles is
// not read.
cudaError_t make_tiles(const Call& call, int2* tiles, cudaStream_t stream);

// The same for keys: `count` entries (document, first key) of tiles of 64 keys, in the same order, of the
// documents that make_tiles() accepts, those without queries included. ceil(total_k / 64) + batch entries are
// always enough.
cudaError_t make_key_tiles(const Call& call, int2* key_tiles, int32_t count, cudaStream_t stream);

// What a row holds that no tile computes: out 0, lse -inf, threshold NaN, tie_index -1, for every row of the
// call. Packed calls need it before the passes, since offsets may leave gaps. `out` (data may be null) is of
// the call's dtype with 16-byte aligned rows; each of the other pointers may be null.
cudaError_t init_rows(const Call& call, View out, float* lse, float* threshold, int32_t* tie_index,
                      cudaStream_t stream);

// The encoding that admits every key, threshold -inf and tie_index 2^31 - 1, for the rows of the call's tiles
// that see a key; threshold NaN and tie_index -1 for those that see none.
cudaError_t admit_all(const Call& call, float* threshold, int32_t* tie_index, cudaStream_t stream);

}  // namespace topk_attn::cuda
