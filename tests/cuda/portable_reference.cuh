// Device side of portable_check.cu: data, and brute-force scores and attention; naive on purpose.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "check_data.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/sequence.cuh"

namespace {

using namespace topk_attn;        // NOLINT: test code
using namespace topk_attn::cuda;  // NOLINT

enum Data { kRandom, kRealLike, kAllEqual, kTwoValues, kDuplicated, kNaN, kInf, kDataKinds };
const char* const kDataNames[] = {"random",     "real-like", "all equal", "two values",
                                  "duplicated", "NaN",       "inf"};

// One thread per (batch, head, channel) walks the tokens. Element (b, t, h, c) lies at ((b * tokens + t) *
// heads + h) * channels + c.
template <typename T>
__global__ void fill(T* out, int batch, int tokens, int heads, int channels, int kind, bool is_key,
                     uint32_t seed, float gain = 1.0f) {
  const int series = blockIdx.x * blockDim.x + threadIdx.x;
  if (series >= batch * heads * channels) return;
  const int channel = series % channels, head = series / channels % heads, b = series / channels / heads;
  SmoothSeries smooth(is_key ? 50.0f : 400.0f, normal(series, seed + 17));
  for (int t = 0; t < tokens; ++t) {
    const uint32_t index = static_cast<uint32_t>(((b * tokens + t) * heads + head) * channels + channel);
    const float white = normal(index, seed);
    float x = white;
    if (kind == kRealLike) {
      const float state = smooth.next(normal(index, seed + 5));
      x = is_key ? sqrtf(0.8f) * state + sqrtf(0.2f) * white
                 : (state + 0.35f * white) / sqrtf(1.0f + 0.35f * 0.35f);
    } else if (kind == kAllEqual && is_key) {
      x = normal(series, seed);
    } else if (kind == kTwoValues && is_key) {
      x = normal(series, seed) * (hash32(t * 7u + seed) % 3 == 0 ? 1.0f : -0.5f);
    } else if (kind == kDuplicated && is_key) {
      x = normal(series + (t / 2) * 65537u, seed);
    } else if (kind == kNaN && is_key && channel == 3 && hash32(t * 11u + seed) % 97 == 0) {
      x = __int_as_float(0x7fc00000);
    } else if (kind == kInf && is_key && channel == 5 && hash32(t * 13u + seed) % 61 == 0) {
      x = __int_as_float(0x7f800000);
    }
    out[index] = static_cast<T>(gain * x);
  }
}

// Scores of the 64 rows of each listed (head, tile): scores[(list index * 64 + row) * max_k + key].
template <typename T>
__global__ void score_tiles(Call c, const int2* list, float* scores) {
  const int2 entry = list[blockIdx.x];
  const Tile t = tile_at(c, entry.y);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv_head = entry.x / (c.heads / c.kv_heads);
  const int g = lane / 4, u = lane % 4 * 2;
  for (int block = 0; block < 4; ++block) {
    for (int key = warp * 8; key < t.tk; key += 8 * (blockDim.x / 32)) {
      float s[4] = {0, 0, 0, 0};
      const T* k = row_pointer<T>(c.k, t.batch, int64_t{t.k_begin} + min(key + g, t.tk - 1), kv_head);
      const T* rows[2];
      for (int upper = 0; upper < 2; ++upper) {
        const int row = min(block * 16 + g + 8 * upper, t.rows - 1);
        rows[upper] = row_pointer<T>(c.q, t.batch, int64_t{t.q_begin} + t.row0 + row, entry.x);
      }
      for (int d = 0; d < c.head_dim; d += 16) {
        const auto load = [&](const T* p, int upper) {  // a head dim of 40 ends in half a step
          return d + upper < c.head_dim ? *reinterpret_cast<const uint32_t*>(p + d + upper + u) : 0u;
        };
        const uint32_t a[4] = {load(rows[0], 0), load(rows[1], 0), load(rows[0], 8), load(rows[1], 8)};
        mma_16816<T>(s, a, load(k, 0), load(k, 8));
      }
      for (int e = 0; e < 4; ++e) {
        const int row = block * 16 + g + 8 * (e >> 1), j = key + u + (e & 1);
        if (j < t.tk) scores[(int64_t{blockIdx.x} * 64 + row) * c.max_k + j] = s[e];
      }
    }
  }
}

__device__ inline double block_sum(double x) {
  __shared__ double shared[128];
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < 128; ++i) sum += shared[i];
  return sum;
}

__device__ inline void note(float* error, double value) {
  atomicMax(reinterpret_cast<int*>(error),
            __float_as_int(value == value ? static_cast<float>(value) : 1e30f));
}

// Error of a vector, one channel a thread, relative to the length of `size`.
__device__ inline void compare(float* error, double got, double wanted, double size) {
  const double difference = sqrt(block_sum((got - wanted) * (got - wanted)));
  const double length = sqrt(block_sum(size * size));
  if (threadIdx.x == 0) note(error, difference / fmax(length, 1e-3));
}

// One block of 128 threads per row of every (head, tile): checks out, lse and dq against float64 sums over
// the kept keys, and leaves each pair's P, dS and what it is the difference of in p, ds and size (laid out as
// `scores`). errors: out, lse, dq, dk, dv.
template <typename T>
__global__ void check_rows(BackwardCall b, View out, const float* scores, float* p, float* ds, float* size,
                           float* errors) {
  const Call& c = b.call;
  const int64_t entry = blockIdx.x / kTileRows;
  const int r = blockIdx.x % kTileRows;
  const int head = static_cast<int>(entry / c.num_tiles);
  const int kv_head = head / (c.heads / c.kv_heads);
  const Tile t = tile_at(c, static_cast<int>(entry % c.num_tiles));
  if (r >= t.rows) return;
  const int64_t at = row_index(c, t, head, t.row0 + r);
  const RowFilter filter = row_filter(c, t, t.row0 + r, b.threshold[at], b.tie_index[at]);
  const int64_t line = (entry * kTileRows + r) * c.max_k;
  const int64_t token = int64_t{t.q_begin} + t.row0 + r;
  const T* dout = row_pointer<const T>(b.dout, t.batch, token, head);
  const double scale = c.softmax_scale;
  double largest = -INFINITY;
  for (int j = 0; j < filter.seen; ++j) {
    if (filter.keeps(scores[line + j], j)) largest = fmax(largest, scores[line + j] * scale);
  }
  double sum = 0;
  double delta = 0;
  for (int j = threadIdx.x; j < filter.seen; j += 128) {
    if (!filter.keeps(scores[line + j], j)) continue;
    const double weight = exp(scores[line + j] * scale - largest);
    const T* v = row_pointer<const T>(c.v, t.batch, int64_t{t.k_begin} + j, kv_head);
    double dp = 0;
    double dp_size = 0;
    for (int x = 0; x < c.v_dim; ++x) {
      const double term = static_cast<double>(float(dout[x])) * static_cast<double>(float(v[x]));
      dp += term;
      dp_size += fabs(term);
    }
    size[line + j] = static_cast<float>(dp_size);
    sum += weight;
    delta += weight * dp;
    p[line + j] = static_cast<float>(weight);
    ds[line + j] = static_cast<float>(dp);
  }
  sum = block_sum(sum);
  delta = block_sum(delta) / (sum == 0 ? 1 : sum);
  for (int j = threadIdx.x; j < filter.seen; j += 128) {
    if (p[line + j] == 0.0f) continue;
    const double weight = p[line + j] / sum;
    p[line + j] = static_cast<float>(weight);
    // delta comes from the rounded output: what cancels counts, not what is left.
    size[line + j] *= static_cast<float>(weight * scale);
    ds[line + j] = static_cast<float>(weight * (ds[line + j] - delta) * scale);
  }
  __syncthreads();
  const int x = threadIdx.x;
  double o = 0, o_size = 0, g = 0, g_size = 0;
  for (int j = 0; j < filter.seen; ++j) {
    if (p[line + j] == 0.0f) continue;
    if (x < c.v_dim) {
      const double term =
          p[line + j] *
          static_cast<double>(float(row_pointer<const T>(c.v, t.batch, int64_t{t.k_begin} + j, kv_head)[x]));
      o += term;
      o_size += fabs(term);
    }
    if (x < c.head_dim) {
      const double term =
          ds[line + j] *
          static_cast<double>(float(row_pointer<const T>(c.k, t.batch, int64_t{t.k_begin} + j, kv_head)[x]));
      g += term;
      g_size += size[line + j] * fabs(static_cast<double>(float(row_pointer<const T>(
                                     c.k, t.batch, int64_t{t.k_begin} + j, kv_head)[x])));
    }
  }
  const double got_out = x < c.v_dim ? float(row_pointer<const T>(out, t.batch, token, head)[x]) : 0.0;
  const double got_dq = x < c.head_dim ? float(row_pointer<const T>(b.dq, t.batch, token, head)[x]) : 0.0;
  compare(errors, got_out, o, o_size);
  compare(errors + 2, got_dq, g, g_size);
  if (threadIdx.x == 0) {
    const double lse = sum == 0 ? -INFINITY : largest + log(sum);
    note(errors + 1, b.lse[at] == lse ? 0.0 : fabs(b.lse[at] - lse));
  }
}

// W = 1: P is exactly 1, whatever the score, so that out is exactly the kept key's value. One block per row
// of every (head, tile), as check_rows(); counts the channels that differ.
template <typename T>
__global__ void check_single(ForwardCall f, int* different) {
  const Call& c = f.call;
  const int64_t entry = blockIdx.x / kTileRows;
  const int r = blockIdx.x % kTileRows;
  const int head = static_cast<int>(entry / c.num_tiles);
  const Tile t = tile_at(c, static_cast<int>(entry % c.num_tiles));
  if (r >= t.rows) return;
  const int key = f.tie_index[row_index(c, t, head, t.row0 + r)];
  const T* out = row_pointer<const T>(f.out, t.batch, int64_t{t.q_begin} + t.row0 + r, head);
  const T* v =
      row_pointer<const T>(c.v, t.batch, int64_t{t.k_begin} + max(key, 0), head / (c.heads / c.kv_heads));
  for (int x = threadIdx.x; x < c.v_dim; x += blockDim.x) {
    if (float(out[x]) != (key < 0 ? 0.0f : float(v[x]))) atomicAdd(different, 1);
  }
}

// One block of 128 threads per (batch entry, KV head, token): checks dk and dv against the sums of
// check_rows.
template <typename T>
__global__ void check_keys(BackwardCall b, const float* p, const float* ds, const float* size,
                           float* errors) {
  const Call& c = b.call;
  const int token = blockIdx.x;
  const int kv_head = blockIdx.y;
  const int group = c.heads / c.kv_heads;
  const int x = threadIdx.x;
  double k = 0, k_size = 0, v = 0, v_size = 0;
  for (int i = 0; i < c.num_tiles; ++i) {
    const Tile t = tile_at(c, i);
    const int j = token - t.k_begin;
    if (t.rows == 0 || t.batch != static_cast<int>(blockIdx.z) || j < 0 || j >= t.tk) continue;
    for (int h = 0; h < group; ++h) {
      const int head = kv_head * group + h;
      for (int r = 0; r < t.rows; ++r) {
        const int64_t at = ((int64_t{head} * c.num_tiles + i) * kTileRows + r) * c.max_k + j;
        if (p[at] == 0.0f) continue;
        const int64_t row = int64_t{t.q_begin} + t.row0 + r;
        if (x < c.v_dim) {
          const double term =
              p[at] * static_cast<double>(float(row_pointer<const T>(b.dout, t.batch, row, head)[x]));
          v += term;
          v_size += fabs(term);
        }
        if (x < c.head_dim) {
          const double term =
              ds[at] * static_cast<double>(float(row_pointer<const T>(c.q, t.batch, row, head)[x]));
          k += term;
          k_size +=
              size[at] * fabs(static_cast<double>(float(row_pointer<const T>(c.q, t.batch, row, head)[x])));
        }
      }
    }
  }
  const double got_dk =
      x < c.head_dim ? float(row_pointer<const T>(b.dk, blockIdx.z, token, kv_head)[x]) : 0.0;
  const double got_dv = x < c.v_dim ? float(row_pointer<const T>(b.dv, blockIdx.z, token, kv_head)[x]) : 0.0;
  compare(errors + 3, got_dk, k, k_size);
  compare(errors + 4, got_dv, v, v_size);
}

}  // namespace
