// A decode step over a short cache in one launch; bf16 and fp16, GPUs with clusters of thread blocks.
//
// A cluster of 8 or 16 blocks takes the rows of one KV head of a sequence, each block an equal part of the
// keys. Its warps stream their keys through rings in shared memory, first K, then V, without a break: while
// rows are selected V is on its way. All of V is read, not the kept rows alone: at these lengths latencies
// cost more than bytes.
//
// Scores, as in scan.cuh, go to the shared memory of the block that selects their row, block m for row m. It
// tells the encoding to all, each block sums up the kept rows of V of its part, and sends the sum to block m,
// which adds the parts in ascending order. Nothing but the results goes through memory. Cost: one read of K
// and V, three barriers of the cluster.
#pragma once

#include <algorithm>

#include "rank.cuh"
#include "scan.cuh"
#include "values.cuh"

namespace topk_attn::cuda::decode {

inline constexpr int kShortMostTeam = 2 * kShortTeam;
inline constexpr int kShortWarps = 8;

template <int D>
struct ShortConfig {
  static constexpr int kWarps = kShortWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16;  // of a stage
  static constexpr int kStageBytes = kKeys * D * 2;
  static constexpr int kWarpBytes = 16 * 1024;
  static constexpr int kStages = kWarpBytes / kStageBytes;
  static constexpr int kRingBytes = kWarps * kWarpBytes;
  static_assert(kShortRows * D * 4 <= kWarpBytes);  // where a warp's sums go in the end
};

struct ShortShared {
  longrow::Workspace ws;
  // Of all rows of the KV head.
  float thresholds[kShortRows];
  int32_t tie_indices[kShortRows];
  float tops[kShortRows];                 // the largest kept score
  float masses[kShortWarps][kShortRows];  // of the warps
  float warp_tops[kShortWarps];
  float masses_of_blocks[kShortMostTeam];  // of the row that this block selects
};

// A barrier of the cluster in two halves: what was written before the first is seen after the second.
__device__ __forceinline__ void team_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void team_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A weight that stands for a key that is not kept: its row of V may hold anything.
inline constexpr float kNotKept = -1.0f;

// kRows: room for the query rows of a KV head, 4 or 8.
template <typename T, int D, int kRows>
__global__ __launch_bounds__(ShortConfig<D>::kThreads,
                             1) void short_kernel(const __grid_constant__ DecodeCall c,
                                                  const __grid_constant__ Slab slab,
                                                  const __grid_constant__ Scratch scratch, const int room) {
  using Config = ShortConfig<D>;
  constexpr int kThreads = Config::kThreads;
  constexpr int kKeys = Config::kKeys;
  extern __shared__ __align__(1024) char ring[];
  ShortShared& shared = *reinterpret_cast<ShortShared*>(ring + Config::kRingBytes);
  const int team = longrow::team_size();
  const int rank = longrow::team_rank();
  // Of the row selected here: all scores, and in the end the blocks' sums, (team, D).
  float* const gathered = reinterpret_cast<float*>(&shared + 1);
  // (room, kRows): scores of this block's keys, then their weights.
  float* const own = gathered + team * max(room, D);
  wait_for_previous();
  team_arrive();
  const int pair = static_cast<int>(blockIdx.x) / team;
  const int slab_sequence = pair / c.kv_heads;
  const int kv_head = pair % c.kv_heads;
  const int sequence = slab.first_sequence + slab_sequence;
  const int rows = c.heads / c.kv_heads * slab.tokens;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const State state = state_of(c, scratch, sequence);
  const Span span = seen_by_slab(c, slab, state);
  const int origin = static_cast<int>(span.begin) / kKeys * kKeys;
  const int end = static_cast<int>(span.end);
  const int part = ((end - origin + team - 1) / team + kKeys - 1) / kKeys * kKeys;
  const int first_key = origin + rank * part;
  const int last_key = min(first_key + part, end);

  // ---- K and V through the warp's ring: stages 0 .. own_stages - 1 are K, then as many of V
  constexpr int kChunks = D / 8;
  constexpr int kRowsAtOnce = 32 / kChunks;
  const int stages = (last_key - first_key + kKeys - 1) / kKeys;  // of all warps; not positive: none
  const int own_stages = stages > warp ? (stages - warp + Config::kWarps - 1) / Config::kWarps : 0;
  const uint32_t mine = shared_address(ring) + warp * Config::kWarpBytes;
  const auto stage_key = [&](int i) { return (i * Config::kWarps + warp) * kKeys; };  // from first_key on
  const auto load = [&](int i) {
    if (i < 2 * own_stages) {
      const bool is_v = i >= own_stages;
      const View& view = is_v ? c.v : c.k;
      const int chunk = lane % kChunks;
      const bool channel_exists = chunk * 8 < (is_v ? c.v_dim : c.head_dim);
      const T* const base = static_cast<const T*>(view.data) + kv_head * view.head + chunk * 8;
      const int j = first_key + stage_key(is_v ? i - own_stages : i) + lane % kKeys;
      const int64_t place = j < last_key ? row_offset(c, view, sequence, j) : -1;
      const uint32_t stage = mine + i % Config::kStages * Config::kStageBytes;
#pragma unroll
      for (int r = 0; r < kKeys; r += kRowsAtOnce) {
        const int row = r + lane / kChunks;
        const int64_t offset = __shfl_sync(~0u, place, row);
        const bool valid = channel_exists && offset >= 0;
        copy16(stage + row * (D * 2) + ((chunk ^ (row & 7)) << 4), valid ? base + offset : base, valid);
      }
    }
    copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i < Config::kStages; ++i) load(i);

  // ---- scores
  uint32_t a[D / 16][4];
  load_queries<T, D>(a, c, slab, slab_sequence, kv_head, rows);
  for (int i = threadIdx.x; i < 2 * longrow::kBins; i += kThreads) shared.ws.bins[0][i] = 0;
  team_wait();  // all blocks are there
#pragma unroll 1
  for (int i = 0; i < own_stages; ++i) {
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
    __syncwarp();
    load(i + Config::kStages);
    const int g = lane / 4;
    if (g < rows) {
      const int at = stage_key(i) + 2 * (lane % 4);
      float* const to = longrow::peer(gathered + rank * part + at, g);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        *reinterpret_cast<float2*>(to + 8 * n) = make_float2(s[n][0], s[n][1]);
        own[(at + 8 * n) * kRows + g] = s[n][0];
        own[(at + 8 * n + 1) * kRows + g] = s[n][1];
      }
    }
  }
  team_arrive();
  team_wait();

  // ---- block m selects row m
  const float infinity = __int_as_float(0x7f800000);
  const auto plan_of = [&](int m) {
    return plan_row(seen_by(c, state, slab.first_token + m % slab.tokens), c.budget, c.sink, c.recent);
  };
  if (rank < rows) {
    const RowPlan plan = plan_of(rank);
    const int begin = static_cast<int>(plan.contested().begin);
    const int count = static_cast<int>(plan.contested().size());
    const int wanted = static_cast<int>(plan.contested_kept());
    // Its best key is kept, if any: the largest score of all that may be kept is the largest kept one.
    float top = -infinity;
    int low = INT_MAX;
    int high = INT_MIN;
    for (int j = static_cast<int>(plan.seen.begin) + static_cast<int>(threadIdx.x); j < plan.seen.end;
         j += kThreads) {
      const float s = gathered[j - origin];
      const bool always = plan.always_kept(j);
      if (always || wanted > 0) top = fmaxf(top, s);
      if (!always) {
        low = min(low, order_key(s));
        high = max(high, order_key(s));
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    if (lane == 0) shared.warp_tops[warp] = top;
    __syncthreads();
    float threshold = __int_as_float(0x7fc00000);
    int tie_index = -1;
    if (wanted > 0) {
      const longrow::Result found = find_rank<kThreads>(
          shared.ws,
          [&](int i) {
            return ScoredKey{order_key(gathered[begin - origin + i]), begin + i};
          },
          count, wanted, low, high);
      threshold = order_score(found.threshold);
      tie_index = found.tie_index;
    }
    if (static_cast<int>(threadIdx.x) < team) {
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) top = fmaxf(top, shared.warp_tops[w]);
      const int block = static_cast<int>(threadIdx.x);
      *longrow::peer(&shared.thresholds[rank], block) = threshold;
      *longrow::peer(&shared.tie_indices[rank], block) = tie_index;
      *longrow::peer(&shared.tops[rank], block) = top;
    }
  }
  team_arrive();
  team_wait();

  // ---- weights of this warp's keys
  const float scale = c.softmax_scale * 1.4426950408889634f;
  {
    const int m = lane % kRows;
    float mass = 0.0f;
    if (m < rows) {
      const RowPlan plan = plan_of(m);
      const float threshold = shared.thresholds[m];
      const int tie_index = shared.tie_indices[m];
      const float top = shared.tops[m];
      const float shift = top == -infinity ? 0.0f : top;
      for (int i = 0; i < own_stages; ++i) {
        for (int k = lane / kRows; k < kKeys; k += 32 / kRows) {
          const int j = first_key + stage_key(i) + k;
          float& x = own[(stage_key(i) + k) * kRows + m];
          const bool seen = j >= plan.seen.begin && j < plan.seen.end;
          const bool keep = seen && (plan.always_kept(j) || admitted(x, int64_t{j}, threshold, tie_index));
          const float weight = keep ? exp2_fast((x - shift) * scale) : kNotKept;
          if (keep) mass += weight;
          x = weight;
        }
      }
    } else {
      for (int i = 0; i < own_stages; ++i) {
        for (int k = lane / kRows; k < kKeys; k += 32 / kRows) {
          own[(stage_key(i) + k) * kRows + m] = kNotKept;
        }
      }
    }
    for (int step = 16; step >= kRows; step /= 2) mass += __shfl_xor_sync(~0u, mass, step);
    if (lane < kRows) shared.masses[warp][lane] = mass;
  }
  __syncwarp();

  // ---- weighted sums of V: 4 channels a lane
  constexpr int kLanes = D / 4;
  constexpr int kAtOnce = 32 / kLanes;
  const int channel = lane % kLanes * 4;
  float sum[kRows][4] = {};
#pragma unroll 1
  for (int i = 0; i < own_stages; ++i) {
    copy_wait<Config::kStages - 1>();
    __syncwarp();
    const int turn = own_stages + i;
    const char* const stage =
        ring + warp * Config::kWarpBytes + turn % Config::kStages * Config::kStageBytes + channel % 8 * 2;
#pragma unroll
    for (int half = 0; half < kRows / 4; ++half) {
#pragma unroll 4
      for (int k = lane / kLanes; k < kKeys; k += kAtOnce) {
        const float4 w = *reinterpret_cast<const float4*>(own + (stage_key(i) + k) * kRows + 4 * half);
        if (w.x < 0.0f && w.y < 0.0f && w.z < 0.0f && w.w < 0.0f) continue;
        const uint2 packed =
            *reinterpret_cast<const uint2*>(stage + k * (D * 2) + ((channel / 8 ^ (k & 7)) << 4));
        float v[4];
        unpack<T>(v, packed);
        const float weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          if (weights[m] < 0.0f) continue;
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[4 * half + m][e] = fmaf(weights[m], v[e], sum[4 * half + m][e]);
        }
      }
    }
    __syncwarp();
    load(turn + Config::kStages);
  }
  copy_wait<0>();
  __syncwarp();
  float* const warp_sums = reinterpret_cast<float*>(ring + warp * Config::kWarpBytes);  // (rows, D)
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (kAtOnce > 1) sum[m][e] += __shfl_xor_sync(~0u, sum[m][e], kLanes % 32);
    }
    if (lane < kLanes) {
      *reinterpret_cast<float4*>(warp_sums + m * D + channel) =
          make_float4(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * D; i += kThreads) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
      total += reinterpret_cast<const float*>(ring + w * Config::kWarpBytes)[i];
    }
    *longrow::peer(gathered + rank * D + i % D, i / D) = total;
  }
  if (static_cast<int>(threadIdx.x) < rows) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) total += shared.masses[w][threadIdx.x];
    *longrow::peer(&shared.masses_of_blocks[rank], static_cast<int>(threadIdx.x)) = total;
  }
  team_arrive();
  if (rank >= rows) return;  // nobody reads or writes its shared memory any more
  team_wait();

  // ---- block m finishes row m
  if (static_cast<int>(threadIdx.x) < D) {
    float all = 0.0f;
    float total = 0.0f;
#pragma unroll 4
    for (int i = 0; i < team; ++i) {
      all += shared.masses_of_blocks[i];
      total += gathered[i * D + threadIdx.x];
    }
    const int head = kv_head * (c.heads / c.kv_heads) + rank / slab.tokens;
    const int token = slab.first_token + rank % slab.tokens;
    const int at = static_cast<int>(threadIdx.x);
    T* const out =
        static_cast<T*>(c.out.data) + sequence * c.out.batch + token * c.out.token + head * c.out.head;
    if (at < c.v_dim) store(out + at, all == 0.0f ? 0.0f : total / all);
    if (at == 0) {
      const int64_t row = sequence * c.rows.batch + head * c.rows.head + token;
      c.lse[row] = all == 0.0f ? -infinity : shared.tops[rank] * c.softmax_scale + logf(all);
      c.threshold[row] = shared.thresholds[rank];
      c.tie_index[row] = shared.tie_indices[rank];
    }
  }
}

template <typename T, int D, int kRows>
cudaError_t launch_short(const DecodeCall& call, const Slab& slab, const Scratch& scratch,
                         cudaStream_t stream) {
  using Config = ShortConfig<D>;
  const auto kernel = short_kernel<T, D, kRows>;
  bool clusters = false;
  if (const cudaError_t e = is_sm90_code(kernel, clusters); e != cudaSuccess) return e;
  if (!clusters) return cudaErrorNotSupported;
  const int pairs = slab.sequences * call.kv_heads;
  // Keys of a block, and a stage at either end.
  const auto room = [&](int team) {
    return (call.capacity / team + 2 * Config::kKeys) / Config::kKeys * Config::kKeys + Config::kKeys;
  };
  const auto shape = [&](int team) {
    const int scores = team * std::max(room(team), D) + room(team) * kRows;
    return LaunchShape{static_cast<unsigned>(pairs * team), Config::kThreads,
                       Config::kRingBytes + sizeof(ShortShared) + sizeof(float) * scores,
                       static_cast<unsigned>(team)};
  };
  const size_t most = std::max(shape(kShortTeam).shared_bytes, shape(kShortMostTeam).shared_bytes);
  if (const cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
      e != cudaSuccess) {
    return e;
  }
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      e != cudaSuccess) {
    return e;
  }
  const bool many = clusters_at_once(kernel, shape(kShortMostTeam)) >= pairs;
  const int team = many ? kShortMostTeam : kShortTeam;
  return launch(kernel, shape(team), scratch.state != nullptr, stream, call, slab, scratch, room(team));
}

// cudaErrorNotSupported: no clusters here.
template <typename T, int D>
cudaError_t run_short(const DecodeCall& call, const Slab& slab, const Scratch& scratch, cudaStream_t stream) {
  return call.heads / call.kv_heads * slab.tokens <= 4 ? launch_short<T, D, 4>(call, slab, scratch, stream)
                                                       : launch_short<T, D, 8>(call, slab, scratch, stream);
}

}  // namespace topk_attn::cuda::decode
