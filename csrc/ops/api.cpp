// The public C++ functions of topk_attn.h: thin calls of the registered operators.

#include <ATen/core/dispatch/Dispatcher.h>

#include "checks.h"
#include "key_codes.h"
#include "operators.h"
#include "topk_attn/topk_attn.h"

namespace topk_attn {
namespace {

SelectionArgs selection_of(const Options& o) {
  return {o.causal, symbolic(o.topk), o.ratio,         SymInt(o.min_keys), symbolic(o.max_keys),
          o.select, SymInt(o.sink),   SymInt(o.recent)};
}

}  // namespace

Attention topk_attn_func(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const Options& options) {
  auto r = call_fwd(q, k, v, {}, selection_of(options), options.softmax_scale, options.deterministic, "none");
  return {std::get<0>(r), std::get<1>(r)};
}

Attention topk_attn_varlen_func(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                int64_t max_seqlen_q, int64_t max_seqlen_k, const Options& options) {
  auto r = call_fwd(q, k, v, {cu_seqlens_q, cu_seqlens_k, SymInt(max_seqlen_q), SymInt(max_seqlen_k)},
                    selection_of(options), options.softmax_scale, options.deterministic, "none");
  return {std::get<0>(r), std::get<1>(r)};
}

Selected topk_select(const at::Tensor& q, const at::Tensor& k, const Options& options,
                     const std::optional<Packed>& packed, bool return_indices) {
  PackedArgs args;
  if (packed.has_value()) {
    args = {packed->cu_seqlens_q, packed->cu_seqlens_k, symbolic(packed->max_seqlen_q),
            symbolic(packed->max_seqlen_k)};
  }
  auto r = call_select(q, k, args, selection_of(options), return_indices);
  return {std::get<0>(r), std::get<1>(r), std::get<2>(r)};
}

Selected topk_select_scores(const at::Tensor& scores, int64_t topk,
                            const std::optional<at::Tensor>& lengths) {
  auto r = call_select_scores(scores, SymInt(topk), lengths);
  return {std::get<0>(r), std::get<1>(r), std::get<2>(r)};
}

CacheAttention topk_attn_with_kvcache(const at::Tensor& q, const Cache& cache, const Options& options,
                                      bool return_indices) {
  auto r = call_fwd_kvcache(q, cache.k_cache, cache.v_cache, cache.k, cache.v, cache.cache_seqlens,
                            cache.cache_leftpad, cache.block_table, cache.key_codes, selection_of(options),
                            options.softmax_scale, return_indices);
  return {std::get<0>(r), std::get<1>(r), std::get<2>(r), std::get<3>(r), std::get<4>(r), std::get<5>(r)};
}

at::Tensor key_codes_new(const at::Tensor& k_cache) {
  return call_key_codes_new(k_cache);
}

void key_codes_rebuild(const at::Tensor& key_codes, const at::Tensor& k_cache,
                       const at::Tensor& cache_seqlens, const std::optional<at::Tensor>& cache_leftpad,
                       const std::optional<at::Tensor>& block_table, bool calibrate) {
  call_key_codes_rebuild(key_codes, k_cache, cache_seqlens, cache_leftpad, block_table, calibrate);
}

KeyCodes key_codes_views(const at::Tensor& key_codes, const at::Tensor& k_cache) {
  check_key_codes(key_codes, k_cache);
  const int64_t blocks = k_cache.size(0);
  const int64_t rows = k_cache.size(1);
  const int64_t heads = k_cache.size(2);
  const int64_t width = codes_width(k_cache.size(3));
  const auto at = codes_layout<int64_t>(blocks, rows, heads, k_cache.size(3));
  const auto part = [&](int64_t from, int64_t bytes, at::ScalarType type, at::IntArrayRef sizes) {
    return key_codes.slice(0, from, from + bytes).view(type).view(sizes);
  };
  const int64_t keys = blocks * heads * rows;
  return {part(0, keys * width, at::kChar, {blocks, heads, rows, width}),
          part(at.words, keys * 4, at::kInt, {blocks, heads, rows}),
          part(at.center, heads * width * 4, at::kFloat, {heads, width}),
          part(at.exponent, heads * width * 4, at::kInt, {heads, width}),
          part(at.stats, kCodeStats * 8, at::kLong, {kCodeStats})};
}

CertifiedStats certified_stats(const at::Tensor& key_codes) {
  TORCH_CHECK(
      key_codes.scalar_type() == at::kChar && key_codes.dim() == 1 && key_codes.numel() >= kCodeStats * 8,
      "topk_attn: key_codes must be as key_codes_new made it, got ", key_codes.scalar_type(), " of sizes ",
      key_codes.sizes());
  const at::Tensor stats = key_codes.slice(0, key_codes.numel() - kCodeStats * 8).view(at::kLong).cpu();
  const int64_t* const s = stats.const_data_ptr<int64_t>();
  return {s[0], s[1], s[2], s[3], s[4]};
}

namespace {

// Operators that exist only where the library has CUDA kernels.
template <typename Signature>
c10::TypedOperatorHandle<Signature> cuda_handle(const char* name) {
  const auto found = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(found.has_value(), "topk_attn: this library was built without CUDA kernels (TOPK_CUDA)");
  return found->typed<Signature>();
}

}  // namespace

CudaPlan cuda_plan(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Options& o) {
  using Result = std::tuple<std::string, std::string, double, double>;
  using Signature = Result(const Tensor&, const Tensor&, const OptTensor&, bool, OptInt,
                           std::optional<double>, int64_t, OptInt, std::string_view, int64_t, int64_t, bool);
  auto [build, selection, forward, backward] =
      cuda_handle<Signature>("topk_attn::_cuda_plan")
          .call(q, k, v, o.causal, o.topk, o.ratio, o.min_keys, o.max_keys, o.select, o.sink, o.recent,
                o.deterministic);
  return {build, selection, forward, backward};
}

void cuda_override(const std::string& build, const std::string& selection, double largest_share) {
  using Signature = void(std::string_view, std::string_view, double);
  cuda_handle<Signature>("topk_attn::_cuda_override").call(build, selection, largest_share);
}

int64_t budget(int64_t n, const Options& options) {
  TORCH_CHECK(n >= 0, "topk_attn: n must be at least 0, got ", n);
  const SelectionArgs s = selection_of(options);
  return budget(n,
                check_settings(s.topk, s.ratio, s.min_keys, s.max_keys, s.select, s.sink, s.recent).budget);
}

}  // namespace topk_attn
