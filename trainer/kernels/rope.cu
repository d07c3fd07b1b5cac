// Rotary embedding of queries or keys, with the RMSNorm over head_dim before it where the model has one: one
// warp a head of a token, each lane with up to four of the pairs (d, d + head_dim / 2) that are rotated
// together.
//
// The backward turns the gradient back by the same angles; with a norm it goes on through the norm, and every
// block keeps a partial sum of the norm weight's gradient.
#include <algorithm>

#include "device.cuh"

namespace topk_sft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPairs = 4;  // of a lane: head_dim at most 2 * 32 * kPairs
constexpr int64_t kMaxBlocks = 132 * 8;

int64_t blocks_for(int64_t heads_in_all) {
  return std::max<int64_t>(1, std::min(kMaxBlocks, (heads_in_all + kWarps - 1) / kWarps));
}

// Elements d and d + half of a head for the lane's pairs.
struct Pairs {
  float low[kPairs];
  float high[kPairs];
};

template <typename T>
__device__ __forceinline__ Pairs load_pairs(const T* p, int half, int lane) {
  Pairs out = {};
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int d = lane + 32 * j;
    if (d < half) {
      out.low[j] = to_float(p[d]);
      out.high[j] = to_float(p[d + half]);
    }
  }
  return out;
}

template <typename T>
__device__ __forceinline__ void store_pairs(T* p, const Pairs& x, int half, int lane) {
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int d = lane + 32 * j;
    if (d < half) {
      p[d] = from_float<T>(x.low[j]);
      p[d + half] = from_float<T>(x.high[j]);
    }
  }
}

__device__ __forceinline__ float dot(const Pairs& a, const Pairs& b) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) sum += a.low[j] * b.low[j] + a.high[j] * b.high[j];
  return warp_sum(sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rope_forward_kernel(Rope call) {
  const int lane = threadIdx.x % 32;
  const int half = static_cast<int>(call.head_dim / 2);
  Pairs weight = {};
  if (call.weight != nullptr) weight = load_pairs(static_cast<const T*>(call.weight), half, lane);

  const int64_t all = call.tokens * call.heads;
  for (int64_t head = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; head < all;
       head += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t token = head / call.heads;
    const T* cos = static_cast<const T*>(call.cos) + token * call.head_dim;
    const T* sin = static_cast<const T*>(call.sin) + token * call.head_dim;
    Pairs x = load_pairs(static_cast<const T*>(call.x) + head * call.head_dim, half, lane);
    if (call.weight != nullptr) {
      const float inverse_rms = rsqrtf(dot(x, x) / static_cast<float>(call.head_dim) + call.eps);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        x.low[j] = rounded<T>(rounded<T>(x.low[j] * inverse_rms) * weight.low[j]);
        x.high[j] = rounded<T>(rounded<T>(x.high[j] * inverse_rms) * weight.high[j]);
      }
    }
    Pairs y = {};
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int d = lane + 32 * j;
      if (d < half) {
        const float c = to_float(cos[d]);
        const float s = to_float(sin[d]);
        y.low[j] = x.low[j] * c - x.high[j] * s;
        y.high[j] = x.high[j] * c + x.low[j] * s;
      }
    }
    store_pairs(static_cast<T*>(call.y) + head * call.head_dim, y, half, lane);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rope_backward_kernel(Rope call) {
  __shared__ float shared[kWarps][2 * 32 * kPairs];
  const int lane = threadIdx.x % 32;
  const int half = static_cast<int>(call.head_dim / 2);
  Pairs weight = {};
  if (call.weight != nullptr) weight = load_pairs(static_cast<const T*>(call.weight), half, lane);
  Pairs grad_weight = {};

  const int64_t all = call.tokens * call.heads;
  for (int64_t head = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; head < all;
       head += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t token = head / call.heads;
    const T* cos = static_cast<const T*>(call.cos) + token * call.head_dim;
    const T* sin = static_cast<const T*>(call.sin) + token * call.head_dim;
    Pairs grad = load_pairs(static_cast<const T*>(call.grad_y) + head * call.head_dim, half, lane);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int d = lane + 32 * j;
      if (d < half) {
        const float c = to_float(cos[d]);
        const float s = to_float(sin[d]);
        const float low = grad.low[j] * c + grad.high[j] * s;
        grad.high[j] = grad.high[j] * c - grad.low[j] * s;
        grad.low[j] = low;
      }
    }
    if (call.weight != nullptr) {
      Pairs normed = load_pairs(static_cast<const T*>(call.x) + head * call.head_dim, half, lane);
      const float inverse_rms = rsqrtf(dot(normed, normed) / static_cast<float>(call.head_dim) + call.eps);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        normed.low[j] *= inverse_rms;
        normed.high[j] *= inverse_rms;
        grad_weight.low[j] += grad.low[j] * rounded<T>(normed.low[j]);
        grad_weight.high[j] += grad.high[j] * rounded<T>(normed.high[j]);
        grad.low[j] *= weight.low[j];
        grad.high[j] *= weight.high[j];
      }
      const float along = dot(grad, normed) / static_cast<float>(call.head_dim);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        grad.low[j] = (grad.low[j] - normed.low[j] * along) * inverse_rms;
        grad.high[j] = (grad.high[j] - normed.high[j] * along) * inverse_rms;
      }
    }
    store_pairs(static_cast<T*>(call.grad_x) + head * call.head_dim, grad, half, lane);
  }

  if (call.weight == nullptr) return;
  store_pairs(shared[threadIdx.x / 32], grad_weight, half, lane);
  __syncthreads();
  for (int d = threadIdx.x; d < call.head_dim; d += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp][d];
    call.partial[blockIdx.x * call.head_dim + d] = sum;
  }
}

}  // namespace

int64_t rope_backward_blocks(int64_t tokens, int64_t heads) {
  return blocks_for(tokens * heads);
}

cudaError_t rope_forward(const Rope& call, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(blocks_for(call.tokens * call.heads));
  if (call.type == Type::kFloat) {
    rope_forward_kernel<float><<<blocks, kThreads, 0, stream>>>(call);
  } else {
    rope_forward_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

cudaError_t rope_backward(const Rope& call, cudaStream_t stream) {
  const int64_t blocks = rope_backward_blocks(call.tokens, call.heads);
  if (call.type == Type::kFloat) {
    rope_backward_kernel<float><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call);
  } else {
    rope_backward_kernel<__nv_bfloat16><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || call.weight == nullptr) return error;
  return column_sums(call.type, call.partial, blocks, call.head_dim, call.grad_weight, stream);
}

}  // namespace topk_sft::cuda
