#include "masked_backward.cuh"

namespace topk_attn::cuda::sm90 {
template cudaError_t launch_masked_backward<__nv_bfloat16, 64>(const BackwardCall&, const BackwardScratch&,
                                                               cudaStream_t);
template cudaError_t launch_masked_backward<__nv_bfloat16, 128>(const BackwardCall&, const BackwardScratch&,
                                                                cudaStream_t);
}  // namespace topk_attn::cuda::sm90
