// Bounds that a few more than W keys of each row very likely reach, from a sample of the keys; bf16 and fp16.
//
// One block a KV head of a sequence: it scores 256 to 1024 keys, one at an irregular place of each of as many
// equal stretches, and takes the rank that W keys of n have in the sample, and four standard deviations
// beyond, as each row's bound. That enough keys reach it, and not too many, is checked later (pick.cu). Rows
// of at most kMaxCandidates keys need no bound: all are candidates.
#pragma once

#include "scan.cuh"

namespace topk_attn::cuda::decode {

template <int D>
struct SampleConfig {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16;
  static constexpr int kStageBytes = kKeys * D * 2;
  static constexpr int kStages = 96 * 1024 / (kWarps * kStageBytes);
  static constexpr int kSharedBytes = kWarps * kStages * kStageBytes;
  static constexpr int kMost = 1024;  // keys of the sample
};

// The rank in a sample of `size` keys whose key `kept` of n keys will very likely reach.
__device__ inline float bound_rank(int64_t kept, int64_t n, int size) {
  const float expected = static_cast<float>(kept) * static_cast<float>(size) / static_cast<float>(n);
  return expected + 4.0f * sqrtf(expected) + 4.0f;
}

// Place of sample i of `size` among n keys.
__device__ inline int sample_place(int i, int size, int n) {
  const uint32_t begin = static_cast<uint32_t>(static_cast<uint64_t>(n) * i / size);
  const uint32_t end = static_cast<uint32_t>(static_cast<uint64_t>(n) * (i + 1) / size);
  uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b9u + 0x7f4a7c15u;
  x = (x ^ (x >> 15)) * 0x2c1b3c6du;
  x = (x ^ (x >> 12)) * 0x297a2d39u;
  return static_cast<int>(begin + __umulhi(x ^ (x >> 15), end - begin));
}

// The score whose rank among the warp's `size` scores at `scores` is `rank`, or one a little lower.
template <int MOST>
__device__ inline float score_of_rank(const float* scores, int size, int rank) {
  uint32_t keys[MOST / 32];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < MOST / 32; ++i) {
    const int at = 32 * i + lane;
    keys[i] = at < size ? static_cast<uint32_t>(order_key(__ldcg(scores + at))) ^ 0x80000000u : 0;
  }
  uint32_t found = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 8; --bit) {
    const uint32_t next = found | 1u << bit;
    int count = 0;
#pragma unroll
    for (int i = 0; i < MOST / 32; ++i) count += keys[i] >= next ? 1 : 0;
    if (__reduce_add_sync(~0u, count) >= rank) found = next;
  }
  return order_score(static_cast<int32_t>(found ^ 0x80000000u));
}

template <typename T, int D>
__global__ __launch_bounds__(SampleConfig<D>::kThreads) void sample_kernel(
    const __grid_constant__ DecodeCall c, const __grid_constant__ Slab slab,
    const __grid_constant__ Scratch scratch) {
  using Config = SampleConfig<D>;
  extern __shared__ __align__(1024) char ring[];
  const int slab_sequence = static_cast<int>(blockIdx.x) / c.kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) % c.kv_heads;
  const int sequence = slab.first_sequence + slab_sequence;
  const int rows = c.heads / c.kv_heads * slab.tokens;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t first = first_row(c, slab, slab_sequence, kv_head);
  if (threadIdx.x == 0) {
    scratch.flags[blockIdx.x] = 0;
    if (blockIdx.x == 0) *scratch.any_flag = 0;
  }
  const State state = state_of(c, scratch, sequence);
  const Span span = seen_by_slab(c, slab, state);
  const int n = static_cast<int>(span.size());
  if (n <= kMaxCandidates) {
    if (threadIdx.x < rows) scratch.bounds[first + threadIdx.x] = __int_as_float(0xff800000);
    return;
  }
  // As few as make less candidates than half of the room.
  const int64_t most_kept = plan_row(span, c.budget, c.sink, c.recent).contested_kept();
  int size = 256;
  while (size < Config::kMost && bound_rank(most_kept, n, size) * static_cast<float>(n) >
                                     0.5f * kMaxCandidates * static_cast<float>(size)) {
    size *= 2;
  }

  uint32_t a[D / 16][4];
  load_queries<T, D>(a, c, slab, slab_sequence, kv_head, rows);
  constexpr int kChunks = D / 8;
  constexpr int kRowsAtOnce = kChunks >= 32 ? 1 : 32 / kChunks;
  const int chunk = lane % kChunks;
  const bool channel_exists = chunk * 8 < c.head_dim;
  const T* const base = static_cast<const T*>(c.k.data) + kv_head * c.k.head + chunk * 8;
  const uint32_t mine = shared_address(ring) + warp * (Config::kStages * Config::kStageBytes);
  const int parts = size / (Config::kKeys * Config::kWarps);  // of this warp
  const auto load = [&](int part) {
    if (part < parts) {
      const int i = (part * Config::kWarps + warp) * Config::kKeys + lane % Config::kKeys;
      const int j = static_cast<int>(span.begin) + sample_place(i, size, n);
      const int64_t own = row_offset(c, c.k, sequence, j);
      const uint32_t stage = mine + part % Config::kStages * Config::kStageBytes;
#pragma unroll
      for (int r = 0; r < Config::kKeys; r += kRowsAtOnce) {
        const int row = r + lane / kChunks;
        const int64_t offset = __shfl_sync(~0u, own, row);
        copy16(stage + row * (D * 2) + ((chunk ^ (row & 7)) << 4), channel_exists ? base + offset : base,
               channel_exists);
      }
    }
    copy_commit();
  };
#pragma unroll 1
  for (int part = 0; part < Config::kStages; ++part) load(part);
#pragma unroll 1
  for (int part = 0; part < parts; ++part) {
    copy_wait<Config::kStages - 1>();
    __syncwarp();
    const uint32_t stage = mine + part % Config::kStages * Config::kStageBytes +
                           (lane % 8 + lane / 16 * 8) * (D * 2) + (((lane / 8 % 2) ^ (lane & 7)) << 4);
    float s[2][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t b[4];
      load_matrix_x4(b, stage ^ (32 * step));
      mma_16816<T>(s[0], a[step], b[0], b[1]);
      mma_16816<T>(s[1], a[step], b[2], b[3]);
    }
    // The rows' own places in the score scratch serve as room for the sample.
    const int g = lane / 4;
    float* const out = scratch.scores + (first + g) * scratch.ld +
                       (part * Config::kWarps + warp) * Config::kKeys + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (g < rows) *reinterpret_cast<float2*>(out + 8 * m) = make_float2(s[m][0], s[m][1]);
      if (g + 8 < rows) {
        *reinterpret_cast<float2*>(out + 8 * scratch.ld + 8 * m) = make_float2(s[m][2], s[m][3]);
      }
    }
    __syncwarp();
    load(part + Config::kStages);
  }
  __syncthreads();
  for (int m = warp; m < rows; m += Config::kWarps) {
    const Span seen = seen_by(c, state, slab.first_token + m % slab.tokens);
    const RowPlan plan = plan_row(seen, c.budget, c.sink, c.recent);
    const int rank = static_cast<int>(bound_rank(plan.contested_kept(), n, size));
    const float bound =
        rank >= size ? __int_as_float(0xff800000)
                     : score_of_rank<Config::kMost>(scratch.scores + (first + m) * scratch.ld, size, rank);
    if (lane == 0) scratch.bounds[first + m] = bound;
  }
}

template <typename T, int D>
cudaError_t run_sample(const DecodeCall& call, const Slab& slab, const Scratch& scratch,
                       cudaStream_t stream) {
  using Config = SampleConfig<D>;
  const auto kernel = sample_kernel<T, D>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(slab.sequences * call.kv_heads), Config::kThreads, Config::kSharedBytes,
           stream>>>(call, slab, scratch);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::decode
