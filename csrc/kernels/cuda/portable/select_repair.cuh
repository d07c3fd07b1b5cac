// Exact selection of the rows that the sweep could not settle, up to 16 at a time and block: all of their
// scores into scratch memory, then the radix select that the slab selection uses. Returns at once where there
// is nothing to do; right, if slow, when every row needs it.
#pragma once

#include "../common/select_row.cuh"
#include "select_params.cuh"

namespace topk_attn::cuda::portable {

inline constexpr int kRepairRows = 16;
inline constexpr int kRepairCapacity = select::kMinCapacity;

struct ScratchRow {
  const float* row;
  __device__ float4 vector(int i) const { return *reinterpret_cast<const float4*>(row + i); }
};

template <typename T, int D>
__global__ void __launch_bounds__(select::kThreads, 2) repair_kernel(const __grid_constant__ SelectParams p) {
  __shared__ select::Workspace workspace;
  __shared__ select::Candidate candidates[kRepairCapacity];
  __shared__ int rows[kWarpRows];
  const Call& c = p.call;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int pair = lane % 4 * 2;
  float* const scratch = p.scores + int64_t{static_cast<int>(blockIdx.x)} * kRepairRows * p.score_stride;
  const int repairs = p.counters->repairs;
  for (int index = blockIdx.x; index < repairs; index += gridDim.x) {
    const int64_t item = p.repair_list[index];
    const uint32_t unsettled = p.unsettled[item];
    const int64_t entry = item / 2;
    const int head = static_cast<int>(entry / c.num_tiles);
    const int kv_head = head / p.group;
    const Tile t = tile_at(c, static_cast<int>(entry % c.num_tiles));
    const int count = __popc(unsettled);
    __syncthreads();
    if (threadIdx.x < kWarpRows && (unsettled >> threadIdx.x & 1u) != 0) {
      rows[__popc(unsettled & ((1u << threadIdx.x) - 1))] =
          static_cast<int>(item % 2) * kWarpRows + static_cast<int>(threadIdx.x);
    }
    __syncthreads();
    for (int first = 0; first < count; first += kRepairRows) {
      // 1. The scores of rows[first ..], eight keys a warp and step.
      const int batch = min(kRepairRows, count - first);
      uint32_t a[D / 16][4];
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const bool exists = g + 8 * upper < batch;
        const T* source = row_pointer<const T>(
            c.q, t.batch, int64_t{t.q_begin} + t.row0 + rows[first + (exists ? g + 8 * upper : 0)], head);
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          const int channel = 8 * i + pair;
          a[i / 2][upper + 2 * (i % 2)] =
              exists && channel < c.head_dim ? __ldg(reinterpret_cast<const uint32_t*>(source + channel)) : 0;
        }
      }
      const int end = seen_end(c, t);
      for (int key = warp * 8; key < end; key += select::kWarps * 8) {
        const T* source =
            row_pointer<const T>(c.k, t.batch, int64_t{t.k_begin} + min(key + g, t.tk - 1), kv_head);
        float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
          uint32_t b[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int channel = 16 * step + 8 * half + pair;
            b[half] = channel < c.head_dim ? __ldg(reinterpret_cast<const uint32_t*>(source + channel)) : 0;
          }
          mma_16816<T>(s, a[step], b[0], b[1]);
        }
        float* const to = scratch + g * p.score_stride + key + pair;
        *reinterpret_cast<float2*>(to) = make_float2(s[0], s[1]);
        *reinterpret_cast<float2*>(to + 8 * p.score_stride) = make_float2(s[2], s[3]);
      }
      __syncthreads();
      // 2. One after the other.
      for (int i = 0; i < batch; ++i) {
        const int row = t.row0 + rows[first + i];
        const RowPlan plan = row_plan(c, t, row);
        const ScratchRow source{scratch + i * p.score_stride};
        const int n = static_cast<int>(plan.seen.end);
        const select::Result result = select::select_row(source, 0, n, static_cast<int>(plan.kept),
                                                         candidates, kRepairCapacity, workspace);
        if (threadIdx.x == 0) {
          const int64_t at = row_index(c, t, head, row);
          p.out.threshold[at] = result.threshold;
          p.out.tie_index[at] = result.tie_index;
        }
        if (p.out.bitmap != nullptr) {
          select::set_kept(source, 0, n, result, candidates, p.out.bitmap + entry * bitmap_words(c));
        }
        __syncthreads();
      }
    }
  }
}

}  // namespace topk_attn::cuda::portable
