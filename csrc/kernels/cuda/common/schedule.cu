// schedule.h: one block walks over the documents in chunks of its threads.
#include "schedule.h"

#include "sequence.cuh"

namespace topk_attn::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// Inclusive scan over the block by `combine`; `totals` is one value a warp. Ends with every thread past its
// last read of `totals`.
template <typename Combine>
__device__ int block_scan(int value, int (&totals)[kWarps], Combine combine) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value = combine(other, value);
  }
  if (lane == 31) totals[warp] = value;
  __syncthreads();
  if (warp == 0) {
    int total = totals[lane];
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, total, step);
      if (lane >= step) total = combine(other, total);
    }
    totals[lane] = total;
  }
  __syncthreads();
  if (warp > 0) value = combine(totals[warp - 1], value);
  __syncthreads();
  return value;
}

struct Max {
  __device__ int operator()(int a, int b) const { return max(a, b); }
};
struct Add {
  __device__ int operator()(int a, int b) const { return a + b; }
};

// Query tiles, or key tiles if `keys`. Documents are good or bad as a whole, so both lists hold the same
// ones.
__global__ __launch_bounds__(kThreads) void make_tiles_kernel(const Call call, const bool keys,
                                                              int2* const tiles, const int count) {
  __shared__ int totals[kWarps];
  __shared__ int ends[kThreads];  // tiles of this chunk's documents up to and with each
  const int thread = threadIdx.x;
  int largest_q = 0;  // largest offset of the chunks before
  int largest_k = 0;
  int done = 0;  // tiles written
  for (int first = 0; first < call.batch; first += kThreads) {
    const int document = first + thread;
    const bool exists = document < call.batch;
    const int q_begin = exists ? call.cu_q[document] : 0;
    const int k_begin = exists ? call.cu_k[document] : 0;
    const int seen_q = block_scan(max(q_begin, largest_q), totals, Max{});
    const int seen_k = block_scan(max(k_begin, largest_k), totals, Max{});
    int own = 0;
    if (exists && q_begin >= seen_q && k_begin >= seen_k) {
      // sequence_at() gives bad offsets (beyond the total, too long) as an empty sequence.
      const Tile sequence = sequence_at(call, document);
      own = ((keys ? sequence.tk : sequence.tq) + kTileRows - 1) / kTileRows;
    }
    const int end = block_scan(own, totals, Add{});
    ends[thread] = end;
    // The last thread saw all of the chunk.
    if (thread == kThreads - 1) {
      totals[0] = seen_q;
      totals[1] = seen_k;
    }
    __syncthreads();
    largest_q = totals[0];
    largest_k = totals[1];
    const int chunk = ends[kThreads - 1];
    for (int i = thread; i < chunk && done + i < count; i += kThreads) {
      int lo = 0;  // the first document whose end lies beyond i
      int hi = kThreads - 1;
      while (lo < hi) {
        const int middle = (lo + hi) / 2;
        if (ends[middle] > i) {
          hi = middle;
        } else {
          lo = middle + 1;
        }
      }
      const int before = lo == 0 ? 0 : ends[lo - 1];
      tiles[done + i] = make_int2(first + lo, (i - before) * kTileRows);
    }
    done += chunk;
    __syncthreads();
  }
  for (int i = done + thread; i < count; i += kThreads) tiles[i] = make_int2(-1, 0);
}

constexpr int kInitThreads = 256;

// One warp a row (b, h, t); 16-byte stores.
__global__ __launch_bounds__(kInitThreads) void init_rows_kernel(const Call call, const View out,
                                                                 const int element_size, float* const lse,
                                                                 float* const threshold,
                                                                 int32_t* const tie_index) {
  const int batch = call.cu_q == nullptr ? call.batch : 1;
  const int64_t rows = int64_t{batch} * call.heads * call.tq;
  const int64_t warps = int64_t{gridDim.x} * (kInitThreads / 32);
  const int lane = threadIdx.x % 32;
  for (int64_t i = (int64_t{blockIdx.x} * kInitThreads + threadIdx.x) / 32; i < rows; i += warps) {
    // Heads fastest: rows of `out` that lie side by side are written side by side.
    const int64_t h = i % call.heads;
    const int64_t t = i / call.heads % call.tq;
    const int64_t b = i / call.heads / call.tq;
    if (lane == 0) {
      const int64_t row = b * call.rows.batch + h * call.rows.head + t;
      if (lse != nullptr) lse[row] = __int_as_float(static_cast<int>(0xff800000));
      if (threshold != nullptr) threshold[row] = __int_as_float(0x7fc00000);
      if (tie_index != nullptr) tie_index[row] = -1;
    }
    if (out.data != nullptr) {
      const int64_t offset = b * out.batch + t * out.token + h * out.head;
      uint4* const to = reinterpret_cast<uint4*>(static_cast<char*>(out.data) + offset * element_size);
      for (int j = lane; j < call.v_dim * element_size / 16; j += 32) to[j] = make_uint4(0, 0, 0, 0);
    }
  }
}

__global__ __launch_bounds__(kTileRows) void admit_all_kernel(const Call call, float* const threshold,
                                                              int32_t* const tie_index) {
  const Tile tile = tile_at(call, blockIdx.x % call.num_tiles);
  const int head = blockIdx.x / call.num_tiles;
  const int row = tile.row0 + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= tile.rows) return;
  const bool sees = visible(row, tile.tq, tile.tk, call.causal).end > 0;
  const int64_t at = row_index(call, tile, head, row);
  threshold[at] = __int_as_float(static_cast<int>(sees ? 0xff800000 : 0x7fc00000));
  tie_index[at] = sees ? 0x7fffffff : -1;
}

}  // namespace

cudaError_t make_tiles(const Call& call, int2* tiles, cudaStream_t stream) {
  if (call.num_tiles <= 0) return cudaSuccess;
  make_tiles_kernel<<<1, kThreads, 0, stream>>>(call, false, tiles, call.num_tiles);
  return cudaGetLastError();
}

cudaError_t make_key_tiles(const Call& call, int2* key_tiles, int32_t count, cudaStream_t stream) {
  if (count <= 0) return cudaSuccess;
  make_tiles_kernel<<<1, kThreads, 0, stream>>>(call, true, key_tiles, count);
  return cudaGetLastError();
}

cudaError_t init_rows(const Call& call, View out, float* lse, float* threshold, int32_t* tie_index,
                      cudaStream_t stream) {
  const int64_t rows = int64_t{call.cu_q == nullptr ? call.batch : 1} * call.heads * call.tq;
  if (rows == 0) return cudaSuccess;
  const int64_t blocks = (rows + kInitThreads / 32 - 1) / (kInitThreads / 32);
  const int element_size = call.dtype == DType::kFloat32 ? 4 : 2;
  init_rows_kernel<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kInitThreads, 0, stream>>>(
      call, out, element_size, lse, threshold, tie_index);
  return cudaGetLastError();
}

cudaError_t admit_all(const Call& call, float* threshold, int32_t* tie_index, cudaStream_t stream) {
  if (call.num_tiles <= 0 || call.heads <= 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(call.num_tiles) * call.heads;
  admit_all_kernel<<<blocks, kTileRows, 0, stream>>>(call, threshold, tie_index);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda
