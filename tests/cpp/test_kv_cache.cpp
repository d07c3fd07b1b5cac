// topk_attn::KVCache from C++. What it does to pages is tested in test_page_pool.cpp, random operations in
// tests/python/test_kv_cache.py.

#include <ATen/Functions.h>

#include <string>
#include <vector>

#include "catch_shim.h"
#include "topk_attn/kv_cache.h"

using topk_attn::KVCache;
using topk_attn::KVCacheOptions;
using topk_attn::Options;

namespace {

KVCacheOptions sizes() {
  KVCacheOptions o;
  o.layers = 2;
  o.kv_heads = 2;
  o.head_dim = 16;
  o.v_dim = 8;
  o.pages = 12;
  o.page_size = 4;
  return o;
}

Options keep(int64_t topk) {
  Options options;
  options.topk = topk;
  return options;
}

at::Tensor rows(int64_t batch, int64_t count, int64_t heads, int64_t dim) {
  return at::randn({batch, count, heads, dim});
}

template <typename F>
std::string error_of(F f) {
  try {
    f();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("kv cache: steps through pages equal attention over all rows") {
  at::manual_seed(1);
  KVCache cache(sizes());
  const int64_t first = cache.add();
  std::vector<at::Tensor> keys, values;
  cache.reserve({first}, 9);
  for (int64_t layer = 0; layer < 2; ++layer) {
    keys.push_back(rows(1, 9, 2, 16));
    values.push_back(rows(1, 9, 2, 8));
    cache.append(layer, keys.back(), values.back());
  }
  cache.advance(9);
  const int64_t second = cache.fork(first, 6);
  CHECK(cache.memory().used_pages == 3);
  CHECK(cache.memory().shared_pages == 2);

  cache.reserve({second, first}, 2);
  CHECK(at::equal(cache.lengths(), at::tensor({6, 9}, at::kInt)));
  for (int64_t layer = 0; layer < 2; ++layer) {
    const at::Tensor q = rows(2, 2, 4, 16), k = rows(2, 2, 2, 16), v = rows(2, 2, 2, 8);
    const auto got = cache.append_and_attend(layer, q, k, v, keep(3), std::nullopt, true);
    for (int64_t b = 0; b < 2; ++b) {
      const int64_t past = b == 0 ? 6 : 9;
      const auto all = [&](const at::Tensor& old, const at::Tensor& fresh) {
        return at::cat({old.narrow(1, 0, past), fresh.narrow(0, b, 1)}, 1);
      };
      const at::Tensor all_k = all(keys[static_cast<size_t>(layer)], k);
      const at::Tensor all_v = all(values[static_cast<size_t>(layer)], v);
      const auto want = topk_attn::topk_attn_func(q.narrow(0, b, 1), all_k, all_v, keep(3));
      const auto set = topk_attn::topk_select(q.narrow(0, b, 1), all_k, keep(3), std::nullopt, true);
      CHECK(at::allclose(got.out.narrow(0, b, 1), want.out, 1e-5, 1e-5));
      CHECK(at::equal(got.indices.narrow(0, b, 1), set.indices));
    }
  }
  cache.advance(2);
  CHECK(cache.length(first) == 11);
  CHECK(cache.length(second) == 8);
  const auto [k, v] = cache.rows(1, 6);
  CHECK(at::equal(k.narrow(0, 0, 1), keys[1].narrow(1, 0, 6)));
  CHECK(at::equal(v.narrow(0, 1, 1), values[1].narrow(1, 0, 6)));
}

TEST_CASE("kv cache: errors name what is wrong and change nothing") {
  KVCache cache(sizes());
  const int64_t a = cache.add();
  CHECK(contains(error_of([&] { cache.lengths(); }), "call reserve first"));
  cache.reserve({a}, 1);
  CHECK(contains(error_of([&] { cache.append(2, rows(1, 1, 2, 16), rows(1, 1, 2, 8)); }),
                 "from 0 to 1, got 2"));
  CHECK(contains(error_of([&] { cache.append(0, rows(1, 5, 2, 16), rows(1, 5, 2, 8)); }),
                 "5 new rows, but the batch has room for 1"));
  CHECK(contains(error_of([&] { cache.reserve({a}, 49); }), "49 more do not fit"));
  const int64_t b = cache.add();
  CHECK(contains(error_of([&] { cache.reserve({a, b}, 28); }), "2 pages are missing"));
  CHECK(cache.batch() == std::vector<int64_t>{a});
  CHECK(cache.memory().used_pages == 1);
  KVCacheOptions bad = sizes();
  bad.head_dim = 12;
  CHECK(contains(error_of([&] { KVCache{bad}; }), "head_dim must be a multiple of 8"));
  bad = sizes();
  bad.key_codes = true;
  CHECK(contains(error_of([&] { KVCache{bad}; }), "CUDA only"));
}
