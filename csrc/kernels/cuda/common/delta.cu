// delta.h: 16 lanes a row, 8 channels a step.
#include "delta.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace topk_attn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 16;
constexpr int64_t kMaxBlocks = 65536;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Eight channels, moved as 16-byte words where the rows are aligned.
template <typename T>
struct alignas(16) Channels {
  T value[8];
};

template <typename T, bool kAligned>
__device__ __forceinline__ Channels<T> load_channels(const T* p) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Channels<T>*>(p);
  } else {
    Channels<T> c;
#pragma unroll
    for (int i = 0; i < 8; ++i) c.value[i] = p[i];
    return c;
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_channels(T* p, const Channels<T>& c) {
  if constexpr (kAligned) {
    *reinterpret_cast<Channels<T>*>(p) = c;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = c.value[i];
  }
}

template <typename T, bool kAligned>
__global__ __launch_bounds__(kThreads) void delta_kernel(const Call call, const View out, const View dout,
                                                         const float* const dlse, const float* const lse,
                                                         float* const delta, const int64_t rows) {
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = int64_t{gridDim.x} * (kThreads / kLanes);
  // Lanes whose row is past the end stay for the shuffles.
  const int64_t rounded = (rows + 1) / 2 * 2;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes; i < rounded; i += stride) {
    const bool exists = i < rows;
    const int64_t h = i % call.heads;
    const int64_t t = i / call.heads % call.tq;
    const int64_t b = i / call.heads / call.tq;
    float sum = 0.0f;
    if (exists) {
      const T* const o = static_cast<const T*>(out.data) + b * out.batch + t * out.token + h * out.head;
      const T* const d = static_cast<const T*>(dout.data) + b * dout.batch + t * dout.token + h * dout.head;
      for (int c = lane * 8; c < call.v_dim; c += kLanes * 8) {
        const Channels<T> x = load_channels<T, kAligned>(o + c);
        const Channels<T> y = load_channels<T, kAligned>(d + c);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = __fmaf_rn(to_float(x.value[j]), to_float(y.value[j]), sum);
      }
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (exists && lane == 0) {
      const int64_t row = b * call.rows.batch + h * call.rows.head + t;
      const bool nothing = lse != nullptr && lse[row] == -__int_as_float(0x7f800000);
      delta[row] = nothing ? 0.0f : dlse == nullptr ? sum : sum - dlse[row];
    }
  }
}

// Each thread converts eight channels of one row.
template <typename T, bool kAligned>
__global__ __launch_bounds__(kThreads) void convert_kernel(const float* const from, const View to,
                                                           const int64_t rows, const int64_t tokens,
                                                           const int heads, const int dim) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int chunks = dim / 8;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows * chunks; i += stride) {
    const int c = static_cast<int>(i % chunks) * 8;
    const int64_t row = i / chunks;
    const int64_t h = row % heads;
    const int64_t t = row / heads % tokens;
    const int64_t b = row / heads / tokens;
    const Channels<float> sum = load_channels<float, true>(from + row * dim + c);
    Channels<T> result;
#pragma unroll
    for (int j = 0; j < 8; ++j) result.value[j] = from_float<T>(sum.value[j]);
    store_channels<T, kAligned>(static_cast<T*>(to.data) + b * to.batch + t * to.token + h * to.head + c,
                                result);
  }
}

bool aligned(const View& v, int element_size) {
  const auto whole = [](int64_t bytes) { return bytes % 16 == 0; };
  return whole(static_cast<int64_t>(reinterpret_cast<uintptr_t>(v.data) % 16)) &&
         whole(v.batch * element_size) && whole(v.token * element_size) && whole(v.head * element_size);
}

unsigned block_count(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

template <typename T>
cudaError_t launch_delta(const Call& call, View out, View dout, const float* dlse, const float* lse,
                         float* delta, cudaStream_t stream) {
  const int64_t rows = int64_t{call.cu_q == nullptr ? call.batch : 1} * call.heads * call.tq;
  if (rows == 0) return cudaSuccess;
  const bool whole = aligned(out, sizeof(T)) && aligned(dout, sizeof(T));
  const auto kernel = whole ? delta_kernel<T, true> : delta_kernel<T, false>;
  kernel<<<block_count(rows, kThreads / kLanes), kThreads, 0, stream>>>(call, out, dout, dlse, lse, delta,
                                                                        rows);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_convert(const Call& call, const float* from, View to, int dim, cudaStream_t stream) {
  const int64_t rows = int64_t{call.cu_q == nullptr ? call.batch : 1} * call.tk * call.kv_heads;
  if (from == nullptr || rows == 0) return cudaSuccess;
  const auto kernel = aligned(to, sizeof(T)) ? convert_kernel<T, true> : convert_kernel<T, false>;
  kernel<<<block_count(rows * (dim / 8), kThreads), kThreads, 0, stream>>>(from, to, rows, call.tk,
                                                                           call.kv_heads, dim);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_finish(const Call& call, const float* dk_sum, const float* dv_sum, View dk, View dv,
                          cudaStream_t stream) {
  const cudaError_t error = launch_convert<T>(call, dk_sum, dk, call.head_dim, stream);
  return error != cudaSuccess ? error : launch_convert<T>(call, dv_sum, dv, call.v_dim, stream);
}

}  // namespace

cudaError_t delta(const Call& call, View out, View dout, const float* dlse, const float* lse, float* delta,
                  cudaStream_t stream) {
  switch (call.dtype) {
    case DType::kFloat32:
      return launch_delta<float>(call, out, dout, dlse, lse, delta, stream);
    case DType::kBFloat16:
      return launch_delta<__nv_bfloat16>(call, out, dout, dlse, lse, delta, stream);
    case DType::kFloat16:
      return launch_delta<__half>(call, out, dout, dlse, lse, delta, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t finish_gradients(const Call& call, const float* dk_sum, const float* dv_sum, View dk, View dv,
                             cudaStream_t stream) {
  switch (call.dtype) {
    case DType::kFloat32:
      return launch_finish<float>(call, dk_sum, dv_sum, dk, dv, stream);
    case DType::kBFloat16:
      return launch_finish<__nv_bfloat16>(call, dk_sum, dv_sum, dk, dv, stream);
    case DType::kFloat16:
      return launch_finish<__half>(call, dk_sum, dv_sum, dk, dv, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace topk_attn::cuda
