// What a run is going to do, settled and checked before anything is computed. Torch-free.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/packing.h"
#include "data/sampler.h"
#include "data/shards.h"
#include "dist/layout.h"
#include "io/json.h"
#include "model/config.h"
#include "model/lora.h"
#include "optim/schedule.h"
#include "recipe/recipe.h"
#include "train/flops.h"

namespace topk_sft {

struct RunPlan {
  Recipe recipe;
  ModelConfig config;
  RankLayout ranks;
  std::string device;          // of this rank: model.device, with the rank's own number
  std::string tokenizer_path;  // the model's tokenizer.json
  std::string tokenizer_sha256;
  std::optional<SparsityConfig> sparsity;  // of the recipe; none if it gives no budget
  std::optional<LoraOptions> lora;         // adapters of a frozen model; none: all weights train
  std::string base_fingerprint;            // of the frozen weights; empty when they train or are drawn
  TokenDataset train_data;
  TokenDataset eval_data;
  PackedDataset train;
  PackedDataset eval;
  int64_t steps_per_epoch = 0;
  int64_t total_steps = 0;
  Schedule schedule;
  std::vector<std::string> notes;

  // Of the steps of all ranks together.
  Sampler make_sampler() const;
  // Sparsity of an attention kind: "topk" gives `sparsity`, "dense" none.
  std::optional<SparsityConfig> sparsity_of(const std::string& mode) const;
  // The recipe's selection with this ratio as its budget.
  SparsityConfig sparsity_at(double ratio) const;
  // What must be equal for a checkpoint to belong to this run: shapes, data, tokenizer and the settings that
  // a resumed run must keep; one flat object of name -> text.
  Json identity() const;
};

// Reads config.json, the tokenizer's hash and the shards, and lays out the run. Throws Error.
RunPlan make_plan(const Recipe& recipe, const Launch& launch = {});

// Micro-batches of the held-out split, in order.
StepPlan eval_batches(const RunPlan& plan);

// The plan in words, several lines: model, data, attention, steps, schedule, memory.
std::string describe_plan(const RunPlan& plan);

}  // namespace topk_sft
