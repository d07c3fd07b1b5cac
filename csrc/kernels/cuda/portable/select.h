// Exact top-k selection fused into the Q K^T pass, for every GPU since sm_80: see select.cu for the method
// and its cost.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../params.h"

namespace topk_attn::cuda::portable {

// Whether select() serves this call: bf16 or fp16, head_dim up to 128, one selection per head, no always-kept
// keys, a budget whose candidates fit the workspace, and instances in this build. Pure: looks at sizes alone.
bool supports_select(const Call& call);

// Bytes of device workspace that select() needs; at most 256 MiB and 12 bytes for each 32 rows, plus one row
// of scores where that is larger. Depends on the current device (its number of SMs).
size_t select_workspace(const Call& call);

// Writes threshold, tie_index and, unless null, bitmap of every row. Rows that see nothing get NaN and -1. No
// synchronisation, no allocation; may be captured into a graph. `selection.indices` must be null.
cudaError_t select(const Call& call, const Selection& selection, void* workspace, size_t bytes,
                   cudaStream_t stream);

}  // namespace topk_attn::cuda::portable
