// Bounds that a few more than W keys of each row very likely reach, from a sample of the keys; bf16 and fp16.
//
// One block a KV head of a sequence, or a cluster of up to 4 where those would leave most of the card idle:
// they score 256 to 1024 keys, one at an irregular place of each of as many equal stretches, and take the
// rank that W keys of n have in the sample, and four standard deviations beyond, as each row's bound. That
// enough keys reach it, and not too many, is checked later (pick.cu). Rows of at most kMaxCandidates keys
// need no bound: all are candidates.
#pragma once

#include "../common/select_long.cuh"
#include "scan.cuh"

namespace topk_attn::cuda::decode {

template <int D>
struct SampleConfig {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16;
  static constexpr int kStageBytes = kKeys * D * 2;
  static constexpr int kStages = 96 * 1024 / (kWarps * kStageBytes);
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kMost = 1024;   // keys of the sample
  static constexpr int kMostTeam = 4;  // blocks of a KV head
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
  constexpr int kLastBit = 14;  // the score is cut below: 9 bits of a float's fraction are left
  uint32_t keys[MOST / 32];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < MOST / 32; ++i) {
    const int at = 32 * i + lane;
    keys[i] = at < size ? static_cast<uint32_t>(order_key(scores[at])) ^ 0x80000000u : 0;
  }
  uint32_t found = 0;
#pragma unroll 1
  for (int bit = 31; bit >= kLastBit; --bit) {
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
  float* const scores = reinterpret_cast<float*>(ring + Config::kRingBytes);  // (rows of this block, kMost)
  const int team = longrow::team_size();
  const int rank = longrow::team_rank();
  const int pair = static_cast<int>(blockIdx.x) / team;
  const int slab_sequence = pair / c.kv_heads;
  const int kv_head = pair % c.kv_heads;
  const int sequence = slab.first_sequence + slab_sequence;
  const int rows = c.heads / c.kv_heads * slab.tokens;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t first = first_row(c, slab, slab_sequence, kv_head);
  wait_for_previous();
  let_next_start();  // not before: the scan relies on it that the cache has been written
  if (rank == 0) {
    if (threadIdx.x < rows) {
      scratch.counts[first + threadIdx.x] = 0;
      scratch.arrived[first + threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) {
      scratch.flags[pair] = 0;
      if (pair == 0) *scratch.any_flag = 0;
    }
  }
  const State state = state_of(c, scratch, sequence);
  const Span span = seen_by_slab(c, slab, state);
  const int n = static_cast<int>(span.size());
  if (n <= kMaxCandidates) {
    if (rank == 0 && threadIdx.x < rows) scratch.bounds[first + threadIdx.x] = __int_as_float(0xff800000);
    return;  // the whole team
  }
  // As few as make less candidates than half of the room.
  const int64_t most_kept = plan_row(span, c.budget, c.sink, c.recent).contested_kept();
  int size = 256;
  while (size < Config::kMost && bound_rank(most_kept, n, size) * static_cast<float>(n) >
                                     0.5f * kMaxCandidates * static_cast<float>(size)) {
    size *= 2;
  }

  constexpr int kChunks = D / 8;
  constexpr int kRowsAtOnce = kChunks >= 32 ? 1 : 32 / kChunks;
  const int chunk = lane % kChunks;
  const bool channel_exists = chunk * 8 < c.head_dim;
  const T* const base = static_cast<const T*>(c.k.data) + kv_head * c.k.head + chunk * 8;
  const uint32_t mine = shared_address(ring) + warp * (Config::kStages * Config::kStageBytes);
  // Parts of 16 keys; this warp's are `own` + i * step.
  const int own = rank * Config::kWarps + warp;
  const int step_parts = team * Config::kWarps;
  const int parts = size / Config::kKeys;
  const auto load = [&](int i) {
    const int part = own + i * step_parts;
    if (part < parts) {
      const int at = part * Config::kKeys + lane % Config::kKeys;
      const int j = static_cast<int>(span.begin) + sample_place(at, size, n);
      const int64_t offset_of_own = row_offset(c, c.k, sequence, j);
      const uint32_t stage = mine + i % Config::kStages * Config::kStageBytes;
#pragma unroll
      for (int r = 0; r < Config::kKeys; r += kRowsAtOnce) {
        const int row = r + lane / kChunks;
        const int64_t offset = __shfl_sync(~0u, offset_of_own, row);
        copy16(stage + row * (D * 2) + ((chunk ^ (row & 7)) << 4), channel_exists ? base + offset : base,
               channel_exists);
      }
    }
    copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i < Config::kStages; ++i) load(i);
  uint32_t a[D / 16][4];
  load_queries<T, D>(a, c, slab, slab_sequence, kv_head, rows);
  longrow::team_sync(team);  // all blocks are there
#pragma unroll 1
  for (int i = 0; own + i * step_parts < parts; ++i) {
    copy_wait<Config::kStages - 1>();
    __syncwarp();
    const uint32_t stage = mine + i % Config::kStages * Config::kStageBytes +
                           (lane % 8 + lane / 16 * 8) * (D * 2) + (((lane / 8 % 2) ^ (lane & 7)) << 4);
    float s[2][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t b[4];
      load_matrix_x4(b, stage ^ (32 * step));
      mma_16816<T>(s[0], a[step], b[0], b[1]);
      mma_16816<T>(s[1], a[step], b[2], b[3]);
    }
    // Block m % team takes row m.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = lane / 4 + 8 * half;
      if (m >= rows) continue;
      float* const here =
          scores + m / team * Config::kMost + (own + i * step_parts) * Config::kKeys + 2 * (lane % 4);
      float* const out = team > 1 ? longrow::peer(here, m % team) : here;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        *reinterpret_cast<float2*>(out + 8 * k) = make_float2(s[k][2 * half], s[k][2 * half + 1]);
      }
    }
    __syncwarp();
    load(i + Config::kStages);
  }
  longrow::team_sync(team);
  for (int m = rank + warp * team; m < rows; m += Config::kWarps * team) {
    const Span seen = seen_by(c, state, slab.first_token + m % slab.tokens);
    const RowPlan plan = plan_row(seen, c.budget, c.sink, c.recent);
    const int at = static_cast<int>(bound_rank(plan.contested_kept(), n, size));
    const float bound = at >= size
                            ? __int_as_float(0xff800000)
                            : score_of_rank<Config::kMost>(scores + m / team * Config::kMost, size, at);
    if (lane == 0) scratch.bounds[first + m] = bound;
  }
}

template <typename T, int D>
cudaError_t run_sample(const DecodeCall& call, const Slab& slab, const Scratch& scratch,
                       cudaStream_t stream) {
  using Config = SampleConfig<D>;
  const auto kernel = sample_kernel<T, D>;
  bool clusters = false;
  if (const cudaError_t error = is_sm90_code(kernel, clusters); error != cudaSuccess) return error;
  const int pairs = slab.sequences * call.kv_heads;
  const unsigned team = !clusters || pairs > 64 ? 1 : pairs > 32 ? 2 : Config::kMostTeam;
  const int rows = call.heads / call.kv_heads * slab.tokens;
  const size_t bytes = Config::kRingBytes + sizeof(float) * Config::kMost * ((rows + team - 1) / team);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const LaunchShape shape{static_cast<unsigned>(pairs) * team, Config::kThreads, bytes, team};
  return launch(kernel, shape, scratch.state != nullptr, stream, call, slab, scratch);
}

}  // namespace topk_attn::cuda::decode
