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
// with; good ones (calibrate()) make the bound tight. Codes hold only for those that they were made with.
//
// The buffer, key_codes.h says what lies where, is zeroed before its first use. A word holds the scale
// (bfloat16) in its upper half and the bound (bfloat16) below; exponents are 0 to 16.
// Cost: 132 bytes a key at D = 128, a quarter more than the bf16 K and V.
#pragma once

#include "../../key_codes.h"
#include "params.h"

namespace topk_attn::cuda::decode {

// Numbers of rows and keys that the certified scan has served, added up.
struct CertifiedStats {
  unsigned long long rows = 0;       // that had to select
  unsigned long long certified = 0;  // of these, served by the certificate; the others fell back
  unsigned long long kept = 0;       // W of the certified rows, in all
  unsigned long long survivors = 0;  // of the certified rows
  unsigned long long listed = 0;     // of the certified rows
};
static_assert(sizeof(CertifiedStats) <= kCodeStats * 8);

struct KeyCodes {
  int8_t* codes = nullptr;
  uint32_t* words = nullptr;
  float* center = nullptr;
  int32_t* exponent = nullptr;
  CertifiedStats* stats = nullptr;
  int32_t rows = 0;   // of a block
  int32_t width = 0;  // channels, padded
};

KeyCodes codes_of(void* buffer, int64_t blocks, int64_t rows, int32_t kv_heads, int32_t head_dim);

// Sets center and exponent from the valid keys of the first sequence that has any (up to 4,096 of them,
// evenly spread), and forgets all codes of the cache's `blocks`: their words are zeroed.
cudaError_t calibrate(const DecodeCall& call, const Scratch& scratch, const KeyCodes& codes, int64_t blocks,
                      cudaStream_t stream);

// Makes the codes of the new rows of every sequence, or of all its valid rows, from the cache. Comes after
// prepare(). bf16 and fp16.
cudaError_t encode(const DecodeCall& call, const Scratch& scratch, const KeyCodes& codes, bool all_rows,
                   cudaStream_t stream);

}  // namespace topk_attn::cuda::decode
