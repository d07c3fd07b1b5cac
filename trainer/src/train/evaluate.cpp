#include "train/evaluate.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <chrono>

#include "dist/sequence.h"
#include "train/batch.h"

namespace topk_sft {

std::optional<EvalResult> evaluate(CausalLM& model, RankOptimizer& optimizer, const RunPlan& plan,
                                   Ranks& ranks, const std::string& mode,
                                   const std::function<bool(int64_t, int64_t)>& progress) {
  struct Restore {
    CausalLM& model;
    AttentionSettings before;
    ~Restore() { model.set_attention(before); }
  } restore{model, model.attention()};
  const at::NoGradGuard no_grad;
  model.set_attention(attention_settings(plan.sparsity_of(mode)));
  const auto start = std::chrono::steady_clock::now();
  const StepPlan batches = eval_batches(plan);
  EvalResult result;
  at::Tensor sum = at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(model.device()));
  for (const auto& batch : batches) result.targets += plan.eval.targets(batch);
  const std::vector<size_t> mine = plan.ranks.share(batches.size());
  for (size_t round = 0; round < plan.ranks.rounds(batches.size()); ++round) {
    if (round < mine.size()) {
      const PackedBatch batch = make_batch(plan.eval_data, plan.eval, batches[mine[round]], model.device());
      optimizer.begin_forward();
      sum += model.loss_sum(sequence_part(batch, plan.ranks));
      optimizer.end_forward();
    } else {
      optimizer.idle_forward();
    }
    const auto total = static_cast<int64_t>(batches.size());
    const int64_t done = std::min(total, static_cast<int64_t>(round + 1) * plan.ranks.data_ranks());
    if (ranks.any(!progress(done, total))) return std::nullopt;
  }
  result.loss = ranks.sum({sum.item<double>()})[0] / static_cast<double>(result.targets);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace topk_sft
