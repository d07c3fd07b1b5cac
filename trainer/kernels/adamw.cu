// AdamW over many tensors at once: reads gradient, master and moments, writes master, moments and the
// bfloat16 parameter, 28 bytes an element with bfloat16 gradients. The arithmetic is that of torch's fused
// AdamW.
#include <algorithm>

#include "device.cuh"

namespace topk_sft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockElements = 8 * kThreads * kVector;
constexpr int kMaxTensors = 48;  // kernel parameters have room for 4 KiB

struct Group {
  AdamWTensor tensor[kMaxTensors];
  int32_t first_block[kMaxTensors + 1];
  int32_t count;
};

struct Element {
  float master, exp_avg, exp_avg_sq;
};

__device__ __forceinline__ Element update(const AdamWSettings& s, float gradient, Element e) {
  gradient *= s.gradient_scale;
  e.master *= 1.0f - s.learning_rate * s.weight_decay;
  e.exp_avg += (1.0f - s.beta1) * (gradient - e.exp_avg);
  e.exp_avg_sq = s.beta2 * e.exp_avg_sq + (1.0f - s.beta2) * gradient * gradient;
  const float denominator = sqrtf(e.exp_avg_sq) / s.correction2_sqrt + s.epsilon;
  e.master -= s.learning_rate / s.correction1 * e.exp_avg / denominator;
  return e;
}

template <typename G>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const AdamWSettings settings, const __grid_constant__ Group group) {
  int index = 0;
  while (index + 1 < group.count && group.first_block[index + 1] <= static_cast<int32_t>(blockIdx.x)) ++index;
  const AdamWTensor& t = group.tensor[index];
  const auto* gradients = static_cast<const G*>(t.gradient);
  auto* parameters = static_cast<__nv_bfloat16*>(t.parameter);
  const int64_t begin =
      (static_cast<int64_t>(blockIdx.x) - group.first_block[index]) * kBlockElements + threadIdx.x * kVector;
  const int64_t end = min(begin + kBlockElements, t.size);

  for (int64_t at = begin; at < end; at += kThreads * kVector) {
    if (at + kVector <= t.size) {
      float gradient[kVector], master[kVector], exp_avg[kVector], exp_avg_sq[kVector];
      load(gradients + at, gradient);
      load(t.master + at, master);
      load(t.exp_avg + at, exp_avg);
      load(t.exp_avg_sq + at, exp_avg_sq);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const Element e = update(settings, gradient[i], {master[i], exp_avg[i], exp_avg_sq[i]});
        master[i] = e.master;
        exp_avg[i] = e.exp_avg;
        exp_avg_sq[i] = e.exp_avg_sq;
      }
      store(t.master + at, master);
      store(t.exp_avg + at, exp_avg);
      store(t.exp_avg_sq + at, exp_avg_sq);
      store(parameters + at, master);
    } else {
      for (int64_t i = at; i < t.size; ++i) {
        const Element e =
            update(settings, to_float(gradients[i]), {t.master[i], t.exp_avg[i], t.exp_avg_sq[i]});
        t.master[i] = e.master;
        t.exp_avg[i] = e.exp_avg;
        t.exp_avg_sq[i] = e.exp_avg_sq;
        parameters[i] = __float2bfloat16_rn(e.master);
      }
    }
  }
}

}  // namespace

cudaError_t adamw(const AdamWSettings& settings, const AdamWTensor* tensors, int64_t count,
                  cudaStream_t stream) {
  for (int64_t begin = 0; begin < count; begin += kMaxTensors) {
    Group group = {};
    int64_t blocks = 0;
    for (int64_t i = begin; i < std::min(count, begin + kMaxTensors); ++i) {
      group.tensor[group.count] = tensors[i];
      group.first_block[group.count++] = static_cast<int32_t>(blocks);
      blocks += (tensors[i].size + kBlockElements - 1) / kBlockElements;
    }
    group.first_block[group.count] = static_cast<int32_t>(blocks);
    if (blocks == 0) continue;
    if (settings.gradient_is_float) {
      adamw_kernel<float><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(settings, group);
    } else {
      adamw_kernel<__nv_bfloat16><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(settings, group);
    }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace topk_sft::cuda
