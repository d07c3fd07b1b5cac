// From checked torch arguments to the kernels' plain structs, for the CPU.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <vector>

#include "common.h"

#if !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for would run on one thread: compile with OpenMP (-fopenmp)"
#endif

namespace topk_attn {

// Torch's thread pool. Tasks are handed out one by one, so uneven ones balance.
inline Executor executor() {
  Executor e;
  e.workers = std::max(1, at::get_num_threads());
  e.run = [](const Executor& self, int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
    const int64_t workers = std::min(self.workers, tasks);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(context, task, worker);
      }
    });
  };
  return e;
}

// Documents or batch entries of an attention call. Checks the values of cu_seqlens and max_seqlen.
std::vector<Sequence> sequences_of(const Shape& shape, const OptTensor& cu_seqlens_q,
                                   const OptTensor& cu_seqlens_k, std::optional<int64_t> max_seqlen_q,
                                   std::optional<int64_t> max_seqlen_k);

// Everything of Problem but the sequences, for per-row outputs (B, H, Tq) or (H, total_q).
Problem problem_of(const Tensor& q, const Shape& shape, const Settings& settings, bool causal);

}  // namespace topk_attn
