// Meta implementations: shapes and dtypes of the outputs, for tracing and torch.compile. No data is read.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"

namespace topk_attn {
namespace {

Tensor make(std::vector<SymInt> sizes, const Tensor& like, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

std::vector<SymInt> row_sizes(const Shape& shape, std::optional<int64_t> extra = std::nullopt) {
  std::vector<SymInt> sizes;
  if (!shape.packed) sizes.push_back(shape.batch);
  sizes.emplace_back(shape.heads);
  sizes.push_back(shape.tq);
  if (extra.has_value()) sizes.emplace_back(*extra);
  return sizes;
}

SelectResult select(const Tensor& q, const Tensor& k, const OptTensor& cu_seqlens_q,
                    const OptTensor& cu_seqlens_k, OptSymInt max_seqlen_q, OptSymInt max_seqlen_k,
                    bool /*causal*/, OptSymInt topk, std::optional<double> ratio, SymInt min_keys,
                    OptSymInt max_keys, std::string_view select, SymInt sink, SymInt recent,
                    bool return_indices) {
  const Settings settings = check_settings(topk, ratio, min_keys, max_keys, select, sink, recent);
  const Shape shape = check_attention(q, k, Tensor(), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  Tensor indices = make({SymInt(0)}, q, at::kInt);
  if (return_indices) {
    indices = make(row_sizes(shape, budget(shape.longest.guard_int(__FILE__, __LINE__), settings.budget)), q,
                   at::kInt);
  }
  return {make(row_sizes(shape), q, accumulation_type(q.scalar_type())), make(row_sizes(shape), q, at::kInt),
          indices};
}

FwdResult fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
              const OptTensor& cu_seqlens_k, OptSymInt max_seqlen_q, OptSymInt max_seqlen_k, bool /*causal*/,
              OptSymInt topk, std::optional<double> ratio, SymInt min_keys, OptSymInt max_keys,
              std::string_view select, SymInt sink, SymInt recent, std::optional<double> softmax_scale,
              bool /*deterministic*/, std::string_view kept) {
  const Settings settings = check_settings(topk, ratio, min_keys, max_keys, select, sink, recent);
  const Shape shape = check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  check_scale(softmax_scale, shape.head_dim);
  const auto acc = accumulation_type(q.scalar_type());
  auto out_sizes = q.sym_sizes().vec();
  out_sizes.back() = shape.v_dim;
  Tensor kept_index = make({SymInt(0)}, q, at::kInt);
  Tensor kept_prob = make({SymInt(0)}, q, acc);
  const Kept form = check_kept(kept);
  if (form == Kept::kLists) {
    const int64_t width = saved_width(shape, settings, true);
    kept_index = make(row_sizes(shape, width), q, at::kInt);
    kept_prob = make(row_sizes(shape, width), q, acc);
  } else if (form == Kept::kTiles) {
    const TileGrid grid = tile_grid(shape, cu_seqlens_q);
    kept_index = make({SymInt(shape.heads), grid.tiles, grid.words}, q, at::kInt);
  }
  return {make(out_sizes, q, q.scalar_type()),
          make(row_sizes(shape), q, acc),
          make(row_sizes(shape), q, acc),
          make(row_sizes(shape), q, at::kInt),
          kept_index,
          kept_prob};
}

BwdResult bwd(const Tensor& /*dout*/, const OptTensor& /*dlse*/, const Tensor& q, const Tensor& k,
              const Tensor& v, const Tensor& /*out*/, const Tensor& /*lse*/, const Tensor& /*threshold*/,
              const Tensor& /*tie_index*/, const Tensor& /*kept_index*/, const Tensor& /*kept_prob*/,
              const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, OptSymInt max_seqlen_q,
              OptSymInt max_seqlen_k, bool /*causal*/, OptSymInt topk, std::optional<double> ratio,
              SymInt min_keys, OptSymInt max_keys, std::string_view select, SymInt sink, SymInt recent,
              std::optional<double> softmax_scale, bool /*deterministic*/) {
  check_settings(topk, ratio, min_keys, max_keys, select, sink, recent);
  const Shape shape = check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  check_scale(softmax_scale, shape.head_dim);
  return {make(q.sym_sizes().vec(), q, q.scalar_type()), make(k.sym_sizes().vec(), k, k.scalar_type()),
          make(v.sym_sizes().vec(), v, v.scalar_type())};
}

SelectResult select_scores(const Tensor& scores, SymInt topk, const OptTensor& lengths) {
  check_select_scores(scores, topk, lengths);
  const SymInt rows = scores.sym_size(0);
  return {make({rows}, scores, at::kFloat), make({rows}, scores, at::kInt),
          make({rows, topk}, scores, at::kInt)};
}

FwdResult fwd_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k,
                      const OptTensor& v, const Tensor& cache_seqlens, const OptTensor& cache_leftpad,
                      const OptTensor& block_table, const OptTensor& key_codes, bool /*causal*/,
                      OptSymInt topk, std::optional<double> ratio, SymInt min_keys, OptSymInt max_keys,
                      std::string_view select, SymInt sink, SymInt recent,
                      std::optional<double> softmax_scale, bool return_indices) {
  const Settings settings = check_settings(topk, ratio, min_keys, max_keys, select, sink, recent);
  const CacheShape cache = check_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, cache_leftpad, block_table,
                                         key_codes, return_indices);
  check_scale(softmax_scale, cache.head_dim);
  const auto acc = accumulation_type(q.scalar_type());
  const std::vector<SymInt> rows = {cache.batch, SymInt(cache.heads), cache.tq};
  std::vector<SymInt> lists = {SymInt(0)};
  if (return_indices) {
    lists = rows;
    lists.emplace_back(budget(cache.capacity.guard_int(__FILE__, __LINE__), settings.budget));
  }
  return {make({cache.batch, cache.tq, SymInt(cache.heads), SymInt(cache.v_dim)}, q, q.scalar_type()),
          make(rows, q, acc),
          make(lists, q, at::kInt),
          make(lists, q, at::kInt),
          make(rows, q, acc),
          make(rows, q, at::kInt)};
}

Tensor key_codes_new(const Tensor& k_cache) {
  return make({check_codes_cache(k_cache)}, k_cache, at::kChar);
}

void key_codes_rebuild(const Tensor& key_codes, const Tensor& k_cache, const Tensor& cache_seqlens,
                       const OptTensor& cache_leftpad, const OptTensor& block_table, bool /*calibrate*/) {
  check_rebuild(key_codes, k_cache, cache_seqlens, cache_leftpad, block_table);
}

}  // namespace
}  // namespace topk_attn

TORCH_LIBRARY_IMPL(topk_attn, Meta, m) {
  m.impl("select", &topk_attn::select);
  m.impl("fwd", &topk_attn::fwd);
  m.impl("bwd", &topk_attn::bwd);
  m.impl("select_scores", &topk_attn::select_scores);
  m.impl("fwd_kvcache", &topk_attn::fwd_kvcache);
  m.impl("key_codes_new", &topk_attn::key_codes_new);
  m.impl("key_codes_rebuild", &topk_attn::key_codes_rebuild);
}
