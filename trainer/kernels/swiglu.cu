// SwiGLU, eight elements a thread; what is left over at the end goes one by one.
#include "device.cuh"

namespace topk_sft::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + __expf(-x));
}

template <typename T>
__device__ __forceinline__ float forward_one(float gate, float up) {
  return rounded<T>(gate * sigmoid(gate)) * up;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_forward_kernel(int64_t size, const T* gate, const T* up, T* y) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (at + kVector <= size) {
    float g[kVector], u[kVector];
    load(gate + at, g);
    load(up + at, u);
#pragma unroll
    for (int i = 0; i < kVector; ++i) g[i] = forward_one<T>(g[i], u[i]);
    store(y + at, g);
    return;
  }
  for (int64_t i = at; i < size; ++i)
    y[i] = from_float<T>(forward_one<T>(to_float(gate[i]), to_float(up[i])));
}

struct Gradients {
  float y, gate, up;
};

template <typename T>
__device__ __forceinline__ Gradients backward_one(float gate, float up, float grad) {
  const float s = sigmoid(gate);
  const float silu = rounded<T>(gate * s);
  return {silu * up, grad * up * s * (1.0f + gate * (1.0f - s)), grad * silu};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(int64_t size, const T* gate, const T* up, const T* grad_y, T* y, T* grad_gate,
                           T* grad_up) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (at + kVector <= size) {
    float g[kVector], u[kVector], grad[kVector];
    load(gate + at, g);
    load(up + at, u);
    load(grad_y + at, grad);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const Gradients one = backward_one<T>(g[i], u[i], grad[i]);
      g[i] = one.gate;
      u[i] = one.up;
      grad[i] = one.y;
    }
    store(grad_gate + at, g);
    store(grad_up + at, u);
    store(y + at, grad);
    return;
  }
  for (int64_t i = at; i < size; ++i) {
    const Gradients one = backward_one<T>(to_float(gate[i]), to_float(up[i]), to_float(grad_y[i]));
    grad_gate[i] = from_float<T>(one.gate);
    grad_up[i] = from_float<T>(one.up);
    y[i] = from_float<T>(one.y);
  }
}

unsigned blocks_for(int64_t size) {
  constexpr int64_t kElements = kThreads * kVector;
  return static_cast<unsigned>((size + kElements - 1) / kElements);
}

template <typename T>
cudaError_t run_forward(int64_t size, const void* gate, const void* up, void* y, cudaStream_t stream) {
  swiglu_forward_kernel<<<blocks_for(size), kThreads, 0, stream>>>(
      size, static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(y));
  return cudaGetLastError();
}

template <typename T>
cudaError_t run_backward(int64_t size, const void* gate, const void* up, const void* grad_y, void* y,
                         void* grad_gate, void* grad_up, cudaStream_t stream) {
  swiglu_backward_kernel<<<blocks_for(size), kThreads, 0, stream>>>(
      size, static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<const T*>(grad_y),
      static_cast<T*>(y), static_cast<T*>(grad_gate), static_cast<T*>(grad_up));
  return cudaGetLastError();
}

}  // namespace

cudaError_t swiglu_forward(Type type, int64_t size, const void* gate, const void* up, void* y,
                           cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  return type == Type::kFloat ? run_forward<float>(size, gate, up, y, stream)
                              : run_forward<__nv_bfloat16>(size, gate, up, y, stream);
}

cudaError_t swiglu_backward(Type type, int64_t size, const void* gate, const void* up, const void* grad_y,
                            void* y, void* grad_gate, void* grad_up, cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  return type == Type::kFloat
             ? run_backward<float>(size, gate, up, grad_y, y, grad_gate, grad_up, stream)
             : run_backward<__nv_bfloat16>(size, gate, up, grad_y, y, grad_gate, grad_up, stream);
}

}  // namespace topk_sft::cuda
