#include "train/step.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/stack.h>
#include <ATen/record_function.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "train/batch.h"

namespace topk_sft {

namespace {

// Documents in a micro-batch, by their number in the training data.
std::string documents_text(const RunPlan& plan, const std::vector<int64_t>& sequences) {
  std::string out;
  int64_t count = 0;
  for (const int64_t sequence : sequences) {
    for (const int64_t piece : plan.train.bins[static_cast<size_t>(sequence)]) {
      if (++count <= 8) {
        out += fmt::format("{}{}", out.empty() ? "" : ", ",
                           plan.train.plan.pieces[static_cast<size_t>(piece)].document);
      }
    }
  }
  return count > 8 ? fmt::format("{} and {} more", out, count - 8) : out;
}

std::string place(const RunPlan& plan, const StepPlan& micro_batches, int64_t step, size_t micro_batch) {
  return fmt::format("step {}, micro-batch {} of {} (documents {})", step, micro_batch + 1,
                     micro_batches.size(), documents_text(plan, micro_batches[micro_batch]));
}

std::string first_bad_weight(const AdamW& optimizer) {
  for (const auto& [name, master] : optimizer.masters()) {
    if (!at::isfinite(master).all().item<bool>()) return name;
  }
  return "";
}

// Runs the micro-batches once more, one at a time, to find the one and the parameter in which a non-finite
// gradient arises. Only called when the run has gone wrong.
std::string locate_gradient(CausalLM& model, AdamW& optimizer, const RunPlan& plan,
                            const StepPlan& micro_batches, int64_t step, int64_t targets) {
  for (size_t i = 0; i < micro_batches.size(); ++i) {
    optimizer.zero_grad(/*single_pass=*/true);
    model.loss_sum(make_batch(plan.train_data, plan.train, micro_batches[i], model.device()))
        .div(targets)
        .backward();
    optimizer.accumulate();
    if (const std::string name = optimizer.nonfinite_gradient(); !name.empty()) {
      return fmt::format("{}: the gradient of {} is not finite", place(plan, micro_batches, step, i), name);
    }
  }
  return fmt::format(
      "step {}: the norm of the gradients is not finite, though each micro-batch's gradients are: they "
      "overflow float32 when summed or squared",
      step);
}

}  // namespace

StepResult run_step(CausalLM& model, AdamW& optimizer, const RunPlan& plan, const StepPlan& micro_batches,
                    int64_t step, const std::function<bool(int64_t)>& go_on) {
  StepResult result;
  for (const auto& sequences : micro_batches) {
    result.tokens += plan.train.tokens(sequences);
    result.targets += plan.train.targets(sequences);
  }
  optimizer.zero_grad(/*single_pass=*/micro_batches.size() == 1);
  std::vector<at::Tensor> sums;
  for (size_t i = 0; i < micro_batches.size(); ++i) {
    at::Tensor sum;
    {
      RECORD_USER_SCOPE("forward");
      sum = model.loss_sum(make_batch(plan.train_data, plan.train, micro_batches[i], model.device()));
    }
    sums.push_back(sum.detach());
    {
      RECORD_USER_SCOPE("backward");
      sum.div(result.targets).backward();
      optimizer.accumulate();
    }
    if (!go_on(static_cast<int64_t>(i) + 1)) {
      result.stopped = true;
      return result;
    }
  }
  // The step's only wait for the device: its losses and the norm, together.
  sums.push_back(optimizer.grad_norm());
  for (at::Tensor& value : sums) value = value.to(sums.front().device(), at::kDouble);
  const at::Tensor values = at::stack(sums).to(at::kCPU);
  const double* value = values.const_data_ptr<double>();
  double loss_sum = 0;
  for (size_t i = 0; i < micro_batches.size(); ++i) {
    if (!std::isfinite(value[i])) {
      const std::string weight = first_bad_weight(optimizer);
      result.nonfinite =
          fmt::format("{}: the loss is {}; {}", place(plan, micro_batches, step, i), value[i],
                      weight.empty() ? "all parameters are finite"
                                     : "parameter " + weight + " holds a value that is not finite");
      return result;
    }
    loss_sum += value[i];
  }
  result.loss = loss_sum / static_cast<double>(result.targets);
  result.grad_norm = value[micro_batches.size()];
  if (!std::isfinite(result.grad_norm)) {
    result.nonfinite = locate_gradient(model, optimizer, plan, micro_batches, step, result.targets);
  }
  return result;
}

}  // namespace topk_sft
