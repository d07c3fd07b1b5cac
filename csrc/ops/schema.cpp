// Registers the schemas and offers typed calls of them.

#include "schema.h"

#include <torch/library.h>

#include "checks.h"
#include "key_codes.h"
#include "operators.h"

namespace topk_attn {
namespace {

std::vector<int64_t> key_codes_layout(const Tensor& k_cache) {
  check_codes_cache(k_cache);
  const auto at = codes_layout<int64_t>(k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3));
  return {at.words, at.center, at.exponent, at.stats, at.bytes};
}

}  // namespace
}  // namespace topk_attn

TORCH_LIBRARY(topk_attn, m) {
  m.def(topk_attn::schema::kSelect);
  m.def(topk_attn::schema::kFwd);
  m.def(topk_attn::schema::kBwd);
  m.def(topk_attn::schema::kSelectScores);
  m.def(topk_attn::schema::kFwdKvcache);
  m.def(topk_attn::schema::kKeyCodesNew);
  m.def(topk_attn::schema::kKeyCodesRebuild);
  m.def(topk_attn::schema::kKeyCodesLayout, &topk_attn::key_codes_layout);
}

namespace topk_attn {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

SelectResult call_select(const Tensor& q, const Tensor& k, const PackedArgs& p, const SelectionArgs& s,
                         bool return_indices) {
  static const auto op = handle<SelectSignature>("topk_attn::select");
  return op.call(q, k, p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k, s.causal, s.topk,
                 s.ratio, s.min_keys, s.max_keys, s.select, s.sink, s.recent, return_indices);
}

FwdResult call_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const PackedArgs& p,
                   const SelectionArgs& s, std::optional<double> softmax_scale, bool deterministic,
                   std::string_view kept) {
  static const auto op = handle<FwdSignature>("topk_attn::fwd");
  return op.call(q, k, v, p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k, s.causal, s.topk,
                 s.ratio, s.min_keys, s.max_keys, s.select, s.sink, s.recent, softmax_scale, deterministic,
                 kept);
}

BwdResult call_bwd(const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k,
                   const Tensor& v, const ForwardState& f, const PackedArgs& p, const SelectionArgs& s,
                   std::optional<double> softmax_scale, bool deterministic) {
  static const auto op = handle<BwdSignature>("topk_attn::bwd");
  return op.call(dout, dlse, q, k, v, f.out, f.lse, f.threshold, f.tie_index, f.kept_index, f.kept_prob,
                 p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k, s.causal, s.topk, s.ratio,
                 s.min_keys, s.max_keys, s.select, s.sink, s.recent, softmax_scale, deterministic);
}

SelectResult call_select_scores(const Tensor& scores, SymInt topk, const OptTensor& lengths) {
  static const auto op = handle<SelectScoresSignature>("topk_attn::select_scores");
  return op.call(scores, std::move(topk), lengths);
}

FwdResult call_fwd_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k,
                           const OptTensor& v, const Tensor& cache_seqlens, const OptTensor& cache_leftpad,
                           const OptTensor& block_table, const OptTensor& key_codes, const SelectionArgs& s,
                           std::optional<double> softmax_scale, bool return_indices) {
  static const auto op = handle<FwdKvcacheSignature>("topk_attn::fwd_kvcache");
  return op.call(q, k_cache, v_cache, k, v, cache_seqlens, cache_leftpad, block_table, key_codes, s.causal,
                 s.topk, s.ratio, s.min_keys, s.max_keys, s.select, s.sink, s.recent, softmax_scale,
                 return_indices);
}

Tensor call_key_codes_new(const Tensor& k_cache) {
  static const auto op = handle<KeyCodesNewSignature>("topk_attn::key_codes_new");
  return op.call(k_cache);
}

void call_key_codes_rebuild(const Tensor& key_codes, const Tensor& k_cache, const Tensor& cache_seqlens,
                            const OptTensor& cache_leftpad, const OptTensor& block_table, bool calibrate) {
  static const auto op = handle<KeyCodesRebuildSignature>("topk_attn::key_codes_rebuild");
  op.call(key_codes, k_cache, cache_seqlens, cache_leftpad, block_table, calibrate);
}

}  // namespace topk_attn
