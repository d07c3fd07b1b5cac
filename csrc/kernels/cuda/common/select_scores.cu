// select_scores.h: kernels, one block a row. The steps of a row are in select_row.cuh.
#include "select_scores.h"

#include "select_long.h"
#include "select_row.cuh"
#include "sequence.cuh"

namespace topk_attn::cuda {
namespace {

using select::kThreads;

// ---------------------------------------------------------------------------------------------------------------
// Where scores come from: vector(i) gives those of columns i .. i + 3 (i a multiple of 4); columns outside
// the span that is asked for may hold anything.
// ---------------------------------------------------------------------------------------------------------------

struct SlabRow {
  const float* row;
  __device__ float4 vector(int i) const { return *reinterpret_cast<const float4*>(row + i); }
};

// NaN if either is NaN.
__device__ __forceinline__ float larger(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// The largest score over the heads of a group, whose rows lie `stride` apart.
struct GroupRow {
  const float* row;
  int64_t stride;
  int heads;
  __device__ float4 vector(int i) const {
    float4 best = *reinterpret_cast<const float4*>(row + i);
#pragma unroll 1
    for (int h = 1; h < heads; ++h) {
      const float4 s = *reinterpret_cast<const float4*>(row + h * stride + i);
      best = make_float4(larger(best.x, s.x), larger(best.y, s.y), larger(best.z, s.z), larger(best.w, s.w));
    }
    return best;
  }
};

// ---------------------------------------------------------------------------------------------------------------
// Rows of a slab
// ---------------------------------------------------------------------------------------------------------------

// Where a block's row lies. Worked out by one thread and kept in shared memory: registers are what limits the
// blocks of an SM.
struct Place {
  const float* scores;
  int64_t row;  // of the unit's head, in call.rows
  int head;
  int tile;
  int begin;  // keys [0, begin) and [end, seen) are always kept
  int end;
  int seen;
  int wanted;  // keys of [begin, end) to keep; -1: no such row
};

__device__ Place place_at(const Call& call, const ScoreSlab& slab, int64_t first, int r) {
  Place place{};
  place.wanted = -1;
  const Unit unit = unit_at(call, slab.first_unit + first);
  const Tile tile = tile_at(call, unit.tile);
  if (r >= tile.rows) return place;
  const RowPlan plan = row_plan(call, tile, tile.row0 + r);
  place.scores = slab.scores + (first * kTileRows + r) * slab.ld;
  place.row = row_index(call, tile, unit.head, tile.row0 + r);
  place.head = unit.head;
  place.tile = unit.tile;
  place.begin = static_cast<int>(plan.contested().begin);
  place.end = static_cast<int>(plan.contested().end);
  place.seen = static_cast<int>(plan.seen.end);
  place.wanted = static_cast<int>(plan.contested_kept());
  return place;
}

template <bool kGroup>
__global__ __launch_bounds__(kThreads, kGroup ? 2 : 5) void select_rows_kernel(const Call call,
                                                                               const ScoreSlab slab,
                                                                               const Selection selection,
                                                                               const int64_t words,
                                                                               const int capacity) {
  extern __shared__ select::Candidate candidates[];
  __shared__ select::Workspace workspace;
  __shared__ Place place;
  const int heads = kGroup ? call.heads / call.kv_heads : 1;
  if (threadIdx.x == 0) {
    place = place_at(call, slab, int64_t{blockIdx.x / kTileRows} * heads,
                     static_cast<int>(blockIdx.x % kTileRows));
  }
  __syncthreads();
  if (place.wanted < 0) return;

  const auto select = [&](const auto& source) {
    const select::Result result =
        select::select_row(source, place.begin, place.end, place.wanted, candidates, capacity, workspace);
    const int begin = place.begin;
    const int end = place.end;
    for (int h = 0; h < heads; ++h) {
      const int64_t row = place.row + h * call.rows.head;
      if (threadIdx.x == 0) {
        selection.threshold[row] = result.threshold;
        selection.tie_index[row] = result.tie_index;
      }
      if (selection.bitmap != nullptr) {
        const int64_t entry = int64_t{place.head + h} * call.num_tiles + place.tile;
        uint32_t* const bitmap = selection.bitmap + entry * words;
        select::set_range(bitmap, 0, begin);
        select::set_range(bitmap, end, place.seen);
        select::set_kept(source, begin, end, result, candidates, bitmap);
      }
      if (selection.indices != nullptr) {
        const auto keeps = [&](float score, int j) {
          return j < begin || j >= end || admitted(score, int64_t{j}, result.threshold, result.tie_index);
        };
        select::write_indices(source, 0, place.seen, keeps, selection.indices + row * selection.index_width,
                              selection.index_width, workspace);
      }
    }
  };
  if constexpr (kGroup) {
    select(GroupRow{place.scores, kTileRows * slab.ld, heads});
  } else {
    select(SlabRow{place.scores});
  }
}

// Room for the candidates of a row of n scores of which w are kept: one and a half times what the bound aims
// at.
int capacity_for(int64_t n, int64_t w) {
  const int64_t vectors = select::sample_vectors(n / 4);
  const float share = select::sample_rank(w, n, 4 * vectors) / (4.0f * static_cast<float>(vectors));
  const float aim = share * static_cast<float>(n);
  // Too many: the radix select reads the row itself.
  if (aim > select::kFill * select::kMaxCapacity) return select::kMinCapacity;
  const int room = (static_cast<int>(1.5f * aim) + 255) / 256 * 256;
  return room < select::kMinCapacity   ? select::kMinCapacity
         : room > select::kMaxCapacity ? select::kMaxCapacity
                                       : room;
}

}  // namespace

cudaError_t select_rows(const Call& call, const ScoreSlab& slab, const Selection& selection,
                        cudaStream_t stream) {
  const int64_t left = num_units(call) - slab.first_unit;
  const int64_t units = slab.units < left ? slab.units : left;
  if (units <= 0) return cudaSuccess;
  const int heads = call.kv_group ? call.heads / call.kv_heads : 1;
  const int64_t blocks = units / heads * kTileRows;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const int capacity = capacity_for(call.max_k, budget(call.max_k, call.budget));
  const auto kernel = call.kv_group ? select_rows_kernel<true> : select_rows_kernel<false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, capacity * sizeof(select::Candidate), stream>>>(
      call, slab, selection, bitmap_words(call), capacity);
  return cudaGetLastError();
}

cudaError_t select_scores(const SelectScoresParams& params, cudaStream_t stream) {
  ScoreRows rows;
  rows.dtype = params.dtype;
  rows.scores = params.scores;
  rows.row_stride = params.row_stride;
  rows.rows = params.rows;
  rows.n = params.n;
  rows.lengths = params.lengths;
  rows.budget.topk = params.topk;
  rows.threshold = params.threshold;
  rows.tie_index = params.tie_index;
  rows.indices = params.indices;
  rows.index_width = params.topk;
  return select_long(rows, stream);
}

}  // namespace topk_attn::cuda
