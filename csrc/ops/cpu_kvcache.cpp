// CPU implementation of fwd_kvcache: checks of lengths and pages, the append, the kernel.

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu_common.h"

namespace topk_attn {
namespace {

// Rows written for one sequence must not appear in another.
void check_writable(const Tensor& cache, const char* name) {
  TORCH_CHECK(at::has_internal_overlap(cache) != at::MemOverlap::Yes, "topk_attn: ", name,
              " must not be an expanded tensor when new rows are written, got strides ", cache.strides(),
              " for sizes ", cache.sizes(), ": several of its elements share memory");
}

void append_rows(const Tensor& rows, const Tensor& cache, const std::vector<int64_t>& start,
                 const int32_t* table, int64_t max_pages) {
  AppendParams p;
  p.src = view_of(rows);
  p.cache = view_of(cache);
  p.start = start.data();
  p.block_table = table;
  p.max_pages = max_pages;
  p.page_size = cache.size(1);
  p.batch = rows.size(0);
  p.tokens = rows.size(1);
  p.kv_heads = rows.size(2);
  p.row_dim = rows.size(3);
  p.element_size = rows.element_size();
  cpu::append(p);
  // The cache is written outside torch's sight: let autograd's version check know.
  if (!cache.is_inference()) cache.unsafeGetTensorImpl()->bump_version();
}

FwdResult fwd_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k,
                      const OptTensor& v, const Tensor& cache_seqlens, const OptTensor& cache_leftpad,
                      const OptTensor& block_table, const OptTensor& key_codes, bool causal, OptInt topk,
                      std::optional<double> ratio, int64_t min_keys, OptInt max_keys, std::string_view select,
                      int64_t sink, int64_t recent, std::optional<double> softmax_scale,
                      bool return_indices) {
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  const CacheShape cache = check_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, cache_leftpad, block_table,
                                         key_codes, return_indices);
  const int64_t batch = cache.batch.expect_int();
  const int64_t tq = cache.tq.expect_int();
  const int64_t appended = cache.appended.expect_int();
  const int64_t capacity = cache.capacity.expect_int();

  const Tensor seqlens_host = cache_seqlens.contiguous();
  const Tensor leftpad_host = cache_leftpad.has_value() ? cache_leftpad->contiguous() : Tensor();
  const Tensor table_host = block_table.has_value() ? block_table->contiguous() : Tensor();
  const int32_t* table = table_host.defined() ? table_host.data_ptr<int32_t>() : nullptr;
  const int64_t max_pages = table_host.defined() ? table_host.size(1) : 0;
  const int64_t page_size = k_cache.size(1);

  if (appended > 0) {
    check_writable(k_cache, "k_cache");
    check_writable(v_cache, "v_cache");
    TORCH_CHECK(at::get_overlap_status(k_cache, v_cache) == at::MemOverlapStatus::No ||
                    at::get_overlap_status(k_cache, v_cache) == at::MemOverlapStatus::TooHard,
                "topk_attn: k_cache and v_cache must not share memory when new rows are written");
  }
  std::vector<Sequence> sequences;
  std::vector<int64_t> start;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t before = seqlens_host.data_ptr<int32_t>()[b];
    TORCH_CHECK(before >= 0, "topk_attn: cache_seqlens must be at least 0, got ", before, " at sequence ", b);
    TORCH_CHECK(before + appended <= capacity,
                "topk_attn: cache_seqlens + new rows must be at most the cache's room of ", capacity,
                " positions, got ", before, " + ", appended, " at sequence ", b);
    const int64_t pad = leftpad_host.defined() ? leftpad_host.data_ptr<int32_t>()[b] : 0;
    TORCH_CHECK(pad >= 0 && pad <= before + appended,
                "topk_attn: cache_leftpad must be between 0 and the valid length ", before + appended,
                ", got ", pad, " at sequence ", b);
    for (int64_t i = 0; table != nullptr && i * page_size < before + appended; ++i) {
      const int32_t page = table[b * max_pages + i];
      TORCH_CHECK(page >= 0 && page < k_cache.size(0),
                  "topk_attn: block_table must hold page numbers from 0 to ", k_cache.size(0) - 1, ", got ",
                  page, " at sequence ", b, ", entry ", i);
    }
    sequences.push_back({b, 0, 0, tq, before + appended, pad});
    start.push_back(before);
  }

  CacheParams p;
  p.problem.dtype = dtype_of(q);
  p.problem.heads = cache.heads;
  p.problem.kv_heads = cache.kv_heads;
  p.problem.head_dim = cache.head_dim;
  p.problem.v_dim = cache.v_dim;
  p.problem.sequences = sequences.data();
  p.problem.num_sequences = batch;
  p.problem.causal = causal;
  p.problem.budget = settings.budget;
  p.problem.kv_group = settings.kv_group;
  p.problem.sink = settings.sink;
  p.problem.recent = settings.recent;
  p.problem.softmax_scale = check_scale(softmax_scale, cache.head_dim);
  p.problem.rows = RowLayout{cache.heads * tq, tq};

  const auto acc = q.options().dtype(accumulation_type(q.scalar_type()));
  const auto ints = q.options().dtype(at::kInt);
  const Tensor out = at::empty({batch, tq, cache.heads, cache.v_dim}, q.options());
  const Tensor lse = at::empty({batch, cache.heads, tq}, acc);
  const Tensor threshold = at::empty({batch, cache.heads, tq}, acc);
  const Tensor tie_index = at::empty({batch, cache.heads, tq}, ints);
  Tensor indices = at::empty({0}, ints);
  Tensor slots = at::empty({0}, ints);
  if (return_indices) {
    p.kept_width = budget(capacity, settings.budget);
    indices = at::empty({batch, cache.heads, tq, p.kept_width}, ints);
    slots = at::empty({batch, cache.heads, tq, p.kept_width}, ints);
    p.indices = indices.data_ptr<int32_t>();
    p.slots = slots.data_ptr<int32_t>();
  }
  p.q = view_of(q);
  p.k = view_of(k_cache);
  p.v = view_of(v_cache);
  p.out = view_of(out);
  p.block_table = table;
  p.max_pages = max_pages;
  p.page_size = page_size;
  p.slots_per_entry = k_cache.size(1);
  p.lse = lse.data_ptr();
  p.threshold = threshold.data_ptr();
  p.tie_index = tie_index.data_ptr<int32_t>();
  if (appended > 0) {  // only now: an error above leaves the caches as they were
    append_rows(*k, k_cache, start, table, max_pages);
    append_rows(*v, v_cache, start, table, max_pages);
  }
  cpu::forward_kvcache(p, executor());
  return {out, lse, indices, slots, threshold, tie_index};
}

// Key codes serve a scan that exists on CUDA only: the checks say so.
Tensor key_codes_new(const Tensor& k_cache) {
  check_codes_cache(k_cache);
  return Tensor();
}
void key_codes_rebuild(const Tensor& key_codes, const Tensor& k_cache, const Tensor& cache_seqlens,
                       const OptTensor& cache_leftpad, const OptTensor& block_table, bool /*calibrate*/) {
  check_rebuild(key_codes, k_cache, cache_seqlens, cache_leftpad, block_table);
}

}  // namespace
}  // namespace topk_attn

TORCH_LIBRARY_IMPL(topk_attn, CPU, m) {
  m.impl("fwd_kvcache", &topk_attn::fwd_kvcache);
  m.impl("key_codes_new", &topk_attn::key_codes_new);
  m.impl("key_codes_rebuild", &topk_attn::key_codes_rebuild);
}
