#include "train/evaluate.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "dist/sequence.h"
#include "io/atomic_file.h"
#include "io/error.h"
#include "train/batch.h"
#include "train/checkpoint_dir.h"
#include "train/console.h"
#include "train/run_log.h"
#include "train/signals.h"

namespace topk_sft {

std::vector<EvalMode> eval_modes(const RunPlan& plan) {
  std::vector<EvalMode> modes;
  for (const std::string& name : plan.recipe.eval_modes()) modes.push_back({name, plan.sparsity_of(name)});
  for (const double ratio : plan.recipe.train.eval_ratios) {
    modes.push_back({fmt::format("topk_{}", ratio), plan.sparsity_at(ratio)});
  }
  return modes;
}

std::optional<EvalResult> evaluate(CausalLM& model, RankOptimizer* optimizer, const RunPlan& plan,
                                   Ranks& ranks, const EvalMode& mode,
                                   const std::function<bool(int64_t, int64_t)>& progress) {
  struct Restore {
    CausalLM& model;
    AttentionSettings before;
    ~Restore() { model.set_attention(before); }
  } restore{model, model.attention()};
  const at::NoGradGuard no_grad;
  model.set_attention(attention_settings(mode.sparsity));
  const auto start = std::chrono::steady_clock::now();
  const StepPlan batches = eval_batches(plan);
  EvalResult result;
  result.mode = mode.name;
  at::Tensor sum = at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(model.device()));
  for (const auto& batch : batches) result.targets += plan.eval.targets(batch);
  const std::vector<size_t> mine = plan.ranks.share(batches.size());
  for (size_t round = 0; round < plan.ranks.rounds(batches.size()); ++round) {
    if (round < mine.size()) {
      const PackedBatch batch = make_batch(plan.eval_data, plan.eval, batches[mine[round]], model.device());
      if (optimizer != nullptr) optimizer->begin_forward();
      sum += model.loss_sum(sequence_part(batch, plan.ranks));
      if (optimizer != nullptr) optimizer->end_forward();
    } else if (optimizer != nullptr) {
      optimizer->idle_forward();
    }
    const auto total = static_cast<int64_t>(batches.size());
    const int64_t done = std::min(total, static_cast<int64_t>(round + 1) * plan.ranks.data_ranks());
    if (ranks.any(!progress(done, total))) return std::nullopt;
  }
  result.loss = ranks.sum({sum.item<double>()})[0] / static_cast<double>(result.targets);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

Json eval_fields(int64_t step, const std::vector<EvalResult>& results) {
  Json fields = {{"step", step}};
  for (const EvalResult& result : results) {
    fields["targets"] = result.targets;
    fields["loss_" + result.mode] = result.loss;
    fields["seconds_" + result.mode] = result.seconds;
  }
  return fields;
}

std::string eval_text(const std::vector<EvalResult>& results) {
  std::string text;
  for (const EvalResult& result : results) {
    text += fmt::format("loss {:.4f} under {} attention (perplexity {:.2f}), ", result.loss, result.mode,
                        std::exp(result.loss));
  }
  return text + fmt::format("{} targets", count_text(results.at(0).targets));
}

void run_evaluation(const RunPlan& plan, const std::vector<std::string>& notes) {
  const Recipe& r = plan.recipe;
  if (plan.eval.bins.empty()) fail("--evaluate needs held-out data: data.eval_files, or a held-out split");
  if (r.model.random_init) fail("--evaluate needs weights, but model.random_init is true");
  if (plan.ranks.several()) fail("--evaluate runs on one rank, got {} (WORLD_SIZE)", plan.ranks.world);
  Console console(r.logging.progress);
  for (const std::string& note : notes) console.line("note: " + note);
  for (const std::string& note : plan.notes) console.line("note: " + note);
  const RunFolder folder(r.checkpoint.output_dir, /*fresh=*/true);
  if (r.train.num_threads) at::set_num_threads(static_cast<int>(*r.train.num_threads));
  LoadOptions options;
  options.device = at::Device(r.model.device);
  options.dtype = r.model.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  const auto model = CausalLM::load(r.model.base_model, options);
  std::vector<EvalResult> results;
  const std::vector<EvalMode> modes = eval_modes(plan);
  Ranks alone;
  for (const EvalMode& mode : modes) {
    const auto result = evaluate(*model, nullptr, plan, alone, mode, [&](int64_t done, int64_t total) {
      console.progress(static_cast<double>(results.size()), static_cast<double>(modes.size()),
                       fmt::format("evaluating ({}) {}/{}", mode.name, done, total));
      return stop_signal() == 0;
    });
    if (!result) fail("the evaluation was stopped by {}", signal_name(stop_signal()));
    results.push_back(*result);
  }
  write_file_atomic(r.checkpoint.output_dir + "/recipe.yaml", recipe_to_yaml(r));
  RunLog log(r.checkpoint.output_dir, r.logging.jsonl, r.logging.tensorboard);
  log.event("eval", eval_fields(0, results));
  console.line(fmt::format("held out, {}: {}", r.model.base_model, eval_text(results)));
}

}  // namespace topk_sft
