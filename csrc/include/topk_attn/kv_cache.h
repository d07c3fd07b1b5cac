// KVCache: the keys and values of all layers of a model, in pages that sequences share where they agree.
//
// Layout: K (layers, pages, page_size, kv_heads, head_dim), V (layers, pages, page_size, kv_heads, v_dim). A
// sequence is a handle; its pages and its length are the same in every layer (page_pool.h). What is shared by
// a fork or a reorder is copied only where one of the sharers writes, page by page, all layers at once.
//
// A step of a model, with T new tokens in each of some sequences, the *batch*:
//
//   cache.reserve(sequences, T);                                   // pages, copies, block table
//   for (layer...) cache.append_and_attend(layer, q, k, v, options);
//   cache.advance(T);
//
// Nothing is written outside the pages that reserve() gave to the batch: append_and_attend() and append()
// refuse rows without room. Nothing waits for the device: lengths and pages are kept on the host, tables are
// sent from pinned memory, and advance() adds on the device.
//
// CUDA graphs. block_table() and lengths() of a batch size stay where they are for the life of the cache, and
// so do the pages. Reserve room for many steps, then capture append_and_attend() of all layers with
// advance(T): the captured step adds to the lengths on the device by itself. The host counted that step when
// it was captured, so the first replay needs nothing more; call advance(T, /*on_device=*/false) for every
// further one. reserve(), fork() and the others are for between replays; the batch must be the same.
//
// A cache is not thread-safe, and works in the current stream. Errors are raised before anything changes.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "topk_attn/page_pool.h"
#include "topk_attn/topk_attn.h"

namespace topk_attn {

struct KVCacheOptions {
  int64_t layers = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;    // a multiple of 8, at most 256
  int64_t v_dim = 0;       // the same; 0: head_dim
  int64_t pages = 0;       // room: pages of page_size tokens for all sequences together
  int64_t page_size = 64;  // 16 to 256 are fast
  int64_t max_length = 0;  // of a sequence; 0: all pages. Decides the width of the block table
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
  bool key_codes = false;  // keep an int8 copy of K for the certified scan; CUDA (topk_attn.h, key_codes_new)
};

struct KVCacheMemory {
  int64_t k_bytes = 0;
  int64_t v_bytes = 0;
  int64_t code_bytes = 0;   // int8 copy of K
  int64_t table_bytes = 0;  // block tables and lengths on the device
  int64_t pages = 0;
  int64_t used_pages = 0;
  int64_t shared_pages = 0;  // of these, in more than one sequence
  int64_t free_pages = 0;
  int64_t sequences = 0;
  int64_t tokens = 0;  // of all sequences; shared ones count for each
};

class KVCache {
 public:
  explicit KVCache(const KVCacheOptions& options);
  // In memory of the caller's: K (layers, pages, page_size, kv_heads, head_dim), V likewise, the pages of a
  // layer contiguous.
  KVCache(at::Tensor k_pages, at::Tensor v_pages, int64_t max_length = 0, bool key_codes = false);

  KVCache(KVCache&&) = default;  // a copy would share pages that each counts alone
  KVCache& operator=(KVCache&&) = default;

  int64_t layers() const { return k_.size(0); }
  int64_t page_size() const { return k_.size(2); }
  int64_t max_length() const { return width_ * page_size(); }
  const PagePool& pool() const { return pool_; }

  // ----- sequences
  int64_t add() { return pool_.add(); }
  // A new sequence that starts with the first `length` tokens of another.
  int64_t fork(int64_t sequence, int64_t length);
  void truncate(int64_t sequence, int64_t length);
  void remove(int64_t sequence);
  void clear();  // all sequences
  // sequences[i] becomes what sequences[order[i]] was (beam search).
  void reorder(const std::vector<int64_t>& sequences, const std::vector<int64_t>& order);
  int64_t length(int64_t sequence) const { return pool_.length(sequence); }

  // ----- a step
  // Makes `sequences` (all different) the batch and finds room for `rows` more tokens of each. OutOfPages
  // says how many pages are missing. Costs next to nothing where there is room already.
  void reserve(const std::vector<int64_t>& sequences, int64_t rows);
  const std::vector<int64_t>& batch() const { return batch_; }
  // Rows that each sequence of the batch may still get before the next reserve().
  int64_t reserved_rows() const { return reserved_rows_; }
  // Of the batch: int32 (B, max_length / page_size), unused entries 0; int32 (B), without the rows of the
  // present step.
  at::Tensor block_table();
  at::Tensor lengths();

  // Writes k (B, T, kv_heads, head_dim) and v at the end of the batch's sequences and attends to all their
  // tokens with q (B, Tq, heads, head_dim), the last Tq of them. cache_leftpad int32 (B): leading tokens that
  // are padding. Called once for each layer; advance() then counts the rows.
  CacheAttention append_and_attend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                   const at::Tensor& v, const Options& options,
                                   const std::optional<at::Tensor>& cache_leftpad = std::nullopt,
                                   bool return_indices = false);
  // Writes without attending, for prefill by topk_attn_func.
  void append(int64_t layer, const at::Tensor& k, const at::Tensor& v);
  // Attends to the tokens that are there.
  CacheAttention attend(int64_t layer, const at::Tensor& q, const Options& options,
                        const std::optional<at::Tensor>& cache_leftpad = std::nullopt,
                        bool return_indices = false);
  // Counts `rows` tokens of each sequence of the batch. on_device = false: a replayed CUDA graph did it
  // there.
  void advance(int64_t rows, bool on_device = true);

  // ----- key codes
  bool has_key_codes() const { return !codes_.empty(); }
  at::Tensor key_codes(int64_t layer) const;
  // Fits the codes to the keys that are there and makes those of all sequences again. The first advance()
  // does it by itself; needed again only if the keys of later text are of another kind.
  void calibrate();

  // ----- contents
  at::Tensor k_pages(int64_t layer) const;  // (pages, page_size, kv_heads, head_dim)
  at::Tensor v_pages(int64_t layer) const;
  // The first `length` rows of every sequence of the batch, (B, length, kv_heads, .): a view where the pages
  // lie in a row, else a copy. What is beyond a sequence's end is not initialised.
  std::pair<at::Tensor, at::Tensor> rows(int64_t layer, int64_t length);

  KVCacheMemory memory() const;

 private:
  struct BatchTensors {
    at::Tensor table;    // int32 (B, width_)
    at::Tensor lengths;  // int32 (B)
  };

  void check_layer(int64_t layer) const;
  void check_rows(const at::Tensor& k, const at::Tensor& v) const;
  void copy_pages(const std::vector<PageCopy>& copies);
  BatchTensors& tensors();  // of the batch, up to date
  CacheAttention run(int64_t layer, const at::Tensor& q, const std::optional<at::Tensor>& k,
                     const std::optional<at::Tensor>& v, const Options& options,
                     const std::optional<at::Tensor>& cache_leftpad, bool return_indices);
  at::Tensor slots(int64_t rows);
  // The step between the first pages of the batch's sequences if each lies in a row and they are evenly
  // spaced.
  std::optional<int64_t> even_step(int64_t pages) const;
  void changed();  // a sequence of the batch may have other pages or another length

  at::Tensor k_;
  at::Tensor v_;
  int64_t width_;
  PagePool pool_;
  std::vector<int64_t> batch_;
  int64_t reserved_rows_ = 0;
  bool stale_ = true;                        // the batch's tensors are not what the pool says
  std::map<int64_t, BatchTensors> tensors_;  // by batch size
  std::vector<at::Tensor> codes_;            // by layer, or empty
  bool calibrated_ = false;
  at::Tensor slots_;  // int64 (B * T) of append(), for the layers of one step
};

}  // namespace topk_attn
