// Page accounting of a KV cache: which pages belong to which sequence, and which are shared. No torch, no
// memory of its own beside the numbers: what a page holds is the caller's (kv_cache.h).
//
// A sequence is a handle, a length in tokens, and the pages that hold them in order; page i of the list has
// the tokens [i * page_size, (i + 1) * page_size). Pages are counted: a fork shares those of its prefix. A
// page is written by one sequence only; one that several share is copied before it is written, which
// reserve() asks the caller to do. So what one sequence writes never changes what another one reads.
//
// Every function that can fail does so before it changes anything: std::invalid_argument for a handle, a
// length or a number that cannot be, OutOfPages where room is missing.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace topk_attn {

class OutOfPages : public std::runtime_error {
 public:
  OutOfPages(const std::string& what, int64_t missing) : std::runtime_error(what), missing_pages(missing) {}
  int64_t missing_pages;
};

// Contents of page `from` that must be copied to page `to` before `to` is read or written.
struct PageCopy {
  int32_t from;
  int32_t to;
};

class PagePool {
 public:
  PagePool(int64_t pages, int64_t page_size);

  int64_t pages() const { return static_cast<int64_t>(users_.size()); }
  int64_t page_size() const { return page_size_; }
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  int64_t shared_pages() const;  // that belong to more than one sequence
  int64_t tokens() const;        // of all sequences; shared ones count for each
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size()); }
  std::vector<int64_t> handles() const;  // ascending

  bool has(int64_t sequence) const { return sequences_.contains(sequence); }
  int64_t length(int64_t sequence) const;
  const std::vector<int32_t>& table(
      int64_t sequence) const;  // its pages; more than its length needs if reserved

  // An empty sequence. Handles are never used twice.
  int64_t add();
  // A sequence of the first `length` tokens of another; takes no page until it is written to.
  int64_t fork(int64_t sequence, int64_t length);
  // Keeps the first `length` tokens. Pages beyond them, reserved ones too, are given back.
  void truncate(int64_t sequence, int64_t length);
  void remove(int64_t sequence);
  // sequences[i] becomes what sequences[order[i]] was; the handles stay. An entry of `order` may appear any
  // number of times; what no entry names is gone. Takes no page.
  void reorder(std::span<const int64_t> sequences, std::span<const int64_t> order);

  // Room for `rows` more tokens in each of `sequences` (all different), in pages that nobody else reads
  // there. The caller must make the copies before it writes. OutOfPages says how many pages are missing.
  std::vector<PageCopy> reserve(std::span<const int64_t> sequences, int64_t rows);
  // Whether reserve() would have nothing to do.
  bool has_room(int64_t sequence, int64_t rows) const;
  // Counts `rows` tokens, which must have room.
  void advance(std::span<const int64_t> sequences, int64_t rows);

  // Throws std::logic_error with what is wrong if counts, lists and free pages do not agree; for tests.
  void check() const;

 private:
  struct Sequence {
    int64_t length = 0;
    std::vector<int32_t> pages;
  };

  Sequence& at(int64_t sequence);
  const Sequence& at(int64_t sequence) const;
  void check_distinct(std::span<const int64_t> sequences) const;
  int64_t pages_for(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
  int32_t take();
  void release(Sequence& s, int64_t keep);  // all pages but the first `keep`

  int64_t page_size_;
  int64_t next_handle_ = 0;
  std::vector<int32_t> users_;  // page -> number of sequences that have it
  std::vector<int32_t> free_;   // a stack
  std::unordered_map<int64_t, Sequence> sequences_;
};

}  // namespace topk_attn
