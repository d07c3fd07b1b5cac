// The launchers that are instantiated one type and head dim a file (csrc/kernels/cuda/CMakeLists.txt).
#pragma once

#include "portable.h"

namespace topk_attn::cuda::portable {

template <typename T, int D>
cudaError_t run_scores(const Call& call, int64_t first, int64_t units, float* slab, int64_t ld,
                       cudaStream_t stream);
struct SelectParams;
template <typename T, int D>  // D = 64, 128
cudaError_t run_select(const SelectParams& params, cudaStream_t stream);
template <typename T, int D, bool kGroup>
cudaError_t run_forward(const ForwardCall& call, cudaStream_t stream);
template <typename T, int D, bool kGroup>
cudaError_t run_backward(const BackwardCall& call, const int2* key_tiles, int32_t num_key_tiles,
                         cudaStream_t stream);
template <typename T, int D>  // D = 64, 128
cudaError_t run_forward_gathered(const ForwardCall& call, cudaStream_t stream);
template <typename T, int D>  // D = 64, 128
cudaError_t run_backward_gathered(const BackwardCall& call, cudaStream_t stream);

}  // namespace topk_attn::cuda::portable
