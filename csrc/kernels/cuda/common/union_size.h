// Size of each query tile's union of kept keys: what Regimes::union_size holds.
#pragma once

#include "../params.h"

namespace topk_attn::cuda {

// union_size[head * num_tiles + tile] = bits set in the bitmap of that (head, tile); 0 for unused tiles.
cudaError_t count_union(const Call& call, const uint32_t* bitmap, int32_t* union_size, cudaStream_t stream);

}  // namespace topk_attn::cuda
