// RMSNorm with the residual addition before it: one block a row, eight columns a thread. The backward keeps a
// thread on its columns over many rows, so that the weight's gradient needs one partial sum a block.
//
// Memory: forward reads x (and the residual) and writes y (and the sum); backward reads x, grad_y (and the
// gradient of the sum) and writes grad_x.
#include <algorithm>

#include "device.cuh"

namespace topk_sft::cuda {
namespace {

constexpr int64_t kMaxColumns = 8192;
constexpr int64_t kResidentThreads = 132 * 2048;  // of the largest device in use: more blocks would only wait

int threads_for(int64_t columns) {
  return static_cast<int>((columns / kVector + 31) / 32 * 32);
}

template <typename T>
__global__ void norm_forward_kernel(NormForward call) {
  __shared__ float shared[32];
  const int64_t row = blockIdx.x;
  const int64_t column = static_cast<int64_t>(threadIdx.x) * kVector;
  const bool active = column < call.columns;
  const int64_t at = row * call.columns + column;

  float x[kVector] = {};
  float square = 0.0f;
  if (active) {
    load(static_cast<const T*>(call.x) + at, x);
    if (call.residual != nullptr) {
      float residual[kVector];
      load(static_cast<const T*>(call.residual) + at, residual);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] = rounded<T>(x[i] + residual[i]);
      store(static_cast<T*>(call.sum) + at, x);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) square += x[i] * x[i];
  }
  const float mean = block_sum(square, shared) / static_cast<float>(call.columns);
  const float inverse_rms = rsqrtf(mean + call.eps);
  if (threadIdx.x == 0) call.inverse_rms[row] = inverse_rms;
  if (!active) return;
  float weight[kVector];
  load(static_cast<const T*>(call.weight) + column, weight);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = rounded<T>(x[i] * inverse_rms) * weight[i];
  store(static_cast<T*>(call.y) + at, x);
}

template <typename T>
__global__ void norm_backward_kernel(NormBackward call) {
  __shared__ float shared[32];
  const int64_t column = static_cast<int64_t>(threadIdx.x) * kVector;
  const bool active = column < call.columns;
  float weight[kVector] = {};
  if (active) load(static_cast<const T*>(call.weight) + column, weight);
  float grad_weight[kVector] = {};

  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const int64_t at = row * call.columns + column;
    const float inverse_rms = call.inverse_rms[row];
    float normed[kVector] = {};
    float grad[kVector] = {};
    float along = 0.0f;
    if (active) {
      load(static_cast<const T*>(call.x) + at, normed);
      load(static_cast<const T*>(call.grad_y) + at, grad);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        normed[i] *= inverse_rms;
        grad_weight[i] += grad[i] * rounded<T>(normed[i]);
        grad[i] *= weight[i];
        along += grad[i] * normed[i];
      }
    }
    along = block_sum(along, shared) / static_cast<float>(call.columns);
    if (!active) continue;
    float past[kVector] = {};
    if (call.grad_sum != nullptr) load(static_cast<const T*>(call.grad_sum) + at, past);
#pragma unroll
    for (int i = 0; i < kVector; ++i) grad[i] = (grad[i] - normed[i] * along) * inverse_rms + past[i];
    store(static_cast<T*>(call.grad_x) + at, grad);
  }
  if (active) store(call.partial + static_cast<int64_t>(blockIdx.x) * call.columns + column, grad_weight);
}

// 32 columns a block; eight threads share a column and add their rows in a fixed order.
template <typename T>
__global__ void column_sums_kernel(const float* partial, int64_t rows, int64_t columns, T* out) {
  __shared__ float shared[8][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0.0f;
  if (column < columns) {
    for (int64_t row = threadIdx.y; row < rows; row += 8) sum += partial[row * columns + column];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) sum += shared[i][threadIdx.x];
  out[column] = from_float<T>(sum);
}

}  // namespace

bool norm_supported(int64_t columns) {
  return columns % kVector == 0 && columns > 0 && columns <= kMaxColumns;
}

int64_t norm_backward_blocks(int64_t rows, int64_t columns) {
  return std::max<int64_t>(1, std::min(rows, kResidentThreads / threads_for(columns) / 2));
}

cudaError_t norm_forward(const NormForward& call, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(call.rows);
  const int threads = threads_for(call.columns);
  if (call.type == Type::kFloat) {
    norm_forward_kernel<float><<<blocks, threads, 0, stream>>>(call);
  } else {
    norm_forward_kernel<__nv_bfloat16><<<blocks, threads, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

cudaError_t norm_backward(const NormBackward& call, cudaStream_t stream) {
  const int64_t blocks = norm_backward_blocks(call.rows, call.columns);
  const int threads = threads_for(call.columns);
  if (call.type == Type::kFloat) {
    norm_backward_kernel<float><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(call);
  } else {
    norm_backward_kernel<__nv_bfloat16><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(call);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return column_sums(call.type, call.partial, blocks, call.columns, call.grad_weight, stream);
}

cudaError_t column_sums(Type type, const float* partial, int64_t rows, int64_t columns, void* out,
                        cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((columns + 31) / 32);
  const dim3 threads(32, 8);
  if (type == Type::kFloat) {
    column_sums_kernel<<<blocks, threads, 0, stream>>>(partial, rows, columns, static_cast<float*>(out));
  } else {
    column_sums_kernel<<<blocks, threads, 0, stream>>>(partial, rows, columns,
                                                       static_cast<__nv_bfloat16*>(out));
  }
  return cudaGetLastError();
}

}  // namespace topk_sft::cuda
