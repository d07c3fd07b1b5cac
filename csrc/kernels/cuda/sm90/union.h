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

// dq of every row of the gathered tiles. Deterministic. `workspace`: as below.
cudaError_t backward_union_dq(const BackwardCall& backward, cudaStream_t stream, void* workspace = nullptr);

// Adds what the gathered tiles contribute to dk_sum and dv_sum (softmax_scale included); keys that no
// gathered tile keeps are not touched. Without `workspace`: by float32 reductions in no fixed order.
//
// With it the result is deterministic. The sums are then turned into fixed point and summed as integers
// (union_fixed_point.cuh), so finish_union_gradients() has to convert them. The order is backward_union_dq(),
// the masked pass (if any; it writes float sums), backward_union_dkv(), finish_union_gradients(), with the
// same workspace of union_workspace() bytes, 8-byte aligned, and dk_sum and dv_sum 16-byte aligned.
cudaError_t backward_union_dkv(const BackwardCall& backward, cudaStream_t stream, void* workspace = nullptr);

// 12 bytes per key and KV head.
size_t union_workspace(const Call& call);

// dk and dv (16-byte aligned rows) from dk_sum and dv_sum, whole tensors.
cudaError_t finish_union_gradients(const BackwardCall& backward, const void* workspace, cudaStream_t stream);

}  // namespace topk_attn::cuda::sm90
