// Attention over the kept keys: softmax of their scores and the weighted sum of their rows of V.
//
// A row's kept keys are shared by up to `splits` blocks. A block takes its part 256 keys at a time: scores
// and places first (one thread a key), then the rows of V, 16 bytes a lane. The block that finishes last adds
// up the parts in ascending order, so the result does not depend on which one that is. Cost: the kept rows of
// V.
#include "../common/mma.cuh"
#include "cache.cuh"
#include "launch.cuh"
#include "values.cuh"

namespace topk_attn::cuda::decode {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 256;       // kept keys at a time
constexpr int kLeastShare = 32;  // kept keys that are worth a block

template <typename T>
struct Packed {
  static constexpr int kCount = 16 / sizeof(T);
};

// Sum or maximum over the block, the same on all threads. `buffer` has room for a float a warp.
__device__ __forceinline__ float block_maximum(float x, float* buffer) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) x = fmaxf(x, buffer[w]);
  return x;
}
__device__ __forceinline__ float block_sum(float x, float* buffer) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) x += buffer[w];
  return x;
}

// What a block needs to know of its row; worked out by one thread.
struct Row {
  const float* scores;
  const int32_t* list;
  const float* listed;  // scores of the list's keys; null: they are in `scores`
  int64_t out_row;      // in call.rows
  int sequence, head, token;
  int begin;    // first visible key
  int end;      // behind the last one
  int sinks;    // kept keys 0 .. sinks - 1 are begin, begin + 1, ...
  int recents;  // the last `recents` ones are the last visible keys
  int kept;
  int64_t v_head;  // offset of the row's KV head in V
};

__device__ inline Row row_at(const DecodeCall& c, const Slab& slab, const Scratch& scratch, int64_t index) {
  Row row;
  const int64_t rest = index / slab.tokens;
  const int slab_token = static_cast<int>(index % slab.tokens);
  const int slab_sequence = static_cast<int>(rest / c.heads);
  row.head = static_cast<int>(rest % c.heads);
  row.sequence = slab.first_sequence + slab_sequence;
  row.token = slab.first_token + slab_token;
  const State state = state_of(c, scratch, row.sequence);
  const RowPlan plan = plan_row(seen_by(c, state, row.token), c.budget, c.sink, c.recent);
  row.begin = static_cast<int>(plan.seen.begin);
  row.end = static_cast<int>(plan.seen.end);
  row.sinks = static_cast<int>(plan.sinks);
  row.recents = static_cast<int>(plan.recents);
  row.kept = static_cast<int>(plan.kept);
  row.scores = scratch.scores + index * scratch.ld;
  const int kv_head = row.head / (c.heads / c.kv_heads);
  const int64_t selected =
      c.kv_group ? (int64_t{slab_sequence} * c.kv_heads + kv_head) * slab.tokens + slab_token : index;
  row.list = scratch.lists + selected * c.kept_width;
  const bool picked = scratch.picked && scratch.flags[slab_sequence * c.kv_heads + kv_head] == 0;
  row.listed = picked ? scratch.kept_scores + index * c.kept_width : nullptr;
  row.out_row = row.sequence * c.rows.batch + row.head * c.rows.head + row.token;
  row.v_head = kv_head * c.v.head;
  return row;
}

// The i-th kept key, ascending.
__device__ inline int kept_key(const Row& row, int i) {
  if (i < row.sinks) return row.begin + i;
  if (i >= row.kept - row.recents) return row.end - (row.kept - i);
  return row.list[i - row.sinks];
}

// Its score.
__device__ inline float kept_score(const Row& row, int i, int key) {
  const bool listed = row.listed != nullptr && i >= row.sinks && i < row.kept - row.recents;
  return listed ? row.listed[i - row.sinks] : row.scores[key];
}

template <typename T, int D>
__global__ __launch_bounds__(kThreads) void attend_kernel(const __grid_constant__ DecodeCall c,
                                                          const __grid_constant__ Slab slab,
                                                          const __grid_constant__ Scratch scratch) {
  constexpr int kPack = Packed<T>::kCount;
  constexpr int kLanes = D / kPack > 32 ? 32 : D / kPack;  // of a row of V
  constexpr int kPacks = D / kPack / kLanes;               // a lane
  constexpr int kRowsAtOnce = kThreads / kLanes;
  constexpr int kUnroll = 8 / kPacks;
  __shared__ Row row;
  __shared__ float weights[kTile];
  __shared__ int64_t places[kTile];
  __shared__ float buffer[kThreads / 32];
  __shared__ float sums[kRowsAtOnce][D];
  __shared__ bool is_last;

  wait_for_previous();
  const int64_t index = blockIdx.x / scratch.splits;
  const int split = static_cast<int>(blockIdx.x % scratch.splits);
  if (threadIdx.x == 0) row = row_at(c, slab, scratch, index);
  __syncthreads();
  const int kept = row.kept;
  int share = (kept + scratch.splits - 1) / scratch.splits;
  share = share < kLeastShare ? kLeastShare : share;
  const int used = kept == 0 ? 1 : (kept + share - 1) / share;
  const int first = split * share;
  const int last = min(kept, first + share);

  if (c.indices != nullptr) {
    int32_t* const indices = c.indices + row.out_row * c.kept_width;
    int32_t* const slots = c.slots + row.out_row * c.kept_width;
    for (int i = first + static_cast<int>(threadIdx.x); i < last; i += kThreads) {
      const int j = kept_key(row, i);
      indices[i] = j;
      slots[i] = slot_of(c, row.sequence, j);
    }
    for (int64_t i = int64_t{kept} + split * kThreads + threadIdx.x; i < c.kept_width;
         i += int64_t{scratch.splits} * kThreads) {
      indices[i] = -1;
      slots[i] = -1;
    }
  }
  if (split >= used) return;

  const float infinity = __int_as_float(0x7f800000);
  const float scale = c.softmax_scale * 1.4426950408889634f;
  const T* const values = static_cast<const T*>(c.v.data) + row.v_head;
  const int lane = threadIdx.x % kLanes;
  const int group = threadIdx.x / kLanes;
  float top = -infinity;
  float mass = 0.0f;  // this thread's
  float sum[kPacks][kPack] = {};
#pragma unroll 1
  for (int base = first; base < last; base += kTile) {
    const int count = min(kTile, last - base);
    __syncthreads();  // weights and places are no longer read
    float own[kTile / kThreads];
    float most = top;
#pragma unroll
    for (int u = 0; u < kTile / kThreads; ++u) {
      const int i = static_cast<int>(threadIdx.x) + u * kThreads;
      own[u] = -infinity;
      if (i < count) {
        const int j = kept_key(row, base + i);
        own[u] = kept_score(row, base + i, j);
        places[i] = row_offset(c, c.v, row.sequence, j);
        most = fmaxf(most, own[u]);
      }
    }
    most = block_maximum(most, buffer);
    // While all scores are -inf or NaN nothing has a weight but NaN.
    const float shift = most == -infinity ? 0.0f : most;
    const float rescale = top == -infinity ? 1.0f : exp2_fast((top - shift) * scale);
    mass *= rescale;
#pragma unroll
    for (int u = 0; u < kTile / kThreads; ++u) {
      const int i = static_cast<int>(threadIdx.x) + u * kThreads;
      const float weight = exp2_fast((own[u] - shift) * scale);
      if (i < count) {
        weights[i] = weight;
        mass += weight;
      }
    }
    top = most;
    __syncthreads();
    if (base > first) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) sum[p][e] *= rescale;
      }
    }
#pragma unroll 1
    for (int i = group; i < count; i += kRowsAtOnce * kUnroll) {
      uint4 v[kUnroll][kPacks];
      float weight[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = i + u * kRowsAtOnce;
        weight[u] = at < count ? weights[at] : 0.0f;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          const int channel = (p * kLanes + lane) * kPack;
          v[u][p] = make_uint4(0, 0, 0, 0);
          if (at < count && channel < c.v_dim) {
            v[u][p] = __ldg(reinterpret_cast<const uint4*>(values + places[at] + channel));
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) add_weighted<T>(sum[p], v[u][p], weight[u]);
      }
    }
  }
  mass = block_sum(mass, buffer);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) sums[group][(p * kLanes + lane) * kPack + e] = sum[p][e];
  }
  __syncthreads();

  T* const out = static_cast<T*>(c.out.data) + row.sequence * c.out.batch + row.token * c.out.token +
                 row.head * c.out.head;
  const auto finish = [&](int channel, float total, float all) {
    store(out + channel, all == 0.0f ? 0.0f : total / all);
  };
  const auto finish_lse = [&](float most, float all) {
    c.lse[row.out_row] = all == 0.0f ? -infinity : most * c.softmax_scale + logf(all);
  };
  if (used == 1) {
    for (int channel = threadIdx.x; channel < c.v_dim; channel += kThreads) {
      float total = 0.0f;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) total += sums[r][channel];
      finish(channel, total, mass);
    }
    if (threadIdx.x == 0) finish_lse(top, mass);
    return;
  }

  // v_dim sums, then the mass and the largest score.
  const int64_t width = c.v_dim + 2;
  float* const parts = scratch.partial + index * scratch.splits * width;
  float* const mine = parts + split * width;
  for (int channel = threadIdx.x; channel < c.v_dim; channel += kThreads) {
    float total = 0.0f;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) total += sums[r][channel];
    mine[channel] = total;
  }
  if (threadIdx.x == 0) {
    mine[c.v_dim] = mass;
    mine[c.v_dim + 1] = top;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(scratch.arrived + index, 1) == used - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  float most = -infinity;
  for (int s = 0; s < used; ++s) most = fmaxf(most, __ldcg(parts + s * width + c.v_dim + 1));
  const float shift = most == -infinity ? 0.0f : most;
  float all = 0.0f;
  for (int s = 0; s < used; ++s) {
    const float part_top = __ldcg(parts + s * width + c.v_dim + 1);
    const float factor = part_top == -infinity ? 1.0f : exp2_fast((part_top - shift) * scale);
    all += factor * __ldcg(parts + s * width + c.v_dim);
  }
  for (int channel = threadIdx.x; channel < c.v_dim; channel += kThreads) {
    float total = 0.0f;
    for (int s = 0; s < used; ++s) {
      const float part_top = __ldcg(parts + s * width + c.v_dim + 1);
      const float factor = part_top == -infinity ? 1.0f : exp2_fast((part_top - shift) * scale);
      total += factor * __ldcg(parts + s * width + channel);
    }
    finish(channel, total, all);
  }
  if (threadIdx.x == 0) finish_lse(most, all);
}

template <typename T>
cudaError_t run_attend(const DecodeCall& c, const Slab& slab, const Scratch& scratch, cudaStream_t stream) {
  const int64_t blocks = int64_t{slab.sequences} * c.heads * slab.tokens * scratch.splits;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const auto kernel = c.v_dim <= 64    ? attend_kernel<T, 64>
                      : c.v_dim <= 128 ? attend_kernel<T, 128>
                                       : attend_kernel<T, 256>;
  const LaunchShape shape{static_cast<unsigned>(blocks), kThreads};
  return decode::launch(kernel, shape, true, stream, c, slab, scratch);
}

}  // namespace

cudaError_t attend(const DecodeCall& c, const Slab& slab, const Scratch& scratch, cudaStream_t stream) {
  switch (c.dtype) {
    case DType::kFloat32:
      return run_attend<float>(c, slab, scratch, stream);
    case DType::kBFloat16:
      return run_attend<__nv_bfloat16>(c, slab, scratch, stream);
    case DType::kFloat16:
      return run_attend<__half>(c, slab, scratch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace topk_attn::cuda::decode
