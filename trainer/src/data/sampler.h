// The order in which sequences are visited, and how far a run has come in it. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

namespace topk_sft {

// Where a run stands: `position` sequences of epoch `epoch` (from 0) have been used. A finished epoch is
// written as the start of the next.
struct SamplerState {
  int64_t epoch = 0;
  int64_t position = 0;
  bool operator==(const SamplerState&) const = default;
};

// The sequences of one optimizer step, by micro-batch.
using StepPlan = std::vector<std::vector<int64_t>>;

// Each epoch visits every sequence exactly once, in an order that depends on seed and epoch only (the order
// of the data without `shuffle`). A step never mixes epochs: the last step of an epoch may be smaller.
class Sampler {
 public:
  Sampler(int64_t num_sequences, int64_t micro_batch_size, int64_t accumulation_steps, bool shuffle,
          uint64_t seed);

  int64_t steps_per_epoch() const;
  StepPlan next_step();
  const SamplerState& state() const { return state_; }
  void restore(const SamplerState& state);  // Error if it lies outside the data

 private:
  void shuffle_epoch();

  int64_t num_sequences_;
  int64_t micro_batch_size_;
  int64_t accumulation_steps_;
  bool shuffle_;
  uint64_t seed_;
  SamplerState state_;
  std::vector<int64_t> order_;  // of state_.epoch
};

}  // namespace topk_sft
