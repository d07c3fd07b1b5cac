#include "masked_forward.cuh"

namespace topk_attn::cuda::sm90 {
template cudaError_t launch_masked_forward<__half, 64>(const ForwardCall&, cudaStream_t);
template cudaError_t launch_masked_forward<__half, 128>(const ForwardCall&, cudaStream_t);
}  // namespace topk_attn::cuda::sm90
