// Scores of many query rows of a KV head (speculative decoding, chunked prefill) against the cache, bf16 and
// fp16.
//
// One block for 64 rows of a KV head, which it keeps in shared memory; it walks over blocks of keys, the next
// one being copied while the present one is multiplied. Rows of different heads of the group and different
// tokens share the tile, so that K is read once for 64 rows. Cost: the products; K comes mostly from the L2
// cache.
#pragma once

#include "../portable/tile.cuh"
#include "cache.cuh"

namespace topk_attn::cuda::decode {

template <int D>
struct TileConfig {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 64;
  static constexpr int kKeys = D <= 128 ? 64 : 32;
  static constexpr int kSharedBytes = (kRows + 2 * kKeys) * D * 2;
};

// Rows from row_of(r), null where there is none, into a tile (portable/tile.cuh).
template <typename T, int D, int ROWS, int THREADS, typename RowOf>
__device__ __forceinline__ void gather_tile(uint32_t tile, const T* anything, int channels,
                                            const RowOf& row_of) {
  constexpr int kChunks = D / 8;
  constexpr int kRowsAtOnce = THREADS / kChunks;
  const int chunk = threadIdx.x % kChunks;
  const bool channel_exists = chunk * 8 < channels;
#pragma unroll 4
  for (int r = threadIdx.x / kChunks; r < ROWS; r += kRowsAtOnce) {
    const T* const row = row_of(r);
    const bool valid = channel_exists && row != nullptr;
    copy16(tile + r * (D * 2) + ((chunk ^ (r & 7)) << 4), valid ? row + chunk * 8 : anything, valid);
  }
}

template <typename T, int D>
__global__ __launch_bounds__(TileConfig<D>::kThreads) void scan_tile_kernel(
    const __grid_constant__ DecodeCall c, const __grid_constant__ Slab slab,
    const __grid_constant__ Scratch scratch, const int tiles) {
  using Config = TileConfig<D>;
  extern __shared__ __align__(1024) char shared[];
  const int slab_sequence = static_cast<int>(blockIdx.y / (tiles * c.kv_heads));
  const int kv_head = static_cast<int>(blockIdx.y / tiles) % c.kv_heads;
  const int row0 = static_cast<int>(blockIdx.y % tiles) * Config::kRows;
  const int group_rows = c.heads / c.kv_heads * slab.tokens;
  const int rows = min(Config::kRows, group_rows - row0);
  const int sequence = slab.first_sequence + slab_sequence;
  const State state = state_of(c, scratch, sequence);
  const int64_t first = first_row(c, slab, slab_sequence, kv_head) + row0;
  if (blockIdx.x == 0 && threadIdx.x < rows) scratch.arrived[first + threadIdx.x] = 0;

  // The rows' last token sees most; with all rows of one head that is less than the slab's last.
  const int last_token = row0 / slab.tokens == (row0 + rows - 1) / slab.tokens
                             ? (row0 + rows - 1) % slab.tokens
                             : slab.tokens - 1;
  const Span span = seen_by(c, state, slab.first_token + last_token);
  const int begin = static_cast<int>(span.begin) / Config::kKeys * Config::kKeys;
  const int end = static_cast<int>(span.end);
  const int step = static_cast<int>(gridDim.x) * Config::kKeys;
  int key = begin + static_cast<int>(blockIdx.x) * Config::kKeys;
  if (span.size() <= 0 || key >= end) return;

  const uint32_t q_tile = shared_address(shared);
  const uint32_t k_tiles = q_tile + Config::kRows * D * 2;
  const T* const queries = static_cast<const T*>(c.q.data);
  const T* const keys = static_cast<const T*>(c.k.data) + kv_head * c.k.head;
  gather_tile<T, D, Config::kRows, Config::kThreads>(q_tile, queries, c.head_dim, [&](int r) {
    return r < rows ? query_row<T>(c, slab, slab_sequence, kv_head, row0 + r) : nullptr;
  });
  const auto load_keys = [&](int stage, int from) {
    gather_tile<T, D, Config::kKeys, Config::kThreads>(
        k_tiles + stage * (Config::kKeys * D * 2), keys, c.head_dim,
        [&](int r) { return from + r < end ? keys + row_offset(c, c.k, sequence, from + r) : nullptr; });
  };
  load_keys(0, key);
  copy_commit();
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  int stage = 0;
#pragma unroll 1
  for (; key < end; key += step, stage ^= 1) {
    if (key + step < end) load_keys(stage ^ 1, key + step);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    constexpr int kColumns = Config::kKeys / 8;
    float s[kColumns][4];
    portable::dot_rows<T, D, kColumns>(s, q_tile, 16 * warp, k_tiles + stage * (Config::kKeys * D * 2), 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = 16 * warp + g + 8 * half;
      if (r >= rows) continue;
      float* const out = scratch.scores + (first + r) * scratch.ld + key + 2 * t;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        // A score row has room up to the next multiple of 32.
        if (key + 8 * n < scratch.ld) {
          *reinterpret_cast<float2*>(out + 8 * n) = make_float2(s[n][2 * half], s[n][2 * half + 1]);
        }
      }
    }
    __syncthreads();  // the stage is no longer read
  }
}

template <typename T, int D>
cudaError_t run_scan_tile(const DecodeCall& call, const Slab& slab, const Scratch& scratch, int sms,
                          cudaStream_t stream) {
  using Config = TileConfig<D>;
  const auto kernel = scan_tile_kernel<T, D>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int group_rows = call.heads / call.kv_heads * slab.tokens;
  const int tiles = (group_rows + Config::kRows - 1) / Config::kRows;
  const int64_t y = int64_t{tiles} * call.kv_heads * slab.sequences;
  if (y > 65535) return cudaErrorInvalidValue;
  const int64_t wanted = (int64_t{sms} * 8 + y - 1) / y;
  const int64_t most = (int64_t{call.capacity} + Config::kKeys - 1) / Config::kKeys;
  const int64_t x = wanted < most ? wanted : most;
  kernel<<<dim3(static_cast<unsigned>(x > 0 ? x : 1), static_cast<unsigned>(y)), Config::kThreads,
           Config::kSharedBytes, stream>>>(call, slab, scratch, tiles);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::decode
