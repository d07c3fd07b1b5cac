// What only sm_90a has: mbarriers, TMA copies, warpgroup products (wgmma), register rebalancing. One thin
// function per instruction, and the layout rules that the kernels of this folder share:
//
// - A block in shared memory is [64-channel part][row][128 bytes], 128-byte swizzled, 1,024-byte aligned:
// what a
//   TMA copy through tensor_map() leaves behind (one copy per part), and what copies by hand must imitate
//   with swizzle128(). A head dim of 128 has two parts, `rows * 128` bytes apart.
// - The same block serves as a K-major operand (the products run along channels: Q K^T) through k_major(),
// and as
//   an MN-major operand B (the products run along rows: P V) through mn_major().
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "../../params.h"
#include "../common/mma.cuh"
#include "../params.h"

namespace topk_attn::cuda::sm90 {

// ---------------------------------------------------------------------------------------------------------------
// Tensor maps (host)
// ---------------------------------------------------------------------------------------------------------------

// Whether a view with these extents can be a tensor map: every stride that is used is a positive multiple of
// 16 bytes below 2^40, and the base is 16-byte aligned.
inline bool mappable(const View& v, int64_t tokens, int64_t heads, int64_t batch) {
  const auto good = [](int64_t extent, int64_t stride) {
    return extent <= 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39));
  };
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && good(tokens, v.token) && good(heads, v.head) &&
         good(batch, v.batch);
}

// A map of a 16-bit view over (channel, token, head, batch), copied in boxes of 64 channels x `box_tokens`
// tokens (at most 256), 128-byte swizzled. Reads past the last token give zeros. The driver function is
// looked up at run time, so that the library loads where there is no driver.
inline cudaError_t tensor_map(CUtensorMap* map, DType dtype, const View& v, int channels, int64_t tokens,
                              int64_t heads, int64_t batch, int box_tokens) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                        : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  // The stride of an extent of 1 is never used, but must pass the driver's checks.
  const auto bytes = [channels](int64_t extent, int64_t stride) {
    return static_cast<cuuint64_t>(extent <= 1 ? channels * 2 : stride * 2);
  };
  const auto extent = [](int64_t n) { return static_cast<cuuint64_t>(n < 1 ? 1 : n); };
  const cuuint64_t extents[4] = {static_cast<cuuint64_t>(channels), extent(tokens), extent(heads),
                                 extent(batch)};
  const cuuint64_t strides[3] = {bytes(tokens, v.token), bytes(heads, v.head), bytes(batch, v.batch)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_tokens), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(
      map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      v.data, extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// ---------------------------------------------------------------------------------------------------------------
// Barriers and copies
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the last barrier_init of a thread, before the barrier that lets other threads and TMA see it.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and makes the current phase wait for `bytes` more bytes of TMA copies.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ bool barrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// Returns once the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_try(barrier, parity)) {
  }
}

// Barrier `id` (1..15; 0 is __syncthreads) among `threads` threads, a multiple of 32.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Makes this thread's writes to shared memory visible to wgmma and TMA (the asynchronous proxy).
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One box of a tensor_map(), from channel `c` of (token, head, batch) on, into shared memory; `barrier`
// counts the bytes (whole boxes, zeros included).
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c,
                                         int token, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

// Registers a thread of this warpgroup may use from here on; every warp of the warpgroup executes it.
template <int kRegisters>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---------------------------------------------------------------------------------------------------------------
// Layout and descriptors of operands in shared memory
// ---------------------------------------------------------------------------------------------------------------

// Byte offset, within a part of a block, of the 16-byte piece `piece` (0..7) of row `row`.
__device__ __forceinline__ uint32_t swizzle128(int row, int piece) {
  return static_cast<uint32_t>(row * 128 + ((piece ^ (row & 7)) << 4));
}

// Operand whose products run along the channels. Step 16 channels on: k_step().
__device__ __forceinline__ uint64_t k_major(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3ffff) >> 4) | (uint64_t{1} << 16) | (uint64_t{64} << 32) |
         (uint64_t{1} << 62);
}
// Distance to channels [16 * step, 16 * step + 16) of a K-major operand whose parts hold `rows` rows.
__host__ __device__ constexpr uint64_t k_step(int step, int rows) {
  return static_cast<uint64_t>(step / 4) * (static_cast<uint64_t>(rows) * 128 >> 4) +
         static_cast<uint64_t>(step % 4) * 2;
}
// Operand whose products run along the rows and whose columns are the channels; parts hold `rows` rows.
// 16 rows on: + 128 (2,048 bytes).
__device__ __forceinline__ uint64_t mn_major(uint32_t shared, int rows) {
  return static_cast<uint64_t>((shared & 0x3ffff) >> 4) | (static_cast<uint64_t>(rows * 128 >> 4) << 16) |
         (uint64_t{64} << 32) | (uint64_t{1} << 62);
}
inline constexpr uint64_t kMnStep = 2048 >> 4;

// ---------------------------------------------------------------------------------------------------------------
// Warpgroup products
// ---------------------------------------------------------------------------------------------------------------

// Before the first product that reads registers written by other instructions (accumulators, A).
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `kPending` committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Major order of an operand in shared memory.
enum class Major : int { kK = 0, kMN = 1 };

// c (64 x N, float32) = a (64 x 16) * b (16 x N) + (accumulate ? c : 0), asynchronous. N = 2 * size of c: 64
// or 128. Element (row, column) of c: thread 32 * warp + lane holds rows 16 * warp + lane / 4 (+ 8) and
// columns 8 * j + 2 * (lane % 4) (+ 1) in c[4 * j + 2 * (upper row) + (odd column)]. A in registers is laid
// out as for mma.m16n8k16. `T` is __nv_bfloat16 or __half.
//
// The instruction's operand list and its name are string literals, so the four shapes and two types are
// written with these two macros, which end with this file.
#define TOPK_ACC8(c, i)                                                                                   \
  "+f"((c)[i]), "+f"((c)[i + 1]), "+f"((c)[i + 2]), "+f"((c)[i + 3]), "+f"((c)[i + 4]), "+f"((c)[i + 5]), \
      "+f"((c)[i + 6]), "+f"((c)[i + 7])
#define TOPK_REGS32                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, "                                                                                                \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TOPK_REGS64                                                                              \
  TOPK_REGS32                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// A and B in shared memory.
template <typename T, Major kA = Major::kK, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&c)[32], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" TOPK_REGS32
        "}, %32, %33, p, 1, 1, %35, %36;\n}"
        : TOPK_ACC8(c, 0), TOPK_ACC8(c, 8), TOPK_ACC8(c, 16), TOPK_ACC8(c, 24)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kA)),
          "n"(static_cast<int>(kB)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" TOPK_REGS32
        "}, %32, %33, p, 1, 1, %35, %36;\n}"
        : TOPK_ACC8(c, 0), TOPK_ACC8(c, 8), TOPK_ACC8(c, 16), TOPK_ACC8(c, 24)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kA)),
          "n"(static_cast<int>(kB)));
  }
}

template <typename T, Major kA = Major::kK, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&c)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" TOPK_REGS64
        "}, %64, %65, p, 1, 1, %67, %68;\n}"
        : TOPK_ACC8(c, 0), TOPK_ACC8(c, 8), TOPK_ACC8(c, 16), TOPK_ACC8(c, 24), TOPK_ACC8(c, 32),
          TOPK_ACC8(c, 40), TOPK_ACC8(c, 48), TOPK_ACC8(c, 56)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kA)),
          "n"(static_cast<int>(kB)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" TOPK_REGS64
        "}, %64, %65, p, 1, 1, %67, %68;\n}"
        : TOPK_ACC8(c, 0), TOPK_ACC8(c, 8), TOPK_ACC8(c, 16), TOPK_ACC8(c, 24), TOPK_ACC8(c, 32),
          TOPK_ACC8(c, 40), TOPK_ACC8(c, 48), TOPK_ACC8(c, 56)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kA)),
          "n"(static_cast<int>(kB)));
  }
}

// A in registers, B in shared memory.
template <typename T, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&c)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                      uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" TOPK_REGS32
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : TOPK_ACC8(c, 0), TOPK_ACC8(c, 8), TOPK_ACC8(c, 16), TOPK_ACC8(c, 24)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(accumulate)),
          "n"(static_cast<int>(kB)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" TOPK_REGS32
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : TOPK_ACC8(c, 0), TOPK_ACC8(c, 8), TOPK_ACC8(c, 16), TOPK_ACC8(c, 24)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(accumulate)),
          "n"(static_cast<int>(kB)));
  }
}

template <typename T, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&c)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                      uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" TOPK_REGS64
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
        : TOPK_ACC8(c, 0), TOPK_ACC8(c, 8), TOPK_ACC8(c, 16), TOPK_ACC8(c, 24), TOPK_ACC8(c, 32),
          TOPK_ACC8(c, 40), TOPK_ACC8(c, 48), TOPK_ACC8(c, 56)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(accumulate)),
          "n"(static_cast<int>(kB)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" TOPK_REGS64
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
        : TOPK_ACC8(c, 0), TOPK_ACC8(c, 8), TOPK_ACC8(c, 16), TOPK_ACC8(c, 24), TOPK_ACC8(c, 32),
          TOPK_ACC8(c, 40), TOPK_ACC8(c, 48), TOPK_ACC8(c, 56)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(accumulate)),
          "n"(static_cast<int>(kB)));
  }
}

#undef TOPK_ACC8
#undef TOPK_REGS32
#undef TOPK_REGS64

}  // namespace topk_attn::cuda::sm90
