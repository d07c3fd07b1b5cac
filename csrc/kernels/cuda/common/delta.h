// Memory-bound steps before and after the backward kernels.
#pragma once

#include "../params.h"

namespace topk_attn::cuda {

// delta (call.rows) = sum over channels of dout * out, in float32, minus dlse (call.rows; may be null). out
// and dout are of the call's dtype with contiguous channels, any other strides (0 too) and any alignment. The
// sum's order is fixed by v_dim alone. Where lse (call.rows; may be null) is -inf the row keeps nothing:
// delta is 0, whatever dlse says.
cudaError_t delta(const Call& call, View out, View dout, const float* dlse, const float* lse, float* delta,
                  cudaStream_t stream);

// Converts the float32 sums of dK and dV, contiguous (tokens, kv_heads, dim), to the call's dtype; tokens are
// batch * tk for dense calls and the packed total otherwise. A pair whose sum is null is skipped.
cudaError_t finish_gradients(const Call& call, const float* dk_sum, const float* dv_sum, View dk, View dv,
                             cudaStream_t stream);

}  // namespace topk_attn::cuda
