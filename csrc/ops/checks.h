// Argument checks shared by every backend. Each failure names the argument, its value and what it must be.
// Sizes stay symbolic where they may be, so that the same checks serve tracing (Meta) and execution.
#pragma once

#include "operators.h"
#include "topk_attn/contract.h"

namespace topk_attn {

// The checked selection settings.
struct Settings {
  Budget budget;
  bool kv_group = false;
  int64_t sink = 0;
  int64_t recent = 0;
};

Settings check_settings(const OptSymInt& topk, std::optional<double> ratio, const SymInt& min_keys,
                        const OptSymInt& max_keys, std::string_view select, const SymInt& sink,
                        const SymInt& recent);

// What the forward leaves for the backward beside the encoding (schema.h).
enum class Kept { kNone, kLists, kTiles };
Kept check_kept(std::string_view kept);

// softmax_scale, or 1 / sqrt(head_dim).
double check_scale(std::optional<double> softmax_scale, int64_t head_dim);

// Sizes of an attention call. Packed calls: batch = 1, tq = total_q, tk = total_k.
struct Shape {
  bool packed = false;
  SymInt batch, tq, tk;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, v_dim = 0;
  SymInt longest;  // most keys that a row may see, as far as the host knows
};

// q and k, v (undefined: selection only), and the packed arguments: ranks, sizes, dtypes, devices, strides.
Shape check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
                      const OptTensor& cu_seqlens_k, const OptSymInt& max_seqlen_q,
                      const OptSymInt& max_seqlen_k);

// Sizes of a cache call.
struct CacheShape {
  SymInt batch, tq;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, v_dim = 0;
  SymInt appended;  // new rows
  SymInt capacity;  // positions a sequence can have
  bool paged = false;
};

CacheShape check_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k,
                         const OptTensor& v, const OptTensor& cache_seqlens, const OptTensor& cache_leftpad,
                         const OptTensor& block_table, const OptTensor& key_codes, bool return_indices);

// A cache that can have key codes; returns the bytes of their buffer.
SymInt check_codes_cache(const Tensor& k_cache);
void check_key_codes(const Tensor& key_codes, const Tensor& k_cache);
void check_rebuild(const Tensor& key_codes, const Tensor& k_cache, const Tensor& cache_seqlens,
                   const OptTensor& cache_leftpad, const OptTensor& block_table);

void check_select_scores(const Tensor& scores, const SymInt& topk, const OptTensor& lengths);

// kept="tiles": query tiles of 64 rows, and words of the key bitmap of each.
struct TileGrid {
  SymInt tiles;  // of one head: dense B * ceil(Tq / 64); packed ceil(total_q / 64) + documents
  SymInt words;  // 32 keys each, a multiple of 4
};
TileGrid tile_grid(const Shape& shape, const OptTensor& cu_seqlens_q);

// Columns of kept_index and kept_prob: the budget of the longest row, or 0 when lists would not be much
// smaller than the scores themselves (more than an eighth of the keys kept): the backward then recomputes
// them.
int64_t saved_width(const Shape& shape, const Settings& settings, bool save_kept);

// float64 for float64 inputs, else float32.
at::ScalarType accumulation_type(at::ScalarType input);

}  // namespace topk_attn
