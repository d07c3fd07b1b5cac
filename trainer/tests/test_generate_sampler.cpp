// Choosing tokens: greedy, the truncations, the penalty, and draws that depend on seed and prompt only.
#include <cmath>
#include <limits>
#include <map>

#include "generate/sampler.h"
#include "scratch.h"

using namespace topk_sft;

namespace {

const std::vector<int64_t> kPrompt = {7, 8};

int64_t once(const SamplingOptions& options, std::vector<float> logits,
             const std::vector<int64_t>& prompt = kPrompt, uint64_t occurrence = 0) {
  return TokenSampler(options, prompt, occurrence).next(logits);
}

// How often each id comes out of 4,000 draws of one sampler.
std::map<int64_t, int> counts(const SamplingOptions& options, const std::vector<float>& logits) {
  TokenSampler sampler(options, kPrompt);
  std::map<int64_t, int> result;
  for (int i = 0; i < 4000; ++i) {
    std::vector<float> copy = logits;
    ++result[sampler.next(copy)];
  }
  return result;
}

SamplingOptions sampled() {
  SamplingOptions options;
  options.sample = true;
  return options;
}

}  // namespace

TEST_CASE("greedy takes the highest logit, the lowest id among equals") {
  CHECK(once({}, {0.0f, 3.0f, -1.0f, 3.0f}) == 1);
  CHECK(once({}, {-5.0f}) == 0);
  CHECK(once({}, {-INFINITY, -2.0f}) == 1);
}

TEST_CASE("logits that say nothing are errors") {
  CHECK(contains(error_of([] { once({}, {0.0f, NAN}); }), "NaN (token id 1)"));
  CHECK(contains(error_of([] { once({}, {-INFINITY, -INFINITY}); }), "-inf"));
  CHECK(contains(error_of([] { once(sampled(), {0.0f, INFINITY}); }), "+inf"));
}

TEST_CASE("draws follow the softmax at the temperature") {
  const std::vector<float> logits = {0.0f, std::log(2.0f), std::log(5.0f)};
  const auto plain = counts(sampled(), logits);
  CHECK(plain.at(0) == Approx(4000 / 8.0).epsilon(0.15));
  CHECK(plain.at(1) == Approx(4000 * 2 / 8.0).epsilon(0.1));
  CHECK(plain.at(2) == Approx(4000 * 5 / 8.0).epsilon(0.1));
  SamplingOptions half = sampled();
  half.temperature = 0.5;  // squares the odds: 1, 4, 25
  CHECK(counts(half, logits).at(2) == Approx(4000 * 25 / 30.0).epsilon(0.1));
}

TEST_CASE("top-k, top-p and min-p keep what transformers keeps") {
  // Probabilities 0.1, 0.4, 0.3, 0.2.
  const std::vector<float> logits = {std::log(1.0f), std::log(4.0f), std::log(3.0f), std::log(2.0f)};
  const auto kept = [&](const SamplingOptions& options) {
    std::vector<int64_t> ids;
    for (const auto& [id, count] : counts(options, logits)) ids.push_back(id);
    return ids;
  };
  SamplingOptions o = sampled();
  CHECK(kept(o) == std::vector<int64_t>{0, 1, 2, 3});
  o.top_k = 2;
  CHECK(kept(o) == std::vector<int64_t>{1, 2});
  o.top_k = 9;
  CHECK(kept(o).size() == 4);
  o = sampled();
  o.top_p = 0.69;
  CHECK(kept(o) == std::vector<int64_t>{1, 2});
  o.top_p = 0.71;
  CHECK(kept(o) == std::vector<int64_t>{1, 2, 3});
  o.top_p = 1e-9;
  CHECK(kept(o) == std::vector<int64_t>{1});
  o = sampled();
  o.min_p = 0.6;  // at least 0.24
  CHECK(kept(o) == std::vector<int64_t>{1, 2});
  o.min_p = 1.0;
  CHECK(kept(o) == std::vector<int64_t>{1});
  // Top-p after top-k: of 0.4 and 0.3, the first has 0.57.
  o = sampled();
  o.top_k = 2;
  o.top_p = 0.5;
  CHECK(kept(o) == std::vector<int64_t>{1});
  // Equal logits at the border of top-k: the lower id stays.
  SamplingOptions tie = sampled();
  tie.top_k = 2;
  std::map<int64_t, int> tied = counts(tie, {1.0f, 1.0f, 1.0f});
  CHECK(tied.count(2) == 0);
  CHECK(tied.size() == 2);
}

TEST_CASE("the repetition penalty holds for prompt and choices, once an id") {
  SamplingOptions o;
  o.repetition_penalty = 2.0;
  CHECK(once(o, {1.0f, 1.5f}, {1, 1, 1}) == 0);  // 1.5 / 2
  CHECK(once(o, {-1.0f, -0.6f}, {1}) == 0);      // -0.6 * 2
  CHECK(once(o, {0.7f, 1.5f}, {1, 1, 1}) == 1);  // not 1.5 / 8
  TokenSampler sampler(o, std::vector<int64_t>{5});
  std::vector<float> logits = {1.0f, 1.5f, 0.0f, 0.0f, 0.0f, 0.0f};
  std::vector<float> again = logits;
  CHECK(sampler.next(logits) == 1);
  CHECK(sampler.next(again) == 0);
}

TEST_CASE("draws depend on seed, prompt and occurrence") {
  const std::vector<float> logits(50, 0.0f);
  const auto draws = [&](uint64_t seed, const std::vector<int64_t>& prompt, uint64_t occurrence) {
    SamplingOptions o = sampled();
    o.seed = seed;
    TokenSampler sampler(o, prompt, occurrence);
    std::vector<int64_t> ids;
    for (int i = 0; i < 20; ++i) {
      std::vector<float> copy = logits;
      ids.push_back(sampler.next(copy));
    }
    return ids;
  };
  CHECK(draws(1, {1, 2}, 0) == draws(1, {1, 2}, 0));
  CHECK(draws(1, {1, 2}, 0) != draws(2, {1, 2}, 0));
  CHECK(draws(1, {1, 2}, 0) != draws(1, {2, 1}, 0));
  CHECK(draws(1, {1, 2}, 0) != draws(1, {1, 2}, 1));
}

TEST_CASE("sampling options out of range are named") {
  const auto refused = [](auto change, const std::string& name) {
    SamplingOptions o = sampled();
    change(o);
    CHECK(contains(error_of([&] { check_sampling(o); }), name));
  };
  refused([](auto& o) { o.temperature = 0.0; }, "temperature");
  refused([](auto& o) { o.temperature = NAN; }, "temperature");
  refused([](auto& o) { o.top_k = -1; }, "top_k");
  refused([](auto& o) { o.top_p = 0.0; }, "top_p");
  refused([](auto& o) { o.top_p = 1.01; }, "top_p");
  refused([](auto& o) { o.min_p = -0.1; }, "min_p");
  refused([](auto& o) { o.repetition_penalty = 0.0; }, "repetition_penalty");
}
