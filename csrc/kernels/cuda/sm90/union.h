// Attention over the gathered union of kept keys (sm_90a): for every query tile that gathered() leaves to
// these kernels (Regimes in ../params.h), only the K and V rows that some row of the tile keeps are read and
// multiplied. Tiles of the other regime are left untouched. Nothing is allocated and no union lists are
// stored: each thread block expands its tile's bitmap on the way.
#pragma once

#include "../common/union_size.h"
#include "../params.h"

namespace topk_attn::cuda::sm90 {

// bf16 and fp16, head_dim == v_dim in {64, 128}, one selection per head; sinks, recent keys, packed input,
// strided views and any lengths are all supported.
bool supports_union(const Call& call);

// out and lse of every row of the gathered tiles. Deterministic.
cudaError_t forward_union(const ForwardCall& forward, cudaStream_t stream);

// dq of every row of the gathered tiles. Deterministic.
cudaError_t backward_union_dq(const BackwardCall& backward, cudaStream_t stream);

// Adds what the gathered tiles contribute to dk_sum and dv_sum (softmax_scale included) by float32 reductions
// in no fixed order; keys that no gathered tile keeps are not touched.
cudaError_t backward_union_dkv(const BackwardCall& backward, cudaStream_t stream);

}  // namespace topk_attn::cuda::sm90
