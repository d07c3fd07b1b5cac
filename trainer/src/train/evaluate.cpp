#include "train/evaluate.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <chrono>

#include "train/batch.h"

namespace topk_sft {

std::optional<EvalResult> evaluate(CausalLM& model, const RunPlan& plan, const std::string& mode,
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
  for (size_t i = 0; i < batches.size(); ++i) {
    sum += model.loss_sum(make_batch(plan.eval_data, plan.eval, batches[i], model.device()));
    result.targets += plan.eval.targets(batches[i]);
    if (!progress(static_cast<int64_t>(i) + 1, static_cast<int64_t>(batches.size()))) return std::nullopt;
  }
  result.loss = sum.item<double>() / static_cast<double>(result.targets);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace topk_sft
