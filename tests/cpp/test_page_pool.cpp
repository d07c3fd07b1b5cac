// PagePool: accounting of cache pages, against a model that gives every token a value.

#include <map>
#include <random>
#include <string>
#include <vector>

#include "catch_shim.h"
#include "topk_attn/page_pool.h"

using topk_attn::OutOfPages;
using topk_attn::PageCopy;
using topk_attn::PagePool;

namespace {

using Handles = std::vector<int64_t>;

template <typename F>
std::string error_of(F f) {
  try {
    f();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Pages with contents, and beside them what every sequence must hold.
class Model {
 public:
  Model(int64_t pages, int64_t page_size)
      : pool(pages, page_size), memory_(static_cast<size_t>(pages * page_size), -1) {}

  // Writes rows with new values, as the operator would: at the end of each sequence, through its pages.
  void append(const Handles& sequences, int64_t rows) {
    for (const PageCopy& copy : pool.reserve(sequences, rows)) {
      for (int64_t i = 0; i < pool.page_size(); ++i) row(copy.to, i) = row(copy.from, i);
    }
    for (const int64_t s : sequences) {
      REQUIRE(pool.has_room(s, rows));
      for (int64_t t = pool.length(s); t < pool.length(s) + rows; ++t) {
        row(pool.table(s)[static_cast<size_t>(t / pool.page_size())], t % pool.page_size()) = ++last_;
        truth[s].push_back(last_);
      }
    }
    pool.advance(sequences, rows);
  }

  void verify() {
    pool.check();
    REQUIRE(pool.num_sequences() == static_cast<int64_t>(truth.size()));
    for (const auto& [s, values] : truth) {
      REQUIRE(pool.length(s) == static_cast<int64_t>(values.size()));
      Handles found;
      for (int64_t t = 0; t < pool.length(s); ++t) {
        const int32_t page = pool.table(s)[static_cast<size_t>(t / pool.page_size())];
        found.push_back(row(page, t % pool.page_size()));
      }
      REQUIRE(found == values);
    }
  }

  PagePool pool;
  std::map<int64_t, Handles> truth;

 private:
  int64_t& row(int64_t page, int64_t i) { return memory_[static_cast<size_t>(page * pool.page_size() + i)]; }

  Handles memory_;
  int64_t last_ = 0;
};

}  // namespace

TEST_CASE("page pool: pages are taken when tokens need them and given back") {
  PagePool pool(8, 4);
  const Handles one = {pool.add()};
  CHECK(pool.free_pages() == 8);
  CHECK(pool.reserve(one, 5).empty());
  CHECK(pool.table(one[0]) == std::vector<int32_t>{0, 1});
  pool.advance(one, 5);
  CHECK(pool.length(one[0]) == 5);
  CHECK(pool.has_room(one[0], 3));
  CHECK_FALSE(pool.has_room(one[0], 4));
  pool.reserve(one, 20);
  CHECK(pool.free_pages() == 1);
  pool.truncate(one[0], 4);
  CHECK(pool.free_pages() == 7);
  CHECK(pool.tokens() == 4);
  pool.remove(one[0]);
  CHECK(pool.free_pages() == 8);
  CHECK(pool.add() != one[0]);
  pool.check();
}

TEST_CASE("page pool: a fork shares whole pages, and the partly filled one is copied before it is written") {
  PagePool pool(8, 4);
  const int64_t a = pool.add();
  pool.reserve(Handles{a}, 10);
  pool.advance(Handles{a}, 10);
  const int64_t b = pool.fork(a, 10);
  const int64_t c = pool.fork(a, 8);
  CHECK(pool.free_pages() == 5);
  CHECK(pool.shared_pages() == 3);
  CHECK_FALSE(pool.has_room(a, 1));
  // c ends at a page boundary: nothing to copy. a and b share the last page: one of them gets its own.
  const std::vector<PageCopy> copies = pool.reserve(Handles{a, b, c}, 1);
  REQUIRE(copies.size() == 1);
  CHECK(copies[0].from == 2);
  CHECK(pool.table(b).back() == 2);
  CHECK(pool.table(a).back() == copies[0].to);
  CHECK(pool.shared_pages() == 2);
  CHECK(pool.free_pages() == 3);
  pool.check();
}

TEST_CASE("page pool: a page that is reserved ahead is not shared") {
  PagePool pool(8, 4);
  const int64_t a = pool.add();
  pool.reserve(Handles{a}, 16);
  pool.advance(Handles{a}, 5);
  const int64_t b = pool.fork(a, 5);
  CHECK(pool.table(b).size() == 2);
  CHECK_FALSE(pool.has_room(a, 1));
  CHECK(pool.reserve(Handles{a}, 1).size() == 1);
  CHECK(pool.reserve(Handles{b}, 1).empty());
  pool.check();
}

TEST_CASE("page pool: a whole shared page that is written from its first row on is not copied") {
  PagePool pool(8, 4);
  const int64_t a = pool.add();
  pool.reserve(Handles{a}, 8);
  pool.advance(Handles{a}, 8);
  const int64_t b = pool.fork(a, 8);
  pool.truncate(b, 4);
  pool.truncate(a, 4);
  CHECK(pool.shared_pages() == 1);
  CHECK(pool.reserve(Handles{a, b}, 4).empty());
  pool.check();
}

TEST_CASE("page pool: without room nothing changes, and the error counts the missing pages") {
  PagePool pool(4, 4);
  const int64_t a = pool.add();
  pool.reserve(Handles{a}, 6);
  pool.advance(Handles{a}, 6);
  const int64_t b = pool.fork(a, 6);
  // a and b: a copy of the shared page, and two more pages each.
  try {
    pool.reserve(Handles{a, b}, 10);
    FAIL("there is no room");
  } catch (const OutOfPages& e) {
    CHECK(e.missing_pages == 3);
    CHECK(contains(e.what(), "2 free pages of 4 tokens"));
    CHECK(contains(e.what(), "3 pages are missing"));
  }
  CHECK(pool.free_pages() == 2);
  CHECK(pool.table(a) == pool.table(b));
  pool.check();
  CHECK(pool.reserve(Handles{a, b}, 2).size() == 1);
}

TEST_CASE("page pool: what cannot be is refused by name") {
  CHECK(contains(error_of([] { PagePool(0, 4); }), "pages must be"));
  CHECK(contains(error_of([] { PagePool(4, 0); }), "page_size must be"));
  PagePool pool(4, 4);
  const int64_t a = pool.add();
  const int64_t b = pool.add();
  CHECK(contains(error_of([&] { pool.truncate(a, 1); }),
                 "length must be from 0 to the sequence's 0 tokens, got 1"));
  CHECK(contains(error_of([&] { pool.fork(a, -1); }), "got -1"));
  CHECK(contains(error_of([&] { pool.remove(77); }), "sequence 77 is not in the cache"));
  CHECK(contains(error_of([&] { pool.reserve(Handles{a, a}, 1); }), "given twice"));
  CHECK(contains(error_of([&] { pool.reserve(Handles{a}, -1); }), "rows must be"));
  CHECK(contains(error_of([&] { pool.advance(Handles{a}, 1); }), "call reserve first"));
  CHECK(contains(error_of([&] { pool.reorder(Handles{a, b}, Handles{0}); }), "an entry for each of the 2"));
  CHECK(contains(error_of([&] { pool.reorder(Handles{a, b}, Handles{0, 2}); }), "from 0 to 1, got 2"));
  pool.check();
}

TEST_CASE("page pool: random operations keep every sequence's tokens") {
  for (const int64_t page_size : {1, 3, 16}) {
    std::mt19937 random(static_cast<unsigned>(page_size));
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
    Model m(400 / page_size, page_size);
    int64_t refused = 0;
    for (int step = 0; step < 2000; ++step) {
      Handles all = m.pool.handles();
      std::shuffle(all.begin(), all.end(), random);
      const int64_t what = below(10);
      if (all.empty() || (what == 0 && all.size() < 12)) {
        m.truth[m.pool.add()] = {};
      } else if (what == 1 && all.size() < 12) {
        const int64_t length = below(m.pool.length(all[0]) + 1);
        const Handles& source = m.truth[all[0]];
        const Handles prefix(source.begin(), source.begin() + length);
        m.truth[m.pool.fork(all[0], length)] = prefix;
      } else if (what == 2) {
        const int64_t length = below(m.pool.length(all[0]) + 1);
        m.pool.truncate(all[0], length);
        m.truth[all[0]].resize(static_cast<size_t>(length));
      } else if (what == 3) {
        m.pool.remove(all[0]);
        m.truth.erase(all[0]);
      } else if (what == 4) {
        Handles order;
        for (size_t i = 0; i < all.size(); ++i) order.push_back(below(static_cast<int64_t>(all.size())));
        m.pool.reorder(all, order);
        const std::map<int64_t, Handles> before = m.truth;
        for (size_t i = 0; i < all.size(); ++i)
          m.truth[all[i]] = before.at(all[static_cast<size_t>(order[i])]);
      } else {
        const int64_t rows = 1 + below(9);
        all.resize(1 + static_cast<size_t>(below(static_cast<int64_t>(all.size()))));
        const int64_t free = m.pool.free_pages();
        try {
          m.append(all, rows);
        } catch (const OutOfPages&) {
          ++refused;
          REQUIRE(m.pool.free_pages() == free);
        }
      }
      m.verify();
    }
    CHECK(refused > 0);
  }
}
