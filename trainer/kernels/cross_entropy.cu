// Cross-entropy of a chunk of logits, one block a row: one pass for the running maximum and the sum of
// exponentials, one that turns the logits into their gradient in place. A row of 150,000 bfloat16 logits is
// still in the L2 cache when the second pass reads it.
#include <cfloat>

#include "device.cuh"

namespace topk_sft::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// The sum of exp(x - largest) over some logits.
struct LogSum {
  float largest = -FLT_MAX;
  float sum = 0.0f;
};

__device__ __forceinline__ LogSum merge(const LogSum& a, const LogSum& b) {
  LogSum out;
  out.largest = fmaxf(a.largest, b.largest);
  out.sum = a.sum * __expf(a.largest - out.largest) + b.sum * __expf(b.largest - out.largest);
  return out;
}

__device__ __forceinline__ LogSum warp_merge(LogSum x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    LogSum other;
    other.largest = __shfl_xor_sync(0xffffffffu, x.largest, offset);
    other.sum = __shfl_xor_sync(0xffffffffu, x.sum, offset);
    x = merge(x, other);
  }
  return x;
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kernel(int64_t vocabulary, T* logits, const int64_t* labels, float* losses, bool gradient) {
  constexpr int kWidth = kVectors ? kVector : 1;
  __shared__ LogSum shared[kWarps];
  T* row = logits + static_cast<int64_t>(blockIdx.x) * vocabulary;
  const int64_t label = labels[blockIdx.x];
  const float target = to_float(row[label]);

  LogSum mine;
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * kWidth; at < vocabulary; at += kThreads * kWidth) {
    if constexpr (kVectors) {
      float x[kVector];
      load(row + at, x);
      float largest = mine.largest;
#pragma unroll
      for (int i = 0; i < kVector; ++i) largest = fmaxf(largest, x[i]);
      float sum = mine.sum * __expf(mine.largest - largest);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += __expf(x[i] - largest);
      mine = {largest, sum};
    } else {
      mine = merge(mine, {to_float(row[at]), 1.0f});
    }
  }
  mine = warp_merge(mine);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();  // also: every thread has read the target before anyone writes a gradient
  mine = threadIdx.x % 32 < kWarps ? shared[threadIdx.x % 32] : LogSum();
  mine = warp_merge(mine);
  const float log_sum = mine.largest + logf(mine.sum);
  if (threadIdx.x == 0) losses[blockIdx.x] = log_sum - target;
  if (!gradient) return;

  for (int64_t at = static_cast<int64_t>(threadIdx.x) * kWidth; at < vocabulary; at += kThreads * kWidth) {
    if constexpr (kVectors) {
      float x[kVector];
      load(row + at, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] = __expf(x[i] - log_sum) - (at + i == label ? 1.0f : 0.0f);
      store(row + at, x);
    } else {
      row[at] = from_float<T>(__expf(to_float(row[at]) - log_sum) - (at == label ? 1.0f : 0.0f));
    }
  }
}

template <typename T>
cudaError_t run(int64_t rows, int64_t vocabulary, void* logits, const int64_t* labels, float* losses,
                bool gradient, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(rows);
  if (vocabulary % kVector == 0) {
    cross_entropy_kernel<T, true>
        <<<blocks, kThreads, 0, stream>>>(vocabulary, static_cast<T*>(logits), labels, losses, gradient);
  } else {
    cross_entropy_kernel<T, false>
        <<<blocks, kThreads, 0, stream>>>(vocabulary, static_cast<T*>(logits), labels, losses, gradient);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t cross_entropy(Type type, int64_t rows, int64_t vocabulary, void* logits, const int64_t* labels,
                          float* losses, bool gradient, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return type == Type::kFloat
             ? run<float>(rows, vocabulary, logits, labels, losses, gradient, stream)
             : run<__nv_bfloat16>(rows, vocabulary, logits, labels, losses, gradient, stream);
}

}  // namespace topk_sft::cuda
