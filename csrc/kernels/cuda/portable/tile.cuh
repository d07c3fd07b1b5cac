// Tiles of 16-bit rows in shared memory and their tensor-core fragments, for every GPU since sm_80.
//
// A tile is ROWS x D channels, row-major; the 16-byte chunk c of row r lies at chunk c ^ (r & 7), so that
// ldmatrix reads eight rows without bank conflicts. Rows and channels that do not exist are zeros.
//
// Fragments follow mma.m16n8k16: lane = 4 * g + t holds rows g and g + 8, columns 2t and 2t + 1 of each 16 x
// 8 result.
#pragma once

#include "../common/mma.cuh"
#include "../common/select_scores.h"
#include "../common/sequence.cuh"

namespace topk_attn::cuda::portable {

// How a kernel is cut for head dims up to D, within the 99 KiB of shared memory that sm_86 and sm_120 offer.
template <int D>
struct Config {
  // Four warps of 16 rows; at D = 256 two warps share the rows and each sums half of the channels of the
  // result.
  static constexpr int kSplit = D <= 128 ? 1 : 2;
  static constexpr int kThreads = 128 * kSplit;
  static constexpr int kChannels = D / kSplit;
  static constexpr int kKeys = D <= 128 ? 64 : 32;  // keys of a block
  static constexpr int kForwardStages = 2;          // blocks of K and V in flight
  static constexpr int kBackwardStages = D <= 128 ? 2 : 1;
};

// Shared memory that a block may have on sm_86, 89 and 120, the least of all GPUs since sm_80.
inline constexpr int kSharedLimit = 99 * 1024;

// Before a launch with kDynamic bytes of shared memory, beside which the kernel declares at most kStatic.
template <int kDynamic, int kStatic = 3072, typename Kernel>
cudaError_t allow_shared(Kernel kernel) {
  static_assert(kDynamic + kStatic <= kSharedLimit);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDynamic);
}

// Starts the copy of ROWS rows, `rows` of which exist, from `source` (the first row; channels beyond
// `channels` are zeros).
template <typename T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* source, int64_t row_stride, int rows,
                                          int channels) {
  constexpr int kChunks = D / 8;
  constexpr int kRowsAtOnce = THREADS / kChunks;
  static_assert(kRowsAtOnce * kChunks == THREADS && ROWS % kRowsAtOnce == 0);
  const int row = threadIdx.x / kChunks;
  const int chunk = threadIdx.x % kChunks;
  const bool channel_exists = chunk * 8 < channels;
  const T* from = source + row * row_stride + chunk * 8;
#pragma unroll
  for (int r = 0; r < ROWS; r += kRowsAtOnce) {
    const bool valid = channel_exists && row + r < rows;
    const uint32_t to = tile + (row + r) * (D * 2) + ((chunk ^ ((row + r) & 7)) << 4);
    copy16(to, valid ? from : source, valid);
    from += kRowsAtOnce * row_stride;
  }
}

// The same where all rows and channels exist: three instructions a copy.
template <typename T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_whole_tile(uint32_t tile, const T* source, int64_t row_stride) {
  constexpr int kChunks = D / 8;
  constexpr int kRowsAtOnce = THREADS / kChunks;
  static_assert(kRowsAtOnce * kChunks == THREADS && kRowsAtOnce % 8 == 0 && ROWS % kRowsAtOnce == 0);
  const int row = threadIdx.x / kChunks;
  const int chunk = threadIdx.x % kChunks;
  const T* from = source + row * row_stride + chunk * 8;
  const uint32_t to = tile + row * (D * 2) + ((chunk ^ (row & 7)) << 4);
#pragma unroll
  for (int r = 0; r < ROWS; r += kRowsAtOnce) {
    copy16(to + r * (D * 2), from, true);
    from += kRowsAtOnce * row_stride;
  }
}

__device__ __forceinline__ void store_shared(uint32_t at, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}

// Fragment addresses. Tiles are aligned to their rows (2 * D bytes), so the swizzled address of channel step
// `step` is an exclusive or with a constant; rows are offset by multiples of 8, which leave the swizzle
// alone.
//
// 16 rows x 16 channels as the first operand: lane l addresses row l % 16, channel half l / 16.
template <int D>
__device__ __forceinline__ uint32_t a_address(uint32_t tile, int row) {
  const uint32_t lane = threadIdx.x % 32;
  return tile + (row + lane % 16) * (D * 2) + (((lane / 16) ^ (lane & 7)) << 4);
}
// As the second operand of rows^T: registers 0, 1 serve rows 0-7, registers 2, 3 rows 8-15.
template <int D>
__device__ __forceinline__ uint32_t b_address(uint32_t tile, int row) {
  const uint32_t lane = threadIdx.x % 32;
  return tile + (row + lane % 8 + lane / 16 * 8) * (D * 2) + (((lane / 8 % 2) ^ (lane & 7)) << 4);
}

// c = (16 rows of `a_tile` from a_row) . (8 * N rows of `b_tile` from b_row)^T: the one way in which scores
// are summed.
template <typename T, int D, int N>
__device__ __forceinline__ void dot_rows(float (&c)[N][4], uint32_t a_tile, int a_row, uint32_t b_tile,
                                         int b_row) {
#pragma unroll
  for (int n = 0; n < N; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
  const uint32_t a_at = a_address<D>(a_tile, a_row);
  const uint32_t b_at = b_address<D>(b_tile, b_row);
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[4];
    load_matrix_x4(a, a_at ^ (32 * step));
    const uint32_t b_step = b_at ^ (32 * step);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_matrix_x4(b, b_step + n * 8 * (D * 2));
      mma_16816<T>(c[n], a, b[0], b[1]);
      mma_16816<T>(c[n + 1], a, b[2], b[3]);
    }
  }
}

// c += p (16 x 8 * K, as operands) . (8 * K rows of `tile` from `row`, 8 * N channels from `channel`).
template <typename T, int D, int K, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[N][4], const uint32_t (&p)[K / 2][4], uint32_t tile,
                                              int row, int channel) {
  const uint32_t at = a_address<D>(tile, row) ^ (2 * channel);
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    const uint32_t column = at ^ (16 * n);
#pragma unroll
    for (int k = 0; k < K / 2; ++k) {
      uint32_t b[4];
      load_matrix_x4_trans(b, column + k * 16 * (D * 2));
      mma_16816<T>(c[n], p[k], b[0], b[1]);
      mma_16816<T>(c[n + 1], p[k], b[2], b[3]);
    }
  }
}

// Products of warps that hold 16 M rows, where each fragment read serves M times as many products.
//
// c = (16 M rows of `a_tile` from a_row) . (8 N rows of `b_tile` from b_row)^T, summed as dot_rows() does.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void dot_block(float (&c)[M][N][4], uint32_t a_tile, int a_row, uint32_t b_tile,
                                          int b_row) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0.0f;
  }
  const uint32_t a_at = a_address<D>(a_tile, a_row);
  const uint32_t b_at = b_address<D>(b_tile, b_row);
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrix_x4(a[m], (a_at ^ (32 * step)) + m * 16 * (D * 2));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_matrix_x4(b, (b_at ^ (32 * step)) + n * 8 * (D * 2));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_16816<T>(c[m][n], a[m], b[0], b[1]);
        mma_16816<T>(c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// c += p (16 M x 8 K, as operands) . (8 K rows of `tile` from `row`, 8 N channels from `channel`).
template <typename T, int D, int M, int K, int N>
__device__ __forceinline__ void multiply_block(float (&c)[M][N][4], const uint32_t (&p)[M][K / 2][4],
                                               uint32_t tile, int row, int channel) {
  const uint32_t at = a_address<D>(tile, row) ^ (2 * channel);
#pragma unroll
  for (int n = 0; n < N; n += 2) {
#pragma unroll
    for (int k = 0; k < K / 2; ++k) {
      uint32_t b[4];
      load_matrix_x4_trans(b, (at ^ (16 * n)) + k * 16 * (D * 2));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_16816<T>(c[m][n], p[m][k], b[0], b[1]);
        mma_16816<T>(c[m][n + 1], p[m][k], b[2], b[3]);
      }
    }
  }
}

// A 64 x 64 tile of results passed between warps, laid out as a tile of 64 channels. Stores 32 x 8 N of them,
// from (row, column); the fragment registers are those of dot_block().
inline constexpr int kPassedBytes = 64 * 64 * 2;

template <int N>
__device__ __forceinline__ void store_passed(uint32_t tile, int row, int column,
                                             const uint32_t (&x)[2][N][2]) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t line = tile + (row + 16 * m + 8 * h + g) * 128 + threadIdx.x % 4 * 4;
#pragma unroll
      for (int n = 0; n < N; ++n) store_shared(line + (((column / 8 + n) ^ g) << 4), x[m][n][h]);
    }
  }
}

// c (16 M x 8 N) += passed . (64 rows of `tile`, from `channel`), `passed` being rows `row` .. of the passed
// tile or, transposed, its columns.
template <typename T, int D, bool kTransposed, int M, int N>
__device__ __forceinline__ void multiply_passed(float (&c)[M][N][4], uint32_t passed, int row, uint32_t tile,
                                                int channel) {
  const uint32_t a_at = kTransposed ? b_address<64>(passed, 0) ^ (2 * row) : a_address<64>(passed, row);
  const uint32_t b_at = a_address<D>(tile, 0) ^ (2 * channel);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (kTransposed) {
        load_matrix_x4_trans(a[m], (a_at ^ (32 * m)) + k * 16 * 128);
      } else {
        load_matrix_x4(a[m], (a_at ^ (32 * k)) + m * 16 * 128);
      }
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_matrix_x4_trans(b, (b_at ^ (16 * n)) + k * 16 * (D * 2));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_16816<T>(c[m][n], a[m], b[0], b[1]);
        mma_16816<T>(c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Results as the first operand of the next product.
template <typename T, int N>
__device__ __forceinline__ void as_operand(uint32_t (&a)[N / 2][4], const float (&c)[N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    a[k][0] = pack<T>(c[2 * k][0], c[2 * k][1]);
    a[k][1] = pack<T>(c[2 * k][2], c[2 * k][3]);
    a[k][2] = pack<T>(c[2 * k + 1][0], c[2 * k + 1][1]);
    a[k][3] = pack<T>(c[2 * k + 1][2], c[2 * k + 1][3]);
  }
}

// The (head, tile) of a block: one KV head at a time so that its K and V stay in the L2 cache, long tiles
// first.
__device__ __forceinline__ Unit unit_of(const Call& c, int block) {
  const int group = c.heads / c.kv_heads;
  const int per_kv_head = c.num_tiles * group;
  const int rest = block % per_kv_head;
  return Unit{block / per_kv_head * group + rest % group, c.num_tiles - 1 - rest / group};
}

// Appends to `list` (shared, WINDOW entries) those of the candidates [first, first + WINDOW) below `count`
// for which `wanted` holds, ascending; returns how many. Every thread of the block calls it; it ends with a
// barrier.
template <int WINDOW, typename Wanted>
__device__ __forceinline__ int compact(int* list, int* warp_counts, int first, int count, Wanted wanted) {
  static_assert(WINDOW % 32 == 0);
  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const bool hit = thread < WINDOW && first + thread < count && wanted(first + thread);
  const uint32_t ballot = __ballot_sync(0xffffffffu, hit);
  __syncthreads();  // the previous list is no longer read
  if (thread % 32 == 0 && thread < WINDOW) warp_counts[warp] = __popc(ballot);
  __syncthreads();
  int before = 0;
  int total = 0;
#pragma unroll
  for (int w = 0; w < WINDOW / 32; ++w) {
    before += w < warp ? warp_counts[w] : 0;
    total += warp_counts[w];
  }
  if (hit) list[before + __popc(ballot & ((1u << (thread % 32)) - 1))] = first + thread;
  __syncthreads();
  return total;
}

// True iff some row of the tile keeps one of the keys [block * KEYS, (block + 1) * KEYS).
template <int KEYS>
__device__ __forceinline__ bool block_kept(const uint32_t* tile_bitmap, int block) {
  if (tile_bitmap == nullptr) return true;
  uint32_t any = 0;
#pragma unroll
  for (int w = 0; w < KEYS / 32; ++w) any |= tile_bitmap[block * (KEYS / 32) + w];
  return any != 0;
}

// The larger of two scores in the order of the selection: a NaN wins.
__device__ __forceinline__ float best_score(float a, float b) {
  return a != a ? a : b != b ? b : fmaxf(a, b);
}

}  // namespace topk_attn::cuda::portable
