// The training loop.
#pragma once

#include <string>
#include <vector>

#include "dist/store.h"
#include "train/plan.h"

namespace topk_sft {

// Trains as planned: from the start, or from the checkpoint of recipe.checkpoint.resume_from_checkpoint.
// Returns when the run is complete, or when a signal stopped it and it was saved. Throws Error when it cannot
// go on; what was saved before stays. `profile`: file for a Chrome trace of a few steps of rank 0; empty:
// none. `store`: of the ranks, if there are several; all of them call this.
void run_training(const RunPlan& plan, const std::vector<std::string>& notes, const std::string& profile = "",
                  RankStore* store = nullptr);

// Prints the plan, the memory estimate and the first micro-batch that training would see, token by token with
// its loss mask. Computes and writes nothing.
void print_dry_run(const RunPlan& plan, const std::vector<std::string>& notes);

}  // namespace topk_sft
