// contract.h: budget, visibility, the row plan, the order of scores and the encoding.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <type_traits>
#include <vector>

#include "catch_shim.h"
#include "topk_attn/contract.h"

namespace {

using topk_attn::Budget;
using topk_attn::Span;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Budget of_topk(int64_t topk, int64_t min_keys = 1, int64_t max_keys = topk_attn::kNoLimit) {
  return Budget{topk, 0.0, min_keys, max_keys};
}

Budget of_ratio(double ratio, int64_t min_keys = 1, int64_t max_keys = topk_attn::kNoLimit) {
  return Budget{0, ratio, min_keys, max_keys};
}

// "a comes before b" in the contract's words.
template <typename Score>
bool before(Score a, int64_t ja, Score b, int64_t jb) {
  if (std::isnan(a) || std::isnan(b)) {
    if (std::isnan(a) != std::isnan(b)) return std::isnan(a);
    return ja < jb;
  }
  if (a != b) return a > b;
  return ja < jb;
}

template <typename Score>
std::vector<Score> interesting() {
  using limits = std::numeric_limits<Score>;
  std::vector<Score> x = {
      limits::infinity(), limits::max(),        Score(1), std::nextafter(Score(1), Score(2)),
      limits::min(),      limits::denorm_min(), Score(0)};
  const size_t positive = x.size();
  for (size_t i = 0; i < positive; ++i) x.push_back(-x[i]);
  x.push_back(limits::quiet_NaN());
  x.push_back(-limits::quiet_NaN());
  return x;
}

}  // namespace

TEST_CASE("budget: absolute") {
  CHECK(topk_attn::budget(0, of_topk(5)) == 0);
  CHECK(topk_attn::budget(-3, of_topk(5)) == 0);
  CHECK(topk_attn::budget(1, of_topk(5)) == 1);
  CHECK(topk_attn::budget(5, of_topk(5)) == 5);
  CHECK(topk_attn::budget(100, of_topk(5)) == 5);
  CHECK(topk_attn::budget(100, of_topk(5, 8)) == 8);
  CHECK(topk_attn::budget(6, of_topk(5, 8)) == 6);
  CHECK(topk_attn::budget(100, of_topk(50, 1, 8)) == 8);
  CHECK(topk_attn::budget(100, of_topk(topk_attn::kNoLimit)) == 100);
}

TEST_CASE("budget: ratio, rounding noise adds no key") {
  CHECK(topk_attn::budget(100, of_ratio(0.07)) == 7);
  CHECK(topk_attn::budget(101, of_ratio(0.07)) == 8);
  CHECK(topk_attn::budget(1, of_ratio(0.01)) == 1);
  CHECK(topk_attn::budget(100, of_ratio(0.01)) == 1);
  CHECK(topk_attn::budget(101, of_ratio(0.01)) == 2);
  CHECK(topk_attn::budget(0, of_ratio(1.0)) == 0);
  CHECK(topk_attn::budget(1, of_ratio(1e-300)) == 1);
  for (int percent = 1; percent <= 100; ++percent) {
    for (int64_t n = 100; n <= 100'000; n += 100) {
      // n is a multiple of 100, so the exact product is an integer.
      REQUIRE(topk_attn::budget(n, of_ratio(percent / 100.0)) == n / 100 * percent);
    }
  }
}

TEST_CASE("budget: ratio 1 keeps everything, and the budget never falls as n grows") {
  const std::vector<Budget> budgets = {of_ratio(1.0), of_ratio(0.01), of_ratio(1.0 / 3), of_ratio(0.3, 7),
                                       of_ratio(0.9, 2, 11)};
  for (const Budget& b : budgets) {
    int64_t last = 0;
    for (int64_t n = 0; n < 5000; ++n) {
      const int64_t w = topk_attn::budget(n, b);
      REQUIRE(w >= last);
      REQUIRE(w <= n);
      REQUIRE((n == 0 || w >= 1));
      last = w;
    }
  }
  for (int64_t n : {int64_t{1}, int64_t{12345}, int64_t{1} << 31, int64_t{1} << 45}) {
    CHECK(topk_attn::budget(n, of_ratio(1.0)) == n);
  }
}

TEST_CASE("visible: bottom-right causal") {
  for (int64_t tq = 1; tq <= 6; ++tq) {
    for (int64_t tk = 0; tk <= 6; ++tk) {
      for (int64_t pad = 0; pad <= tk; ++pad) {
        for (int64_t i = 0; i < tq; ++i) {
          for (bool causal : {false, true}) {
            const Span s = topk_attn::visible(i, tq, tk, causal, pad);
            REQUIRE(s.end >= s.begin);
            REQUIRE(s.size() == s.end - s.begin);
            for (int64_t j = -1; j <= tk; ++j) {
              const bool want = j >= pad && j < tk && j >= 0 && (!causal || j <= i + (tk - tq));
              REQUIRE((j >= s.begin && j < s.end) == want);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("plan_row: always-kept keys count inside the budget, sinks first, newest recent first") {
  for (int64_t n = 0; n <= 8; ++n) {
    for (int64_t topk = 1; topk <= 9; ++topk) {
      for (int64_t sink : {0, 1, 2, 5, 100}) {
        for (int64_t recent : {0, 1, 3, 100}) {
          const Span seen{4, 4 + n};
          const auto plan = topk_attn::plan_row(seen, of_topk(topk), sink, recent);
          // The contract, literally.
          const int64_t w = topk_attn::budget(n, of_topk(topk));
          std::set<int64_t> kept;
          for (int64_t j = seen.begin; j < seen.end && j < seen.begin + sink; ++j) {
            if (static_cast<int64_t>(kept.size()) < w) kept.insert(j);
          }
          for (int64_t j = seen.end - 1; j >= seen.begin && j >= seen.end - recent; --j) {
            if (static_cast<int64_t>(kept.size()) < w) kept.insert(j);
          }
          REQUIRE(plan.kept == w);
          REQUIRE(plan.contested_kept() == w - static_cast<int64_t>(kept.size()));
          for (int64_t j = 0; j < 20; ++j) REQUIRE(plan.always_kept(j) == (kept.count(j) == 1));
          const Span middle = plan.contested();
          REQUIRE(middle.size() >= plan.contested_kept());
          for (int64_t j = seen.begin; j < seen.end; ++j) {
            REQUIRE((j >= middle.begin && j < middle.end) == (kept.count(j) == 0));
          }
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("order_key: the contract's order on special values", "", float, double) {
  const auto values = interesting<TestType>();
  for (TestType a : values) {
    for (TestType b : values) {
      const auto ka = topk_attn::order_key(a), kb = topk_attn::order_key(b);
      if (std::isnan(a) || std::isnan(b)) {
        CHECK((ka == kb) == (std::isnan(a) && std::isnan(b)));
        if (std::isnan(a) && !std::isnan(b)) CHECK(ka > kb);
      } else {
        CHECK((ka < kb) == (a < b));
        CHECK((ka == kb) == (a == b));
      }
    }
  }
}

TEMPLATE_TEST_CASE("order_score: gives the score back, +0 for zeros, one quiet NaN", "", float, double) {
  for (TestType x : interesting<TestType>()) {
    const TestType back = topk_attn::order_score(topk_attn::order_key(x));
    if (std::isnan(x)) {
      CHECK(std::isnan(back));
      CHECK_FALSE(std::signbit(back));
    } else {
      CHECK(back == x);
      if (x == 0) CHECK_FALSE(std::signbit(back));
    }
  }
}

TEST_CASE("order_key: every NaN bit pattern is the same key, random patterns keep the order") {
  std::mt19937 random(1);
  float last = 0;
  for (int i = 0; i < 1'000'000; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random());
    float x;
    std::memcpy(&x, &bits, sizeof x);
    const int32_t key = topk_attn::order_key(x);
    if (std::isnan(x)) {
      REQUIRE(key == topk_attn::order_key(std::numeric_limits<float>::quiet_NaN()));
    } else {
      const float back = topk_attn::order_score(key);
      REQUIRE(back == x);
      if (!std::isnan(last)) REQUIRE((key < topk_attn::order_key(last)) == (x < last));
    }
    last = x;
  }
}

TEMPLATE_TEST_CASE("admitted: the encoding of the W-th key admits exactly the first W", "", float, double) {
  std::mt19937 random(2);
  const std::vector<TestType> table = {TestType(0),     TestType(-0.0), TestType(1),
                                       TestType(-1),    TestType(2),    TestType(kInf),
                                       TestType(-kInf), TestType(kNan), TestType(0.5)};
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t n = 1 + random() % 12;
    std::vector<TestType> scores(n);
    for (auto& s : scores) s = table[random() % table.size()];
    std::vector<int64_t> order(n);
    for (int64_t j = 0; j < n; ++j) order[j] = j;
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return before(scores[a], a, scores[b], b); });
    for (int64_t w = 1; w <= n; ++w) {
      const int64_t last = order[w - 1];
      const TestType threshold = topk_attn::order_score(topk_attn::order_key(scores[last]));
      for (int64_t rank = 0; rank < n; ++rank) {
        const int64_t j = order[rank];
        REQUIRE(topk_attn::admitted(scores[j], j, threshold, static_cast<int32_t>(last)) == (rank < w));
      }
    }
  }
}

TEMPLATE_TEST_CASE("admitted: an empty encoding admits nothing", "", float, double) {
  for (TestType x : interesting<TestType>()) {
    CHECK_FALSE(topk_attn::admitted(x, 0, std::numeric_limits<TestType>::quiet_NaN(), -1));
    CHECK_FALSE(topk_attn::admitted(x, 5, TestType(-kInf), -1));
  }
}
