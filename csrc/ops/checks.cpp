#include "checks.h"

#include <c10/util/Exception.h>

#include <cmath>

#include "key_codes.h"

namespace topk_attn {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();

bool floating(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

void check_dtype(const Tensor& t, const char* name, at::ScalarType like, const char* like_name) {
  TORCH_CHECK(t.scalar_type() == like, "topk_attn: ", name, " has dtype ", t.scalar_type(), ", but ",
              like_name, " has ", like, ": they must be the same");
}

void check_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  TORCH_CHECK(t.device() == like.device(), "topk_attn: ", name, " is on ", t.device(), ", but ", like_name,
              " is on ", like.device(), ": they must be on one device");
}

void check_rank(const Tensor& t, const char* name, int64_t rank, const char* layout) {
  TORCH_CHECK(t.dim() == rank, "topk_attn: ", name, " must have ", rank, " dimensions ", layout, ", got ",
              t.dim(), " of sizes ", t.sym_sizes());
}

void check_last_contiguous(const Tensor& t, const char* name) {
  TORCH_CHECK(t.sym_numel() == 0 || t.sym_size(-1) == 1 || t.sym_stride(-1) == 1, "topk_attn: ", name,
              " must be contiguous in its last dimension, got stride ", t.sym_stride(-1));
}

int64_t check_head_dim(const SymInt& size, const char* name) {
  const int64_t dim = size.guard_int(__FILE__, __LINE__);
  TORCH_CHECK(dim >= 8 && dim <= kMaxHeadDim && dim % 8 == 0, "topk_attn: the head dim of ", name,
              " must be a multiple of 8 and at most ", kMaxHeadDim, ", got ", dim);
  return dim;
}

void check_int32_vector(const OptTensor& t, const char* name, const SymInt& size, const char* what,
                        const Tensor& like, const char* like_name = "q") {
  if (!t.has_value()) return;
  TORCH_CHECK(t->scalar_type() == at::kInt, "topk_attn: ", name, " must be int32, got ", t->scalar_type());
  check_rank(*t, name, 1, what);
  TORCH_CHECK(t->sym_size(0) == size, "topk_attn: ", name, " must have ", size, " entries ", what, ", got ",
              t->sym_size(0));
  check_device(*t, name, like, like_name);
}

void check_heads(Shape& shape, const Tensor& q, const Tensor& k, const char* k_name) {
  shape.heads = q.sym_size(-2).guard_int(__FILE__, __LINE__);
  shape.kv_heads = k.sym_size(-2).guard_int(__FILE__, __LINE__);
  TORCH_CHECK(shape.kv_heads > 0 && shape.heads > 0 && shape.heads % shape.kv_heads == 0, "topk_attn: q has ",
              shape.heads, " heads and ", k_name, " has ", shape.kv_heads,
              ": the heads of q must be a positive multiple of the heads of ", k_name);
  shape.head_dim = check_head_dim(q.sym_size(-1), "q");
  TORCH_CHECK(k.sym_size(-1) == shape.head_dim, "topk_attn: ", k_name, " has head dim ", k.sym_size(-1),
              ", but q has ", shape.head_dim, ": they must be the same");
}

void check_floating(const Tensor& q) {
  TORCH_CHECK(floating(q.scalar_type()), "topk_attn: q must be float32, float64, bfloat16 or float16, got ",
              q.scalar_type());
  TORCH_CHECK(q.layout() == at::kStrided, "topk_attn: q must be a strided tensor, got layout ", q.layout());
}

// `t` is k or v: like q in everything but heads and head dim.
void check_companion(const Tensor& t, const char* name, const Tensor& q) {
  check_dtype(t, name, q.scalar_type(), "q");
  check_device(t, name, q, "q");
  check_last_contiguous(t, name);
}

}  // namespace

Settings check_settings(const OptSymInt& topk, std::optional<double> ratio, const SymInt& min_keys,
                        const OptSymInt& max_keys, std::string_view select, const SymInt& sink,
                        const SymInt& recent) {
  Settings s;
  TORCH_CHECK(!(topk.has_value() && ratio.has_value()),
              "topk_attn: exactly one of topk and ratio must be given, got topk = ", topk.value_or(SymInt(0)),
              " and ratio = ", ratio.value_or(0.0));
  TORCH_CHECK(topk.has_value() || ratio.has_value(),
              "topk_attn: exactly one of topk and ratio must be given, got topk = None and ratio = None");
  if (topk.has_value()) {
    s.budget.topk = topk->guard_int(__FILE__, __LINE__);
    TORCH_CHECK(s.budget.topk >= 1, "topk_attn: topk must be at least 1, got ", s.budget.topk);
  } else {
    s.budget.ratio = *ratio;
    TORCH_CHECK(s.budget.ratio > 0.0 && s.budget.ratio <= 1.0,
                "topk_attn: ratio must be greater than 0 and at most 1, got ", *ratio);
  }
  s.budget.min_keys = min_keys.guard_int(__FILE__, __LINE__);
  TORCH_CHECK(s.budget.min_keys >= 1, "topk_attn: min_keys must be at least 1, got ", s.budget.min_keys);
  if (max_keys.has_value()) {
    s.budget.max_keys = max_keys->guard_int(__FILE__, __LINE__);
    TORCH_CHECK(s.budget.max_keys >= 1, "topk_attn: max_keys must be at least 1, got ", s.budget.max_keys);
    TORCH_CHECK(s.budget.min_keys <= s.budget.max_keys,
                "topk_attn: min_keys must be at most max_keys, got min_keys = ", s.budget.min_keys,
                " and max_keys = ", s.budget.max_keys);
  }
  TORCH_CHECK(select == "head" || select == "kv_group",
              "topk_attn: select must be 'head' or 'kv_group', got '", std::string(select), "'");
  s.kv_group = select == "kv_group";
  s.sink = sink.guard_int(__FILE__, __LINE__);
  s.recent = recent.guard_int(__FILE__, __LINE__);
  TORCH_CHECK(s.sink >= 0, "topk_attn: sink must be at least 0, got ", s.sink);
  TORCH_CHECK(s.recent >= 0, "topk_attn: recent must be at least 0, got ", s.recent);
  return s;
}

Kept check_kept(std::string_view kept) {
  if (kept == "none") return Kept::kNone;
  if (kept == "lists") return Kept::kLists;
  TORCH_CHECK(kept == "tiles", "topk_attn: kept must be 'none', 'lists' or 'tiles', got '", std::string(kept),
              "'");
  return Kept::kTiles;
}

double check_scale(std::optional<double> softmax_scale, int64_t head_dim) {
  const double scale = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  // Kernels for float32 and halves compute with it in float32, where it must be positive and finite too.
  const float narrow = static_cast<float>(scale);
  TORCH_CHECK(std::isfinite(narrow) && narrow > 0.0f,
              "topk_attn: softmax_scale must be positive and finite, got ", scale);
  return scale;
}

Shape check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
                      const OptTensor& cu_seqlens_k, const OptSymInt& max_seqlen_q,
                      const OptSymInt& max_seqlen_k) {
  Shape shape;
  shape.packed = cu_seqlens_q.has_value() || cu_seqlens_k.has_value();
  TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), "topk_attn: cu_seqlens_",
              cu_seqlens_q.has_value() ? "k" : "q",
              " must be given too: packed inputs need cu_seqlens_q and cu_seqlens_k");
  check_floating(q);
  const int64_t rank = shape.packed ? 3 : 4;
  check_rank(q, "q", rank, shape.packed ? "(total_q, H, D)" : "(B, Tq, H, D)");
  check_rank(k, "k", rank, shape.packed ? "(total_k, Hkv, D)" : "(B, Tk, Hkv, D)");
  check_last_contiguous(q, "q");
  check_companion(k, "k", q);
  check_heads(shape, q, k, "k");
  shape.batch = shape.packed ? SymInt(1) : q.sym_size(0);
  shape.tq = q.sym_size(-3);
  shape.tk = k.sym_size(-3);
  if (!shape.packed) {
    TORCH_CHECK(k.sym_size(0) == shape.batch, "topk_attn: k has batch size ", k.sym_size(0), ", but q has ",
                shape.batch, ": they must be the same");
    TORCH_CHECK(
        !max_seqlen_q.has_value() && !max_seqlen_k.has_value(),
        "topk_attn: max_seqlen_q and max_seqlen_k need cu_seqlens_q and cu_seqlens_k (packed inputs)");
  }
  TORCH_CHECK(shape.tk <= kMaxLength && shape.tq <= kMaxLength,
              "topk_attn: sequences must be shorter than 2^31, got ", shape.tq, " queries and ", shape.tk,
              " keys");
  if (v.defined()) {
    check_rank(v, "v", rank, shape.packed ? "(total_k, Hkv, Dv)" : "(B, Tk, Hkv, Dv)");
    check_companion(v, "v", q);
    shape.v_dim = check_head_dim(v.sym_size(-1), "v");
    for (int64_t d = 0; d < rank - 1; ++d) {
      TORCH_CHECK(v.sym_size(d) == k.sym_size(d), "topk_attn: v has sizes ", v.sym_sizes(), ", but k has ",
                  k.sym_sizes(), ": all but the last must be the same");
    }
  } else {
    shape.v_dim = shape.head_dim;
  }
  shape.longest = shape.tk;
  if (shape.packed) {
    TORCH_CHECK(cu_seqlens_q->dim() == 1 && cu_seqlens_q->sym_size(0) >= 1,
                "topk_attn: cu_seqlens_q must be a vector of B + 1 entries, got sizes ",
                cu_seqlens_q->sym_sizes());
    check_int32_vector(cu_seqlens_q, "cu_seqlens_q", cu_seqlens_q->sym_size(0), "(B + 1)", q);
    check_int32_vector(cu_seqlens_k, "cu_seqlens_k", cu_seqlens_q->sym_size(0), "(B + 1, as cu_seqlens_q)",
                       q);
    if (max_seqlen_q.has_value()) {
      TORCH_CHECK(*max_seqlen_q >= 0, "topk_attn: max_seqlen_q must be at least 0, got ", *max_seqlen_q);
    }
    if (max_seqlen_k.has_value()) {
      TORCH_CHECK(*max_seqlen_k >= 0, "topk_attn: max_seqlen_k must be at least 0, got ", *max_seqlen_k);
      shape.longest = *max_seqlen_k;
      TORCH_CHECK(shape.longest <= kMaxLength, "topk_attn: max_seqlen_k must be below 2^31, got ",
                  *max_seqlen_k);
    }
  }
  return shape;
}

CacheShape check_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k,
                         const OptTensor& v, const OptTensor& cache_seqlens, const OptTensor& cache_leftpad,
                         const OptTensor& block_table, const OptTensor& key_codes, bool return_indices) {
  CacheShape shape;
  shape.paged = block_table.has_value();
  check_floating(q);
  check_rank(q, "q", 4, "(B, Tq, H, D)");
  check_last_contiguous(q, "q");
  check_rank(k_cache, "k_cache", 4, shape.paged ? "(P, page, Hkv, D)" : "(B, S, Hkv, D)");
  check_rank(v_cache, "v_cache", 4, shape.paged ? "(P, page, Hkv, Dv)" : "(B, S, Hkv, Dv)");
  check_companion(k_cache, "k_cache", q);
  check_companion(v_cache, "v_cache", q);
  Shape heads;
  check_heads(heads, q, k_cache, "k_cache");
  shape.heads = heads.heads;
  shape.kv_heads = heads.kv_heads;
  shape.head_dim = heads.head_dim;
  shape.v_dim = check_head_dim(v_cache.sym_size(-1), "v_cache");
  for (int64_t d = 0; d < 3; ++d) {
    TORCH_CHECK(v_cache.sym_size(d) == k_cache.sym_size(d), "topk_attn: v_cache has sizes ",
                v_cache.sym_sizes(), ", but k_cache has ", k_cache.sym_sizes(),
                ": all but the last must be the same");
  }
  shape.batch = q.sym_size(0);
  shape.tq = q.sym_size(1);
  if (shape.paged) {
    TORCH_CHECK(block_table->scalar_type() == at::kInt, "topk_attn: block_table must be int32, got ",
                block_table->scalar_type());
    check_rank(*block_table, "block_table", 2, "(B, max_pages)");
    TORCH_CHECK(block_table->sym_size(0) == shape.batch, "topk_attn: block_table has ",
                block_table->sym_size(0), " rows, but q has batch size ", shape.batch,
                ": they must be the same");
    check_device(*block_table, "block_table", q, "q");
    TORCH_CHECK(k_cache.sym_size(1) >= 1,
                "topk_attn: the page size (k_cache's dimension 1) must be at least 1, got ",
                k_cache.sym_size(1));
    shape.capacity = block_table->sym_size(1) * k_cache.sym_size(1);
  } else {
    TORCH_CHECK(k_cache.sym_size(0) == shape.batch, "topk_attn: k_cache has batch size ", k_cache.sym_size(0),
                ", but q has ", shape.batch, ": they must be the same");
    shape.capacity = k_cache.sym_size(1);
  }
  TORCH_CHECK(shape.capacity <= kMaxLength,
              "topk_attn: a cached sequence must be shorter than 2^31, got room for ", shape.capacity);
  TORCH_CHECK(!return_indices || k_cache.sym_size(0) * k_cache.sym_size(1) <= kMaxLength,
              "topk_attn: slots are int32, so the cache must have fewer than 2^31 of them, got ",
              k_cache.sym_size(0), " x ", k_cache.sym_size(1));
  TORCH_CHECK(k.has_value() == v.has_value(),
              "topk_attn: k and v (new rows) must be given together, got only ", k.has_value() ? "k" : "v");
  shape.appended = 0;
  if (k.has_value()) {
    const SymInt tokens = k->dim() == 4 ? k->sym_size(1) : SymInt(0);
    const auto check_new = [&](const Tensor& t, const char* name, int64_t dim) {
      check_rank(t, name, 4, "(B, Tnew, Hkv, head dim)");
      check_companion(t, name, q);
      TORCH_CHECK(t.sym_size(0) == shape.batch && t.sym_size(1) == tokens &&
                      t.sym_size(2) == shape.kv_heads && t.sym_size(3) == dim,
                  "topk_attn: ", name, " (new rows) must have sizes (", shape.batch, ", ", tokens, ", ",
                  shape.kv_heads, ", ", dim, "), got ", t.sym_sizes());
    };
    check_new(*k, "k", shape.head_dim);
    check_new(*v, "v", shape.v_dim);
    shape.appended = tokens;
  }
  check_int32_vector(cache_seqlens, "cache_seqlens", shape.batch, "(B)", q);
  check_int32_vector(cache_leftpad, "cache_leftpad", shape.batch, "(B)", q);
  TORCH_CHECK(!key_codes.has_value() || !q.is_cpu(),
              "topk_attn: key_codes serve the certified scan, which exists on CUDA only; on ", q.device(),
              " key_codes must be None");
  if (key_codes.has_value()) check_key_codes(*key_codes, k_cache);
  return shape;
}

SymInt check_codes_cache(const Tensor& k_cache) {
  check_rank(k_cache, "k_cache", 4, "(B, S, Hkv, D) or (P, page, Hkv, D)");
  TORCH_CHECK(!k_cache.is_cpu(),
              "topk_attn: key_codes serve the certified scan, which exists on CUDA only, got k_cache on ",
              k_cache.device());
  const auto t = k_cache.scalar_type();
  TORCH_CHECK(t == at::kBFloat16 || t == at::kHalf,
              "topk_attn: k_cache must be bfloat16 or float16 to have key_codes, got ", t);
  const int64_t dim = check_head_dim(k_cache.sym_size(3), "k_cache");
  TORCH_CHECK(codes_width(dim) > 0, "topk_attn: the head dim of k_cache must be at most ", kMostCodeChannels,
              " to have key_codes, got ", dim);
  check_last_contiguous(k_cache, "k_cache");
  const int64_t heads = k_cache.sym_size(2).guard_int(__FILE__, __LINE__);
  TORCH_CHECK(heads > 0, "topk_attn: k_cache must have at least one head, got ", heads);
  TORCH_CHECK(k_cache.sym_size(1) <= kMaxLength, "topk_attn: a cached sequence or page must be shorter than ",
              "2^31, got room for ", k_cache.sym_size(1));
  return codes_layout<SymInt>(k_cache.sym_size(0), k_cache.sym_size(1), heads, dim).bytes;
}

void check_key_codes(const Tensor& key_codes, const Tensor& k_cache) {
  const SymInt bytes = check_codes_cache(k_cache);
  TORCH_CHECK(key_codes.scalar_type() == at::kChar, "topk_attn: key_codes must be int8, got ",
              key_codes.scalar_type());
  check_rank(key_codes, "key_codes", 1, "(as key_codes_new makes it)");
  check_device(key_codes, "key_codes", k_cache, "k_cache");
  check_last_contiguous(key_codes, "key_codes");
  TORCH_CHECK(key_codes.sym_size(0) == bytes, "topk_attn: key_codes must have ", bytes,
              " bytes for a k_cache of sizes ", k_cache.sym_sizes(), ", got ", key_codes.sym_size(0));
}

void check_rebuild(const Tensor& key_codes, const Tensor& k_cache, const Tensor& cache_seqlens,
                   const OptTensor& cache_leftpad, const OptTensor& block_table) {
  check_key_codes(key_codes, k_cache);
  SymInt batch = k_cache.sym_size(0);
  SymInt capacity = k_cache.sym_size(1);
  if (block_table.has_value()) {
    TORCH_CHECK(block_table->scalar_type() == at::kInt, "topk_attn: block_table must be int32, got ",
                block_table->scalar_type());
    check_rank(*block_table, "block_table", 2, "(B, max_pages)");
    check_device(*block_table, "block_table", k_cache, "k_cache");
    TORCH_CHECK(k_cache.sym_size(1) >= 1,
                "topk_attn: the page size (k_cache's dimension 1) must be at least 1, got ",
                k_cache.sym_size(1));
    batch = block_table->sym_size(0);
    capacity = block_table->sym_size(1) * k_cache.sym_size(1);
  }
  TORCH_CHECK(capacity <= kMaxLength, "topk_attn: a cached sequence must be shorter than 2^31, got room for ",
              capacity);
  check_int32_vector(cache_seqlens, "cache_seqlens", batch, "(B)", k_cache, "k_cache");
  check_int32_vector(cache_leftpad, "cache_leftpad", batch, "(B)", k_cache, "k_cache");
}

void check_select_scores(const Tensor& scores, const SymInt& topk, const OptTensor& lengths) {
  check_rank(scores, "scores", 2, "(rows, n)");
  const auto t = scores.scalar_type();
  TORCH_CHECK(t == at::kFloat || t == at::kBFloat16 || t == at::kHalf,
              "topk_attn: scores must be float32, bfloat16 or float16, got ", t);
  check_last_contiguous(scores, "scores");
  TORCH_CHECK(scores.sym_size(1) <= kMaxLength, "topk_attn: score rows must be shorter than 2^31, got ",
              scores.sym_size(1));
  TORCH_CHECK(topk >= 1, "topk_attn: topk must be at least 1, got ", topk);
  TORCH_CHECK(topk <= kMaxLength, "topk_attn: topk must be below 2^31, got ", topk);
  if (lengths.has_value()) {
    TORCH_CHECK(lengths->scalar_type() == at::kInt, "topk_attn: lengths must be int32, got ",
                lengths->scalar_type());
    check_rank(*lengths, "lengths", 1, "(rows)");
    TORCH_CHECK(lengths->sym_size(0) == scores.sym_size(0), "topk_attn: lengths must have ",
                scores.sym_size(0), " entries (rows), got ", lengths->sym_size(0));
    check_device(*lengths, "lengths", scores, "scores");
  }
}

TileGrid tile_grid(const Shape& shape, const OptTensor& cu_seqlens_q) {
  TileGrid grid;
  grid.tiles = (shape.tq + 63) / 64;
  grid.tiles = shape.packed ? grid.tiles + cu_seqlens_q->sym_size(0) - 1 : grid.tiles * shape.batch;
  // A document is no longer than the packed keys, whatever max_seqlen_k says.
  const SymInt longest = shape.longest < shape.tk ? shape.longest : shape.tk;
  grid.words = (longest + 127) / 128 * 4;
  return grid;
}

int64_t saved_width(const Shape& shape, const Settings& settings, bool save_kept) {
  if (!save_kept) return 0;
  const int64_t longest = shape.longest.guard_int(__FILE__, __LINE__);
  const int64_t kept = budget(longest, settings.budget);
  return kept * 8 <= longest ? kept : 0;
}

at::ScalarType accumulation_type(at::ScalarType input) {
  return input == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace topk_attn
