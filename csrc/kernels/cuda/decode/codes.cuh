// Device side of codes.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cache.cuh"
#include "codes.h"

namespace topk_attn::cuda::decode {

// Shares of the bound, see docs/decode.md.
inline constexpr float kRoutineShare = 0x1p-22f;  // a channel: the score routine's own rounding, of |q| |k|
inline constexpr float kFloatShare = 0x1p-21f;    // of float32 arithmetic here and in the scan
inline constexpr float kQueryShare = 1.8e-5f;     // times sqrt(D): rounding of the query's two int8 planes
inline constexpr float kLeastBound = 0x1p-100f;   // stands for underflow; keeps words of written rows above 0
inline constexpr float kLargestError = 0x1p100f;  // beyond it scores may overflow: such keys always survive
inline constexpr float kAbsoluteError = 0x1p-110f;

// Row of the codes of position j of a sequence, head 0; heads are `rows` apart. j is valid, and so is its
// page.
__device__ __forceinline__ int64_t code_row(const DecodeCall& c, const KeyCodes& codes, int sequence, int j) {
  int64_t block = sequence;
  int row = j;
  if (c.block_table != nullptr) {
    const int page = j / c.page_size;
    block = c.block_table[int64_t{sequence} * c.max_pages + page];
    row = j - page * c.page_size;
  }
  return block * c.kv_heads * codes.rows + row;
}

// The least bfloat16 at or above x >= 0, as bits; infinity beyond the last, and for NaN.
__device__ __forceinline__ uint32_t bf16_up(float x) {
  if (!(x < __int_as_float(0x7f7f0000))) return 0x7f80u;
  return (__float_as_uint(x) + 0xffffu) >> 16;
}
__device__ __forceinline__ float bf16_value(uint32_t bits) {
  return __uint_as_float(bits << 16);
}

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

}  // namespace topk_attn::cuda::decode
