#include "topk_attn/kv_cache.h"

#include <ATen/ScalarOps.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

namespace topk_attn {
namespace {

using at::Tensor;

constexpr int64_t kCopyBytes = int64_t{32} << 20;

Tensor allocate(const KVCacheOptions& o, int64_t dim, const char* name) {
  const auto positive = [](int64_t value, const char* what) {
    TORCH_CHECK_VALUE(value >= 1, "topk_attn: ", what, " must be at least 1, got ", value);
  };
  positive(o.layers, "layers");
  positive(o.pages, "pages");
  positive(o.page_size, "page_size");
  positive(o.kv_heads, "kv_heads");
  TORCH_CHECK_VALUE(dim >= 8 && dim <= 256 && dim % 8 == 0, "topk_attn: ", name,
                    " must be a multiple of 8 from 8 to 256, got ", dim);
  TORCH_CHECK_VALUE(
      o.dtype == at::kFloat || o.dtype == at::kDouble || o.dtype == at::kBFloat16 || o.dtype == at::kHalf,
      "topk_attn: dtype must be float32, float64, bfloat16 or float16, got ", o.dtype);
  return at::empty({o.layers, o.pages, o.page_size, o.kv_heads, dim},
                   at::TensorOptions().dtype(o.dtype).device(o.device));
}

Tensor checked_pages(Tensor pages, const char* name) {
  TORCH_CHECK_VALUE(pages.dim() == 5 && pages.numel() > 0, "topk_attn: ", name,
                    " must be (layers, pages, page_size, kv_heads, head dim), got sizes ", pages.sizes());
  TORCH_CHECK_VALUE(pages.select(0, 0).is_contiguous(), "topk_attn: the pages of a layer in ", name,
                    " must be contiguous, got strides ", pages.strides(), " for sizes ", pages.sizes());
  TORCH_CHECK_VALUE(!pages.requires_grad(), "topk_attn: ", name, " must not require a gradient");
  return pages;
}

int64_t table_width(const Tensor& k, int64_t max_length) {
  TORCH_CHECK_VALUE(max_length >= 0, "topk_attn: max_length must be at least 0, got ", max_length);
  const int64_t pages = k.size(1), page_size = k.size(2);
  return max_length == 0 ? pages : std::min(pages, (max_length + page_size - 1) / page_size);
}

// Sent to the device without waiting: torch keeps pinned memory until the copy is done.
template <typename T>
Tensor sent(const std::vector<T>& values, at::IntArrayRef sizes, at::ScalarType dtype, at::Device device) {
  const Tensor host = at::empty(sizes, at::TensorOptions().dtype(dtype).pinned_memory(device.is_cuda()));
  std::copy(values.begin(), values.end(), host.data_ptr<T>());
  return device.is_cpu() ? host : host.to(at::TensorOptions().device(device), /*non_blocking=*/true);
}

}  // namespace

KVCache::KVCache(const KVCacheOptions& o)
    : KVCache(allocate(o, o.head_dim, "head_dim"), allocate(o, o.v_dim == 0 ? o.head_dim : o.v_dim, "v_dim"),
              o.max_length, o.key_codes) {}

KVCache::KVCache(Tensor k_pages, Tensor v_pages, int64_t max_length, bool key_codes)
    : k_(checked_pages(std::move(k_pages), "k_pages")),
      v_(checked_pages(std::move(v_pages), "v_pages")),
      width_(table_width(k_, max_length)),
      pool_(k_.size(1), k_.size(2)) {
  TORCH_CHECK_VALUE(k_.sizes().slice(0, 4) == v_.sizes().slice(0, 4), "topk_attn: v_pages has sizes ",
                    v_.sizes(), ", but k_pages has ", k_.sizes(), ": all but the last must be the same");
  TORCH_CHECK_VALUE(k_.scalar_type() == v_.scalar_type() && k_.device() == v_.device(),
                    "topk_attn: k_pages and v_pages must have the same dtype and device, got ",
                    k_.scalar_type(), " on ", k_.device(), " and ", v_.scalar_type(), " on ", v_.device());
  TORCH_CHECK_VALUE(this->max_length() <= std::numeric_limits<int32_t>::max(),
                    "topk_attn: a sequence must be shorter than 2^31 tokens, got room for ",
                    this->max_length());
  for (int64_t layer = 0; key_codes && layer < layers(); ++layer) {
    codes_.push_back(key_codes_new(this->k_pages(layer)));
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Sequences
// ---------------------------------------------------------------------------------------------------------------

void KVCache::changed() {
  stale_ = true;
  reserved_rows_ = 0;
  slots_ = Tensor();
}

int64_t KVCache::fork(int64_t sequence, int64_t length) {
  const int64_t made = pool_.fork(sequence, length);
  // The source's last page may be shared now.
  reserved_rows_ = 0;
  slots_ = Tensor();
  return made;
}

void KVCache::truncate(int64_t sequence, int64_t length) {
  pool_.truncate(sequence, length);
  changed();
}

void KVCache::remove(int64_t sequence) {
  pool_.remove(sequence);
  if (std::find(batch_.begin(), batch_.end(), sequence) != batch_.end()) {
    batch_.clear();
    changed();
  }
}

void KVCache::clear() {
  for (const int64_t sequence : pool_.handles()) pool_.remove(sequence);
  batch_.clear();
  changed();
}

void KVCache::reorder(const std::vector<int64_t>& sequences, const std::vector<int64_t>& order) {
  pool_.reorder(sequences, order);
  changed();
}

// ---------------------------------------------------------------------------------------------------------------
// The batch and its tensors
// ---------------------------------------------------------------------------------------------------------------

void KVCache::reserve(const std::vector<int64_t>& sequences, int64_t rows) {
  TORCH_CHECK_VALUE(rows >= 0, "topk_attn: rows must be at least 0, got ", rows);
  if (sequences == batch_ && !stale_) {
    // The usual step of a decode loop: the page of the last token has room for one more.
    const auto has_room = [&](int64_t sequence) { return pool_.has_room(sequence, rows); };
    if (std::all_of(sequences.begin(), sequences.end(), has_room)) {
      reserved_rows_ = std::max(reserved_rows_, rows);
      return;
    }
  }
  TORCH_CHECK_VALUE(!sequences.empty(), "topk_attn: sequences must name at least one sequence, got none");
  for (const int64_t sequence : sequences) {
    const int64_t length = pool_.length(sequence);
    TORCH_CHECK_VALUE(rows <= max_length() - length, "topk_attn: sequence ", sequence, " has ", length,
                      " tokens of at most ", max_length(), " (max_length): ", rows, " more do not fit");
  }
  const std::vector<PageCopy> copies = pool_.reserve(sequences, rows);
  batch_ = sequences;
  changed();
  reserved_rows_ = rows;
  copy_pages(copies);
  tensors();
}

void KVCache::copy_pages(const std::vector<PageCopy>& copies) {
  if (copies.empty()) return;
  const at::NoGradGuard no_grad;
  std::vector<int64_t> from, to;
  for (const PageCopy& copy : copies) {
    from.push_back(copy.from);
    to.push_back(copy.to);
  }
  const auto count = static_cast<int64_t>(copies.size());
  const Tensor source = sent(from, {count}, at::kLong, k_.device());
  const Tensor target = sent(to, {count}, at::kLong, k_.device());
  const auto copy = [&](Tensor& blocks, int64_t dim) {
    // A few at a time: what lies between reading and writing stays small.
    const int64_t block_bytes =
        blocks.numel() / blocks.size(dim) * static_cast<int64_t>(blocks.element_size());
    const int64_t step = std::max<int64_t>(1, kCopyBytes / block_bytes);
    for (int64_t first = 0; first < count; first += step) {
      const int64_t some = std::min(step, count - first);
      const Tensor read = blocks.index_select(dim, source.narrow(0, first, some));
      blocks.index_copy_(dim, target.narrow(0, first, some), read);
    }
  };
  copy(k_, 1);
  copy(v_, 1);
  for (size_t layer = 0; layer < codes_.size(); ++layer) {
    KeyCodes views = key_codes_views(codes_[layer], k_pages(static_cast<int64_t>(layer)));
    copy(views.codes, 0);
    copy(views.words, 0);
  }
}

KVCache::BatchTensors& KVCache::tensors() {
  TORCH_CHECK_VALUE(!batch_.empty(), "topk_attn: the cache has no batch: call reserve first");
  const auto size = static_cast<int64_t>(batch_.size());
  BatchTensors& t = tensors_[size];
  if (!t.table.defined()) {
    const auto ints = k_.options().dtype(at::kInt);
    t = {at::empty({size, width_}, ints), at::empty({size}, ints)};
    stale_ = true;
  }
  if (!stale_) return t;
  std::vector<int32_t> table(static_cast<size_t>(size * width_), 0);
  std::vector<int32_t> lengths;
  for (int64_t b = 0; b < size; ++b) {
    const int64_t sequence = batch_[static_cast<size_t>(b)];
    const std::vector<int32_t>& pages = pool_.table(sequence);
    std::copy(pages.begin(), pages.end(), table.begin() + b * width_);
    lengths.push_back(static_cast<int32_t>(pool_.length(sequence)));
  }
  t.table.copy_(sent(table, {size, width_}, at::kInt, k_.device()));
  t.lengths.copy_(sent(lengths, {size}, at::kInt, k_.device()));
  stale_ = false;
  return t;
}

Tensor KVCache::block_table() {
  return tensors().table;
}

Tensor KVCache::lengths() {
  return tensors().lengths;
}

void KVCache::advance(int64_t rows, bool on_device) {
  TORCH_CHECK_VALUE(rows >= 0 && rows <= reserved_rows_, "topk_attn: rows is ", rows,
                    ", but the batch has room for ", reserved_rows_, " more: call reserve first");
  pool_.advance(batch_, rows);
  reserved_rows_ -= rows;
  slots_ = Tensor();
  if (!on_device) return;
  tensors().lengths.add_(rows);
  if (has_key_codes() && !calibrated_ && rows > 0) calibrate();
}

// ---------------------------------------------------------------------------------------------------------------
// Key codes
// ---------------------------------------------------------------------------------------------------------------

Tensor KVCache::key_codes(int64_t layer) const {
  check_layer(layer);
  TORCH_CHECK_VALUE(has_key_codes(), "topk_attn: the cache was made without key codes");
  return codes_[static_cast<size_t>(layer)];
}

void KVCache::calibrate() {
  TORCH_CHECK_VALUE(has_key_codes(), "topk_attn: the cache was made without key codes");
  std::vector<int32_t> table, lengths;
  for (const int64_t sequence : pool_.handles()) {
    if (pool_.length(sequence) == 0) continue;
    const std::vector<int32_t>& pages = pool_.table(sequence);
    table.insert(table.end(), pages.begin(), pages.end());
    lengths.push_back(static_cast<int32_t>(pool_.length(sequence)));
    table.resize(lengths.size() * static_cast<size_t>(width_), 0);
  }
  if (lengths.empty()) return;
  const auto count = static_cast<int64_t>(lengths.size());
  const Tensor device_table = sent(table, {count, width_}, at::kInt, k_.device());
  const Tensor device_lengths = sent(lengths, {count}, at::kInt, k_.device());
  for (int64_t layer = 0; layer < layers(); ++layer) {
    key_codes_rebuild(key_codes(layer), k_pages(layer), device_lengths, std::nullopt, device_table, true);
  }
  calibrated_ = true;
}

// ---------------------------------------------------------------------------------------------------------------
// Attention
// ---------------------------------------------------------------------------------------------------------------

void KVCache::check_layer(int64_t layer) const {
  TORCH_CHECK_VALUE(layer >= 0 && layer < layers(), "topk_attn: layer must be from 0 to ", layers() - 1,
                    ", got ", layer);
}

void KVCache::check_rows(const Tensor& k, const Tensor& v) const {
  const auto batch = static_cast<int64_t>(batch_.size());
  const int64_t rows = k.dim() == 4 ? k.size(1) : 0;
  const auto check = [&](const Tensor& t, const char* name, const Tensor& pages) {
    TORCH_CHECK_VALUE(t.dim() == 4 && t.size(0) == batch && t.size(1) == rows && t.size(2) == pages.size(3) &&
                          t.size(3) == pages.size(4),
                      "topk_attn: ", name, " must have sizes (", batch, ", T, ", pages.size(3), ", ",
                      pages.size(4), "), got ", t.sizes());
    TORCH_CHECK_VALUE(t.scalar_type() == pages.scalar_type() && t.device() == pages.device(),
                      "topk_attn: ", name, " must be ", pages.scalar_type(), " on ", pages.device(),
                      " as the cache, got ", t.scalar_type(), " on ", t.device());
  };
  check(k, "k", k_);
  check(v, "v", v_);
  TORCH_CHECK_VALUE(rows <= reserved_rows_, "topk_attn: k has ", rows,
                    " new rows, but the batch has room for ", reserved_rows_, ": call reserve first");
}

CacheAttention KVCache::run(int64_t layer, const Tensor& q, const std::optional<Tensor>& k,
                            const std::optional<Tensor>& v, const Options& options,
                            const std::optional<Tensor>& cache_leftpad, bool return_indices) {
  const BatchTensors& t = tensors();
  Cache cache;
  cache.k_cache = k_pages(layer);
  cache.v_cache = v_pages(layer);
  cache.k = k;
  cache.v = v;
  cache.cache_seqlens = t.lengths;
  cache.cache_leftpad = cache_leftpad;
  cache.block_table = t.table;
  if (has_key_codes()) cache.key_codes = key_codes(layer);
  return topk_attn_with_kvcache(q, cache, options, return_indices);
}

CacheAttention KVCache::append_and_attend(int64_t layer, const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Options& options, const std::optional<Tensor>& cache_leftpad,
                                          bool return_indices) {
  check_layer(layer);
  check_rows(k, v);
  return run(layer, q, k, v, options, cache_leftpad, return_indices);
}

CacheAttention KVCache::attend(int64_t layer, const Tensor& q, const Options& options,
                               const std::optional<Tensor>& cache_leftpad, bool return_indices) {
  check_layer(layer);
  return run(layer, q, std::nullopt, std::nullopt, options, cache_leftpad, return_indices);
}

Tensor KVCache::slots(int64_t rows) {
  const BatchTensors& t = tensors();
  const auto count = static_cast<int64_t>(batch_.size()) * rows;
  if (!slots_.defined() || slots_.size(0) != count) {
    const auto longs = t.lengths.options().dtype(at::kLong);
    const Tensor position = t.lengths.to(at::kLong).unsqueeze(1) + at::arange(rows, longs);
    const Tensor page = t.table.gather(1, position.floor_divide(page_size())).to(at::kLong);
    slots_ = (page * page_size() + position.remainder(page_size())).flatten();
  }
  return slots_;
}

void KVCache::append(int64_t layer, const Tensor& k, const Tensor& v) {
  check_layer(layer);
  check_rows(k, v);
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && (k.requires_grad() || v.requires_grad())),
                    "topk_attn: k and v must not require a gradient: a cache has none; use torch.no_grad()");
  const at::NoGradGuard no_grad;
  const Tensor where = slots(k.size(1));
  k_pages(layer).flatten(0, 1).index_copy_(0, where, k.flatten(0, 1));
  v_pages(layer).flatten(0, 1).index_copy_(0, where, v.flatten(0, 1));
  if (has_key_codes()) {
    const BatchTensors& t = tensors();
    key_codes_rebuild(key_codes(layer), k_pages(layer), t.lengths + k.size(1), std::nullopt, t.table, false);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Contents
// ---------------------------------------------------------------------------------------------------------------

Tensor KVCache::k_pages(int64_t layer) const {
  check_layer(layer);
  return k_.select(0, layer);
}

Tensor KVCache::v_pages(int64_t layer) const {
  check_layer(layer);
  return v_.select(0, layer);
}

std::optional<int64_t> KVCache::even_step(int64_t pages) const {
  int64_t step = pages;
  for (size_t b = 0; b < batch_.size(); ++b) {
    const std::vector<int32_t>& table = pool_.table(batch_[b]);
    if (static_cast<int64_t>(table.size()) < pages) return std::nullopt;
    for (int64_t i = 1; i < pages; ++i) {
      if (table[static_cast<size_t>(i)] != table[0] + i) return std::nullopt;
    }
    if (b == 0) continue;
    const int64_t from_last = table[0] - pool_.table(batch_[b - 1])[0];
    if (b == 1) step = from_last;
    if (from_last != step || step < 0) return std::nullopt;
  }
  return step;
}

std::pair<Tensor, Tensor> KVCache::rows(int64_t layer, int64_t length) {
  check_layer(layer);
  TORCH_CHECK_VALUE(length >= 0 && length <= max_length(), "topk_attn: length must be from 0 to ",
                    max_length(), ", got ", length);
  const BatchTensors& t = tensors();
  const auto batch = static_cast<int64_t>(batch_.size());
  const int64_t pages = (length + page_size() - 1) / page_size();
  const std::optional<int64_t> step = pages > 0 ? even_step(pages) : std::nullopt;
  const Tensor index = step ? Tensor() : t.table.narrow(1, 0, pages).flatten();
  const auto of = [&](const Tensor& layer_pages) {
    if (!step) {
      const Tensor found = layer_pages.index_select(0, index);
      return found.view({batch, pages * page_size(), found.size(2), found.size(3)}).narrow(1, 0, length);
    }
    const int64_t first = pool_.table(batch_[0])[0];
    return layer_pages.as_strided(
        {batch, length, layer_pages.size(2), layer_pages.size(3)},
        {*step * layer_pages.stride(0), layer_pages.stride(1), layer_pages.stride(2), 1},
        layer_pages.storage_offset() + first * layer_pages.stride(0));
  };
  return {of(k_pages(layer)), of(v_pages(layer))};
}

KVCacheMemory KVCache::memory() const {
  KVCacheMemory m;
  m.k_bytes = static_cast<int64_t>(k_.numel() * k_.element_size());
  m.v_bytes = static_cast<int64_t>(v_.numel() * v_.element_size());
  for (const Tensor& codes : codes_) m.code_bytes += codes.numel();
  for (const auto& [size, t] : tensors_) m.table_bytes += (t.table.numel() + t.lengths.numel()) * 4;
  m.pages = pool_.pages();
  m.free_pages = pool_.free_pages();
  m.used_pages = m.pages - m.free_pages;
  m.shared_pages = pool_.shared_pages();
  m.sequences = pool_.num_sequences();
  m.tokens = pool_.tokens();
  return m;
}

}  // namespace topk_attn
