// Masked dense backward on sm_90a: dQ, dK and dV of the masked tiles in one pass of five products.
//
// One thread block takes 128 keys of one KV head and walks the query tiles that see them, head by head: dK
// and dV stay in registers to the end, so neither needs an addition in memory, whatever the size of the GQA
// group. A step is one tile of 64 rows. Two warpgroups hold 64 keys each and work on transposed scores (keys
// x rows), so that P^T and dS^T go from accumulators into the products for dV and dK without passing through
// memory:
//
//   S^T = K Q^T, dP^T = V dO^T, P = exp(S - lse) where kept, dS = P (dP - delta), dV += P^T dO, dK += dS^T Q
//
// dS alone goes through shared memory, for dQ = dS K (each warpgroup makes half of the channels over all 128
// keys), which is added to a float32 sum in global memory with bulk reductions. The sums of a tile lie in the
// order of the accumulators' registers; finish_dq_kernel() puts them right, scales and rounds.
//
// The fourth warpgroup-sized part of the block are four warps of its own: one loads Q and dO by TMA (rings of
// two), two prepare each step's 64 rows (bounds, lse, delta), one adds dQ.
//
// The key blocks of one KV head and sequence form a chain; chains are worked off in sections, side by side:
// few enough for Q, dO and dQ to stay in L2, enough to keep the heaviest blocks from starting last.
//
// For additions in a fixed order see BlockOrder.
//
// Cost: 5 products of 64 x 128 x D a step; from and to L2 256 * D bytes of Q and dO and 256 * D bytes of dQ a
// step.
#pragma once

#include "masked_steps.cuh"

namespace topk_attn::cuda::sm90 {

// c (64 x 32) = a (64 x 16, MN-major) * b (16 x 32, MN-major) + (accumulate ? c : 0).
template <typename T>
__device__ __forceinline__ void wgmma_n32(float (&c)[16], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 1, 1;\n}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 1, 1;\n}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }
}

// dQ, 64 rows x D / 2 channels: dS is [key][row], K is [part][key][channel].
template <typename T, int D>
__device__ __forceinline__ void dq_product(float (&dq)[D / 4], uint32_t ds, uint32_t k, int warpgroup) {
  const uint64_t a = mn_major(ds, kBlockKeys);
  const uint64_t b = mn_major(D == 128 ? k + warpgroup * kBlockKeys * 128 : k + warpgroup * 64, kBlockKeys);
#pragma unroll
  for (int step = 0; step < kBlockKeys / 16; ++step) {
    if constexpr (D == 128) {
      wgmma<T, Major::kMN, Major::kMN>(dq, a + step * kMnStep, b + step * kMnStep, step > 0);
    } else {
      wgmma_n32<T>(dq, a + step * kMnStep, b + step * kMnStep, step > 0);
    }
  }
}

// 64 keys x 64 rows: from 64 of the block's 128 rows of K or V, and the tile's Q or dO.
template <typename T, int D>
__device__ __forceinline__ void transposed_product(float (&s)[32], uint64_t keys, uint64_t rows) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    wgmma<T>(s, keys + k_step(step, kBlockKeys), rows + k_step(step, kTileRows), step > 0);
  }
}

// dV += P^T dO or dK += dS^T Q, the first factor in registers.
template <typename T, int D>
__device__ __forceinline__ void gradient_product(float (&c)[D / 2], const uint32_t (&a)[16], uint64_t rows) {
#pragma unroll
  for (int step = 0; step < kTileRows / 16; ++step) {
    wgmma<T, Major::kMN>(c, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3],
                         rows + step * kMnStep, true);
  }
}

// Turns transposed scores into probabilities, 0 where a row does not keep the key. `rows` = the stage's row
// values from the thread's first column on, `key` = the thread's first key (the second is 8 on). A NaN score
// counts as dropped: where a row keeps one its lse is NaN, and that makes P NaN; in a row beyond the tile
// (zeros times an infinite key) P must be 0.
template <int D>
__device__ __forceinline__ void probabilities(float (&s)[32], const float* rows, Test test, float scale,
                                              int key) {
  using Shape = BackwardShape<D>;
  const auto pair = [&](int array, int j) {
    return *reinterpret_cast<const float2*>(rows + array * kTileRows + 8 * j);
  };
  if (test == Test::kPlain) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 bound = pair(Shape::kBound, j);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i)
        s[i] = s[i] >= (i & 1 ? bound.y : bound.x) ? s[i] : minus_infinity();
    }
  } else if (test == Test::kEdge) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 threshold = pair(Shape::kThreshold, j), above = pair(Shape::kAbove, j);
      const float2 tie = pair(Shape::kTie, j), seen = pair(Shape::kSeen, j);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) {
        const int own = key + (i & 2) * 4;
        const bool to_tie = own <= __float_as_int(i & 1 ? tie.y : tie.x);
        const float bound = to_tie ? (i & 1 ? threshold.y : threshold.x) : (i & 1 ? above.y : above.x);
        const bool hidden = own >= __float_as_int(i & 1 ? seen.y : seen.x);
        s[i] = !hidden && s[i] >= bound ? s[i] : minus_infinity();
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const float* const row = rows + 8 * (i / 4) + (i & 1);
      const RowFilter f{row[Shape::kThreshold * kTileRows], __float_as_int(row[Shape::kTie * kTileRows]),
                        __float_as_int(row[Shape::kSeen * kTileRows]),
                        __float_as_int(row[Shape::kSinks * kTileRows]),
                        __float_as_int(row[Shape::kRecents * kTileRows])};
      const bool kept = s[i] == s[i] && f.keeps(s[i], key + (i & 2) * 4);
      s[i] = kept ? s[i] : minus_infinity();
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 lse = pair(Shape::kLse, j);
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 4; ++i) s[i] = exp2_fast(fmaf(s[i], scale, -(i & 1 ? lse.y : lse.x)));
  }
}

// Stores 16 x 64 values of a warp, packed as accumulators are, at rows [16 * warp, + 16) of a block in shared
// memory.
__device__ __forceinline__ void store_fragment(uint32_t block, const uint32_t (&a)[16], int warp, int lane) {
  const int row = warp * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     block + swizzle128(row, j + lane / 16)),
                 "r"(a[2 * j]), "r"(a[2 * j + 1]), "r"(a[2 * j + 2]), "r"(a[2 * j + 3])
                 : "memory");
  }
}

// Writes a warpgroup's 64 keys x D of dK or dV: to float32 sums, or through shared memory in the input's
// type.
template <typename T, int D>
__device__ __forceinline__ void write_gradient(const float (&c)[D / 2], float scale, float* sum,
                                               const View& view, uint8_t* staged, const Call& call,
                                               const KeyBlock& b, int warpgroup) {
  const Tile& t = b.sequence;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int key0 = b.k0 + warpgroup * 64;
  if (sum != nullptr) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = key0 + row + 8 * r;
      if (key >= t.tk) continue;
      const int64_t token = int64_t{t.batch} * call.tk + t.k_begin + key;
      float* const to = sum + (token * call.kv_heads + b.kv_head) * D + column;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) =
            make_float2(c[4 * j + 2 * r] * scale, c[4 * j + 2 * r + 1] * scale);
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<uint32_t*>(staged + j / 8 * 64 * 128 + swizzle128(row + 8 * r, j % 8) + column * 2) =
          pack<T>(c[4 * j + 2 * r] * scale, c[4 * j + 2 * r + 1] * scale);
    }
  }
  named_barrier_sync(2 + warpgroup, 128);
  const int rows = min(64, t.tk - key0);
  for (int i = thread; i < rows * (D / 8); i += 128) {
    const int key = i / (D / 8), piece = i % (D / 8);
    T* const to = row_pointer<T>(view, t.batch, t.k_begin + key0 + key, b.kv_head) + piece * 8;
    *reinterpret_cast<uint4*>(to) =
        *reinterpret_cast<const uint4*>(staged + piece / 8 * 64 * 128 + swizzle128(key, piece % 8));
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(BackwardShape<D>::kThreads, 1)
    masked_backward_kernel(const __grid_constant__ CUtensorMap q_map,
                           const __grid_constant__ CUtensorMap k_map,
                           const __grid_constant__ CUtensorMap v_map,
                           const __grid_constant__ CUtensorMap do_map, const __grid_constant__ BackwardCall f,
                           const __grid_constant__ BackwardScratch w) {
  using Shape = BackwardShape<D>;
  extern __shared__ uint8_t shared_raw[];
  __shared__ int item;
  const Call& c = f.call;
  const int warpgroup = threadIdx.x / 128;
  const uint32_t raw = shared_address(shared_raw);
  const uint32_t base = (raw + 1023) & ~1023u;
  uint8_t* const shared = shared_raw + (base - raw);
  const uint32_t bars = base + Shape::kAtBarriers;

  if (threadIdx.x == 0) {
    item = w.wave == 0 ? static_cast<int>(blockIdx.x) : atomicAdd(w.ticket, 1);
    barrier_init(bars + Shape::kKvFull, 1);
    barrier_init(bars + Shape::kWhole, 1);
    for (int s = 0; s < Shape::kStages; ++s) {
      barrier_init(bars + Shape::kQFull + 8 * s, 3);  // the loading warp and two row warps
      barrier_init(bars + Shape::kDoFull + 8 * s, 1);
      barrier_init(bars + Shape::kQEmpty + 8 * s, 2);
      barrier_init(bars + Shape::kDoEmpty + 8 * s, 2);
    }
    barrier_init(bars + Shape::kDqFull, 256);
    barrier_init(bars + Shape::kDqEmpty, 1);
    barrier_init_fence();
  }
  __syncthreads();
  const KeyBlock b = key_block(c, w, item);
  if (b.k0 >= b.sequence.tk) return;

  if (warpgroup == 2) {
    registers_lower<56>();
    switch (threadIdx.x / 32 % 4) {
      case 0:
        load_steps<D>(q_map, k_map, v_map, do_map, f, w, b, base);
        break;
      case 1:
        prepare_rows<D>(f, w, b, base, shared, 0);
        break;
      case 2:
        prepare_rows<D>(f, w, b, base, shared, 32);
        break;
      default:
        add_dq<D>(f, w, b, base);
        break;
    }
    return;
  }
  registers_raise<224>();
  const int thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32;
  const int column = lane % 4 * 2;
  const int key = b.k0 + warpgroup * 64 + warp * 16 + lane / 4;
  const float scale = c.softmax_scale * 1.4426950408889634f;
  const uint64_t k_own = k_major(base + warpgroup * 64 * 128);
  const uint64_t v_own = k_major(base + Shape::kAtV + warpgroup * 64 * 128);
  const volatile int* const tests = reinterpret_cast<int*>(shared + Shape::kAtBarriers + Shape::kTests);
  float dk[D / 2];
  float dv[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.0f;
  float s[32];
  float dp[32];
  float dq[D / 4];

  Ring ring;
  uint32_t dq_parity = 1;
  float4* const staged =
      reinterpret_cast<float4*>(shared + Shape::kAtDq) + warpgroup * (D / 16) * 128 + thread;
  const auto hand_over_dq = [&] {
    barrier_wait(bars + Shape::kDqEmpty, dq_parity);
    dq_parity ^= 1;
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      staged[j * 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
    fence_async_proxy();
    barrier_arrive(bars + Shape::kDqFull);
  };
  barrier_wait(bars + Shape::kKvFull, 0);
  barrier_wait(bars + Shape::kQFull, 0);
  int test = max(tests[0], tests[1]);
  if (test >= 0) {
    pin(s);
    wgmma_fence();
    transposed_product<T, D>(s, k_own, k_major(base + Shape::kAtQ));
    wgmma_commit();
    while (true) {
      const int stage = ring.stage;
      const uint32_t q_at = base + Shape::kAtQ + stage * Shape::kQBytes;
      const uint32_t do_at = base + Shape::kAtDo + stage * Shape::kQBytes;
      const uint32_t ds_at = base + Shape::kAtDs + stage * Shape::kDsBytes;
      const float* const rows =
          reinterpret_cast<const float*>(shared + Shape::kAtRows + stage * Shape::kRowBytes) + column;
      uint32_t fragment[16];
      barrier_wait(bars + Shape::kDoFull + 8 * stage, ring.parity);
      pin(dp);
      wgmma_fence();
      transposed_product<T, D>(dp, v_own, k_major(do_at));
      wgmma_commit();
      wgmma_wait<1>();
      pin(s);
      probabilities<D>(s, rows, static_cast<Test>(test), scale, key);
#pragma unroll
      for (int i = 0; i < 16; ++i) fragment[i] = pack<T>(s[2 * i], s[2 * i + 1]);
      pin(dv);
      wgmma_fence();
      gradient_product<T, D>(dv, fragment, mn_major(do_at, kTileRows));
      wgmma_commit();
      wgmma_wait<1>();
      pin(dp);
      uint32_t ds[16];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 delta = *reinterpret_cast<const float2*>(rows + Shape::kDelta * kTileRows + 8 * j);
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; ++i) {
          // Where nothing is kept, a non-finite dP must not show.
          s[i] = s[i] == 0.0f ? 0.0f : s[i] * (dp[i] - (i & 1 ? delta.y : delta.x));
        }
        ds[2 * j] = pack<T>(s[4 * j], s[4 * j + 1]);
        ds[2 * j + 1] = pack<T>(s[4 * j + 2], s[4 * j + 3]);
      }
      store_fragment(ds_at + warpgroup * 64 * 128, ds, warp, lane);
      fence_async_proxy();
      pin(dk);
      wgmma_fence();
      gradient_product<T, D>(dk, ds, mn_major(q_at, kTileRows));
      wgmma_commit();
      // Then both halves of dS are there, and both warpgroups are done with the other buffer.
      named_barrier_sync(1, 256);
      pin(dq);
      wgmma_fence();
      dq_product<T, D>(dq, ds_at, base, warpgroup);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dk);
      pin(dv);
      pin(dq);
      if (thread == 0) {
        barrier_arrive(bars + Shape::kQEmpty + 8 * stage);
        barrier_arrive(bars + Shape::kDoEmpty + 8 * stage);
      }
      ring.advance();
      barrier_wait(bars + Shape::kQFull + 8 * ring.stage, ring.parity);
      test = max(tests[2 * ring.stage], tests[2 * ring.stage + 1]);
      if (test < 0) break;
      pin(s);
      wgmma_fence();
      transposed_product<T, D>(s, k_own, k_major(base + Shape::kAtQ + ring.stage * Shape::kQBytes));
      wgmma_commit();
      hand_over_dq();
    }
    hand_over_dq();
  }
  named_barrier_sync(1, 256);  // nobody reads K and V any more
  write_gradient<T, D>(dk, c.softmax_scale, f.dk_sum, f.dk, shared + warpgroup * 64 * D * 2, c, b, warpgroup);
  write_gradient<T, D>(dv, 1.0f, f.dv_sum, f.dv, shared + Shape::kAtV + warpgroup * 64 * D * 2, c, b,
                       warpgroup);
}

// dq of the masked tiles from the sums, one block of 128 threads per (head, tile).
template <typename T, int D>
__global__ void __launch_bounds__(128)
    finish_dq_kernel(const __grid_constant__ BackwardCall f, const float* dq_sum) {
  const Call& c = f.call;
  const int index = blockIdx.x % c.num_tiles, head = blockIdx.x / c.num_tiles;
  const Tile t = tile_at(c, index);
  if (t.rows == 0 || gathered(f.regimes, blockIdx.x, seen_end(c, t))) return;
  __shared__ __align__(16) uint8_t staged[kTileRows * D * 2];
  const int thread = threadIdx.x, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const float4* const sums = reinterpret_cast<const float4*>(dq_sum + int64_t{blockIdx.x} * kTileRows * D);
  // A row that keeps nothing finite has no gradient, whatever its keys hold (0 * inf is not 0).
  const auto empty = [&](int r) {
    return r >= t.rows || f.lse[row_index(c, t, head, t.row0 + r)] == minus_infinity();
  };
  const bool drop = empty(row), drop_lower = empty(row + 8);
#pragma unroll 8
  for (int j = 0; j < D / 8; ++j) {  // the first half of them are the first warpgroup's
    const float4 x = sums[j * 128 + thread];
    uint8_t* const part = staged + j / 8 * kTileRows * 128 + column * 2;
    const float scale = c.softmax_scale;
    const uint32_t upper = drop ? 0 : pack<T>(x.x * scale, x.y * scale);
    const uint32_t lower = drop_lower ? 0 : pack<T>(x.z * scale, x.w * scale);
    *reinterpret_cast<uint32_t*>(part + swizzle128(row, j % 8)) = upper;
    *reinterpret_cast<uint32_t*>(part + swizzle128(row + 8, j % 8)) = lower;
  }
  __syncthreads();
  for (int i = thread; i < t.rows * (D / 8); i += 128) {
    const int r = i / (D / 8), piece = i % (D / 8);
    T* const to = row_pointer<T>(f.dq, t.batch, t.q_begin + t.row0 + r, head) + piece * 8;
    *reinterpret_cast<uint4*>(to) =
        *reinterpret_cast<const uint4*>(staged + piece / 8 * kTileRows * 128 + swizzle128(r, piece % 8));
  }
}

template <typename T, int D>
cudaError_t launch_masked_backward(const BackwardCall& b, const BackwardScratch& w, cudaStream_t stream) {
  using Shape = BackwardShape<D>;
  const Call& c = b.call;
  const int64_t batch = c.cu_q == nullptr ? c.batch : 1;
  CUtensorMap q_map, k_map, v_map, do_map;
  cudaError_t error = tensor_map(&q_map, c.dtype, c.q, D, c.tq, c.heads, batch, kTileRows);
  if (error == cudaSuccess) error = tensor_map(&do_map, c.dtype, b.dout, D, c.tq, c.heads, batch, kTileRows);
  if (error == cudaSuccess) error = tensor_map(&k_map, c.dtype, c.k, D, c.tk, c.kv_heads, batch, kBlockKeys);
  if (error == cudaSuccess) error = tensor_map(&v_map, c.dtype, c.v, D, c.tk, c.kv_heads, batch, kBlockKeys);
  if (error != cudaSuccess) return error;
  const auto kernel = masked_backward_kernel<T, D>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t items = int64_t{c.kv_heads} * c.batch * ((c.max_k + kBlockKeys - 1) / kBlockKeys);
  if (items > 0) {
    kernel<<<static_cast<unsigned>(items), Shape::kThreads, Shape::kSharedBytes, stream>>>(
        q_map, k_map, v_map, do_map, b, w);
  }
  const int64_t entries = int64_t{c.heads} * c.num_tiles;
  if (entries > 0) {
    finish_dq_kernel<T, D><<<static_cast<unsigned>(entries), 128, 0, stream>>>(b, w.dq_sum);
  }
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::sm90
