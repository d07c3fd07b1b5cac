// Epoch orders by Fisher-Yates on a Mersenne twister: the same on every platform.
#include "data/sampler.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <utility>

#include "io/error.h"

namespace topk_sft {

namespace {

// Uniform in [0, n) without bias: draws from the incomplete last multiple of n are drawn again.
uint64_t below(std::mt19937_64& rng, uint64_t n) {
  const uint64_t limit = UINT64_MAX - UINT64_MAX % n;
  uint64_t draw = rng();
  while (draw >= limit) draw = rng();
  return draw % n;
}

}  // namespace

Sampler::Sampler(int64_t num_sequences, int64_t micro_batch_size, int64_t accumulation_steps, bool shuffle,
                 uint64_t seed)
    : num_sequences_(num_sequences),
      micro_batch_size_(micro_batch_size),
      accumulation_steps_(accumulation_steps),
      shuffle_(shuffle),
      seed_(seed),
      order_(static_cast<size_t>(num_sequences)) {
  if (num_sequences < 1) fail("there is nothing to train on: no document has a token that carries loss");
  shuffle_epoch();
}

int64_t Sampler::steps_per_epoch() const {
  const int64_t per_step = micro_batch_size_ * accumulation_steps_;
  return (num_sequences_ + per_step - 1) / per_step;
}

StepPlan Sampler::next_step() {
  StepPlan plan;
  const int64_t end = std::min(num_sequences_, state_.position + micro_batch_size_ * accumulation_steps_);
  for (int64_t begin = state_.position; begin < end; begin += micro_batch_size_) {
    plan.emplace_back(order_.begin() + begin, order_.begin() + std::min(end, begin + micro_batch_size_));
  }
  state_.position = end;
  if (end == num_sequences_) {
    state_ = {state_.epoch + 1, 0};
    shuffle_epoch();
  }
  return plan;
}

void Sampler::restore(const SamplerState& state) {
  if (state.epoch < 0 || state.position < 0 || state.position >= num_sequences_) {
    fail("data position {} of epoch {} lies outside the data, which has {} sequences", state.position,
         state.epoch, num_sequences_);
  }
  state_ = state;
  shuffle_epoch();
}

void Sampler::shuffle_epoch() {
  std::iota(order_.begin(), order_.end(), 0);
  if (!shuffle_) return;
  std::seed_seq seed{static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32),
                     static_cast<uint32_t>(state_.epoch), static_cast<uint32_t>(state_.epoch >> 32)};
  std::mt19937_64 rng(seed);
  for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[below(rng, i)]);
}

}  // namespace topk_sft
