// The kernels behind certified.h, in order.
#pragma once

#include "certified.h"

namespace topk_attn::cuda::decode {

// Keys that step 1 samples of n, as a power of two.
constexpr __host__ __device__ int certified_sample_log(int64_t n) {
  return n < (1 << 19) ? 11 : 12;
}

cudaError_t certified_bound(const DecodeCall& call, const Slab& slab, const Scratch& scratch,
                            const KeyCodes& codes, const CertifiedScratch& own, cudaStream_t stream);
cudaError_t certified_scan(const DecodeCall& call, const Slab& slab, const Scratch& scratch,
                           const KeyCodes& codes, const CertifiedScratch& own, int sms, cudaStream_t stream);
cudaError_t certified_finish(const DecodeCall& call, const Slab& slab, const Scratch& scratch,
                             const KeyCodes& codes, const CertifiedScratch& own, cudaStream_t stream);

}  // namespace topk_attn::cuda::decode
