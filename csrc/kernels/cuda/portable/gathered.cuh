// Attention over the gathered union of a tile's kept keys: for tiles whose rows keep much the same keys
// (Regimes). One block per (head, tile): here the forward, in gathered_backward.cuh the gradients.
//
// The tile's bitmap is expanded, about 2,000 keys at a time, into a list of key positions in shared memory;
// blocks of listed keys are copied row by row with cp.async and multiplied as contiguous blocks are. A warp
// holds 32 rows, so that each fragment of K and V serves two products. Cost of an entry of the union: 4 D
// bytes gathered from L2 (once in the forward, once in the backward), and 8 D bytes of float32 reductions
// into L2 for dK and dV. Keys of a list ascend, so that a row's filter is as cheap as over contiguous keys.
#pragma once

#include "forward.cuh"

namespace topk_attn::cuda::portable {

inline constexpr int kListStep = 2048;    // keys whose bits are expanded together
inline constexpr int kListRoom = 3072;    // entries of a list
inline constexpr int kListReach = 61440;  // keys that a list spans: positions have 16 bits
inline constexpr int kListPadding = 64;   // entries of no key behind the last: a block
inline constexpr uint16_t kNoKey = 0xffff;

// A list of kept keys, in shared memory.
struct KeyList {
  uint16_t keys[kListRoom + kListPadding];  // positions from the first key of the list; then kNoKey
  int warp_counts[2][4];

  __device__ __forceinline__ int key(int begin, int i) const {
    return keys[i] == kNoKey ? INT_MAX : begin + keys[i];
  }
};

// Lists the keys from `at` whose bits are set, ascending, as many steps as surely fit; returns how many, and
// in `at` where the next list begins. Every thread of the block calls it; it ends with a barrier.
template <int THREADS>
__device__ __forceinline__ int list_keys(KeyList& list, const uint32_t* bitmap, int seen, int& at) {
  constexpr int kBits = kListStep / THREADS;  // of a thread in a step
  static_assert(kBits <= 32 && THREADS <= 128);
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int begin = at;
  const auto bits_at = [&](int key) {
    key += thread * kBits;
    const uint32_t word = key < seen ? __ldg(bitmap + key / 32) : 0;
    return kBits == 32 ? word : word >> (key % 32) & ((1u << kBits % 32) - 1);
  };
  int count = 0;
  uint32_t next = bits_at(at);
  __syncthreads();  // the previous list is no longer read
  for (int step = 0; at < seen && count <= kListRoom - kListStep && at - begin < kListReach; ++step) {
    uint32_t bits = next;
    next = bits_at(at + kListStep);
    const int own = __popc(bits);
    int through = own;
#pragma unroll
    for (int other = 1; other < 32; other *= 2) {
      const int below = __shfl_up_sync(~0u, through, other);
      if (lane >= other) through += below;
    }
    int* const counts = list.warp_counts[step % 2];
    if (lane == 31) counts[warp] = through;
    __syncthreads();
    int to = count + through - own;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) {
      to += w < warp ? counts[w] : 0;
      count += counts[w];
    }
    const int first = at - begin + thread * kBits;
    for (; bits != 0; bits &= bits - 1) {
      list.keys[to++] = static_cast<uint16_t>(first + __ffs(static_cast<int>(bits)) - 1);
    }
    at += kListStep;
  }
  for (int i = thread; i < kListPadding; i += THREADS) list.keys[count + i] = kNoKey;
  __syncthreads();
  return count;
}

// Starts the copy of KEYS listed rows from list entry `first`; rows of no key are zeros.
template <typename T, int D, int KEYS, int THREADS>
__device__ __forceinline__ void gather_tile(uint32_t tile, const T* source, int64_t row_stride,
                                            const KeyList& list, int begin, int first, int channels) {
  constexpr int kChunks = D / 8;
  constexpr int kRowsAtOnce = THREADS / kChunks;
  static_assert(KEYS % kRowsAtOnce == 0);
  const int row = threadIdx.x / kChunks;
  const int chunk = threadIdx.x % kChunks;
  const bool channel_exists = chunk * 8 < channels;
  const T* const origin = source + int64_t{begin} * row_stride + chunk * 8;
#pragma unroll 4
  for (int r = row; r < row + KEYS; r += kRowsAtOnce) {
    const int position = list.keys[first + r];
    const bool valid = channel_exists && position != kNoKey;
    copy16(tile + r * (D * 2) + ((chunk ^ (r & 7)) << 4), valid ? origin + position * row_stride : source,
           valid);
  }
}

// The keys of a block of listed ones, as mask_block() wants them.
struct ListedKeys {
  const KeyList& list;
  int begin;
  int first;
  __device__ __forceinline__ int operator[](int i) const { return list.key(begin, first + i); }
};

template <typename T, int D>
__global__ void __launch_bounds__(kForwardThreads, 4)
    forward_gathered_kernel(const __grid_constant__ ForwardCall f) {
  constexpr uint32_t kKeyBytes = kForwardKeys * D * 2;
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
  const int row0 = threadIdx.x / 32 * kWideRows;
  const int kv_head = unit.head / (c.heads / c.kv_heads);
  const T* k = row_pointer<const T>(c.k, t.batch, t.k_begin, kv_head);
  const T* v = row_pointer<const T>(c.v, t.batch, t.k_begin, kv_head);
  load_tile<T, D, kTileRows, kForwardThreads>(
      q_tile, row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0, unit.head), c.q.token, t.rows,
      c.head_dim);
  copy_commit();

  const RowFilter filter = filter_of(c, t, unit.head, row0 + threadIdx.x % 32, f.threshold, f.tie_index);
  const float none = -__int_as_float(0x7f800000);
  float out[2][D / 8][4] = {};
  float largest[2][2] = {{none, none}, {none, none}};
  float sum[2][2] = {};
  const uint32_t* const bitmap = f.bitmap + entry * bitmap_words(c);
  for (int at = 0; at < seen;) {
    const int begin = at;
    const int count = list_keys<kForwardThreads>(list, bitmap, seen, at);
    const auto load = [&](int first, int stage) {
      const uint32_t to = kv_tiles + stage * 2 * kKeyBytes;
      gather_tile<T, D, kForwardKeys, kForwardThreads>(to, k, c.k.token, list, begin, first, c.head_dim);
      gather_tile<T, D, kForwardKeys, kForwardThreads>(to + kKeyBytes, v, c.v.token, list, begin, first,
                                                       c.v_dim);
    };
    if (count > 0) load(0, 0);
    copy_commit();
    int stage = 0;
    for (int first = 0; first < count; first += kForwardKeys, stage ^= 1) {
      if (first + kForwardKeys < count) load(first + kForwardKeys, stage ^ 1);
      copy_commit();
      copy_wait<1>();
      __syncthreads();
      const uint32_t k_tile = kv_tiles + stage * 2 * kKeyBytes;
      attend_block<T, D>(q_tile, row0, k_tile, k_tile + kKeyBytes, filter, ListedKeys{list, begin, first},
                         c.softmax_scale * kLog2E, out, largest, sum);
      __syncthreads();
    }
    copy_wait<0>();
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) write_rows<T>(f, t, unit.head, row0 + 16 * m, 0, out[m], largest[m], sum[m]);
}

template <typename T, int D>
cudaError_t run_forward_gathered(const ForwardCall& f, cudaStream_t stream) {
  const int64_t blocks = int64_t{f.call.num_tiles} * f.call.heads;
  if (blocks == 0) return cudaSuccess;
  if (f.bitmap == nullptr) return cudaErrorInvalidValue;
  constexpr int kBytes = forward_wide_bytes<D>();
  const auto kernel = forward_gathered_kernel<T, D>;
  const cudaError_t error = allow_shared<kBytes, sizeof(KeyList) + 1024>(kernel);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kForwardThreads, kBytes, stream>>>(f);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::portable
