#include "masked_backward.cuh"

namespace topk_attn::cuda::sm90 {
template cudaError_t launch_masked_backward<__half, 64>(const BackwardCall&, const BackwardScratch&,
                                                        cudaStream_t);
template cudaError_t launch_masked_backward<__half, 128>(const BackwardCall&, const BackwardScratch&,
                                                         cudaStream_t);
}  // namespace topk_attn::cuda::sm90
