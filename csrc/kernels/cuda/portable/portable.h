// The portable build: bf16 and fp16 on the tensor cores of any GPU since sm_80 (mma.sync, cp.async), any head
// dims. Masked dense: every key block that some row of a query tile keeps is visited whole.
#pragma once

#include "../params.h"

namespace topk_attn::cuda::portable {

// Whether this build of the library has the instances that a call needs; `attend`: forward and backward too.
bool supports(const Call& call, bool attend);

// Raw scores of the units [first, first + units), numbered by unit_at() (common/select_scores.h) and laid out
// as ScoreSlab says. ld is a multiple of 64 and at least max_k; units at most 65,535.
cudaError_t scores(const Call& call, int64_t first, int64_t units, float* slab, int64_t ld,
                   cudaStream_t stream);

// out and lse of every row whose tile is not left to the gathered kernels.
cudaError_t forward(const ForwardCall& call, cudaStream_t stream);

// dq of those rows, and their share of dk and dv: written, for every key, to dk_sum and dv_sum if these are
// given, else to dk and dv. Split into a pass over query tiles and a pass over key tiles: no atomics,
// bit-stable, no workspace. `key_tiles`: packed calls: (document, first key) of each key tile, as
// make_tiles() gives it for cu_k.
cudaError_t backward(const BackwardCall& call, const int2* key_tiles, int32_t num_key_tiles,
                     cudaStream_t stream);

}  // namespace topk_attn::cuda::portable
