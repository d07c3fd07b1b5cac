// Selection from the scores that reached their row's bound.
//
// One block a row: find_rank() on its candidates, at most kMaxCandidates of them, in shared memory gives the
// row's encoding. It is the row's own if it reaches the bound: then every key before it in the order does, so
// all of them are candidates. Where it does not, or the candidates are fewer than W or did not fit, the KV
// head is flagged: it is scanned again without a bound (select.cu). The kept ones are put in the order of
// their columns by a bitmap. Cost: 8 bytes a candidate, and 8 a kept key.
#include "cache.cuh"
#include "launch.cuh"
#include "rank.cuh"

namespace topk_attn::cuda::decode {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kWindow = 1 << 17;  // columns that the bitmap holds at a time
constexpr int kWords = kWindow / 32;

struct Shared {
  longrow::Workspace ws;
  ScoredKey candidates[kMaxCandidates];
  uint32_t bitmap[kWords];
  uint16_t before[kWords];  // set bits of the words before it
};

struct Row {
  int64_t slab_row;
  int64_t out_row;
  int head;  // KV head of the slab: index in flags
  int begin, end, kept;
};

__device__ inline Row row_at(const DecodeCall& c, const Slab& slab, const Scratch& scratch, int64_t index) {
  const SelectedRow selected = selected_row(c, slab, index);
  const int sequence = slab.first_sequence + selected.slab_sequence;
  const int token = slab.first_token + selected.token;
  const RowPlan plan =
      plan_row(seen_by(c, state_of(c, scratch, sequence), token), c.budget, c.sink, c.recent);
  Row row;
  row.slab_row = index;
  row.out_row = sequence * c.rows.batch + selected.first_head * c.rows.head + token;
  row.head = selected.slab_sequence * c.kv_heads + selected.first_head / (c.heads / c.kv_heads);
  row.begin = static_cast<int>(plan.contested().begin);
  row.end = static_cast<int>(plan.contested().end);
  row.kept = static_cast<int>(plan.contested_kept());
  return row;
}

// Writes the candidates that `result` admits in ascending order of their columns.
__device__ void write_kept(Shared& shared, const Row& row, const longrow::Result& result, int count,
                           int32_t* list, float* scores) {
  constexpr int kMine = kWords / kThreads;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int done = 0;  // kept keys of the windows before
  for (int origin = row.begin / 32 * 32; origin < row.end; origin += kWindow) {
    const auto kept_here = [&](const ScoredKey& x) {
      const bool kept =
          x.key > result.threshold || (x.key == result.threshold && x.column <= result.tie_index);
      return kept && x.column >= origin && x.column - origin < kWindow;
    };
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const ScoredKey x = shared.candidates[i];
      const int at = x.column - origin;
      if (kept_here(x)) atomicOr(&shared.bitmap[at / 32], 1u << (at % 32));
    }
    __syncthreads();
    uint32_t words[kMine];
    int own = 0;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      words[i] = shared.bitmap[threadIdx.x * kMine + i];
      own += __popc(words[i]);
    }
    const int through = longrow::warp_scan(own);
    if (lane == 31) shared.ws.totals[warp] = through;
    __syncthreads();
    int before = through - own;
    int all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? shared.ws.totals[w] : 0;
      all += shared.ws.totals[w];
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      shared.before[threadIdx.x * kMine + i] = static_cast<uint16_t>(before);
      before += __popc(words[i]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const ScoredKey x = shared.candidates[i];
      if (!kept_here(x)) continue;
      const int at = x.column - origin;
      const int place =
          done + shared.before[at / 32] + __popc(shared.bitmap[at / 32] & ((1u << (at % 32)) - 1));
      list[place] = x.column;
      scores[place] = order_score(x.key);
    }
    done += all;
    if (origin + kWindow >= row.end) break;
    __syncthreads();
    for (int i = threadIdx.x; i < kWords; i += kThreads) shared.bitmap[i] = 0;
    __syncthreads();
  }
}

__global__ __launch_bounds__(kThreads, 2) void pick_kernel(const __grid_constant__ DecodeCall c,
                                                           const __grid_constant__ Slab slab,
                                                           const __grid_constant__ Scratch scratch) {
  extern __shared__ __align__(16) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  __shared__ Row row;
  __shared__ int contested;
  let_next_start();
  for (int i = threadIdx.x; i < 2 * longrow::kBins; i += kThreads) shared.ws.bins[0][i] = 0;
  for (int i = threadIdx.x; i < kWords; i += kThreads) shared.bitmap[i] = 0;
  wait_for_previous();
  if (threadIdx.x == 0) {
    row = row_at(c, slab, scratch, blockIdx.x);
    contested = 0;
  }
  const int listed = scratch.counts[blockIdx.x];
  __syncthreads();
  if (row.kept == 0) {
    if (threadIdx.x == 0) {
      c.threshold[row.out_row] = __int_as_float(0x7fc00000);
      c.tie_index[row.out_row] = -1;
    }
    return;
  }
  const auto flag = [&] {
    if (threadIdx.x == 0) {
      scratch.flags[row.head] = 1;
      *scratch.any_flag = 1;
    }
  };
  if (listed > kMaxCandidates || listed < row.kept) return flag();

  const ScoredKey* const from = scratch.candidates + row.slab_row * kMaxCandidates;
  int low = INT_MAX;
  int high = INT_MIN;
  if (slab.tokens == 1) {  // all of them compete
#pragma unroll 4
    for (int i = threadIdx.x; i < listed; i += kThreads) {
      const ScoredKey x = from[i];
      shared.candidates[i] = x;
      low = min(low, x.key);
      high = max(high, x.key);
    }
    if (threadIdx.x == 0) contested = listed;
  } else {
    // Rows of other tokens see other keys, and have other recent keys.
    for (int i = threadIdx.x; i < (listed + 31) / 32 * 32; i += kThreads) {
      const ScoredKey x = i < listed ? from[i] : ScoredKey{0, -1};
      const bool competes = x.column >= row.begin && x.column < row.end;
      const uint32_t ballot = __ballot_sync(~0u, competes);
      int base = 0;
      if (threadIdx.x % 32 == 0) base = atomicAdd(&contested, __popc(ballot));
      base = __shfl_sync(~0u, base, 0);
      if (!competes) continue;
      shared.candidates[base + __popc(ballot & ((1u << threadIdx.x % 32) - 1))] = x;
      low = min(low, x.key);
      high = max(high, x.key);
    }
  }
  __syncthreads();
  const int count = contested;
  if (count < row.kept) return flag();
  const longrow::Result result = find_rank<kThreads>(
      shared.ws, [&](int i) { return shared.candidates[i]; }, count, row.kept, low, high);
  const float threshold = order_score(result.threshold);
  if (threshold < scratch.bounds[row.slab_row]) return flag();
  if (threadIdx.x == 0) {
    c.threshold[row.out_row] = threshold;
    c.tie_index[row.out_row] = result.tie_index;
  }
  const int64_t list = row.slab_row * c.kept_width;
  write_kept(shared, row, result, count, scratch.lists + list, scratch.kept_scores + list);
}

}  // namespace

cudaError_t pick(const DecodeCall& c, const Slab& slab, const Scratch& scratch, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(pick_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  const LaunchShape shape{static_cast<unsigned>(selected_rows(c, slab)), kThreads, sizeof(Shared)};
  return launch(pick_kernel, shape, true, stream, c, slab, scratch);
}

}  // namespace topk_attn::cuda::decode
