#include "optim/schedule.h"

#include <algorithm>
#include <cmath>

#include "io/error.h"
#include "recipe/recipe.h"

namespace topk_sft {

namespace {

constexpr double kPi = 3.14159265358979323846;

// Falls from 1 to 0 as progress goes from 0 to 1.
double fall(const std::string& shape, double progress) {
  if (shape == "linear") return 1.0 - progress;
  if (shape == "sqrt") return 1.0 - std::sqrt(progress);
  return 0.5 * (1.0 + std::cos(kPi * progress));
}

int64_t share_of(double ratio, int64_t total) {
  return static_cast<int64_t>(std::ceil(ratio * static_cast<double>(total)));
}

}  // namespace

double Schedule::learning_rate(int64_t step) const {
  if (step < warmup_steps) return peak * static_cast<double>(step) / static_cast<double>(warmup_steps);
  if (kind == "constant") return peak;
  const bool wsd = kind == "wsd";
  const int64_t begin = wsd ? total_steps - decay_steps : warmup_steps;
  if (step < begin) return peak;
  const auto length = static_cast<double>(std::max<int64_t>(1, total_steps - begin));
  const double progress = std::min(1.0, static_cast<double>(step - begin) / length);
  const double factor = std::max(0.0, fall(wsd ? decay_shape : kind, progress));
  return peak * (factor * (1.0 - min_ratio) + min_ratio);
}

Schedule make_schedule(const OptimSection& optim, int64_t total_steps) {
  Schedule s;
  s.kind = optim.lr_scheduler;
  s.peak = optim.learning_rate;
  s.total_steps = total_steps;
  s.min_ratio = optim.min_lr_ratio;
  s.decay_shape = optim.decay_shape;
  s.warmup_steps =
      optim.warmup_ratio ? share_of(*optim.warmup_ratio, total_steps) : optim.warmup_steps.value_or(0);
  if (s.kind == "wsd") {
    s.decay_steps =
        optim.decay_steps ? *optim.decay_steps : share_of(optim.decay_ratio.value_or(0.1), total_steps);
    if (s.warmup_steps + s.decay_steps > total_steps) {
      fail("optim: a warm-up of {} and a decay of {} steps do not fit into {} steps", s.warmup_steps,
           s.decay_steps, total_steps);
    }
  }
  return s;
}

}  // namespace topk_sft
