// Selection of a slab's rows: encodings, and the kept columns that compete as ascending lists.
//
// The row selection of common/select_long.h on the columns between sinks and recent keys, behind the padding.
// After pick() only the rows of flagged KV heads are left to do here. With select="kv_group" the largest
// scores of the groups are written out first.
#include "../common/select_long_row.cuh"
#include "cache.cuh"
#include "launch.cuh"

namespace topk_attn::cuda::decode {
namespace {

// NaN if either is NaN.
__device__ __forceinline__ float larger(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

__device__ inline Span seen_by_row(const DecodeCall& c, const Slab& slab, const Scratch& scratch,
                                   const SelectedRow& row) {
  const State state = state_of(c, scratch, slab.first_sequence + row.slab_sequence);
  return seen_by(c, state, slab.first_token + row.token);
}

// Of the row's first head.
__device__ inline int64_t slab_row(const DecodeCall& c, const Slab& slab, const SelectedRow& row) {
  return (int64_t{row.slab_sequence} * c.heads + row.first_head) * slab.tokens + row.token;
}

constexpr int kGroupThreads = 256;

__global__ __launch_bounds__(kGroupThreads) void group_maximum_kernel(
    const __grid_constant__ DecodeCall c, const __grid_constant__ Slab slab,
    const __grid_constant__ Scratch scratch) {
  const SelectedRow row = selected_row(c, slab, blockIdx.x);
  const Span span = seen_by_row(c, slab, scratch, row);
  const float* const scores = scratch.scores + slab_row(c, slab, row) * scratch.ld;
  float* const best = scratch.group_scores + blockIdx.x * scratch.ld;
  const int64_t stride = slab.tokens * scratch.ld;
  for (int64_t j = span.begin + blockIdx.y * kGroupThreads + threadIdx.x; j < span.end;
       j += gridDim.y * kGroupThreads) {
    float most = scores[j];
#pragma unroll 4
    for (int h = 1; h < row.heads; ++h) most = larger(most, scores[h * stride + j]);
    best[j] = most;
  }
}

template <int kThreads>
__global__ __launch_bounds__(kThreads, kThreads == longrow::kLongThreads ? 2 : 4) void select_kernel(
    const __grid_constant__ DecodeCall c, const __grid_constant__ Slab slab,
    const __grid_constant__ Scratch scratch, const longrow::Room room) {
  extern __shared__ __align__(16) uint8_t memory[];
  let_next_start();
  if (scratch.only_flagged) {
    if (*scratch.any_flag == 0) return;
    const SelectedRow row = selected_row(c, slab, blockIdx.x / longrow::team_size());
    const int kv_head = row.first_head / (c.heads / c.kv_heads);
    if (scratch.flags[row.slab_sequence * c.kv_heads + kv_head] == 0) return;
  }
  __shared__ longrow::RowTask<float> task;  // not in registers, of which there are too few
  if (threadIdx.x == 0) {
    const int64_t index = blockIdx.x / longrow::team_size();
    const SelectedRow row = selected_row(c, slab, index);
    const RowPlan plan = plan_row(seen_by_row(c, slab, scratch, row), c.budget, c.sink, c.recent);
    task.first = static_cast<int>(plan.contested().begin);
    task.n = static_cast<int>(plan.contested().size());
    task.w = static_cast<int>(plan.contested_kept());
    task.scores = (c.kv_group ? scratch.group_scores + index * scratch.ld
                              : scratch.scores + slab_row(c, slab, row) * scratch.ld) +
                  task.first;
    task.columns = nullptr;
    task.list = scratch.lists + index * c.kept_width;
    task.width = task.w;
  }
  __syncthreads();
  const longrow::Encoding encoding = longrow::select_long_row<kThreads>(task, room, memory);
  if (longrow::team_rank() != 0) return;
  const SelectedRow row = selected_row(c, slab, blockIdx.x / longrow::team_size());
  const int64_t out = (slab.first_sequence + row.slab_sequence) * c.rows.batch +
                      row.first_head * c.rows.head + slab.first_token + row.token;
  for (int h = threadIdx.x; h < row.heads; h += kThreads) {
    c.threshold[out + h * c.rows.head] = encoding.threshold;
    c.tie_index[out + h * c.rows.head] = encoding.tie_index;
  }
}

}  // namespace

cudaError_t select(const DecodeCall& c, const Slab& slab, const Scratch& scratch, cudaStream_t stream) {
  const int64_t rows = selected_rows(c, slab);
  if (rows > 0x7fffffff / longrow::kMaxTeam) return cudaErrorInvalidValue;
  if (c.kv_group) {
    const int64_t blocks = (int64_t{c.capacity} + 4 * kGroupThreads - 1) / (4 * kGroupThreads);
    const int64_t most = 4096 / rows + 1;
    const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(blocks < most ? blocks : most));
    group_maximum_kernel<<<grid, kGroupThreads, 0, stream>>>(c, slab, scratch);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if (c.capacity <= longrow::kShortRow) {
    constexpr int kThreads = longrow::kShortThreads;
    return longrow::launch_long<float, kThreads>(select_kernel<kThreads>, rows, c.capacity, stream, c, slab,
                                                 scratch);
  }
  constexpr int kThreads = longrow::kLongThreads;
  return longrow::launch_long<float, kThreads>(select_kernel<kThreads>, rows, c.capacity, stream, c, slab,
                                               scratch);
}

}  // namespace topk_attn::cuda::decode
