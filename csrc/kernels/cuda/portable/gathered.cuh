// Attention over the gathered union of a tile's kept keys: for tiles whose rows keep much the same keys
// (Regimes). Forward, dQ, and dK with dV, one block of four warps per (head, tile).
//
// The tile's bitmap is expanded, 4,096 keys at a time, into a list of key positions in shared memory; blocks
// of listed keys are copied row by row with cp.async and multiplied as contiguous blocks are. Cost of an
// entry of the union: 4 D bytes gathered from L2 (three times in all), and 8 D bytes of float32 reductions
// into L2 for dK and dV, which is what bounds the backward. Keys of a list ascend, so that a row's filter is
// as cheap as over contiguous keys.
#pragma once

#include <climits>

#include "forward.cuh"

namespace topk_attn::cuda::portable {

inline constexpr int kListKeys = 4096;  // keys of a window: one bitmap word a thread
inline constexpr int kGatherThreads = 128;
inline constexpr int kGatherKeys = 32;     // keys of a block of forward and dQ
inline constexpr int kGatherKeysDkv = 64;  // of dK and dV: 16 a warp
inline constexpr uint16_t kNoKey = 0xffff;

struct KeyList {
  uint16_t keys[kListKeys + kGatherKeysDkv];  // positions in the window; kNoKey behind the last
  int warp_counts[kGatherThreads / 32];

  __device__ __forceinline__ int key(int window, int i) const {
    return keys[i] == kNoKey ? INT_MAX : window + keys[i];
  }
};

// Lists the keys [window, window + kListKeys) whose bits are set, ascending; returns how many. Every thread
// of the block calls it; it ends with a barrier.
__device__ __forceinline__ int list_keys(KeyList& list, const uint32_t* bitmap, int64_t words, int window) {
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int64_t word = window / 32 + thread;
  uint32_t bits = word < words ? __ldg(bitmap + word) : 0;
  const int own = __popc(bits);
  int through = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, through, step);
    if (lane >= step) through += other;
  }
  __syncthreads();  // the previous list is no longer read
  if (lane == 31) list.warp_counts[warp] = through;
  __syncthreads();
  int at = through - own;
  int total = 0;
#pragma unroll
  for (int w = 0; w < kGatherThreads / 32; ++w) {
    at += w < warp ? list.warp_counts[w] : 0;
    total += list.warp_counts[w];
  }
  for (; bits != 0; bits &= bits - 1) {
    list.keys[at++] = static_cast<uint16_t>(32 * thread + __ffs(static_cast<int>(bits)) - 1);
  }
  if (thread < kGatherKeysDkv) list.keys[total + thread] = kNoKey;
  __syncthreads();
  return total;
}

// Starts the copy of KEYS listed rows from list entry `first`; rows of no key are zeros.
template <typename T, int D, int KEYS>
__device__ __forceinline__ void gather_tile(uint32_t tile, const T* source, int64_t row_stride,
                                            const KeyList& list, int window, int first, int channels) {
  constexpr int kChunks = D / 8;
  constexpr int kRowsAtOnce = kGatherThreads / kChunks;
  static_assert(KEYS % kRowsAtOnce == 0);
  const int row = threadIdx.x / kChunks;
  const int chunk = threadIdx.x % kChunks;
  const bool channel_exists = chunk * 8 < channels;
  const T* const origin = source + int64_t{window} * row_stride + chunk * 8;
#pragma unroll 2
  for (int r = row; r < row + KEYS; r += kRowsAtOnce) {
    const int position = list.keys[first + r];
    const bool valid = channel_exists && position != kNoKey;
    copy16(tile + r * (D * 2) + ((chunk ^ (r & 7)) << 4), valid ? origin + position * row_stride : source,
           valid);
  }
}

// mask_scores() for the listed keys from entry `first`.
template <int N>
__device__ __forceinline__ void mask_listed(float (&s)[N][4], const RowFilter (&filter)[2],
                                            const KeyList& list, int window, int first) {
  const float none = -__int_as_float(0x7f800000);
  const int begin = list.key(window, first);
  const int last = list.key(window, first + 8 * N - 1);  // INT_MAX: the block is not full
  if (last != INT_MAX &&
      __all_sync(~0u, filter[0].plain(begin, last + 1) && filter[1].plain(begin, last + 1))) {
    const float bound[2] = {filter[0].bound(begin), filter[1].bound(begin)};
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] < bound[e / 2] ? none : s[n][e];
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = list.key(window, first + 8 * n + threadIdx.x % 4 * 2 + e % 2);
      s[n][e] = filter[e / 2].keeps(s[n][e], key) ? s[n][e] : none;
    }
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kGatherThreads, 3)
    forward_gathered_kernel(const __grid_constant__ ForwardCall f) {
  constexpr int N = kGatherKeys / 8;
  constexpr uint32_t kKeyBytes = kGatherKeys * D * 2;
  extern __shared__ __align__(512) uint8_t shared[];
  __shared__ KeyList list;
  const Call& c = f.call;
  const Unit unit = unit_of(c, blockIdx.x);
  const Tile t = tile_at(c, unit.tile);
  const int seen = seen_end(c, t);
  const int64_t entry = int64_t{unit.head} * c.num_tiles + unit.tile;
  if (t.rows == 0 || !gathered(f.regimes, entry, seen)) return;

  const uint32_t q_tile = shared_address(shared);
  const uint32_t kv_tiles = q_tile + kTileRows * D * 2;
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int kv_head = unit.head / (c.heads / c.kv_heads);
  const T* k = row_pointer<const T>(c.k, t.batch, t.k_begin, kv_head);
  const T* v = row_pointer<const T>(c.v, t.batch, t.k_begin, kv_head);
  load_tile<T, D, kTileRows, kGatherThreads>(
      q_tile, row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0, unit.head), c.q.token, t.rows,
      c.head_dim);
  copy_commit();

  RowFilter filter[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    filter[h] = RowFilter{0.0f, -1, 0, 0, 0};
    const int row = 16 * warp + g + 8 * h;
    if (row < t.rows) {
      const int64_t at = row_index(c, t, unit.head, t.row0 + row);
      filter[h] = row_filter(c, t, t.row0 + row, f.threshold[at], f.tie_index[at]);
    }
  }
  const float none = -__int_as_float(0x7f800000);
  float out[D / 8][4] = {};
  float largest[2] = {none, none};
  float sum[2] = {0.0f, 0.0f};
  const int64_t words = bitmap_words(c);
  for (int window = 0; window < seen; window += kListKeys) {
    const int count = list_keys(list, f.bitmap + entry * words, words, window);
    const auto load = [&](int first, int stage) {
      const uint32_t at = kv_tiles + stage * 2 * kKeyBytes;
      gather_tile<T, D, kGatherKeys>(at, k, c.k.token, list, window, first, c.head_dim);
      gather_tile<T, D, kGatherKeys>(at + kKeyBytes, v, c.v.token, list, window, first, c.v_dim);
    };
    if (count > 0) load(0, 0);
    copy_commit();
    int stage = 0;
    for (int first = 0; first < count; first += kGatherKeys, stage ^= 1) {
      if (first + kGatherKeys < count) load(first + kGatherKeys, stage ^ 1);
      copy_commit();
      copy_wait<1>();
      __syncthreads();
      const uint32_t k_tile = kv_tiles + stage * 2 * kKeyBytes;
      float s[N][4];
      dot_rows<T, D, N>(s, q_tile, 16 * warp, k_tile, 0);
      mask_listed(s, filter, list, window, first);
      online_softmax(s, out, largest, sum, c.softmax_scale * kLog2E);
      uint32_t p[N / 2][4];
      as_operand<T, N>(p, s);
      multiply_rows<T, D, N, D / 8>(out, p, k_tile + kKeyBytes, 0, 0);
      __syncthreads();
    }
    copy_wait<0>();
  }
  write_rows<T>(f, t, unit.head, 16 * warp, 0, out, largest, sum);
}

template <int D>
constexpr int forward_gathered_bytes() {
  return (kTileRows + 2 * 2 * kGatherKeys) * D * 2;
}

template <typename T, int D>
cudaError_t run_forward_gathered(const ForwardCall& f, cudaStream_t stream) {
  const int64_t blocks = int64_t{f.call.num_tiles} * f.call.heads;
  if (blocks == 0) return cudaSuccess;
  constexpr int kBytes = forward_gathered_bytes<D>();
  const auto kernel = forward_gathered_kernel<T, D>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kGatherThreads, kBytes, stream>>>(f);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::portable
