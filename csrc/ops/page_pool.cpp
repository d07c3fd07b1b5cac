#include "topk_attn/page_pool.h"

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_set>

namespace topk_attn {
namespace {

std::string number(int64_t value) {
  return std::to_string(value);
}

[[noreturn]] void bad(const std::string& what) {
  throw std::invalid_argument("topk_attn: " + what);
}

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

}  // namespace

PagePool::PagePool(int64_t pages, int64_t page_size) : page_size_(page_size) {
  if (pages < 1 || pages > kMost) bad("pages must be from 1 to 2^31 - 1, got " + number(pages));
  if (page_size < 1 || page_size > kMost)
    bad("page_size must be from 1 to 2^31 - 1, got " + number(page_size));
  users_.assign(static_cast<size_t>(pages), 0);
  // Low pages are taken first.
  for (int64_t page = pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
}

PagePool::Sequence& PagePool::at(int64_t sequence) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) bad("sequence " + number(sequence) + " is not in the cache");
  return found->second;
}

const PagePool::Sequence& PagePool::at(int64_t sequence) const {
  return const_cast<PagePool*>(this)->at(sequence);
}

void PagePool::check_distinct(std::span<const int64_t> sequences) const {
  std::unordered_set<int64_t> seen;
  for (const int64_t sequence : sequences) {
    at(sequence);
    if (!seen.insert(sequence).second) bad("sequence " + number(sequence) + " is given twice");
  }
}

int64_t PagePool::shared_pages() const {
  return std::count_if(users_.begin(), users_.end(), [](int32_t users) { return users > 1; });
}

int64_t PagePool::tokens() const {
  int64_t total = 0;
  for (const auto& [handle, s] : sequences_) total += s.length;
  return total;
}

std::vector<int64_t> PagePool::handles() const {
  std::vector<int64_t> all;
  for (const auto& [handle, s] : sequences_) all.push_back(handle);
  std::sort(all.begin(), all.end());
  return all;
}

int64_t PagePool::length(int64_t sequence) const {
  return at(sequence).length;
}

const std::vector<int32_t>& PagePool::table(int64_t sequence) const {
  return at(sequence).pages;
}

int64_t PagePool::add() {
  sequences_.emplace(next_handle_, Sequence{});
  return next_handle_++;
}

int64_t PagePool::fork(int64_t sequence, int64_t length) {
  const Sequence& source = at(sequence);
  if (length < 0 || length > source.length) {
    bad("length must be from 0 to the sequence's " + number(source.length) + " tokens, got " +
        number(length));
  }
  Sequence copy;
  copy.length = length;
  copy.pages.assign(source.pages.begin(), source.pages.begin() + pages_for(length));
  for (const int32_t page : copy.pages) ++users_[static_cast<size_t>(page)];
  sequences_.emplace(next_handle_, std::move(copy));
  return next_handle_++;
}

void PagePool::release(Sequence& s, int64_t keep) {
  while (static_cast<int64_t>(s.pages.size()) > keep) {
    const int32_t page = s.pages.back();
    s.pages.pop_back();
    if (--users_[static_cast<size_t>(page)] == 0) free_.push_back(page);
  }
}

void PagePool::truncate(int64_t sequence, int64_t length) {
  Sequence& s = at(sequence);
  if (length < 0 || length > s.length) {
    bad("length must be from 0 to the sequence's " + number(s.length) + " tokens, got " + number(length));
  }
  s.length = length;
  release(s, pages_for(length));
}

void PagePool::remove(int64_t sequence) {
  release(at(sequence), 0);
  sequences_.erase(sequence);
}

void PagePool::reorder(std::span<const int64_t> sequences, std::span<const int64_t> order) {
  check_distinct(sequences);
  if (sequences.size() != order.size()) {
    bad("order must have an entry for each of the " + number(static_cast<int64_t>(sequences.size())) +
        " sequences, got " + number(static_cast<int64_t>(order.size())));
  }
  const auto count = static_cast<int64_t>(sequences.size());
  for (const int64_t from : order) {
    if (from < 0 || from >= count)
      bad("order must hold numbers from 0 to " + number(count - 1) + ", got " + number(from));
  }
  std::vector<Sequence> wanted;
  for (const int64_t from : order) {
    const Sequence& source = at(sequences[static_cast<size_t>(from)]);
    Sequence copy;
    copy.length = source.length;
    copy.pages.assign(source.pages.begin(), source.pages.begin() + pages_for(source.length));
    for (const int32_t page : copy.pages) ++users_[static_cast<size_t>(page)];
    wanted.push_back(std::move(copy));
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& s = at(sequences[i]);
    release(s, 0);
    s = std::move(wanted[i]);
  }
}

bool PagePool::has_room(int64_t sequence, int64_t rows) const {
  const Sequence& s = at(sequence);
  if (rows <= 0) return true;
  const int64_t needed = pages_for(s.length + rows);
  if (static_cast<int64_t>(s.pages.size()) < needed) return false;
  for (int64_t i = s.length / page_size_; i < needed; ++i) {
    if (users_[static_cast<size_t>(s.pages[static_cast<size_t>(i)])] > 1) return false;
  }
  return true;
}

int32_t PagePool::take() {
  const int32_t page = free_.back();
  free_.pop_back();
  users_[static_cast<size_t>(page)] = 1;
  return page;
}

std::vector<PageCopy> PagePool::reserve(std::span<const int64_t> sequences, int64_t rows) {
  if (rows < 0 || rows > kMost) bad("rows must be from 0 to 2^31 - 1, got " + number(rows));
  check_distinct(sequences);
  if (rows == 0) return {};
  // First only counted. Of the sequences that share a page all but the last one to ask get a copy, unless
  // somebody outside the call has it too.
  int64_t needed = 0;
  std::unordered_map<int32_t, int32_t> left;  // users of a shared page after the copies
  for (const int64_t sequence : sequences) {
    const Sequence& s = at(sequence);
    if (s.length + rows > kMost) {
      bad("a sequence must be shorter than 2^31 tokens, got " + number(s.length) + " + " + number(rows));
    }
    const auto have = static_cast<int64_t>(s.pages.size());
    const int64_t end = pages_for(s.length + rows);
    for (int64_t i = s.length / page_size_; i < std::min(end, have); ++i) {
      const int32_t page = s.pages[static_cast<size_t>(i)];
      const auto entry = left.try_emplace(page, users_[static_cast<size_t>(page)]).first;
      if (entry->second > 1) {
        --entry->second;
        ++needed;
      }
    }
    needed += std::max<int64_t>(0, end - have);
  }
  if (needed > free_pages()) {
    const int64_t missing = needed - free_pages();
    throw OutOfPages("topk_attn: the cache has " + number(free_pages()) + " free pages of " +
                         number(page_size_) + " tokens, but " +
                         number(static_cast<int64_t>(sequences.size())) + " sequences with " + number(rows) +
                         " new rows each need " + number(needed) + ": " + number(missing) +
                         " pages are missing",
                     missing);
  }
  std::vector<PageCopy> copies;
  for (const int64_t sequence : sequences) {
    Sequence& s = at(sequence);
    const int64_t begin = s.length / page_size_;
    const int64_t end = pages_for(s.length + rows);
    for (int64_t i = begin; i < std::min(end, static_cast<int64_t>(s.pages.size())); ++i) {
      int32_t& page = s.pages[static_cast<size_t>(i)];
      if (users_[static_cast<size_t>(page)] == 1) continue;
      const int32_t own = take();
      --users_[static_cast<size_t>(page)];
      // A page from its first row on is written whole: nothing in it is worth a copy.
      if (i > begin || s.length % page_size_ != 0) copies.push_back({page, own});
      page = own;
    }
    while (static_cast<int64_t>(s.pages.size()) < end) s.pages.push_back(take());
  }
  return copies;
}

void PagePool::advance(std::span<const int64_t> sequences, int64_t rows) {
  if (rows < 0) bad("rows must be at least 0, got " + number(rows));
  check_distinct(sequences);
  for (const int64_t sequence : sequences) {
    if (!has_room(sequence, rows)) {
      bad("sequence " + number(sequence) + " has no room for " + number(rows) +
          " more rows: call reserve first");
    }
  }
  for (const int64_t sequence : sequences) at(sequence).length += rows;
}

void PagePool::check() const {
  const auto wrong = [](const std::string& what) { throw std::logic_error("page pool: " + what); };
  std::vector<int32_t> counted(users_.size(), 0);
  for (const auto& [handle, s] : sequences_) {
    if (static_cast<int64_t>(s.pages.size()) < pages_for(s.length)) {
      wrong("sequence " + number(handle) + " has fewer pages than tokens");
    }
    std::unordered_set<int32_t> own;
    for (const int32_t page : s.pages) {
      if (page < 0 || page >= pages()) wrong("page " + number(page) + " does not exist");
      if (!own.insert(page).second) wrong("page " + number(page) + " is twice in sequence " + number(handle));
      ++counted[static_cast<size_t>(page)];
    }
  }
  if (counted != users_) wrong("the counts are not those of the lists");
  std::unordered_set<int32_t> unused;
  for (const int32_t page : free_) {
    if (users_[static_cast<size_t>(page)] != 0) wrong("free page " + number(page) + " is used");
    if (!unused.insert(page).second) wrong("page " + number(page) + " is free twice");
  }
  const auto idle = std::count(users_.begin(), users_.end(), 0);
  if (static_cast<int64_t>(unused.size()) != idle) wrong("a page is neither used nor free");
}

}  // namespace topk_attn
