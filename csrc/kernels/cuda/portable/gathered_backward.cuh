// Backward over gathered unions: dQ, dK and dV in one pass. See gathered.cuh.
//
// Of 64 rows and 64 listed keys the four warps compute S and dP in quarters of 32 x 32 and pass P, then dS,
// through shared memory; dV = P^T dO, dK = dS^T Q and dQ += dS K are cut into 32 rows or keys and half of the
// channels a warp. dQ stays in registers, dK and dV are added in L2, in no fixed order. The next block's V is
// copied once dP is done, its K once dQ is.
#pragma once

#include "gathered.cuh"

namespace topk_attn::cuda::portable {

inline constexpr int kBackwardThreads = 128;
inline constexpr int kBackwardKeys = 64;

template <int D>
constexpr int backward_gathered_bytes() {
  return (2 * kTileRows + 2 * kBackwardKeys) * D * 2 + kPassedBytes;
}

// How sums reach L2, which bounds this pass where unions are wide. Since sm_90 in bulk reductions of half
// rows from shared memory, 16 keys of a warp at a time (an H100 takes 3.2 TB/s of them, 2.0 from registers).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kBulkSums = true;
#else
inline constexpr bool kBulkSums = false;
#endif

template <int D>
struct SumStage {
  static constexpr int kStride = D / 2 * 4 + 32;  // of a key's half row: no bank conflicts
  static constexpr int kWarpBytes = 16 * kStride;
  static constexpr int kBytes = kBackwardThreads / 32 * kWarpBytes;
};

// The stage may be written again: what was added from it has been read.
__device__ __forceinline__ void wait_sums() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  __syncwarp();
#endif
}

// Adds `floats` floats of this lane's key, from `stage`, to those at `to`; all lanes call it, null: nothing.
__device__ __forceinline__ void add_bulk(float* to, uint32_t stage, int floats) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (to != nullptr && floats > 0) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(stage), "r"(floats * 4)
                 : "memory");
  }
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Adds a warp's sums of 32 keys, list entries `first` ..., times `factor`, to the rows of `sums`, which are
// contiguous: (batch, token, head, channel). The warp's channels begin at channel0.
template <int D, int kColumns>
__device__ __forceinline__ void add_listed(const Call& c, const Tile& t, int kv_head, float* sums,
                                           int channels, int channel0, const KeyList& list, int begin,
                                           int first, const float (&x)[2][kColumns][4], float factor,
                                           uint32_t stage) {
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const auto row_of = [&](int i) -> float* {
    const int key = list.key(begin, first + i);
    const int64_t token = t.batch * int64_t{c.tk} + t.k_begin + key;
    return key == INT_MAX ? nullptr : sums + (token * c.kv_heads + kv_head) * channels + channel0;
  };
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    if constexpr (kBulkSums) {
      constexpr int kStride = SumStage<D>::kStride;
      wait_sums();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t line = stage + (8 * h + g) * kStride + lane % 4 * 8;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(line + 32 * n), "f"(x[m][n][2 * h] * factor),
                       "f"(x[m][n][2 * h + 1] * factor)
                       : "memory");
        }
      }
      add_bulk(lane < 16 ? row_of(16 * m + lane) : nullptr, stage + lane * kStride,
               min(D / 2, channels - channel0));
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* const row = row_of(16 * m + 8 * h + g);
        if (row == nullptr) continue;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int channel = 8 * n + lane % 4 * 2;
          if (channel < channels - channel0) {
            atomicAdd(row + channel, x[m][n][2 * h] * factor);
            atomicAdd(row + channel + 1, x[m][n][2 * h + 1] * factor);
          }
        }
      }
    }
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    backward_gathered_kernel(const __grid_constant__ BackwardCall f) {
  constexpr int kColumns = D / 2 / 8;  // of a warp's part of a gradient
  extern __shared__ __align__(512) uint8_t shared[];
  __shared__ KeyList list;
  __shared__ float lses[kTileRows];  // in base 2; +inf: the row keeps nothing
  __shared__ float deltas[kTileRows];
  const Call& c = f.call;
  const Unit unit = unit_of(c, blockIdx.x);
  const Tile t = tile_at(c, unit.tile);
  const int seen = seen_end(c, t);
  const int64_t entry = int64_t{unit.head} * c.num_tiles + unit.tile;
  if (t.rows == 0 || !gathered(f.regimes, entry, seen)) return;

  const uint32_t q_tile = shared_address(shared);
  const uint32_t dout_tile = q_tile + kTileRows * D * 2;
  const uint32_t k_tile = dout_tile + kTileRows * D * 2;
  const uint32_t v_tile = k_tile + kBackwardKeys * D * 2;
  const uint32_t passed = v_tile + kBackwardKeys * D * 2;  // P, then dS
  const int warp = threadIdx.x / 32;
  const uint32_t stage = passed + kPassedBytes + warp * SumStage<D>::kWarpBytes;  // there if kBulkSums
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
  const int upper = warp / 2 * 32;        // first row, or key, of a warp's part
  const int right = warp % 2 * 32;        // first key of its scores
  const int channel0 = warp % 2 * D / 2;  // first channel of its gradients
  const int kv_head = unit.head / (c.heads / c.kv_heads);
  const T* k = row_pointer<const T>(c.k, t.batch, t.k_begin, kv_head);
  const T* v = row_pointer<const T>(c.v, t.batch, t.k_begin, kv_head);
  load_tile<T, D, kTileRows, kBackwardThreads>(
      q_tile, row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0, unit.head), c.q.token, t.rows,
      c.head_dim);
  load_tile<T, D, kTileRows, kBackwardThreads>(
      dout_tile, row_pointer<const T>(f.dout, t.batch, t.q_begin + t.row0, unit.head), f.dout.token, t.rows,
      c.v_dim);
  copy_commit();

  const float infinity = __int_as_float(0x7f800000);
  const float scale = c.softmax_scale * kLog2E;
  if (threadIdx.x < kTileRows) {
    const int row = threadIdx.x;
    lses[row] = infinity;
    deltas[row] = 0.0f;
    if (row < t.rows) {
      const int64_t at = row_index(c, t, unit.head, t.row0 + row);
      lses[row] = f.lse[at] == -infinity ? infinity : f.lse[at] * kLog2E;
      deltas[row] = f.delta[at];
    }
  }
  const RowFilter filter = filter_of(c, t, unit.head, upper + threadIdx.x % 32, f.threshold, f.tie_index);
  float dq[2][kColumns][4] = {};
  const uint32_t* const bitmap = f.bitmap + entry * bitmap_words(c);
  for (int at = 0; at < seen;) {
    const int begin = at;
    const int count = list_keys<kBackwardThreads>(list, bitmap, seen, at);
    const auto load = [&](uint32_t tile, const T* source, int64_t stride, int first, int channels) {
      if (first < count) {
        gather_tile<T, D, kBackwardKeys, kBackwardThreads>(tile, source, stride, list, begin, first,
                                                           channels);
      }
      copy_commit();
    };
    load(v_tile, v, c.v.token, 0, c.v_dim);
    load(k_tile, k, c.k.token, 0, c.head_dim);
    for (int first = 0; first < count; first += kBackwardKeys) {
      copy_wait<0>();
      __syncthreads();  // K and V are there
      uint32_t ds[2][4][2];
      {
        float s[2][4][4];
        dot_block<T, D>(s, q_tile, upper, k_tile, right);
        mask_block(s, filter, ListedKeys{list, begin, first + right});
        uint32_t p[2][4][2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float lse = lses[upper + 16 * m + 8 * h + g];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
#pragma unroll
              for (int e = 2 * h; e < 2 * h + 2; ++e) s[m][n][e] = exp2_fast(fmaf(s[m][n][e], scale, -lse));
              p[m][n][h] = pack<T>(s[m][n][2 * h], s[m][n][2 * h + 1]);
            }
          }
        }
        store_passed(passed, upper, right, p);
        float dp[2][4][4];
        dot_block<T, D>(dp, dout_tile, upper, v_tile, right);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float delta = deltas[upper + 16 * m + 8 * h + g];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              ds[m][n][h] = pack<T>(s[m][n][2 * h] * (dp[m][n][2 * h] - delta),
                                    s[m][n][2 * h + 1] * (dp[m][n][2 * h + 1] - delta));
            }
          }
        }
      }
      __syncthreads();  // P is there, V is free
      load(v_tile, v, c.v.token, first + kBackwardKeys, c.v_dim);
      {
        float dv[2][kColumns][4] = {};
        multiply_passed<T, D, true>(dv, passed, upper, dout_tile, channel0);
        add_listed<D>(c, t, kv_head, f.dv_sum, c.v_dim, channel0, list, begin, first + upper, dv, 1.0f,
                      stage);
      }
      __syncthreads();  // P is free
      store_passed(passed, upper, right, ds);
      __syncthreads();  // dS is there
      multiply_passed<T, D, false>(dq, passed, upper, k_tile, channel0);
      __syncthreads();  // K is free
      load(k_tile, k, c.k.token, first + kBackwardKeys, c.head_dim);
      float dk[2][kColumns][4] = {};
      multiply_passed<T, D, true>(dk, passed, upper, q_tile, channel0);
      add_listed<D>(c, t, kv_head, f.dk_sum, c.head_dim, channel0, list, begin, first + upper, dk,
                    c.softmax_scale, stage);
    }
  }
  wait_sums();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = upper + 8 * i + g;
    if (row >= t.rows) continue;
    // A row that keeps nothing finite has no gradient, whatever its keys hold (0 * inf is not 0).
    const float factor = lses[row] == infinity ? 0.0f : c.softmax_scale;
    T* o = row_pointer<T>(f.dq, t.batch, t.q_begin + t.row0 + row, unit.head);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int channel = channel0 + 8 * n + pair;
      const float* const x = dq[i / 2][n] + i % 2 * 2;
      if (channel < c.head_dim)
        *reinterpret_cast<uint32_t*>(o + channel) =
            factor == 0.0f ? 0u : pack<T>(x[0] * factor, x[1] * factor);
    }
  }
}

template <typename T, int D>
cudaError_t run_backward_gathered(const BackwardCall& f, cudaStream_t stream) {
  if (f.dk_sum == nullptr || f.dv_sum == nullptr || f.bitmap == nullptr) return cudaErrorInvalidValue;
  const int64_t blocks = int64_t{f.call.num_tiles} * f.call.heads;
  if (blocks == 0) return cudaSuccess;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error != cudaSuccess) return error;
  constexpr int kBytes = backward_gathered_bytes<D>() + SumStage<D>::kBytes;
  const auto kernel = backward_gathered_kernel<T, D>;
  error = allow_shared<kBytes, sizeof(KeyList) + 1024>(kernel);
  if (error != cudaSuccess) return error;
  // The stage costs older GPUs half of their occupancy for nothing.
  const int bytes = major >= 9 ? kBytes : backward_gathered_bytes<D>();
  kernel<<<static_cast<unsigned>(blocks), kBackwardThreads, bytes, stream>>>(f);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::portable
