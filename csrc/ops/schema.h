// The operator schemas, written once: registered by schema.cpp, implemented per backend by cpu.cpp, meta.cpp,
// autograd.cpp and autocast.cpp. A change here is a change of every backend.
#pragma once

// Budget and selection arguments, the same everywhere (contract section 10).
#define TOPK_ATTN_SELECTION_ARGS                                                                        \
  "SymInt? topk=None, float? ratio=None, SymInt min_keys=1, SymInt? max_keys=None, str select='head', " \
  "SymInt sink=0, SymInt recent=0"

#define TOPK_ATTN_PACKED_ARGS                                                                 \
  "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? " \
  "max_seqlen_k=None"

namespace topk_attn::schema {

// Dense: q (B,Tq,H,D), k (B,Tk,Hkv,D). Packed (cu_seqlens given): q (total_q,H,D), k (total_k,Hkv,D).
inline constexpr const char* kSelect =
    "select(Tensor q, Tensor k, " TOPK_ATTN_PACKED_ARGS ", *, bool causal=True, " TOPK_ATTN_SELECTION_ARGS
    ", bool return_indices=False) -> (Tensor threshold, Tensor tie_index, Tensor indices)";

// `kept` says what is left for the backward beside the encoding, in kept_index and kept_prob:
//   "none"   nothing (both empty): the backward recomputes it;
//   "lists"  CPU: a row's kept keys and their probabilities, (..., Wmax), or empty where lists would not pay;
//   "tiles"  CUDA: kept_index (H, tiles, words) int32, one bit a key for every 64 query rows: whether any of
//            them keeps it. kept_prob is empty.
// Where every row keeps all that it sees, CUDA returns an encoding that says no more than that (-inf, last
// int32): it skips the selection.
inline constexpr const char* kFwd =
    "fwd(Tensor q, Tensor k, Tensor v, " TOPK_ATTN_PACKED_ARGS
    ", *, bool causal=True, " TOPK_ATTN_SELECTION_ARGS
    ", float? softmax_scale=None, bool deterministic=False, str kept='none') -> (Tensor out, Tensor lse, "
    "Tensor threshold, Tensor tie_index, Tensor kept_index, Tensor kept_prob)";

inline constexpr const char* kBwd =
    "bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor threshold, "
    "Tensor tie_index, Tensor kept_index, Tensor kept_prob, " TOPK_ATTN_PACKED_ARGS
    ", *, bool causal=True, " TOPK_ATTN_SELECTION_ARGS
    ", float? softmax_scale=None, bool deterministic=False) -> (Tensor dq, Tensor dk, Tensor dv)";

inline constexpr const char* kSelectScores =
    "select_scores(Tensor scores, SymInt topk, Tensor? lengths=None) -> (Tensor threshold, Tensor tie_index, "
    "Tensor indices)";

// key_codes, made by key_codes_new, allow the certified scan on CUDA. The codes of the new rows are made by
// the call that writes them, whichever scan serves it; statistics are added to at the buffer's end.
inline constexpr const char* kFwdKvcache =
    "fwd_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor "
    "cache_seqlens, "
    "Tensor? cache_leftpad=None, Tensor? block_table=None, Tensor(c!)? key_codes=None, *, bool "
    "causal=True, " TOPK_ATTN_SELECTION_ARGS
    ", float? softmax_scale=None, bool return_indices=False) -> (Tensor out, Tensor lse, Tensor indices, "
    "Tensor slots, Tensor threshold, Tensor tie_index)";

// The key codes of a cache (B,S,Hkv,D) or of pages (P,page,Hkv,D): one flat int8 buffer (key_codes.h),
// zeroed.
inline constexpr const char* kKeyCodesNew = "key_codes_new(Tensor k_cache) -> Tensor";

// Codes of all valid rows of the given sequences, from the cache. With `calibrate` their centre and exponents
// are set first, from the first sequence that has keys, and the codes of all other rows of the cache are
// forgotten: those keys are looked at exactly until they are encoded again.
inline constexpr const char* kKeyCodesRebuild =
    "key_codes_rebuild(Tensor(a!) key_codes, Tensor k_cache, Tensor cache_seqlens, Tensor? "
    "cache_leftpad=None, Tensor? block_table=None, *, bool calibrate=True) -> ()";

// Byte offsets in the buffer of k_cache's codes: words, center, exponent, stats, and its size.
inline constexpr const char* kKeyCodesLayout = "key_codes_layout(Tensor k_cache) -> int[]";

}  // namespace topk_attn::schema
