#include "generate/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "io/error.h"

namespace topk_sft {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// The finaliser of splitmix64: every input bit reaches every output bit.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

struct Candidate {
  double weight;  // probability, not normalised: the highest is 1
  int64_t id;
};

// Highest first; the lower id among equals.
bool before(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

}  // namespace

void check_sampling(const SamplingOptions& o) {
  if (!(o.temperature > 0.0) || !std::isfinite(o.temperature)) {
    fail("temperature must be positive and finite, got {} (greedy decoding needs none)", o.temperature);
  }
  if (o.top_k < 0) fail("top_k must be at least 0, got {}", o.top_k);
  if (!(o.top_p > 0.0 && o.top_p <= 1.0)) fail("top_p must be above 0 and at most 1, got {}", o.top_p);
  if (!(o.min_p >= 0.0 && o.min_p <= 1.0)) fail("min_p must be from 0 to 1, got {}", o.min_p);
  if (!(o.repetition_penalty > 0.0) || !std::isfinite(o.repetition_penalty)) {
    fail("repetition_penalty must be positive and finite, got {}", o.repetition_penalty);
  }
}

TokenSampler::TokenSampler(const SamplingOptions& options, std::span<const int64_t> prompt,
                           uint64_t occurrence)
    : options_(options), seen_(prompt.begin(), prompt.end()) {
  check_sampling(options);
  state_ = mix(options.seed + kGolden);
  for (const int64_t id : prompt) state_ = mix(state_ ^ (static_cast<uint64_t>(id) + kGolden));
  state_ = mix(state_ ^ mix(occurrence + kGolden));
}

double TokenSampler::uniform() {
  state_ += kGolden;
  return static_cast<double>(mix(state_) >> 11) * 0x1.0p-53;
}

void TokenSampler::penalise(std::span<float> logits) const {
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  if (penalty == 1.0f) return;
  for (const int64_t id : seen_) {
    float& logit = logits[static_cast<size_t>(id)];
    logit = logit < 0.0f ? logit * penalty : logit / penalty;
  }
}

int64_t TokenSampler::next(std::span<float> logits) {
  penalise(logits);
  float highest = -std::numeric_limits<float>::infinity();
  size_t best = 0;
  for (size_t id = 0; id < logits.size(); ++id) {
    if (std::isnan(logits[id])) fail("the model's logits hold NaN (token id {})", id);
    if (logits[id] > highest) {
      highest = logits[id];
      best = id;
    }
  }
  if (std::isinf(highest)) {
    fail("the model's highest logit is {}: it must be finite", highest > 0 ? "+inf" : "-inf");
  }
  const int64_t chosen = options_.sample ? draw(logits) : static_cast<int64_t>(best);
  seen_.insert(chosen);
  return chosen;
}

int64_t TokenSampler::draw(std::span<const float> logits) {
  const double highest = *std::max_element(logits.begin(), logits.end());
  std::vector<Candidate> kept;
  kept.reserve(logits.size());
  for (size_t id = 0; id < logits.size(); ++id) {
    const double weight = std::exp((logits[id] - highest) / options_.temperature);
    if (weight > 0.0) kept.push_back({weight, static_cast<int64_t>(id)});
  }
  if (options_.top_k > 0 && static_cast<size_t>(options_.top_k) < kept.size()) {
    std::nth_element(kept.begin(), kept.begin() + options_.top_k, kept.end(), before);
    kept.resize(static_cast<size_t>(options_.top_k));
  }
  const auto total = [&] {
    double sum = 0.0;
    for (const Candidate& candidate : kept) sum += candidate.weight;
    return sum;
  };
  if (options_.top_p < 1.0) {
    std::sort(kept.begin(), kept.end(), before);
    const double enough = options_.top_p * total();
    double sum = 0.0;
    size_t count = 0;
    while (count < kept.size() && sum < enough) sum += kept[count++].weight;
    kept.resize(std::max<size_t>(count, 1));
  }
  // The highest weight is 1, whatever the truncation so far.
  if (options_.min_p > 0.0) {
    std::erase_if(kept, [&](const Candidate& candidate) { return candidate.weight < options_.min_p; });
  }
  // In order of id, so that the draw does not depend on how the library sorts.
  std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  const double point = uniform() * total();
  double sum = 0.0;
  for (const Candidate& candidate : kept) {
    sum += candidate.weight;
    if (point < sum) return candidate.id;
  }
  return kept.back().id;  // rounding of the sums
}

}  // namespace topk_sft
