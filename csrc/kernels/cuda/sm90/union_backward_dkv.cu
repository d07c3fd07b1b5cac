// dK and dV over the gathered union: two neighbouring query tiles (128 rows of one head) per thread block, or
// one where its neighbour is left to the other regime or does not exist.
//
// Q and dO of the rows stay in shared memory. Two warpgroups walk the union of the rows' kept keys, each
// through its own half of the bitmap (pairs of words in turn), 64 keys at a time, with the products
// transposed so that P^T and dS^T are A operands in registers:
//
//   S^T = K Q^T, P^T kept in float32; dV = P^T dO; dP^T = V dO^T; dS^T = P^T (dP^T - delta); dK = dS^T Q
//
// The 64 x D sums of a chunk are staged in shared memory and added to the float32 sums in device memory by
// bulk reductions of whole rows; dV's are issued while dP^T runs. 128 rows instead of 64 cut these
// reductions, which bound the kernel (L2: about 3.2 TB/s on an H100), by a third.
//
// For a deterministic result the sums are integers, multiples of a step of each key (union_fixed_point.cuh).
//
// Cost: union x (4 D bytes gathered + 8 D bytes reduced), and 8 x rows x D x union FLOP.
#include "union.h"
#include "union_fixed_point.cuh"

namespace topk_attn::cuda::sm90 {
namespace {

constexpr int kMaxRows = 2 * kTileRows;
constexpr int kThreads = 256;

template <int kDim>
struct KeyGradientMemory {
  static constexpr int kPitch = kDim * 4 + 32;  // bytes of a staged row; the padding avoids bank conflicts
  static constexpr int kQueries = 0;
  static constexpr int kOutGradient = 2 * kBlockBytes<kDim>;
  static constexpr int kKeys = 2 * kOutGradient;  // K and V of one chunk, per warpgroup
  static constexpr int kStaging = kKeys + 4 * kBlockBytes<kDim>;
  static constexpr int kRing = kStaging + 2 * kChunkKeys * kPitch;
  static constexpr int kRows = kRing + 2 * KeyStream<2>::kBytes;
  static constexpr int kTotal = kRows + kMaxRows * kRowBytes;
};

// Whether `next` exists and follows `tile` in the same sequence.
__device__ inline bool follows(const Tile& tile, const Tile& next) {
  return next.rows > 0 && next.batch == tile.batch && next.q_begin == tile.q_begin &&
         next.k_begin == tile.k_begin && next.tq == tile.tq && next.tk == tile.tk &&
         next.row0 == tile.row0 + kTileRows;
}

// One query tile or two, starting at `tile`, number `work.tile` (kBlocks = 2: and the next number).
template <typename T, int kDim, bool kFixedPoint, int kBlocks>
__device__ __forceinline__ void key_gradients(const BackwardCall& backward, int64_t words,
                                              const InverseStep* inverse_steps, const Work& work,
                                              const Tile& tile, int seen, uint32_t shared) {
  using Memory = KeyGradientMemory<kDim>;
  const Call& call = backward.call;
  const int group = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int column_pair = lane % 4;
  const int rows = min(kBlocks * kTileRows, tile.tq - tile.row0);
  const uint32_t row_states = shared + Memory::kRows;
  const uint32_t k_chunk = shared + Memory::kKeys + group * 2 * kBlockBytes<kDim>;
  const uint32_t v_chunk = k_chunk + kBlockBytes<kDim>;
  const uint32_t staged_rows = shared + Memory::kStaging + (group * kChunkKeys + warp * 16) * Memory::kPitch;
  const auto group_sync = [group] { named_barrier_sync(1 + group, 128); };

  const uint32_t* bits = backward.bitmap + (int64_t{work.head} * call.num_tiles + work.tile) * words;
  KeyStream<2> keys(shared + Memory::kRing + group * KeyStream<2>::kBytes, bits,
                    kBlocks == 2 ? bits + words : nullptr, seen, group, warp, lane);
  const GatherLane<kDim> lanes(warp, lane);
  const Rows k_rows[1] = {lanes.shifted(rows_of(call.k, tile.batch, tile.k_begin, work.kv_head))};
  const Rows v_rows[1] = {lanes.shifted(rows_of(call.v, tile.batch, tile.k_begin, work.kv_head))};
  const int64_t first_token = int64_t{tile.batch} * call.tk + tile.k_begin;
  const int64_t first_row = first_token * call.kv_heads + work.kv_head;
  float* const dk_sum = backward.dk_sum + first_row * kDim;
  float* const dv_sum = backward.dv_sum + first_row * kDim;
  const uint32_t sum_stride = static_cast<uint32_t>(call.kv_heads) * kDim * 4;  // bytes

  keys.ensure(2 * kChunkKeys);
  group_sync();
  lanes.gather(k_chunk, k_rows, keys.first_chunk(), keys.filled());
  copy_rows<kDim, kBlocks * kTileRows>(shared + Memory::kQueries,
                                       rows_of(call.q, tile.batch, tile.q_begin + tile.row0, work.head), rows,
                                       threadIdx.x, kThreads);
  copy_rows<kDim, kBlocks * kTileRows>(
      shared + Memory::kOutGradient, rows_of(backward.dout, tile.batch, tile.q_begin + tile.row0, work.head),
      rows, threadIdx.x, kThreads);
  copy_commit();
  lanes.gather(v_chunk, v_rows, keys.first_chunk(), keys.filled());
  copy_commit();
  if (threadIdx.x < kBlocks * kTileRows) {
    const int row = tile.row0 + threadIdx.x;
    RowState state = absent_row();
    if (static_cast<int>(threadIdx.x) < rows) {
      const int64_t at = row_index(call, tile, work.head, row);
      state = row_state(call, tile, row, backward.threshold[at], backward.tie_index[at]);
      state.lse = lse_log2(backward.lse[at]);
      state.delta = backward.delta[at];
    }
    store_row(row_states + threadIdx.x * kRowBytes, state);
  }
  copy_wait<1>();
  fence_async_proxy();
  __syncthreads();

  Contested contested;
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) contested.add_row(row_states + (lane + 32 * i) * kRowBytes);
  contested.reduce_over_warp();
  const float scale = call.softmax_scale * kLog2e;

  // Adds row `i` of the warp's staged rows to the row of `key`.
  const auto reduce_row = [&](float* sums, uint32_t key, int i) {
    char* const to = reinterpret_cast<char*>(sums) + uint64_t{key} * sum_stride;
    if constexpr (kFixedPoint) {
      asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(to),
                   "r"(staged_rows + i * Memory::kPitch), "n"(kDim * 4)
                   : "memory");
    } else {
      asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                   "r"(staged_rows + i * Memory::kPitch), "n"(kDim * 4)
                   : "memory");
    }
  };
  // Stages the warp's 16 x D part of a chunk's sums, the thread's two rows times a factor each, once earlier
  // staged rows have been read.
  const auto stage_pair = [](uint32_t address, float x, float y, float factor) {
    if constexpr (kFixedPoint) {
      store_shared_int2(address, in_steps(x, factor), in_steps(y, factor));
    } else {
      store_shared_float2(address, x * factor, y * factor);
    }
  };
  const auto stage_rows = [&](const float(&sum)[kDim / 2], float upper_factor, float lower_factor) {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    __syncwarp();
    const uint32_t upper = staged_rows + lane / 4 * Memory::kPitch + column_pair * 8;
    const uint32_t lower = upper + 8 * Memory::kPitch;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      stage_pair(upper + 32 * j, sum[4 * j], sum[4 * j + 1], upper_factor);
      stage_pair(lower + 32 * j, sum[4 * j + 2], sum[4 * j + 3], lower_factor);
    }
    fence_async_proxy();
    __syncwarp();
  };
  // Starts adding the staged rows to `sums`, a lane one row. `chunk`, `count`: the indices of the chunk they
  // belong to. (One lane issuing all rows takes fewer instructions, but makes the compiler serialize products
  // in flight.)
  const auto reduce_rows = [&](float* sums, uint32_t chunk, int count) {
    if (lane < min(16, count - warp * 16))
      reduce_row(sums, load_shared_int(chunk + (warp * 16 + lane) * 4), lane);
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    __syncwarp();
  };

  uint32_t chunk = keys.first_chunk();
  for (int c = 0; keys.filled() > c * kChunkKeys; ++c) {
    if (c > 0) {  // K of this chunk has arrived
      copy_wait<1>();
      fence_async_proxy();
      group_sync();
    }
    const int count = min(kChunkKeys, keys.filled() - c * kChunkKeys);
    const uint32_t next_chunk = keys.chunk_after(chunk);
    const int upper_entry = warp * 16 + lane / 4;
    const int upper_key = upper_entry < count ? load_shared_int(chunk + upper_entry * 4) : kNoKey;
    const int lower_key = upper_entry + 8 < count ? load_shared_int(chunk + (upper_entry + 8) * 4) : kNoKey;
    const bool plain = contested.holds(load_shared_int(chunk), load_shared_int(chunk + (count - 1) * 4));
    float2 upper_factor{1.0f, call.softmax_scale};  // of dV and dK
    float2 lower_factor = upper_factor;
    if constexpr (kFixedPoint) {
      const auto factor_of = [&](int key) {
        if (key == kNoKey) return float2{0.0f, 0.0f};
        const InverseStep x = __ldg(inverse_steps + first_row + int64_t{key} * call.kv_heads);
        return float2{x.x, x.y * call.softmax_scale};
      };
      upper_factor = factor_of(upper_key);
      lower_factor = factor_of(lower_key);
    }

    float p[kBlocks][32];
    float sum[kDim / 2];
    wgmma_fence();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint64_t k = k_major(k_chunk);
      const uint64_t q = k_major(shared + Memory::kQueries + b * kBlockBytes<kDim>);
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) wgmma<T>(p[b], k + k_step(i, 64), q + k_step(i, 64), i > 0);
      wgmma_commit();
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (kBlocks == 1) {
        wgmma_wait<0>();
      } else {
        wgmma_wait<1>();  // groups complete in order: all but the newest
      }
      const uint32_t states = row_states + (b * 64 + 2 * column_pair) * kRowBytes;
      if (plain) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int4 row = load_shared_int4(states + (8 * j + e) * kRowBytes);
            const float lse = load_shared_float(states + (8 * j + e) * kRowBytes + 24);
            float& x = p[b][4 * j + e];
            float& y = p[b][4 * j + 2 + e];
            const bool drop_x = x < __int_as_float(upper_key <= row.z ? row.x : row.y) || upper_key >= row.w;
            const bool drop_y = y < __int_as_float(lower_key <= row.z ? row.x : row.y) || lower_key >= row.w;
            x = drop_x ? 0.0f : exp2_fast(fmaf(x, scale, -lse));
            y = drop_y ? 0.0f : exp2_fast(fmaf(y, scale, -lse));
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const RowFilter filter = load_filter(states + (8 * j + e) * kRowBytes);
            const float lse = load_shared_float(states + (8 * j + e) * kRowBytes + 24);
            float& x = p[b][4 * j + e];
            float& y = p[b][4 * j + 2 + e];
            x = filter.keeps(x, upper_key) ? exp2_fast(fmaf(x, scale, -lse)) : 0.0f;
            y = filter.keeps(y, lower_key) ? exp2_fast(fmaf(y, scale, -lse)) : 0.0f;
          }
        }
      }
      uint32_t a[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) a[i] = pack<T>(p[b][2 * i], p[b][2 * i + 1]);
      const uint64_t out_gradient = mn_major(shared + Memory::kOutGradient + b * kBlockBytes<kDim>, 64);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wgmma<T, Major::kMN>(sum, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3],
                             out_gradient + i * kMnStep, b > 0 || i > 0);
      }
      wgmma_commit();
    }

    wgmma_wait<0>();
    stage_rows(sum, upper_factor.x, lower_factor.x);

    // V of this chunk has arrived; its K is no longer needed.
    copy_wait<0>();
    fence_async_proxy();
    group_sync();
    const int left = keys.filled() - (c + 1) * kChunkKeys;
    if (left > 0) lanes.gather(k_chunk, k_rows, next_chunk, left);
    copy_commit();

    float dp[32];
    uint32_t ds[kBlocks][16];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint64_t v = k_major(v_chunk);
      const uint64_t out_gradient = k_major(shared + Memory::kOutGradient + b * kBlockBytes<kDim>);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i)
        wgmma<T>(dp, v + k_step(i, 64), out_gradient + k_step(i, 64), i > 0);
      wgmma_commit();
      if (b == 0) {
        reduce_rows(dv_sum, chunk, count);
        keys.ensure((c + 3) * kChunkKeys);
        wgmma_wait<0>();
      } else {  // the first block's share of dK runs meanwhile
        const uint64_t q = mn_major(shared + Memory::kQueries + (b - 1) * kBlockBytes<kDim>, 64);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          wgmma<T, Major::kMN>(sum, ds[b - 1][4 * i], ds[b - 1][4 * i + 1], ds[b - 1][4 * i + 2],
                               ds[b - 1][4 * i + 3], q + i * kMnStep, b > 1 || i > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
      }
      if (b == kBlocks - 1) {  // V is no longer needed
        group_sync();
        if (left > 0) lanes.gather(v_chunk, v_rows, next_chunk, left);
        copy_commit();
      }
      const uint32_t deltas = row_states + (b * 64 + 2 * column_pair) * kRowBytes + 28;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float even = load_shared_float(deltas + 8 * j * kRowBytes);
        const float odd = load_shared_float(deltas + (8 * j + 1) * kRowBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 4 * j + 2 * half;
          ds[b][2 * j + half] = pack<T>(p[b][i] * (dp[i] - even), p[b][i + 1] * (dp[i + 1] - odd));
        }
      }
    }
    const uint64_t q = mn_major(shared + Memory::kQueries + (kBlocks - 1) * kBlockBytes<kDim>, 64);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma<T, Major::kMN>(sum, ds[kBlocks - 1][4 * i], ds[kBlocks - 1][4 * i + 1],
                           ds[kBlocks - 1][4 * i + 2], ds[kBlocks - 1][4 * i + 3], q + i * kMnStep,
                           kBlocks > 1 || i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    stage_rows(sum, upper_factor.y, lower_factor.y);
    reduce_rows(dk_sum, chunk, count);
    chunk = next_chunk;
  }
  copy_wait<0>();
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <typename T, int kDim, bool kFixedPoint>
__global__ void __launch_bounds__(kThreads, 1) dkv_kernel(const __grid_constant__ BackwardCall backward,
                                                          int64_t words, const InverseStep* inverse_steps) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const Call& call = backward.call;
  const Work work = work_of(call, blockIdx.x);
  const Tile tile = tile_at(call, work.tile);
  if (tile.rows == 0) return;
  const int64_t entry = int64_t{work.head} * call.num_tiles + work.tile;
  const int seen = seen_end(call, tile);
  if (!gathered(backward.regimes, entry, seen)) return;

  // Tiles of a sequence pair up as (0, 1), (2, 3), ...: the even one does both if both are gathered.
  if (tile.row0 / kTileRows % 2 == 1) {
    const Tile before = work.tile > 0 ? tile_at(call, work.tile - 1) : Tile{};
    if (follows(before, tile) && gathered(backward.regimes, entry - 1, seen_end(call, before))) return;
  } else {
    const Tile next = work.tile + 1 < call.num_tiles ? tile_at(call, work.tile + 1) : Tile{};
    if (follows(tile, next)) {
      const int next_seen = seen_end(call, next);
      if (gathered(backward.regimes, entry + 1, next_seen)) {
        key_gradients<T, kDim, kFixedPoint, 2>(backward, words, inverse_steps, work, tile, next_seen, shared);
        return;
      }
    }
  }
  key_gradients<T, kDim, kFixedPoint, 1>(backward, words, inverse_steps, work, tile, seen, shared);
}

template <typename T, int kDim, bool kFixedPoint>
cudaError_t launch(const BackwardCall& backward, const InverseStep* inverse_steps, cudaStream_t stream) {
  constexpr int kBytes = KeyGradientMemory<kDim>::kTotal;
  const auto kernel = dkv_kernel<T, kDim, kFixedPoint>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(backward.call.heads) * backward.call.num_tiles;
  kernel<<<blocks, kThreads, kBytes, stream>>>(backward, bitmap_words(backward.call), inverse_steps);
  return cudaGetLastError();
}

template <typename T, int kDim>
cudaError_t launch(const BackwardCall& backward, const InverseStep* inverse_steps, cudaStream_t stream) {
  return inverse_steps == nullptr ? launch<T, kDim, false>(backward, inverse_steps, stream)
                                  : launch<T, kDim, true>(backward, inverse_steps, stream);
}

}  // namespace

cudaError_t backward_union_dkv(const BackwardCall& backward, cudaStream_t stream, void* workspace) {
  const Call& call = backward.call;
  if (!supports_union(call)) return cudaErrorNotSupported;
  if (backward.regimes.union_size == nullptr || call.heads == 0 || call.num_tiles == 0) return cudaSuccess;
  if (backward.dk_sum == nullptr || backward.dv_sum == nullptr) return cudaErrorInvalidValue;
  if (workspace != nullptr) {
    const cudaError_t error = set_steps(backward, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  const InverseStep* const steps = static_cast<const InverseStep*>(workspace);
  const bool wide = call.head_dim == 128;
  if (call.dtype == DType::kFloat16) {
    return wide ? launch<__half, 128>(backward, steps, stream) : launch<__half, 64>(backward, steps, stream);
  }
  return wide ? launch<__nv_bfloat16, 128>(backward, steps, stream)
              : launch<__nv_bfloat16, 64>(backward, steps, stream);
}

}  // namespace topk_attn::cuda::sm90
