// Loss on held-out data.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "dist/rank_optimizer.h"
#include "dist/ranks.h"
#include "model/model.h"
#include "train/plan.h"

namespace topk_sft {

struct EvalResult {
  double loss = 0;  // mean over the targets
  int64_t targets = 0;
  double seconds = 0;
};

// Mean loss over the plan's held-out micro-batches under an attention kind ("topk", "dense"); the model's
// attention setting is put back. `progress(done, total)` is called after each micro-batch; false ends early
// without a result. The ranks divide the micro-batches and get the same result.
std::optional<EvalResult> evaluate(CausalLM& model, RankOptimizer& optimizer, const RunPlan& plan,
                                   Ranks& ranks, const std::string& mode,
                                   const std::function<bool(int64_t, int64_t)>& progress);

}  // namespace topk_sft
