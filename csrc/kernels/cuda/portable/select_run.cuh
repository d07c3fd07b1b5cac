// The launches of the fused selection for one type and head dim.
#pragma once

#include "instances.h"
#include "select_bracket.cuh"
#include "select_repair.cuh"
#include "select_sweep.cuh"

namespace topk_attn::cuda::portable {

template <typename T, int D>
cudaError_t run_select(const SelectParams& p, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(p.counters, 0, sizeof(SelectCounters), stream);
  if (error != cudaSuccess) return error;
  constexpr int kBracketBytes = bracket_shared_bytes<D>();
  error = allow_shared<kBracketBytes>(bracket_kernel<T, D>);
  if (error != cudaSuccess) return error;
  bracket_kernel<T, D><<<p.items, kSelectThreads, kBracketBytes, stream>>>(p);
  constexpr int kSweepBytes = SweepShared<D>::kBytes;
  error = allow_shared<kSweepBytes>(sweep_kernel<T, D>);
  if (error != cudaSuccess) return error;
  sweep_kernel<T, D><<<p.sweep_blocks, kSelectThreads, kSweepBytes, stream>>>(p);
  repair_kernel<T, D><<<p.repair_blocks, select::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::portable
