// dQ over the gathered union: one query tile (64 rows of one head) per thread block.
//
// One warpgroup. Q stays in registers, dO in shared memory; chunks of 64 gathered K and V rows are
// double-buffered. Per chunk: S = Q K^T, dP = dO V^T, P = exp2(S * scale - lse) for kept keys, dS = P (dP -
// delta), dQ += dS K.
//
// Cost: union x 4 x D bytes gathered, from L2, and 384 x D x union FLOP per tile. No atomics: deterministic.
//
// For a deterministic dK and dV it also bounds what the tile adds to each key's (union_fixed_point.cuh),
// about 120 instructions a warp and chunk.
#include "union.h"
#include "union_fixed_point.cuh"

namespace topk_attn::cuda::sm90 {
namespace {

template <int kDim, bool kBounds>
struct QueryGradientMemory {
  static constexpr int kStage = 2 * kBlockBytes<kDim>;  // K and V of one chunk
  static constexpr int kOutGradient = 2 * kStage;
  static constexpr int kRing = kOutGradient + kBlockBytes<kDim>;
  static constexpr int kRows = kRing + KeyStream<1>::kBytes;
  static constexpr int kAtBounds = kRows + kTileRows * kRowBytes;
  static constexpr int kTotal = kAtBounds + (kBounds ? ChunkBounds::kBytes : 0);
};

// Thread blocks of a multiprocessor. The bounds of fp16 need a few registers more than three blocks have.
template <typename T, int kDim, bool kBounds>
inline constexpr int kResident = kDim == 128 || (kBounds && std::is_same_v<T, __half>) ? 2 : 3;

template <typename T, int kDim, bool kBounds>
__global__ void __launch_bounds__(128, kResident<T, kDim, kBounds>)
    dq_kernel(const __grid_constant__ BackwardCall backward, int64_t words, KeyBound* key_bounds) {
  using Memory = QueryGradientMemory<kDim, kBounds>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const Call& call = backward.call;
  const Work work = work_of(call, blockIdx.x);
  const Tile tile = tile_at(call, work.tile);
  if (tile.rows == 0) return;
  const int64_t entry = int64_t{work.head} * call.num_tiles + work.tile;
  const int seen = seen_end(call, tile);
  if (!gathered(backward.regimes, entry, seen)) return;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int column_pair = lane % 4;
  const uint32_t shared = shared_address(memory);
  const uint32_t row_states = shared + Memory::kRows;

  KeyStream<1> keys(shared + Memory::kRing, backward.bitmap + entry * words, nullptr, seen, 0, warp, lane);
  const GatherLane<kDim> lanes(warp, lane);
  const Rows tensors[2] = {lanes.shifted(rows_of(call.k, tile.batch, tile.k_begin, work.kv_head)),
                           lanes.shifted(rows_of(call.v, tile.batch, tile.k_begin, work.kv_head))};
  keys.ensure(2 * kChunkKeys);
  __syncthreads();
  lanes.gather(shared, tensors, keys.first_chunk(), keys.filled());
  copy_rows<kDim, kTileRows>(shared + Memory::kOutGradient,
                             rows_of(backward.dout, tile.batch, tile.q_begin + tile.row0, work.head),
                             tile.rows, threadIdx.x, 128);
  copy_commit();

  if (threadIdx.x < kTileRows) {
    const int row = tile.row0 + threadIdx.x;
    RowState state = absent_row();
    if (static_cast<int>(threadIdx.x) < tile.rows) {
      const int64_t at = row_index(call, tile, work.head, row);
      state = row_state(call, tile, row, backward.threshold[at], backward.tie_index[at]);
      state.lse = lse_log2(backward.lse[at]);
      state.delta = backward.delta[at];
    }
    store_row(row_states + threadIdx.x * kRowBytes, state);
  }

  const int upper = warp * 16 + lane / 4;  // this thread's rows of the tile: upper, upper + 8
  uint32_t q[kDim / 4];
  const Rows queries = rows_of(call.q, tile.batch, tile.q_begin + tile.row0, work.head);
  load_operand_rows<kDim>(q, queries.at(upper), upper < tile.rows, queries.at(upper + 8),
                          upper + 8 < tile.rows, column_pair);
  const uint32_t upper_state = row_states + upper * kRowBytes;
  const uint32_t lower_state = upper_state + 8 * kRowBytes;

  float dq[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) dq[i] = 0.0f;
  float lse[2] = {0.0f, 0.0f};
  float delta[2] = {0.0f, 0.0f};
  Contested contested;
  const float scale = call.softmax_scale * kLog2e;
  const int64_t first_token = int64_t{tile.batch} * call.tk + tile.k_begin;
  ChunkBounds bounds(shared + Memory::kAtBounds, key_bounds + first_token * call.kv_heads + work.kv_head,
                     call.kv_heads, call.softmax_scale, warp, lane);
  const uint64_t out_gradient = k_major(shared + Memory::kOutGradient);

  uint32_t chunk = keys.first_chunk();
  for (int c = 0; c == 0 || keys.filled() > c * kChunkKeys; ++c) {
    copy_wait<0>();
    fence_async_proxy();
    __syncthreads();
    if (c == 0) {
      if (keys.filled() == 0) break;
      contested.add_row(upper_state);
      contested.add_row(lower_state);
      contested.reduce_over_warp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        lse[half] = load_shared_float(upper_state + half * 8 * kRowBytes + 24);
        delta[half] = load_shared_float(upper_state + half * 8 * kRowBytes + 28);
      }
      if constexpr (kBounds) {
        uint32_t largest[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
          const int4 x = load_shared_int4(shared + Memory::kOutGradient + (threadIdx.x + 128 * i) * 16);
          largest[0] = largest_pair(largest[0], largest_pair(largest_pair(x.x, x.y), largest_pair(x.z, x.w)));
        }
#pragma unroll
        for (int i = 0; i < kDim / 4; ++i) largest[1] = largest_pair(largest[1], q[i]);
        bounds.add_largest(largest[0], largest[1]);
      }
    }
    const int count = min(kChunkKeys, keys.filled() - c * kChunkKeys);
    const uint32_t stage = shared + c % 2 * Memory::kStage;
    const uint32_t next_chunk = keys.chunk_after(chunk);
    if (keys.filled() > (c + 1) * kChunkKeys) {
      lanes.gather(shared + (c + 1) % 2 * Memory::kStage, tensors, next_chunk,
                   keys.filled() - (c + 1) * kChunkKeys);
    }
    copy_commit();

    float s[32];
    float dp[32];
    const uint64_t k = k_major(stage);
    const uint64_t v = k_major(stage + kBlockBytes<kDim>);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      wgmma<T>(s, q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3], k + k_step(i, kChunkKeys), i > 0);
    }
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      wgmma<T>(dp, out_gradient + k_step(i, kTileRows), v + k_step(i, kChunkKeys), i > 0);
    }
    wgmma_commit();
    const ChunkFilter filter(upper_state, lower_state, contested, chunk, count);
    if constexpr (kBounds) {
      if (c > 0) bounds.settle<T>((c - 1) % 2);
      bounds.open(chunk, count);
    }
    keys.ensure((c + 3) * kChunkKeys);
    wgmma_wait<1>();

    filter.drop(s, upper_state, lower_state, chunk, count, column_pair);
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = exp2_fast(fmaf(s[i], scale, -lse[i / 2 % 2]));
    wgmma_wait<0>();
    uint32_t ds[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 4 * j + 2 * half;
        dp[i] = s[i] * (dp[i] - delta[half]);
        dp[i + 1] = s[i + 1] * (dp[i + 1] - delta[half]);
        ds[2 * j + half] = pack<T>(dp[i], dp[i + 1]);
      }
    }
    const uint64_t k_rows = mn_major(stage, kChunkKeys);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kChunkKeys / 16; ++i) {
      wgmma<T, Major::kMN>(dq, ds[4 * i], ds[4 * i + 1], ds[4 * i + 2], ds[4 * i + 3], k_rows + i * kMnStep,
                           true);
    }
    wgmma_commit();
    if constexpr (kBounds) bounds.add<T>(s, dp, c % 2);
    wgmma_wait<0>();
    chunk = next_chunk;
  }
  if constexpr (kBounds) {
    const int chunks = (keys.filled() + kChunkKeys - 1) / kChunkKeys;
    __syncthreads();
    if (chunks > 0) bounds.settle<T>((chunks - 1) % 2);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = upper + 8 * half;
    if (row >= tile.rows) continue;
    char* out =
        const_cast<char*>(rows_of(backward.dq, tile.batch, tile.q_begin + tile.row0 + row, work.head).base);
    // A row that keeps nothing finite has no gradient, whatever its keys hold (0 * inf is not 0).
    const bool empty = lse[half] == kInfinity;
    const float factor = call.softmax_scale;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const uint32_t pair = pack<T>(dq[4 * j + 2 * half] * factor, dq[4 * j + 2 * half + 1] * factor);
      reinterpret_cast<uint32_t*>(out)[4 * j + column_pair] = empty ? 0 : pair;
    }
  }
}

template <typename T, int kDim, bool kBounds>
cudaError_t launch(const BackwardCall& backward, KeyBound* bounds, cudaStream_t stream) {
  constexpr int kBytes = QueryGradientMemory<kDim, kBounds>::kTotal;
  const auto kernel = dq_kernel<T, kDim, kBounds>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(backward.call.heads) * backward.call.num_tiles;
  kernel<<<blocks, 128, kBytes, stream>>>(backward, bitmap_words(backward.call), bounds);
  return cudaGetLastError();
}

template <typename T, int kDim>
cudaError_t launch(const BackwardCall& backward, KeyBound* bounds, cudaStream_t stream) {
  return bounds == nullptr ? launch<T, kDim, false>(backward, bounds, stream)
                           : launch<T, kDim, true>(backward, bounds, stream);
}

}  // namespace

cudaError_t backward_union_dq(const BackwardCall& backward, cudaStream_t stream, void* workspace) {
  const Call& call = backward.call;
  if (!supports_union(call)) return cudaErrorNotSupported;
  KeyBound* const bounds = static_cast<KeyBound*>(workspace);
  if (bounds != nullptr) {
    const cudaError_t error = cudaMemsetAsync(bounds, 0, union_workspace(call), stream);
    if (error != cudaSuccess) return error;
  }
  if (backward.regimes.union_size == nullptr || call.heads == 0 || call.num_tiles == 0) return cudaSuccess;
  const bool wide = call.head_dim == 128;
  if (call.dtype == DType::kFloat16) {
    return wide ? launch<__half, 128>(backward, bounds, stream)
                : launch<__half, 64>(backward, bounds, stream);
  }
  return wide ? launch<__nv_bfloat16, 128>(backward, bounds, stream)
              : launch<__nv_bfloat16, 64>(backward, bounds, stream);
}

}  // namespace topk_attn::cuda::sm90
