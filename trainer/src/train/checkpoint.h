// Saving and restoring a run, bit for bit: float32 weights, moments, random state, data position, step,
// recipe.
//
// output_dir/step-N holds model.safetensors (master weights, Hugging Face names; adapters alone are
// adapter_model.safetensors), optimizer.safetensors (exp_avg.NAME, exp_avg_sq.NAME), rng.safetensors,
// trainer_state.json, recipe.yaml and, last, COMPLETE.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/sampler.h"
#include "dist/rank_optimizer.h"
#include "train/plan.h"

namespace topk_sft {

struct TrainState {
  int64_t step = 0;      // optimizer steps done
  SamplerState sampler;  // what the next step starts from
  int64_t tokens = 0;    // trained on so far
  int64_t targets = 0;
};

// Writes step-N of plan.recipe.checkpoint.output_dir and returns its path. On an error (a full disk) nothing
// of it remains, and older checkpoints are untouched. Rank 0 writes, in the one form that any number of ranks
// reads, and gets what the others hold a layer at a time.
std::string save_checkpoint(const RunPlan& plan, const TrainState& state, const RankOptimizer& optimizer);

// The checkpoint that `wanted` (a folder, or "latest") names, verified: whole, and of this run. Appends what
// the user should know to `notes`. Throws Error that names the fault and offers the previous usable
// checkpoint.
std::string find_checkpoint(const RunPlan& plan, const std::string& wanted, std::vector<std::string>& notes);

// Puts weights, moments and random state of a checkpoint back and returns where the run stands.
// Every rank reads what it owns.
TrainState restore_checkpoint(const RunPlan& plan, const std::string& path, RankOptimizer& optimizer);

}  // namespace topk_sft
