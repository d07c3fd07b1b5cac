// Loss on held-out data.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "dist/rank_optimizer.h"
#include "dist/ranks.h"
#include "io/json.h"
#include "model/model.h"
#include "train/plan.h"

namespace topk_sft {

// An attention to evaluate under: "dense", "topk" (the recipe's budget) or "topk_R" (ratio R as the budget).
struct EvalMode {
  std::string name;
  std::optional<SparsityConfig> sparsity;  // none: dense
};

// Those of the recipe: train.eval_attention, then train.eval_ratios.
std::vector<EvalMode> eval_modes(const RunPlan& plan);

struct EvalResult {
  std::string mode;
  double loss = 0;  // mean over the targets
  int64_t targets = 0;
  double seconds = 0;
};

// Mean loss over the plan's held-out micro-batches under an attention; the model's attention setting is put
// back. The ranks divide the micro-batches and get the same result. `optimizer`: who gathers the layers of a
// sharded model; none for a model that is whole. `progress(done, total)` is called after each micro-batch;
// false ends early without a result.
std::optional<EvalResult> evaluate(CausalLM& model, RankOptimizer* optimizer, const RunPlan& plan,
                                   Ranks& ranks, const EvalMode& mode,
                                   const std::function<bool(int64_t, int64_t)>& progress);

// Results as the fields of a log event, and in words.
Json eval_fields(int64_t step, const std::vector<EvalResult>& results);
std::string eval_text(const std::vector<EvalResult>& results);

// topk-sft --evaluate: evaluates model.base_model as it is, prints the results and logs them as step 0 of
// checkpoint.output_dir. Throws Error.
void run_evaluation(const RunPlan& plan, const std::vector<std::string>& notes);

}  // namespace topk_sft
