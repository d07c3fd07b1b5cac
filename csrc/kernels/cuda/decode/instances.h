// The launchers of the scans: those that are instantiated one type and head dim a file, and the plain one.
#pragma once

#include "params.h"

namespace topk_attn::cuda::decode {

template <typename T, int D>
cudaError_t run_scan(const DecodeCall& call, const Slab& slab, const Scratch& scratch, int sms,
                     cudaStream_t stream);
template <typename T, int D>
cudaError_t run_scan_tile(const DecodeCall& call, const Slab& slab, const Scratch& scratch, int sms,
                          cudaStream_t stream);
template <typename T, int D>
cudaError_t run_sample(const DecodeCall& call, const Slab& slab, const Scratch& scratch, cudaStream_t stream);
template <typename T, int D>
cudaError_t run_short(const DecodeCall& call, const Slab& slab, const Scratch& scratch, cudaStream_t stream);
cudaError_t scan_plain(const DecodeCall& call, const Slab& slab, const Scratch& scratch, int sms,
                       cudaStream_t stream);

}  // namespace topk_attn::cuda::decode
