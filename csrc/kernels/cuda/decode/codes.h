// An int8 copy of the keys of a cache, with a bound of what the copy leaves out, for the certified scan.
//
// Key k of a KV head is centred and scaled channel by channel, x = (k - center) * 2^-exponent, and stored as
// codes round(x / scale), one scale a key. What is lost is bounded by one number a key: for every query q,
// with p = q * 2^exponent,
//   |score(q, k) - q . center - p^ . (scale * codes)| <= |p| * bound,
// where score() is the contract's routine with its own rounding and p^ is the scan's quantised p. The bound
// is derived in docs/decode.md. A key that is not finite has an infinite bound, and so has a row that was
// never written (its word is 0): such keys are always looked at exactly.
//
// center and exponent belong to the cache (one a KV head and channel). They may be anything, zeros to begin
// with; good ones (calibrate()) make the bound tight. To change them is to make all codes invalid.
//
// Layout of the buffer, which has codes_bytes() and is zeroed before its first use. A block is an entry of a
// contiguous cache (rows = its room) or a page (rows = its size); pieces are 16-byte aligned:
//   codes     (blocks, kv_heads, rows, width) int8; width: 64 or 128 channels
//   words     (blocks, kv_heads, rows) uint32: scale (bfloat16) in the upper half, bound (bfloat16) below
//   center    (kv_heads, width) float32
//   exponent  (kv_heads, width) int32, 0 to 16
// Cost: 132 bytes a key at D = 128, a quarter more than the bf16 K and V.
#pragma once

#include "params.h"

namespace topk_attn::cuda::decode {

struct KeyCodes {
  int8_t* codes = nullptr;
  uint32_t* words = nullptr;
  float* center = nullptr;
  int32_t* exponent = nullptr;
  int32_t rows = 0;   // of a block
  int32_t width = 0;  // channels, padded
};

// Channels of a stored key; 0: no codes for this head dim (above 128).
inline int32_t codes_width(int32_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 0;
}

int64_t codes_bytes(int64_t blocks, int64_t rows, int32_t kv_heads, int32_t head_dim);
KeyCodes codes_of(void* buffer, int64_t blocks, int64_t rows, int32_t kv_heads, int32_t head_dim);

// Sets center and exponent from the valid keys of the first sequence that has any (up to 4,096 of them,
// evenly spread). Codes that were made before are invalid afterwards.
cudaError_t calibrate(const DecodeCall& call, const Scratch& scratch, const KeyCodes& codes,
                      cudaStream_t stream);

// Makes the codes of the new rows of every sequence, or of all its valid rows, from the cache. Comes after
// prepare(). bf16 and fp16.
cudaError_t encode(const DecodeCall& call, const Scratch& scratch, const KeyCodes& codes, bool all_rows,
                   cudaStream_t stream);

}  // namespace topk_attn::cuda::decode
