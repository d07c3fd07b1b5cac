// topk_attn: exact top-k sparse attention on torch tensors. The C++ face of the operators; Python calls the
// same ones.
//
// For each query only the W keys of highest raw score q.k are kept; contract.h defines the set,
// docs/contract.md says it in words. Source of the method: "A Preliminary Study on the Promises and
// Challenges of Native Top-k Sparse Attention" (arXiv 2512.03494).
//
// Shapes: B sequences, H query heads, Hkv key/value heads (H a multiple of Hkv; head h reads KV head h / (H /
// Hkv)), head dim D for q and k, Dv for v; both multiples of 8, at most 256. dtypes: float32, float64,
// bfloat16, float16, the same for q, k and v. Tensors may be strided as long as the last dimension is
// contiguous. Errors: std::invalid_argument-like c10::Error that names the argument, its value and what it
// must be, before any kernel starts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "topk_attn/contract.h"

namespace topk_attn {

// What every call takes. Defaults are the contract's; exactly one of topk and ratio must be given.
struct Options {
  bool causal = true;                   // bottom-right aligned
  std::optional<int64_t> topk;          // keys kept per row, absolute, >= 1
  std::optional<double> ratio;          // share of the visible keys kept, 0 < ratio <= 1
  int64_t min_keys = 1;                 // floor of the budget
  std::optional<int64_t> max_keys;      // ceiling of the budget; none: no limit
  std::string select = "head";          // "head": a set per query head; "kv_group": one per KV group
  int64_t sink = 0;                     // the first visible keys always kept
  int64_t recent = 0;                   // the last visible keys always kept
  std::optional<double> softmax_scale;  // default 1 / sqrt(D)
  bool deterministic = false;           // bit-identical gradients from run to run (always so on the CPU)
};

struct Attention {
  at::Tensor out;  // q's dtype
  at::Tensor lse;  // natural log over the kept keys; float32 (float64 for float64 inputs); differentiable
};

struct Selected {
  at::Tensor threshold;  // float32 (float64 for float64 inputs)
  at::Tensor tie_index;  // int32
  at::Tensor indices;    // int32, ascending, -1 padded; empty (0 elements) unless asked for
};

// Document bounds of packed inputs: cu_seqlens int32 (B+1), rising from 0 to the packed length.
struct Packed {
  at::Tensor cu_seqlens_q;
  at::Tensor cu_seqlens_k;
  std::optional<int64_t> max_seqlen_q;
  std::optional<int64_t> max_seqlen_k;
};

// q (B,Tq,H,D), k (B,Tk,Hkv,D), v (B,Tk,Hkv,Dv) -> out (B,Tq,H,Dv), lse (B,H,Tq).
Attention topk_attn_func(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const Options& options);

// q (total_q,H,D), k (total_k,Hkv,D), v (total_k,Hkv,Dv) -> out (total_q,H,Dv), lse (H,total_q).
Attention topk_attn_varlen_func(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                int64_t max_seqlen_q, int64_t max_seqlen_k, const Options& options);

// The selection alone; not differentiable. Dense: q (B,Tq,H,D) -> (B,H,Tq); packed: q (total_q,H,D) ->
// (H,total_q) with indices relative to the document. indices (..., Wmax) when `return_indices`.
Selected topk_select(const at::Tensor& q, const at::Tensor& k, const Options& options,
                     const std::optional<Packed>& packed = std::nullopt, bool return_indices = false);

// scores (rows, n) float32, bfloat16 or float16; lengths int32 (rows) or none (= n)
// -> threshold float32 (rows), tie_index int32 (rows), indices int32 (rows, topk).
Selected topk_select_scores(const at::Tensor& scores, int64_t topk,
                            const std::optional<at::Tensor>& lengths = std::nullopt);

// Caches and the rows to append. Contiguous: (B,S,Hkv,.); paged: pages (P,page,Hkv,.) with block_table int32
// (B,max_pages). `k`, `v` (B,Tnew,Hkv,.) are written in place at `cache_seqlens` before attending.
struct Cache {
  at::Tensor k_cache;
  at::Tensor v_cache;
  std::optional<at::Tensor> k;
  std::optional<at::Tensor> v;
  at::Tensor cache_seqlens;                 // int32 (B): valid keys before the new rows; not modified
  std::optional<at::Tensor> cache_leftpad;  // int32 (B): leading keys that are padding
  std::optional<at::Tensor> block_table;    // int32 (B,max_pages)
  std::optional<at::Tensor> key_codes;  // of key_codes_new(k_cache); codes of the new rows are written to it
};

struct CacheAttention {
  at::Tensor out;      // (B,Tq,H,Dv)
  at::Tensor lse;      // (B,H,Tq)
  at::Tensor indices;  // (B,H,Tq,Wmax) int32 logical positions; empty unless asked for
  at::Tensor slots;  // same shape: physical slots, page * page_size + offset (contiguous: = b * S + position)
  at::Tensor threshold;  // (B,H,Tq)
  at::Tensor tie_index;  // (B,H,Tq) int32
};

// q (B,Tq,H,D). Not differentiable: an error if a gradient is required.
CacheAttention topk_attn_with_kvcache(const at::Tensor& q, const Cache& cache, const Options& options,
                                      bool return_indices = false);

// Key codes (CUDA, bfloat16 and float16, D up to 128): an int8 copy of the keys of a cache, with which the
// certified scan reads half the bytes and keeps the same sets. k_cache (B,S,Hkv,D) or pages (P,page,Hkv,D).
// Returns a flat int8 buffer that knows no key yet; keys it does not know are looked at exactly.
at::Tensor key_codes_new(const at::Tensor& k_cache);

// Codes of all valid rows of these sequences: needed after anything but topk_attn_with_kvcache(.key_codes)
// has written rows. `calibrate` first fits the buffer to the keys of the first sequence that has some, which
// makes the scan look at fewer keys twice, and forgets the codes of all other rows of the cache.
void key_codes_rebuild(const at::Tensor& key_codes, const at::Tensor& k_cache,
                       const at::Tensor& cache_seqlens,
                       const std::optional<at::Tensor>& cache_leftpad = std::nullopt,
                       const std::optional<at::Tensor>& block_table = std::nullopt, bool calibrate = true);

// Views of the buffer's parts. Those of a block (an entry of a contiguous cache, or a page) can be copied to
// another with its keys.
struct KeyCodes {
  at::Tensor codes;     // (blocks,Hkv,rows,64 or 128) int8
  at::Tensor words;     // (blocks,Hkv,rows) int32: scale and bound, 0: unknown
  at::Tensor center;    // (Hkv,64 or 128) float32
  at::Tensor exponent;  // (Hkv,64 or 128) int32
  at::Tensor stats;     // (8) int64: CertifiedStats, then zeros
};
KeyCodes key_codes_views(const at::Tensor& key_codes, const at::Tensor& k_cache);

// What the certified scan did with this buffer since it was made or its stats were zeroed. Waits for the
// device.
struct CertifiedStats {
  int64_t rows = 0;       // query rows that had to select
  int64_t certified = 0;  // of these, served by the certificate; the others read all keys
  int64_t kept = 0;       // keys that the certified rows kept
  int64_t survivors = 0;  // keys that they looked at exactly
  int64_t listed = 0;     // keys that passed their first bound
};
CertifiedStats certified_stats(const at::Tensor& key_codes);

// Which CUDA kernels serve a call (csrc/kernels/cuda/plan.h has the rules). Every choice computes the same
// sets.
struct CudaPlan {
  std::string build;      // "plain", "portable" or "sm90"
  std::string selection;  // "slab" or "fused"
  double forward_share;   // largest union share of a query tile that the gathered kernels take; 0: none
  double backward_share;
};

// The plan of topk_attn_func(q, k, v, options) on q's GPU. An error where the library was built without CUDA
// kernels or an override asks for what cannot be done.
CudaPlan cuda_plan(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Options& options);

// Asks for kernels from now on, process-wide: empty strings and a negative share leave the choice to the
// library. Calls that cannot be served so raise an error with the reason.
void cuda_override(const std::string& build, const std::string& selection, double largest_share);

// W for a row that sees n keys: budget(n, ...) of contract.h, with the arguments checked.
int64_t budget(int64_t n, const Options& options);

}  // namespace topk_attn
