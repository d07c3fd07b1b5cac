// Learning-rate schedules. Torch-free.
//
// The values are those of transformers' get_*_schedule_with_warmup for step 0, 1, ..., total_steps - 1: with
// a warm-up of w steps, step s < w has the rate peak * s / w, so the very first step has rate 0.
// (Its warmup_stable_decay starts the warm-up at the minimum instead; here every warm-up starts at 0.)
#pragma once

#include <cstdint>
#include <string>

namespace topk_sft {

struct Schedule {
  std::string kind = "cosine";  // cosine, linear, constant, wsd
  double peak = 0.0;
  int64_t total_steps = 1;
  int64_t warmup_steps = 0;
  double min_ratio = 0.0;
  int64_t decay_steps = 0;             // wsd
  std::string decay_shape = "cosine";  // wsd: cosine, linear, sqrt

  // Learning rate of optimizer step `step`, counted from 0.
  double learning_rate(int64_t step) const;
};

struct OptimSection;

// The schedule that a recipe asks for over `total_steps`. Throws Error if warm-up and decay do not fit.
Schedule make_schedule(const OptimSection& optim, int64_t total_steps);

}  // namespace topk_sft
