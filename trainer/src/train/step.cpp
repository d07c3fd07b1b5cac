#include "train/step.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>
#include <ATen/record_function.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "dist/sequence.h"
#include "train/batch.h"

namespace topk_sft {

namespace {

// Forward and backward of this rank's micro-batch of a round, and its summed loss; undefined if the rank has
// none in this round, in which case it only does its part for the others.
at::Tensor backward(CausalLM& model, RankOptimizer& optimizer, const RunPlan& plan,
                    const StepPlan& micro_batches, const std::vector<size_t>& mine, size_t round, bool last,
                    int64_t targets) {
  if (round >= mine.size()) {
    optimizer.idle_micro_batch(last);
    return at::Tensor();
  }
  const PackedBatch batch =
      make_batch(plan.train_data, plan.train, micro_batches[mine[round]], model.device());
  optimizer.begin_micro_batch(last);
  at::Tensor sum;
  {
    RECORD_USER_SCOPE("forward");
    sum = model.loss_sum(sequence_part(batch, plan.ranks));
  }
  {
    RECORD_USER_SCOPE("backward");
    sum.div(targets).backward();
    optimizer.end_micro_batch();
  }
  return sum.detach();
}

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

// What this rank says of its losses; all ranks together. Empty if they are finite.
std::string locate_loss(const RankOptimizer& optimizer, const RunPlan& plan, const StepPlan& micro_batches,
                        int64_t step, const std::vector<double>& losses, Ranks& ranks) {
  const std::string weight = ranks.first_text(0, optimizer.bad_parameter());
  const std::vector<size_t> mine = plan.ranks.share(micro_batches.size());
  size_t bad = 0;
  while (bad < losses.size() && std::isfinite(losses[bad])) ++bad;
  if (bad == losses.size()) return ranks.first_text(0, "");
  const std::string text =
      fmt::format("{}: the loss is {}; {}", place(plan, micro_batches, step, mine[bad]), losses[bad],
                  weight.empty() ? "all parameters are finite"
                                 : "parameter " + weight + " holds a value that is not finite");
  return ranks.first_text(static_cast<int64_t>(mine[bad]), text);
}

// Runs the micro-batches once more, one at a time, to find the one and the parameter in which a non-finite
// gradient arises. Only called when the run has gone wrong.
std::string locate_gradient(CausalLM& model, RankOptimizer& optimizer, const RunPlan& plan,
                            const StepPlan& micro_batches, int64_t step, int64_t targets, Ranks& ranks) {
  const std::vector<size_t> mine = plan.ranks.share(micro_batches.size());
  const size_t rounds = plan.ranks.rounds(micro_batches.size());
  for (size_t round = 0; round < rounds; ++round) {
    optimizer.inspect_gradients(true);
    backward(model, optimizer, plan, micro_batches, mine, round, /*last=*/true, targets);
    const std::string name = optimizer.bad_gradient();
    optimizer.inspect_gradients(false);
    std::string text;
    int64_t order = 0;
    if (!name.empty()) {
      text = fmt::format("{}: the gradient of {} is not finite",
                         place(plan, micro_batches, step, mine[round]), name);
      order = static_cast<int64_t>(mine[round]);
    }
    if (text = ranks.first_text(order, text); !text.empty()) return text;
  }
  return fmt::format(
      "step {}: the norm of the gradients is not finite, though each micro-batch's gradients are: they "
      "overflow float32 when summed or squared",
      step);
}

}  // namespace

StepResult run_step(CausalLM& model, RankOptimizer& optimizer, const RunPlan& plan,
                    const StepPlan& micro_batches, int64_t step, Ranks& ranks,
                    const std::function<bool(int64_t)>& go_on) {
  StepResult result;
  for (const auto& sequences : micro_batches) {
    result.tokens += plan.train.tokens(sequences);
    result.targets += plan.train.targets(sequences);
  }
  const std::vector<size_t> mine = plan.ranks.share(micro_batches.size());
  const size_t rounds = plan.ranks.rounds(micro_batches.size());
  optimizer.zero_grad(/*single_pass=*/rounds == 1);
  std::vector<at::Tensor> sums;
  for (size_t round = 0; round < rounds; ++round) {
    const bool last = round + 1 == rounds;
    const at::Tensor sum = backward(model, optimizer, plan, micro_batches, mine, round, last, result.targets);
    if (sum.defined()) sums.push_back(sum);
    const auto done = static_cast<int64_t>(round + 1) * plan.ranks.data_ranks();
    const bool stop = !go_on(std::min(done, static_cast<int64_t>(micro_batches.size())));
    if (!last && ranks.any(stop)) {
      result.stopped = true;
      return result;
    }
  }
  // The step's only wait for the device: its losses and the norm, together.
  sums.push_back(optimizer.finish_gradients());
  for (at::Tensor& value : sums) value = value.to(model.device(), at::kDouble);
  const at::Tensor values = at::stack(sums).to(at::kCPU);
  const double* value = values.const_data_ptr<double>();
  const std::vector<double> losses(value, value + mine.size());
  double loss_sum = 0;
  for (const double loss : losses) loss_sum += loss;
  const std::vector<double> total = ranks.sum({loss_sum, value[mine.size()]});
  result.loss = total[0] / static_cast<double>(result.targets);
  result.grad_norm = std::sqrt(total[1]);
  if (!std::isfinite(total[0])) {
    result.nonfinite = locate_loss(optimizer, plan, micro_batches, step, losses, ranks);
  } else if (!std::isfinite(result.grad_norm)) {
    result.nonfinite = locate_gradient(model, optimizer, plan, micro_batches, step, result.targets, ranks);
  }
  return result;
}

}  // namespace topk_sft
