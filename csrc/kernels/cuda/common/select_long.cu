// select_long.h: the kernel. The steps of a row are in select_long_row.cuh.
#include "select_long.h"

#include "select_long_row.cuh"

namespace topk_attn::cuda {
namespace {

using namespace longrow;

template <typename T, int kThreads>
__global__ __launch_bounds__(kThreads, kThreads == kLongThreads ? 2 : 4) void select_long_kernel(
    const __grid_constant__ ScoreRows p, const Room room) {
  extern __shared__ __align__(16) uint8_t memory[];
  const int64_t index = blockIdx.x / team_size();
  RowTask<T> task{};
  task.scores = static_cast<const T*>(p.scores) + index * p.row_stride;
  task.n = static_cast<int>(p.n);
  if (p.lengths != nullptr) task.n = max(0, min(task.n, p.lengths[index / p.rows_per_length]));
  task.w = static_cast<int>(budget(task.n, p.budget));
  if (p.columns != nullptr) task.columns = p.columns + index * p.column_stride;
  if (p.indices != nullptr) {
    task.list = p.indices + index * p.index_width;
    task.width = p.index_width;
    const int64_t stride = team_size() * kThreads;
    for (int64_t at = task.w + team_rank() * kThreads + threadIdx.x; at < task.width; at += stride) {
      task.list[at] = -1;
    }
  }
  const Encoding encoding = select_long_row<kThreads>(task, room, memory);
  if (team_rank() == 0 && threadIdx.x == 0) {
    p.threshold[index] = encoding.threshold;
    p.tie_index[index] = encoding.tie_index;
    if (p.kept != nullptr) p.kept[index] = task.w;
  }
}

template <typename T>
cudaError_t launch(const ScoreRows& p, cudaStream_t stream) {
  if (p.n <= kShortRow) {
    return launch_long<T, kShortThreads>(select_long_kernel<T, kShortThreads>, p.rows, p.n, stream, p);
  }
  return launch_long<T, kLongThreads>(select_long_kernel<T, kLongThreads>, p.rows, p.n, stream, p);
}

}  // namespace

cudaError_t select_long(const ScoreRows& rows, cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  if (rows.rows > 0x7fffffff / kMaxTeam || rows.n > 0x7ff00000) return cudaErrorInvalidValue;
  switch (rows.dtype) {
    case DType::kFloat32:
      return launch<float>(rows, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(rows, stream);
    case DType::kFloat16:
      return launch<__half>(rows, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace topk_attn::cuda
