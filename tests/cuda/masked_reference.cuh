// Random data, brute-force selection and a float64 reference on the device, one document at a time; naive on
// purpose.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "check_data.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/sequence.cuh"

namespace {

using namespace topk_attn;        // NOLINT: test code
using namespace topk_attn::cuda;  // NOLINT

// Query tile `tile` of the call belongs to (document, first row); the device code reads the same table.
struct Doc {
  Call call;
  Tile sequence;  // row0 = rows = 0
  int first_tile;
};

// Raw scores (heads, tq, tk) by mma.sync, one warp for 16 x 8.
template <typename T>
__global__ void score_slab(Doc d, float* s) {
  const Call& c = d.call;
  const Tile& t = d.sequence;
  const int h = blockIdx.z, i0 = blockIdx.y * 16, j0 = blockIdx.x * 8;
  const int lane = threadIdx.x, g = lane / 4, x = lane % 4;
  const auto q_pair = [&](int row, int channel) {
    if (row >= t.tq) return 0u;
    return *reinterpret_cast<const uint32_t*>(row_pointer<T>(c.q, t.batch, t.q_begin + row, h) + channel);
  };
  const auto k_pair = [&](int row, int channel) {
    if (row >= t.tk) return 0u;
    return *reinterpret_cast<const uint32_t*>(
        row_pointer<T>(c.k, t.batch, t.k_begin + row, h / (c.heads / c.kv_heads)) + channel);
  };
  float acc[4] = {0, 0, 0, 0};
  for (int step = 0; step < c.head_dim; step += 16) {
    const uint32_t a[4] = {q_pair(i0 + g, step + 2 * x), q_pair(i0 + g + 8, step + 2 * x),
                           q_pair(i0 + g, step + 2 * x + 8), q_pair(i0 + g + 8, step + 2 * x + 8)};
    mma_16816<T>(acc, a, k_pair(j0 + g, step + 2 * x), k_pair(j0 + g, step + 2 * x + 8));
  }
  for (int e = 0; e < 4; ++e) {
    const int i = i0 + g + e / 2 * 8, j = j0 + 2 * x + e % 2;
    if (i < t.tq && j < t.tk) s[(int64_t{h} * t.tq + i) * t.tk + j] = acc[e];
  }
}

// Threshold and tie index of each row by bisection over order_key, its kept mask and the tile bitmaps.
__global__ void select_rows(Doc d, const float* slab, float* threshold, int32_t* tie_index, uint8_t* keep,
                            uint32_t* bitmap, int64_t words, int* wrong) {
  const Call& c = d.call;
  const Tile& t = d.sequence;
  const int i = blockIdx.x, h = blockIdx.y;
  const float* s = slab + (int64_t{h} * t.tq + i) * t.tk;
  const RowPlan plan = row_plan(c, t, i);
  const int begin = static_cast<int>(plan.contested().begin), end = static_cast<int>(plan.contested().end);
  const int need = static_cast<int>(plan.contested_kept());
  __shared__ int total;
  __shared__ int32_t tie;
  const auto count_from = [&](int64_t key) {
    __syncthreads();
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    int n = 0;
    for (int j = begin + threadIdx.x; j < end; j += blockDim.x) n += order_key(s[j]) >= key;
    atomicAdd(&total, n);
    __syncthreads();
    return total;
  };
  float th = __int_as_float(0x7fc00000);
  if (threadIdx.x == 0) tie = -1;
  if (need > 0) {
    int64_t lo = -2147483648LL, hi = 2147483648LL;  // count_from(lo) >= need > count_from(hi)
    while (hi - lo > 1) {
      const int64_t middle = (lo + hi) / 2 - ((lo + hi) < 0 && (lo + hi) % 2 != 0);
      if (count_from(middle) >= need) {
        lo = middle;
      } else {
        hi = middle;
      }
    }
    const int above = count_from(hi);
    th = order_score(static_cast<int32_t>(lo));
    if (threadIdx.x == 0) {
      int left = need - above;
      for (int j = begin; j < end && left > 0; ++j) {
        if (order_key(s[j]) == lo && --left == 0) tie = j;
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    threshold[row_index(c, t, h, i)] = th;
    tie_index[row_index(c, t, h, i)] = tie;
  }
  const RowFilter f = row_filter(c, t, i, th, tie);
  const int64_t entry = int64_t{h} * c.num_tiles + d.first_tile + i / kTileRows;
  int kept = 0;
  for (int j = threadIdx.x; j < t.tk; j += blockDim.x) {
    const bool k = f.keeps(s[j], j);
    keep[(int64_t{h} * t.tq + i) * t.tk + j] = k;
    kept += k;
    if (k) atomicOr(bitmap + entry * words + j / 32, 1u << (j % 32));
  }
  __syncthreads();
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, kept);
  __syncthreads();
  if (threadIdx.x == 0 && total != plan.kept) atomicAdd(wrong, 1);
}

__device__ double block_reduce(double x, bool maximum) {
  __shared__ double part[128];
  __syncthreads();
  part[threadIdx.x] = x;
  __syncthreads();
  for (int o = 64; o > 0; o /= 2) {
    if (static_cast<int>(threadIdx.x) < o) {
      const double a = part[threadIdx.x], b = part[threadIdx.x + o];
      part[threadIdx.x] = maximum ? fmax(a, b) : a + b;
    }
    __syncthreads();
  }
  return part[0];
}

template <typename T>
__device__ double dot(const T* a, const T* b, int n) {
  double x = 0;
  for (int i = 0; i < n; ++i) x += static_cast<double>(float(a[i])) * static_cast<double>(float(b[i]));
  return x;
}

// One block of 128 threads per (row, head): probabilities, out, lse, delta and dS in float64.
template <typename T>
__global__ void reference_rows(Doc d, const uint8_t* keep, View dout, double* p, double* ds, double* out,
                               double* lse, float* delta) {
  const Call& c = d.call;
  const Tile& t = d.sequence;
  const int i = blockIdx.x, h = blockIdx.y, hk = h / (c.heads / c.kv_heads);
  const int64_t row = int64_t{h} * t.tq + i;
  const uint8_t* kept = keep + row * t.tk;
  double* pr = p + row * t.tk;
  double m = -INFINITY;
  for (int j = threadIdx.x; j < t.tk; j += blockDim.x) {
    if (!kept[j]) continue;
    pr[j] = c.softmax_scale * dot(row_pointer<T>(c.q, t.batch, t.q_begin + i, h),
                                  row_pointer<T>(c.k, t.batch, t.k_begin + j, hk), c.head_dim);
    m = fmax(m, pr[j]);
  }
  m = block_reduce(m, true);
  double sum = 0;
  for (int j = threadIdx.x; j < t.tk; j += blockDim.x) sum += kept[j] ? exp(pr[j] - m) : 0.0;
  sum = block_reduce(sum, false);
  const double l = sum > 0 ? m + log(sum) : -INFINITY;
  for (int j = threadIdx.x; j < t.tk; j += blockDim.x) pr[j] = kept[j] ? exp(pr[j] - l) : 0.0;
  __syncthreads();
  const T* go = row_pointer<T>(dout, t.batch, t.q_begin + i, h);
  double product = 0;
  for (int x = threadIdx.x; x < c.v_dim; x += blockDim.x) {
    double o = 0;
    for (int j = 0; j < t.tk; ++j) {
      if (kept[j]) o += pr[j] * float(row_pointer<T>(c.v, t.batch, t.k_begin + j, hk)[x]);
    }
    out[row * c.v_dim + x] = o;
    product += o * float(go[x]);
  }
  product = block_reduce(product, false);
  if (threadIdx.x == 0) {
    lse[row] = l;
    delta[row_index(c, t, h, i)] = static_cast<float>(product);
  }
  for (int j = threadIdx.x; j < t.tk; j += blockDim.x) {
    ds[row * t.tk + j] =
        kept[j] ? pr[j] * (dot(go, row_pointer<T>(c.v, t.batch, t.k_begin + j, hk), c.v_dim) - product) : 0.0;
  }
}

template <typename T>
__global__ void reference_dq(Doc d, const double* ds, double* dq) {
  const Call& c = d.call;
  const Tile& t = d.sequence;
  const int i = blockIdx.x, h = blockIdx.y, hk = h / (c.heads / c.kv_heads);
  const int64_t row = int64_t{h} * t.tq + i;
  double x = 0;
  for (int j = 0; j < t.tk; ++j) {
    const double y = ds[row * t.tk + j];
    if (y != 0) x += y * float(row_pointer<T>(c.k, t.batch, t.k_begin + j, hk)[threadIdx.x]);
  }
  dq[row * c.head_dim + threadIdx.x] = x * c.softmax_scale;
}

// Tiles with skip[entry] != 0 contribute nothing.
template <typename T>
__global__ void reference_dkv(Doc d, const double* p, const double* ds, const int32_t* skip, View dout,
                              double* dk, double* dv) {
  const Call& c = d.call;
  const Tile& t = d.sequence;
  const int j = blockIdx.x, hk = blockIdx.y, group = c.heads / c.kv_heads;
  double x = 0, y = 0;
  for (int h = hk * group; h < (hk + 1) * group; ++h) {
    for (int i = 0; i < t.tq; ++i) {
      if (skip[int64_t{h} * c.num_tiles + d.first_tile + i / kTileRows] != 0) continue;
      const int64_t at = (int64_t{h} * t.tq + i) * t.tk + j;
      if (p[at] == 0 && ds[at] == 0) continue;
      x += ds[at] * float(row_pointer<T>(c.q, t.batch, t.q_begin + i, h)[threadIdx.x]);
      y += p[at] * float(row_pointer<T>(dout, t.batch, t.q_begin + i, h)[threadIdx.x]);
    }
  }
  dk[(int64_t{hk} * t.tk + j) * c.head_dim + threadIdx.x] = x * c.softmax_scale;
  dv[(int64_t{hk} * t.tk + j) * c.v_dim + threadIdx.x] = y;
}

}  // namespace
