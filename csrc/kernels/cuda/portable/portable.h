// The portable build: bf16 and fp16 on the tensor cores of any GPU since sm_80 (mma.sync, cp.async), any head
// dims. Two regimes: masked dense, where every key block that some row of a query tile keeps is visited
// whole, and, for head dims up to 128, the gathered union (gathered.cuh).
#pragma once

#include "../params.h"

namespace topk_attn::cuda::portable {

// Whether this build of the library has the instances that a call needs; `attend`: forward and backward too.
bool supports(const Call& call, bool attend);

// Whether forward() and backward() serve regimes with gathered tiles.
bool supports_gathered(const Call& call);

// Raw scores of the units [first, first + units), numbered by unit_at() (common/select_scores.h) and laid out
// as ScoreSlab says. ld is a multiple of 64 and at least max_k; units at most 65,535.
cudaError_t scores(const Call& call, int64_t first, int64_t units, float* slab, int64_t ld,
                   cudaStream_t stream);

// out and lse of every row, both regimes.
cudaError_t forward(const ForwardCall& call, cudaStream_t stream);

// dq of every row, and dk and dv: to dk_sum and dv_sum if these are given, as regimes need it, else to dk and
// dv. Masked tiles: a pass over query tiles and a pass over key tiles, no atomics, bit-stable, no workspace.
// Gathered tiles add their dk and dv in no fixed order. `key_tiles`: packed calls: (document, first key) of
// each key tile, as make_tiles() gives it for cu_k.
cudaError_t backward(const BackwardCall& call, const int2* key_tiles, int32_t num_key_tiles,
                     cudaStream_t stream);

}  // namespace topk_attn::cuda::portable
