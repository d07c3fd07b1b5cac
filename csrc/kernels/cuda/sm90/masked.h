// Masked dense attention on sm_90a: flash attention over contiguous key tiles with the selection as a mask.
//
// The query tiles that call.regimes leaves to the masked dense regime are done here, forward and backward;
// gathered tiles are not touched. Every score is computed again, with the bits that selection saw, and
// compared with the row's encoding (threshold, tie_index), so nothing but 8 bytes a row is read for the mask;
// blocks of 128 keys none of which the tile's bitmap holds are neither loaded nor multiplied.
//
// Packed input: tokens that belong to no good document are left untouched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../params.h"

namespace topk_attn::cuda::sm90 {

// bf16 and fp16, head_dim == v_dim in {64, 128}, one selection per head, q, k and v that TMA can address.
// Pure.
bool supports_masked(const Call& call);

// Writes out and lse of the masked tiles. Rows without kept finite mass: zeros and -inf.
cudaError_t forward_masked(const ForwardCall& f, cudaStream_t stream);

// Bytes of backward_masked()'s workspace: dQ in float32 and a little more.
size_t backward_masked_workspace(const Call& call);

// Writes dq of the masked tiles, and their share of dK and dV: every key's row of dk_sum and dv_sum if these
// are wanted, else of dk and dv. dQ is summed over key blocks in float32 in global memory, in a fixed order
// if `deterministic` (dK and dV always are).
cudaError_t backward_masked(const BackwardCall& b, void* workspace, size_t bytes, cudaStream_t stream,
                            bool deterministic = true);

}  // namespace topk_attn::cuda::sm90
