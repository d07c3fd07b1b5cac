// One optimizer step: forward and backward over the micro-batches, and what to say when a number is not
// finite.
#pragma once

#include <functional>
#include <string>

#include "data/sampler.h"
#include "dist/rank_optimizer.h"
#include "dist/ranks.h"
#include "model/model.h"
#include "train/plan.h"

namespace topk_sft {

struct StepResult {
  double loss = 0;       // mean over the step's targets
  double grad_norm = 0;  // before clipping
  int64_t tokens = 0;
  int64_t targets = 0;
  bool stopped = false;   // left early at the caller's wish; nothing was changed
  std::string nonfinite;  // where a NaN or infinity arose; the gradients are then of no use
};

// Fills the optimizer's gradients with those of the mean loss over all targets of the step: the sum over
// micro-batches of their loss sums, divided by the number of targets of the whole step.
// `go_on(micro_batches_done)` is asked after each micro-batch. `step` counts from 1 and is used in messages.
//
// `micro_batches` are those of all ranks, which run theirs at the same time and get the same result; a rank
// that is asked to stop stops all.
StepResult run_step(CausalLM& model, RankOptimizer& optimizer, const RunPlan& plan,
                    const StepPlan& micro_batches, int64_t step, Ranks& ranks,
                    const std::function<bool(int64_t)>& go_on);

}  // namespace topk_sft
