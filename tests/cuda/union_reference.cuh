// Data, brute-force selection and a float64 reference on the device, for union_check.cu. Plain and slow.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "check_data.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/sequence.cuh"

namespace topk_attn::cuda::reference {

// ---------------------------------------------------------------------------------------------------------------
// Data
// ---------------------------------------------------------------------------------------------------------------

__device__ inline float to_float(__half x) {
  return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

enum class Data { kRandom, kRealLike, kTied };

// One thread per (batch, head, channel) walks along the sequence: sqrt(share) * AR(1) + sqrt(1 - share) *
// white. kTied: eight distinct rows, repeated in a hashed order.
template <typename T>
__global__ void make_data(View view, int batch, int tokens, int heads, int dim, uint32_t seed, float share,
                          float correlation, bool tied) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= batch * heads * dim) return;
  const int channel = i % dim;
  const int head = i / dim % heads;
  const int b = i / dim / heads;
  SmoothSeries smooth(correlation, normal(i, seed));
  for (int t = 0; t < tokens; ++t) {
    const uint32_t id = static_cast<uint32_t>(i) * 131071u + t;
    const float state = smooth.next(normal(id, seed + 1));
    float x = sqrtf(share) * state + sqrtf(1.0f - share) * normal(id, seed + 2);
    if (tied) x = normal((hash32(t * 7 + head) % 8) * 1024 + channel, seed + 3);
    row_pointer<T>(view, b, t, head)[channel] = from_float<T>(x);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Brute-force selection
// ---------------------------------------------------------------------------------------------------------------

// Scores of 16 rows (A) against 8 keys (B), accumulated in ascending chunks of 16 channels.
template <typename T>
__device__ void score_block(float (&s)[4], const T* upper, const T* lower, const T* key, int dim) {
  const int column_pair = threadIdx.x % 4;
  for (float& x : s) x = 0.0f;
  for (int k = column_pair * 2; k < dim; k += 16) {
    uint32_t a[4] = {0, 0, 0, 0};
    uint32_t b[2] = {0, 0};
    for (int half = 0; half < 2; ++half) {
      if (upper != nullptr) a[2 * half] = *reinterpret_cast<const uint32_t*>(upper + k + 8 * half);
      if (lower != nullptr) a[2 * half + 1] = *reinterpret_cast<const uint32_t*>(lower + k + 8 * half);
      if (key != nullptr) b[half] = *reinterpret_cast<const uint32_t*>(key + k + 8 * half);
    }
    mma_16816<T>(s, a, b[0], b[1]);
  }
}

// slab[(unit * 64 + row) * ld + key] for the units (tile indices) first + blockIdx.y of one head; a warp does
// 16 rows and 64 keys.
template <typename T>
__global__ void slab_scores(Call call, int head, int first, float* slab, int64_t ld) {
  const Tile tile = tile_at(call, first + blockIdx.y);
  const int key0 = blockIdx.x * 64;
  if (tile.rows == 0 || key0 >= tile.tk) return;
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int row = warp * 16 + g;
  const auto row_of = [&](int r) {
    return r < tile.rows ? row_pointer<const T>(call.q, tile.batch, tile.q_begin + tile.row0 + r, head)
                         : nullptr;
  };
  for (int n = 0; n < 64; n += 8) {
    const int key = key0 + n + g;
    const T* k = key < tile.tk ? row_pointer<const T>(call.k, tile.batch, tile.k_begin + key,
                                                      head / (call.heads / call.kv_heads))
                               : nullptr;
    float s[4];
    score_block<T>(s, row_of(row), row_of(row + 8), k, call.head_dim);
    float* to = slab + (int64_t{blockIdx.y} * 64 + row) * ld + key0 + n + 2 * (threadIdx.x % 4);
    to[0] = s[0];
    to[1] = s[1];
    to[8 * ld] = s[2];
    to[8 * ld + 1] = s[3];
  }
}

// One block per row of the slab: the exact encoding and the row's bits of the tile's bitmap.
__global__ void __launch_bounds__(256)
    slab_select(Call call, int head, int first, const float* slab, int64_t ld, Selection out, int64_t words) {
  __shared__ int histogram[256];
  __shared__ int state[4];
  const int index = first + blockIdx.x / 64;
  const Tile tile = tile_at(call, index);
  const int r = blockIdx.x % 64;
  if (r >= tile.rows) return;
  const int row = tile.row0 + r;
  const RowPlan plan = row_plan(call, tile, row);
  const int begin = static_cast<int>(plan.contested().begin);
  const int end = static_cast<int>(plan.contested().end);
  const int wanted = static_cast<int>(plan.contested_kept());
  const float* s = slab + int64_t{blockIdx.x} * ld;
  const auto order = [&](int j) { return static_cast<uint32_t>(order_key(s[j])) ^ 0x80000000u; };
  uint32_t prefix = 0;
  int rest = wanted;
  int tie = -1;
  if (wanted > 0) {
    for (int shift = 24; shift >= 0; shift -= 8) {
      histogram[threadIdx.x] = 0;
      __syncthreads();
      for (int j = begin + threadIdx.x; j < end; j += 256) {
        const uint32_t u = order(j);
        if (shift == 24 || (u >> (shift + 8)) == (prefix >> (shift + 8)))
          atomicAdd(&histogram[u >> shift & 255], 1);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int digit = 255;
        while (histogram[digit] < rest) rest -= histogram[digit--];
        state[0] = digit;
        state[1] = rest;
      }
      __syncthreads();
      prefix |= static_cast<uint32_t>(state[0]) << shift;
      rest = state[1];
      __syncthreads();
    }
    if (threadIdx.x < 32) {  // the rest-th key of exactly this score
      int found = 0;
      for (int j = begin; j < end && tie < 0; j += 32) {
        const bool equal = j + static_cast<int>(threadIdx.x) < end && order(j + threadIdx.x) == prefix;
        uint32_t votes = __ballot_sync(~0u, equal);
        if (found + __popc(votes) < rest) {
          found += __popc(votes);
          continue;
        }
        for (; found + 1 < rest; ++found) votes &= votes - 1;
        tie = j + __ffs(votes) - 1;
      }
      if (threadIdx.x == 0) state[2] = tie;
    }
    __syncthreads();
    tie = state[2];
  }
  const float threshold = wanted > 0 ? order_score(static_cast<int32_t>(prefix ^ 0x80000000u)) : nanf("");
  if (threadIdx.x == 0) {
    const int64_t at = row_index(call, tile, head, row);
    out.threshold[at] = threshold;
    out.tie_index[at] = tie;
  }
  uint32_t* bits = out.bitmap + (int64_t{head} * call.num_tiles + index) * words;
  for (int j = threadIdx.x; j < (tile.tk + 31) / 32 * 32; j += 256) {
    const bool kept = j < plan.seen.end && (plan.always_kept(j) || admitted(s[j], j, threshold, tie));
    const uint32_t word = __ballot_sync(~0u, kept);
    if (threadIdx.x % 32 == 0 && word != 0) atomicOr(bits + j / 32, word);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Float64 reference
// ---------------------------------------------------------------------------------------------------------------

struct Sample {
  int head;   // rows: query head; keys: KV head
  int tile;   // rows: tile; keys: unused
  int index;  // row or key in its sequence
  int sequence;
};

__device__ inline double block_sum(double x) {
  __shared__ double shared[128];
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < 128; ++i) sum += shared[i];
  return sum;
}

// One block of 128 threads per sampled row. scratch: 2 x max_k doubles per sample.
template <typename T>
__global__ void reference_rows(BackwardCall b, const Sample* samples, double* scratch, double* out,
                               double* lse, double* dq, double* dq_size) {
  const Call& call = b.call;
  const Sample sample = samples[blockIdx.x];
  const Tile tile = tile_at(call, sample.tile);
  const int kv_head = sample.head / (call.heads / call.kv_heads);
  const int dim = call.head_dim;
  double* p = scratch + int64_t{blockIdx.x} * 2 * call.max_k;
  double* dp = p + call.max_k;
  const int64_t token = tile.q_begin + sample.index;
  const T* q = row_pointer<const T>(call.q, tile.batch, token, sample.head);
  const T* go = row_pointer<const T>(b.dout, tile.batch, token, sample.head);
  const int64_t at = row_index(call, tile, sample.head, sample.index);
  const RowFilter filter = row_filter(call, tile, sample.index, b.threshold[at], b.tie_index[at]);
  const int lane = threadIdx.x % 32;
  const double scale = call.softmax_scale;
  double largest = -INFINITY;
  for (int key0 = threadIdx.x / 32 * 8; key0 < filter.seen; key0 += 32) {
    const int key = key0 + lane / 4;
    float s[4];
    score_block<T>(
        s, lane / 4 == 0 ? q : nullptr, nullptr,
        key < tile.tk ? row_pointer<const T>(call.k, tile.batch, tile.k_begin + key, kv_head) : nullptr, dim);
    if (lane >= 4) continue;
    for (int e = 0; e < 2; ++e) {
      const int j = key0 + 2 * lane + e;
      if (j < filter.seen) p[j] = filter.keeps(s[e], j) ? static_cast<double>(s[e]) * scale : -INFINITY;
    }
  }
  __syncthreads();
  for (int j = 0; j < filter.seen; ++j) largest = fmax(largest, p[j]);
  __syncthreads();
  double sum = 0;
  for (int j = threadIdx.x; j < filter.seen; j += 128) {
    p[j] = p[j] == -INFINITY ? 0.0 : exp(p[j] - largest);
    sum += p[j];
    dp[j] = 0;
    if (p[j] == 0) continue;
    const T* v = row_pointer<const T>(call.v, tile.batch, tile.k_begin + j, kv_head);
    for (int x = 0; x < dim; ++x)
      dp[j] += static_cast<double>(to_float(go[x])) * static_cast<double>(to_float(v[x]));
  }
  sum = block_sum(sum);
  double delta = 0;
  for (int j = threadIdx.x; j < filter.seen; j += 128) delta += p[j] * dp[j];
  delta = block_sum(delta) / (sum == 0 ? 1 : sum);
  if (threadIdx.x == 0) lse[blockIdx.x] = sum == 0 ? -INFINITY : largest + log(sum);
  if (static_cast<int>(threadIdx.x) >= dim) return;
  double o = 0;
  double g = 0;
  double size = 0;  // of what cancels in g
  for (int j = 0; j < filter.seen; ++j) {
    if (p[j] == 0) continue;
    const double weight = p[j] / sum;
    o += weight * static_cast<double>(to_float(
                      row_pointer<const T>(call.v, tile.batch, tile.k_begin + j, kv_head)[threadIdx.x]));
    const double term = weight * (dp[j] - delta) * scale *
                        static_cast<double>(to_float(row_pointer<const T>(
                            call.k, tile.batch, tile.k_begin + j, kv_head)[threadIdx.x]));
    g += term;
    size += fabs(term);
  }
  out[blockIdx.x * dim + threadIdx.x] = o;
  dq[blockIdx.x * dim + threadIdx.x] = g;
  dq_size[blockIdx.x * dim + threadIdx.x] = size;
}

// One block of 128 threads per sampled key: the sums over the rows of gathered tiles, with the kernel's lse
// and delta (which the rows check). scratch: 2 x group x num_tiles x 64 floats per sample.
template <typename T>
__global__ void reference_keys(BackwardCall b, const Sample* samples, float* scratch, double* dk,
                               double* dv) {
  const Call& call = b.call;
  const Sample sample = samples[blockIdx.x];
  const int dim = call.head_dim;
  const int group = call.heads / call.kv_heads;
  const int rows = group * call.num_tiles * 64;
  float* ps = scratch + int64_t{blockIdx.x} * 2 * rows;
  float* ds = ps + rows;
  const int lane = threadIdx.x % 32;
  const Tile own = sequence_at(call, sample.sequence);
  const T* k = row_pointer<const T>(call.k, own.batch, own.k_begin + sample.index, sample.head);
  const T* v = row_pointer<const T>(call.v, own.batch, own.k_begin + sample.index, sample.head);
  for (int block = threadIdx.x / 32; block < rows / 16; block += 4) {
    const int head = sample.head * group + block / 4 / call.num_tiles;
    const int index = block / 4 % call.num_tiles;
    const Tile tile = tile_at(call, index);
    const int row = block % 4 * 16 + lane / 4;
    const bool mine = tile.rows > 0 && tile.batch == own.batch && tile.k_begin == own.k_begin &&
                      tile.tk == own.tk &&
                      gathered(b.regimes, int64_t{head} * call.num_tiles + index, seen_end(call, tile));
    const auto at = [&](const View& view, int r) {
      return mine && r < tile.rows
                 ? row_pointer<const T>(view, tile.batch, tile.q_begin + tile.row0 + r, head)
                 : nullptr;
    };
    float s[4];
    float dp[4];
    score_block<T>(s, at(call.q, row), at(call.q, row + 8), lane / 4 == 0 ? k : nullptr, dim);
    score_block<T>(dp, at(b.dout, row), at(b.dout, row + 8), lane / 4 == 0 ? v : nullptr, dim);
    if (lane % 4 != 0) continue;
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      float p = 0;
      float d = 0;
      if (mine && r < tile.rows) {
        const int64_t i = row_index(call, tile, head, tile.row0 + r);
        const RowFilter filter = row_filter(call, tile, tile.row0 + r, b.threshold[i], b.tie_index[i]);
        if (filter.keeps(s[2 * half], sample.index) && b.lse[i] > -INFINITY) {
          p = static_cast<float>(exp(static_cast<double>(s[2 * half]) * call.softmax_scale - b.lse[i]));
          d = p * (dp[2 * half] - b.delta[i]) * call.softmax_scale;
        }
      }
      ps[block * 16 + lane / 4 + 8 * half] = p;
      ds[block * 16 + lane / 4 + 8 * half] = d;
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= dim) return;
  double k_sum = 0;
  double v_sum = 0;
  for (int i = 0; i < rows; ++i) {
    if (ps[i] == 0) continue;
    const int head = sample.head * group + i / 64 / call.num_tiles;
    const Tile tile = tile_at(call, i / 64 % call.num_tiles);
    const int64_t token = tile.q_begin + tile.row0 + i % 64;
    v_sum +=
        static_cast<double>(ps[i]) *
        static_cast<double>(to_float(row_pointer<const T>(b.dout, tile.batch, token, head)[threadIdx.x]));
    k_sum +=
        static_cast<double>(ds[i]) *
        static_cast<double>(to_float(row_pointer<const T>(call.q, tile.batch, token, head)[threadIdx.x]));
  }
  dk[blockIdx.x * dim + threadIdx.x] = k_sum;
  dv[blockIdx.x * dim + threadIdx.x] = v_sum;
}

// delta of every row: one thread each.
template <typename T>
__global__ void row_delta(BackwardCall b, View out, float* delta) {
  const Call& call = b.call;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const Tile tile = tile_at(call, i / 64 % call.num_tiles);
  const int head = i / 64 / call.num_tiles;
  if (head >= call.heads || i % 64 >= tile.rows) return;
  const int64_t token = tile.q_begin + tile.row0 + i % 64;
  const T* o = row_pointer<const T>(out, tile.batch, token, head);
  const T* g = row_pointer<const T>(b.dout, tile.batch, token, head);
  float sum = 0;
  for (int x = 0; x < call.head_dim; ++x) sum += to_float(o[x]) * to_float(g[x]);
  delta[row_index(call, tile, head, tile.row0 + i % 64)] = sum;
}

template <typename T>
__global__ void fill(T* p, T value, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    p[i] = value;
  }
}

}  // namespace topk_attn::cuda::reference
