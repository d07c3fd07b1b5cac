// Autocast: q, k and v are cast as scaled_dot_product_attention casts them, to the region's lower precision.

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "operators.h"

namespace topk_attn {
namespace {

template <c10::DeviceType device>
struct Autocast {
  static constexpr c10::DispatchKey kKey =
      device == c10::DeviceType::CPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA;

  static Tensor cast(const Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  }

  static SelectResult select(const Tensor& q, const Tensor& k, const OptTensor& cu_seqlens_q,
                             const OptTensor& cu_seqlens_k, OptSymInt max_seqlen_q, OptSymInt max_seqlen_k,
                             bool causal, OptSymInt topk, std::optional<double> ratio, SymInt min_keys,
                             OptSymInt max_keys, std::string_view select, SymInt sink, SymInt recent,
                             bool return_indices) {
    c10::impl::ExcludeDispatchKeyGuard off(kKey);
    return call_select(cast(q), cast(k), {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                       {causal, topk, ratio, min_keys, max_keys, std::string(select), sink, recent},
                       return_indices);
  }

  static FwdResult fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
                       const OptTensor& cu_seqlens_k, OptSymInt max_seqlen_q, OptSymInt max_seqlen_k,
                       bool causal, OptSymInt topk, std::optional<double> ratio, SymInt min_keys,
                       OptSymInt max_keys, std::string_view select, SymInt sink, SymInt recent,
                       std::optional<double> softmax_scale, bool deterministic, std::string_view kept) {
    c10::impl::ExcludeDispatchKeyGuard off(kKey);
    return call_fwd(cast(q), cast(k), cast(v), {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                    {causal, topk, ratio, min_keys, max_keys, std::string(select), sink, recent},
                    softmax_scale, deterministic, kept);
  }

  static OptTensor cast(const OptTensor& t) { return t.has_value() ? OptTensor(cast(*t)) : t; }

  // The caches are never cast: a copy would be written to instead of the cache.
  static FwdResult fwd_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                               const OptTensor& k, const OptTensor& v, const Tensor& cache_seqlens,
                               const OptTensor& cache_leftpad, const OptTensor& block_table,
                               const OptTensor& key_codes, bool causal, OptSymInt topk,
                               std::optional<double> ratio, SymInt min_keys, OptSymInt max_keys,
                               std::string_view select, SymInt sink, SymInt recent,
                               std::optional<double> softmax_scale, bool return_indices) {
    c10::impl::ExcludeDispatchKeyGuard off(kKey);
    return call_fwd_kvcache(cast(q), k_cache, v_cache, cast(k), cast(v), cache_seqlens, cache_leftpad,
                            block_table, key_codes,
                            {causal, topk, ratio, min_keys, max_keys, std::string(select), sink, recent},
                            softmax_scale, return_indices);
  }
};

}  // namespace
}  // namespace topk_attn

TORCH_LIBRARY_IMPL(topk_attn, AutocastCPU, m) {
  m.impl("select", &topk_attn::Autocast<c10::DeviceType::CPU>::select);
  m.impl("fwd", &topk_attn::Autocast<c10::DeviceType::CPU>::fwd);
  m.impl("fwd_kvcache", &topk_attn::Autocast<c10::DeviceType::CPU>::fwd_kvcache);
}

TORCH_LIBRARY_IMPL(topk_attn, AutocastCUDA, m) {
  m.impl("select", &topk_attn::Autocast<c10::DeviceType::CUDA>::select);
  m.impl("fwd", &topk_attn::Autocast<c10::DeviceType::CUDA>::fwd);
  m.impl("fwd_kvcache", &topk_attn::Autocast<c10::DeviceType::CUDA>::fwd_kvcache);
}
