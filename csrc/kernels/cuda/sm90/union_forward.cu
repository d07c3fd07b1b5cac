// Forward over the gathered union: out and lse of one query tile (64 rows of one head) per thread block.
//
// One warpgroup. Q stays in registers as A operand; chunks of 64 gathered K and V rows are double-buffered in
// shared memory: S = Q K^T, selection filter, P = exp2(S * scale - reference), O += P V. The reference is a
// row maximum that is raised only when a score exceeds it by kSlack, so most chunks neither reduce over the
// row nor rescale O. Three blocks (head dim 64: four) share an SM and hide each other's latencies.
//
// Cost: union x 4 x D bytes gathered, from L2 (which bounds it: about 6 TB/s on an H100), and 256 x D x union
// FLOP per tile.
#include "union.h"
#include "union_common.cuh"

namespace topk_attn::cuda::sm90 {
namespace {

template <int kDim>
struct ForwardMemory {
  static constexpr int kStage = 2 * kBlockBytes<kDim>;  // K and V of one chunk
  static constexpr int kRing = 2 * kStage;
  static constexpr int kRows = kRing + KeyStream<1>::kBytes;
  static constexpr int kTotal = kRows + kTileRows * kRowBytes;
};

// Log2 of how far probabilities may exceed 1 before the reference is raised: far below the type's largest
// value.
template <typename T>
inline constexpr float kSlack = 60.0f;
template <>
inline constexpr float kSlack<__half> = 8.0f;

// Where a reference is beyond this, its rounding shows in probabilities (2^-12 here), and the difference of
// scores is taken first, at an instruction more a score.
constexpr float kLargeReference = 2048.0f;

// The softmax of one row, spread over four lanes.
struct RowSoftmax {
  float reference = 0.0f;    // log2 units: base * scale
  float base = 0.0f;         // the raw score of probability 1
  float limit = -kInfinity;  // scores above it raise the reference
  float sum = 0.0f;          // this lane's share
};

// Raises the reference to the row's largest score so far. Returns the factor for what was summed before.
template <typename T>
__device__ __forceinline__ float raise_reference(RowSoftmax& row, float raw, float scale) {
  raw = fmaxf(raw, __shfl_xor_sync(~0u, raw, 1));
  raw = fmaxf(raw, __shfl_xor_sync(~0u, raw, 2));
  const float largest = raw * scale;
  const bool first = row.limit == -kInfinity;
  if (!(largest > (first ? row.limit : row.reference))) return 1.0f;
  const float factor = first ? 1.0f : exp2_fast(row.reference - largest);
  row.reference = largest;
  row.base = raw;
  row.limit = largest + kSlack<T>;
  row.sum *= factor;
  return factor;
}

template <typename T, int kDim>
__global__ void __launch_bounds__(128, 3)
    forward_kernel(const __grid_constant__ ForwardCall forward, int64_t words) {
  using Memory = ForwardMemory<kDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const Call& call = forward.call;
  const Work work = work_of(call, blockIdx.x);
  const Tile tile = tile_at(call, work.tile);
  if (tile.rows == 0) return;
  const int64_t entry = int64_t{work.head} * call.num_tiles + work.tile;
  const int seen = seen_end(call, tile);
  if (!gathered(forward.regimes, entry, seen)) return;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int column_pair = lane % 4;
  const uint32_t shared = shared_address(memory);
  const uint32_t row_states = shared + Memory::kRows;

  KeyStream<1> keys(shared + Memory::kRing, forward.bitmap + entry * words, nullptr, seen, 0, warp, lane);
  const GatherLane<kDim> lanes(warp, lane);
  const Rows tensors[2] = {lanes.shifted(rows_of(call.k, tile.batch, tile.k_begin, work.kv_head)),
                           lanes.shifted(rows_of(call.v, tile.batch, tile.k_begin, work.kv_head))};
  keys.ensure(2 * kChunkKeys);
  __syncthreads();
  lanes.gather(shared, tensors, keys.first_chunk(), keys.filled());
  copy_commit();

  if (threadIdx.x < kTileRows) {
    const int row = tile.row0 + threadIdx.x;
    RowState state = absent_row();
    if (static_cast<int>(threadIdx.x) < tile.rows) {
      const int64_t at = row_index(call, tile, work.head, row);
      state = row_state(call, tile, row, forward.threshold[at], forward.tie_index[at]);
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

  float o[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
  RowSoftmax rows[2];
  bool large = false;  // of the warp: a reference is beyond kLargeReference
  Contested contested;
  const float scale = call.softmax_scale * kLog2e;

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
    const uint64_t k = k_major(stage);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      wgmma<T>(s, q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3], k + k_step(i, kChunkKeys), i > 0);
    }
    wgmma_commit();
    const ChunkFilter filter(upper_state, lower_state, contested, chunk, count);
    keys.ensure((c + 3) * kChunkKeys);
    wgmma_wait<0>();

    filter.drop(s, upper_state, lower_state, chunk, count, column_pair);
    float largest[2] = {s[0], s[2]};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      largest[0] = fmaxf(largest[0], fmaxf(s[4 * j], s[4 * j + 1]));
      largest[1] = fmaxf(largest[1], fmaxf(s[4 * j + 2], s[4 * j + 3]));
    }
    if (__any_sync(~0u, largest[0] * scale > rows[0].limit || largest[1] * scale > rows[1].limit)) {
      const float upper_factor = raise_reference<T>(rows[0], largest[0], scale);
      const float lower_factor = raise_reference<T>(rows[1], largest[1], scale);
      large = __any_sync(~0u, fmaxf(fabsf(rows[0].reference), fabsf(rows[1].reference)) > kLargeReference);
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o[i] *= i & 2 ? lower_factor : upper_factor;
    }
    if (large) {
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] = (s[i] - rows[i / 2 % 2].base) * scale;
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] = fmaf(s[i], scale, -rows[i / 2 % 2].reference);
    }
    uint32_t p[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = exp2_fast(s[4 * j + 2 * half]);
        const float b = exp2_fast(s[4 * j + 2 * half + 1]);
        rows[half].sum += a + b;
        p[2 * j + half] = pack<T>(a, b);
      }
    }
    const uint64_t v = mn_major(stage + kBlockBytes<kDim>, kChunkKeys);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kChunkKeys / 16; ++i) {
      wgmma<T, Major::kMN>(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], v + i * kMnStep, true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    chunk = next_chunk;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows[half].sum;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int row = upper + 8 * half;
    if (row >= tile.rows) continue;
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    uint32_t* out = row_pointer<uint32_t>(
        View{forward.out.data, forward.out.batch / 2, forward.out.token / 2, forward.out.head / 2},
        tile.batch, tile.q_begin + tile.row0 + row, work.head);
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      out[4 * j + column_pair] = pack<T>(o[4 * j + 2 * half] * inverse, o[4 * j + 2 * half + 1] * inverse);
    }
    if (column_pair == 0) {
      forward.lse[row_index(call, tile, work.head, tile.row0 + row)] =
          sum == 0.0f ? -kInfinity : (rows[half].reference + log2f(sum)) * kLn2;
    }
  }
}

template <typename T, int kDim>
cudaError_t launch(const ForwardCall& forward, cudaStream_t stream) {
  constexpr int kBytes = ForwardMemory<kDim>::kTotal;
  const auto kernel = forward_kernel<T, kDim>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(forward.call.heads) * forward.call.num_tiles;
  kernel<<<blocks, 128, kBytes, stream>>>(forward, bitmap_words(forward.call));
  return cudaGetLastError();
}

}  // namespace

bool supports_union(const Call& call) {
  const auto narrow = [](const View& v) { return v.token >= 0 && v.token < (int64_t{1} << 31); };
  return (call.dtype == DType::kBFloat16 || call.dtype == DType::kFloat16) && call.head_dim == call.v_dim &&
         (call.head_dim == 64 || call.head_dim == 128) && !call.kv_group && narrow(call.q) &&
         narrow(call.k) && narrow(call.v) && int64_t{call.heads} * call.num_tiles < (int64_t{1} << 31);
}

cudaError_t forward_union(const ForwardCall& forward, cudaStream_t stream) {
  const Call& call = forward.call;
  if (!supports_union(call)) return cudaErrorNotSupported;
  if (forward.regimes.union_size == nullptr || call.heads == 0 || call.num_tiles == 0) return cudaSuccess;
  const bool wide = call.head_dim == 128;
  if (call.dtype == DType::kFloat16) {
    return wide ? launch<__half, 128>(forward, stream) : launch<__half, 64>(forward, stream);
  }
  return wide ? launch<__nv_bfloat16, 128>(forward, stream) : launch<__nv_bfloat16, 64>(forward, stream);
}

}  // namespace topk_attn::cuda::sm90
