// A decode step over a short cache in one launch; bf16 and fp16, GPUs with clusters of thread blocks.
//
// A cluster of 8 blocks takes the rows of one KV head of a sequence. Each block scores its eighth of the
// keys, as in scan.cuh, and keeps the scores in shared memory. Block m then reads all scores of row m from
// the others, selects, and tells them the encoding; each block attends to the kept keys of its own eighth;
// block m adds up the parts of row m in ascending order. Nothing but the results goes through memory. Cost:
// one read of K and of the kept rows of V, four barriers of the cluster.
#pragma once

#include "../common/select_long.cuh"
#include "scan.cuh"
#include "values.cuh"

namespace topk_attn::cuda::decode {

template <int D>
struct ShortConfig {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16;
  static constexpr int kStageBytes = kKeys * D * 2;
  static constexpr int kStages = 16 * 1024 / kStageBytes;
  static constexpr int kRingBytes =
      kWarps * kStages * kStageBytes;  // 128 KiB, and later candidates and lists
  static_assert(kRingBytes >= kShortKeys * static_cast<int>(sizeof(longrow::Candidate)) +
                                  kShortRows * (kShortKeys / kShortTeam + 64) * 4);
};

struct ShortShared {
  longrow::Workspace ws;
  float thresholds[kShortRows];
  int32_t tie_indices[kShortRows];
  int lowest;
  int highest;
  struct Part {
    float sums[kShortDim];
    float mass;
    float top;
  } parts[8];  // of the warps
};

// Narrows to one key, or to one candidate, whose key and column are then in ws.found; of this block alone.
template <int kThreads, typename Key>
__device__ inline void settle_alone(longrow::Search& search, longrow::Team& team,
                                    const longrow::Candidate* candidates, int count, const Key& key) {
  while (!search.done() && search.equal > 1) {
    longrow::narrow<kThreads>(search, team, 1, [&](const auto& add) {
      for (int i = threadIdx.x; i < count; i += kThreads) add(key(candidates[i]));
    });
  }
  if (search.equal != 1) return;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int k = key(candidates[i]);
    if (k >= search.lo && k <= search.hi) {
      team.ws->found = k;
      team.ws->found_column = candidates[i].column;
    }
  }
  __syncthreads();
}

template <typename T, int D>
__global__ __launch_bounds__(ShortConfig<D>::kThreads,
                             1) void short_kernel(const __grid_constant__ DecodeCall c,
                                                  const __grid_constant__ Slab slab,
                                                  const __grid_constant__ Scratch scratch, const int room) {
  using Config = ShortConfig<D>;
  constexpr int kThreads = Config::kThreads;
  extern __shared__ __align__(1024) char ring[];
  ShortShared& shared = *reinterpret_cast<ShortShared*>(ring + Config::kRingBytes);
  float* const scores = reinterpret_cast<float*>(&shared + 1);  // (rows, room)
  const int rank = longrow::team_rank();
  const int pair = static_cast<int>(blockIdx.x) / kShortTeam;
  const int slab_sequence = pair / c.kv_heads;
  const int kv_head = pair % c.kv_heads;
  const int sequence = slab.first_sequence + slab_sequence;
  const int rows = c.heads / c.kv_heads * slab.tokens;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const State state = state_of(c, scratch, sequence);
  const Span span = seen_by_slab(c, slab, state);
  const int origin = static_cast<int>(span.begin) / Config::kKeys * Config::kKeys;
  const int end = static_cast<int>(span.end);
  const int part =
      ((end - origin + kShortTeam - 1) / kShortTeam + Config::kKeys - 1) / Config::kKeys * Config::kKeys;
  const int first_key = origin + rank * part;
  const int last_key = min(first_key + part, end);

  // ---- scores of this block's keys
  constexpr int kChunks = D / 8;
  constexpr int kRowsAtOnce = 32 / kChunks;
  const int chunk = lane % kChunks;
  const bool channel_exists = chunk * 8 < c.head_dim;
  const T* const keys = static_cast<const T*>(c.k.data) + kv_head * c.k.head + chunk * 8;
  const uint32_t mine = shared_address(ring) + warp * (Config::kStages * Config::kStageBytes);
  const int stages = (last_key - first_key + Config::kKeys - 1) / Config::kKeys;  // of all warps
  const auto load = [&](int i) {
    const int number = i * Config::kWarps + warp;
    if (number < stages) {
      const int j = first_key + number * Config::kKeys + lane % Config::kKeys;
      const int64_t own = j < last_key ? row_offset(c, c.k, sequence, j) : -1;
      const uint32_t stage = mine + i % Config::kStages * Config::kStageBytes;
#pragma unroll
      for (int r = 0; r < Config::kKeys; r += kRowsAtOnce) {
        const int row = r + lane / kChunks;
        const int64_t offset = __shfl_sync(~0u, own, row);
        const bool valid = channel_exists && offset >= 0;
        copy16(stage + row * (D * 2) + ((chunk ^ (row & 7)) << 4), valid ? keys + offset : keys, valid);
      }
    }
    copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i < Config::kStages; ++i) load(i);
  uint32_t a[D / 16][4];
  load_queries<T, D>(a, c, slab, slab_sequence, kv_head, rows);
  for (int i = threadIdx.x; i < 2 * longrow::kBins; i += kThreads) shared.ws.bins[0][i] = 0;
  if (threadIdx.x == 0) {
    shared.lowest = INT_MAX;
    shared.highest = INT_MIN;
  }
#pragma unroll 1
  for (int i = 0; i * Config::kWarps + warp < stages; ++i) {
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
    const int g = lane / 4;
    if (g < rows) {
      float* const out = scores + g * room + (i * Config::kWarps + warp) * Config::kKeys + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < 2; ++n) *reinterpret_cast<float2*>(out + 8 * n) = make_float2(s[n][0], s[n][1]);
    }
    __syncwarp();
    load(i + Config::kStages);
  }
  copy_wait<0>();
  longrow::team_sync(kShortTeam);

  // ---- block m selects row m
  const auto plan_of = [&](int m) {
    return plan_row(seen_by(c, state, slab.first_token + m % slab.tokens), c.budget, c.sink, c.recent);
  };
  auto* const candidates = reinterpret_cast<longrow::Candidate*>(ring);
  if (rank < rows) {
    const RowPlan plan = plan_of(rank);
    const int begin = static_cast<int>(plan.contested().begin);
    const int count = static_cast<int>(plan.contested().size());
    const int wanted = static_cast<int>(plan.contested_kept());
    float threshold = __int_as_float(0x7fc00000);
    int tie_index = -1;
    if (wanted > 0) {
      int low = INT_MAX;
      int high = INT_MIN;
#pragma unroll 4
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const int j = begin + i - origin;
        const int block = j / part;
        const int key = order_key(*longrow::peer(scores + rank * room + j - block * part, block));
        candidates[i] = longrow::Candidate{key, begin + i};
        low = min(low, key);
        high = max(high, key);
      }
      low = __reduce_min_sync(~0u, low);
      high = __reduce_max_sync(~0u, high);
      if (lane == 0) {
        atomicMin(&shared.lowest, low);
        atomicMax(&shared.highest, high);
      }
      __syncthreads();
      longrow::Team team{&shared.ws, 0, 1};
      longrow::Search search{shared.lowest, shared.highest, wanted, count, shared.highest};
      settle_alone<kThreads>(search, team, candidates, count,
                             [](const longrow::Candidate& x) { return x.key; });
      int key = search.lo;
      if (search.equal == 1) {
        key = shared.ws.found;
        tie_index = shared.ws.found_column;
      } else {
        // The rank-th smallest column among equal keys is the rank-th greatest of its complement.
        longrow::Search tie{longrow::kLowest, -1, search.rank, search.equal, -1};
        settle_alone<kThreads>(tie, team, candidates, count, [&](const longrow::Candidate& x) {
          return x.key == key ? ~x.column : INT_MIN;
        });
        tie_index = tie.equal == 1 ? shared.ws.found_column : ~tie.lo;
      }
      threshold = order_score(key);
    }
    if (threadIdx.x < kShortTeam) {
      *longrow::peer(&shared.thresholds[rank], static_cast<int>(threadIdx.x)) = threshold;
      *longrow::peer(&shared.tie_indices[rank], static_cast<int>(threadIdx.x)) = tie_index;
    }
  }
  longrow::team_sync(kShortTeam);

  // ---- every block attends to its own kept keys, one or more warps a row
  const int warps_of_row = rows > 4 ? 1 : rows > 2 ? 2 : rows > 1 ? 4 : 8;
  const int m = warp / warps_of_row;
  const float infinity = __int_as_float(0x7f800000);
  const float scale = c.softmax_scale * 1.4426950408889634f;
  if (m < rows) {
    const RowPlan plan = plan_of(m);
    const float threshold = shared.thresholds[m];
    const int tie_index = shared.tie_indices[m];
    const int share = (part + warps_of_row - 1) / warps_of_row;
    const int from = warp % warps_of_row * share;
    const int to = min(from + share, last_key - first_key);
    float* const own = scores + m * room;
    int32_t* const list =
        reinterpret_cast<int32_t*>(ring + kShortKeys * sizeof(longrow::Candidate)) + m * room;
    // Kept scores and columns move to the front of the warp's share.
    int kept = 0;
    float top = -infinity;
    for (int base = from; base < to; base += 32) {
      const int i = base + lane;
      const int j = first_key + i;
      const float s = i < to ? own[i] : 0.0f;
      const bool seen = i < to && j >= plan.seen.begin && j < plan.seen.end;
      const bool keep = seen && (plan.always_kept(j) || admitted(s, int64_t{j}, threshold, tie_index));
      const uint32_t ballot = __ballot_sync(~0u, keep);
      __syncwarp();  // all have read
      if (keep) {
        const int at = from + kept + __popc(ballot & ((1u << lane) - 1));
        own[at] = s;
        list[at] = j;
        top = fmaxf(top, s);
      }
      kept += __popc(ballot);
      __syncwarp();
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const float shift = top == -infinity ? 0.0f : top;
    float mass = 0.0f;
    for (int i = lane; i < kept; i += 32) {
      const float weight = exp2_fast((own[from + i] - shift) * scale);
      own[from + i] = weight;
      mass += weight;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) mass += __shfl_xor_sync(~0u, mass, step);
    __syncwarp();
    // 16 lanes a row of V.
    constexpr int kUnroll = 8;
    const int channel = lane % 16 * 8;
    const T* const values = static_cast<const T*>(c.v.data) + kv_head * c.v.head + channel;
    float sum[8] = {};
    for (int base = lane / 16; base < kept; base += 2 * kUnroll) {
      uint4 v[kUnroll];
      float weight[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = base + 2 * u;
        v[u] = make_uint4(0, 0, 0, 0);
        weight[u] = 0.0f;
        if (i < kept && channel < c.v_dim) {
          weight[u] = own[from + i];
          v[u] = __ldg(reinterpret_cast<const uint4*>(values + row_offset(c, c.v, sequence, list[from + i])));
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) add_weighted<T>(sum, v[u], weight[u]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += __shfl_xor_sync(~0u, sum[e], 16);
    if (lane < 16) {
#pragma unroll
      for (int e = 0; e < 8; ++e) shared.parts[warp].sums[channel + e] = sum[e];
    }
    if (lane == 0) {
      shared.parts[warp].mass = mass;
      shared.parts[warp].top = top;
    }
  }
  longrow::team_sync(kShortTeam);

  // ---- block m finishes row m
  if (rank < rows && threadIdx.x < kShortDim) {
    const int parts = kShortTeam * warps_of_row;
    const auto part_at = [&](int i) {
      return longrow::peer(&shared.parts[rank * warps_of_row + i % warps_of_row], i / warps_of_row);
    };
    float most = -infinity;
    for (int i = 0; i < parts; ++i) most = fmaxf(most, part_at(i)->top);
    const float shift = most == -infinity ? 0.0f : most;
    float all = 0.0f;
    float total = 0.0f;
#pragma unroll 4
    for (int i = 0; i < parts; ++i) {
      const ShortShared::Part* const p = part_at(i);
      const float factor = p->top == -infinity ? 1.0f : exp2_fast((p->top - shift) * scale);
      all += factor * p->mass;
      total += factor * p->sums[threadIdx.x];
    }
    const int head = kv_head * (c.heads / c.kv_heads) + rank / slab.tokens;
    const int token = slab.first_token + rank % slab.tokens;
    const int channel = static_cast<int>(threadIdx.x);
    T* const out =
        static_cast<T*>(c.out.data) + sequence * c.out.batch + token * c.out.token + head * c.out.head;
    if (channel < c.v_dim) store(out + channel, all == 0.0f ? 0.0f : total / all);
    if (channel == 0) {
      const int64_t row = sequence * c.rows.batch + head * c.rows.head + token;
      c.lse[row] = all == 0.0f ? -infinity : most * c.softmax_scale + logf(all);
      c.threshold[row] = shared.thresholds[rank];
      c.tie_index[row] = shared.tie_indices[rank];
    }
  }
  longrow::team_sync(kShortTeam);  // nobody leaves while its shared memory is read
}

// cudaErrorNotSupported: no clusters here.
template <typename T, int D>
cudaError_t run_short(const DecodeCall& call, const Slab& slab, const Scratch& scratch, cudaStream_t stream) {
  using Config = ShortConfig<D>;
  const auto kernel = short_kernel<T, D>;
  // Code that was compiled for an older architecture knows no clusters.
  cudaFuncAttributes attributes;
  if (const cudaError_t e = cudaFuncGetAttributes(&attributes, kernel); e != cudaSuccess) return e;
  if (attributes.ptxVersion < 90 || attributes.binaryVersion < 90) return cudaErrorNotSupported;
  const int rows = call.heads / call.kv_heads * slab.tokens;
  const int room =
      (call.capacity + kUnitKeys) / kShortTeam / Config::kKeys * Config::kKeys + 2 * Config::kKeys;
  const size_t bytes = Config::kRingBytes + sizeof(ShortShared) + sizeof(float) * rows * room;
  const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (e != cudaSuccess) return e;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(slab.sequences * call.kv_heads * kShortTeam));
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kShortTeam, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, call, slab, scratch, room);
}

}  // namespace topk_attn::cuda::decode
