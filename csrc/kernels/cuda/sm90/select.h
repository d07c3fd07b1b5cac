// Exact top-k selection fused into the Q K^T pass, for sm_90a: see select.cu for the method and its cost.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../../params.h"
#include "../params.h"

namespace topk_attn::cuda::sm90 {

// Whether select() serves this call: bf16 or fp16, head_dim 64 or 128, one selection per head, no always-kept
// keys, views that TMA can read. Pure: looks at sizes, strides and alignment only.
bool supports_select(const Call& call);

// Bytes of device workspace that select() needs, 256-byte aligned; at most about 256 MiB. Depends on the
// current device (its number of SMs).
size_t select_workspace(const Call& call);

// Writes threshold, tie_index and, unless null, bitmap of every row. Rows that see nothing get NaN and -1. No
// synchronisation, no allocation; may be captured into a graph. `selection.indices` must be null.
cudaError_t select(const Call& call, const Selection& selection, void* workspace, size_t bytes,
                   cudaStream_t stream);

}  // namespace topk_attn::cuda::sm90
