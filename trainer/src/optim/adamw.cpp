// AdamW: which gradients a step reads, and the two ways of the update.
#include "optim/adamw.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "io/error.h"
#include "model/fused.h"

namespace topk_sft {

bool AdamW::decays(const std::string& name, int64_t dims, bool decay_embeddings) {
  // Norm weights and biases are the vectors; every matrix is a projection, the embedding or the output head.
  if (dims < 2) return false;
  const bool embedding = name == "model.embed_tokens.weight" || name == "lm_head.weight";
  return !embedding || decay_embeddings;
}

AdamW::AdamW(NamedTensors parameters, const AdamWOptions& options, std::vector<at::Tensor> masters)
    : options_(options) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters.size(); ++i) {
    auto& [name, parameter] = parameters[i];
    Slot slot;
    slot.decay = decays(name, parameter.dim(), options.decay_embeddings);
    slot.name = std::move(name);
    slot.parameter = parameter;
    slot.separate = parameter.scalar_type() == at::kBFloat16 || parameter.scalar_type() == at::kHalf;
    slot.fused = parameter.scalar_type() == at::kBFloat16 && fused::available(parameter);
    if (slot.separate) {
      const at::Tensor start = masters.empty() ? parameter : std::move(masters.at(i));
      slot.master = start.detach().to(parameter.device(), at::kFloat);
      refresh(slot);
    } else {
      slot.master = parameter.detach();
    }
    slot.exp_avg = at::zeros_like(slot.master);
    slot.exp_avg_sq = at::zeros_like(slot.master);
    slots_.push_back(std::move(slot));
  }
}

void AdamW::refresh(Slot& slot) {
  const at::NoGradGuard no_grad;
  if (slot.separate) slot.parameter.copy_(slot.master);
}

void AdamW::zero_grad(bool single_pass) {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    slot.parameter.mutable_grad().reset();
    if (summed_ && slot.grad_sum.defined()) slot.grad_sum.zero_();
  }
  summed_ = false;
  single_pass_ = single_pass;
  gradient_scale_ = 1.0;
}

void AdamW::accumulate() {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    const at::Tensor grad = slot.parameter.grad();
    if (!slot.separate || !grad.defined() || (slot.fused && single_pass_)) continue;
    if (!slot.grad_sum.defined()) slot.grad_sum = at::zeros_like(slot.master);
    slot.grad_sum.add_(grad);
    slot.parameter.mutable_grad().reset();
    summed_ = true;
  }
}

at::Tensor AdamW::gradient(const Slot& slot) const {
  if (!slot.separate || (slot.fused && single_pass_)) return slot.parameter.grad();
  return slot.grad_sum;
}

std::vector<at::Tensor> AdamW::gradients() const {
  std::vector<at::Tensor> out;
  for (const Slot& slot : slots_) {
    if (const at::Tensor g = gradient(slot); g.defined()) out.push_back(g);
  }
  return out;
}

at::Tensor AdamW::grad_norm() const {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> all = gradients();
  if (all.empty()) return at::zeros({});
  const bool wide = all.front().scalar_type() == at::kDouble;
  const auto norms = at::_foreach_norm(all, 2, wide ? at::kDouble : at::kFloat);
  return at::linalg_vector_norm(at::stack(norms), 2).mul(gradient_scale_);
}

void AdamW::scale_gradients(double factor) {
  const at::NoGradGuard no_grad;
  // All parameters of a model are of one kind: the kernel scales as it reads, others are scaled here.
  if (!slots_.empty() && slots_.front().fused) {
    gradient_scale_ *= factor;
    return;
  }
  const std::vector<at::Tensor> all = gradients();
  if (!all.empty()) at::_foreach_mul_(all, at::Scalar(factor));
}

std::string AdamW::nonfinite_gradient() const {
  const at::NoGradGuard no_grad;
  for (auto slot = slots_.rbegin(); slot != slots_.rend(); ++slot) {
    const at::Tensor g = gradient(*slot);
    if (g.defined() && !at::isfinite(g).all().item<bool>()) return slot->name;
  }
  return "";
}

void AdamW::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  ++updates_;
  for (const bool decay : {true, false}) {
    step_on_aten(learning_rate, decay);
    step_fused(learning_rate, decay);
  }
}

void AdamW::step_on_aten(double learning_rate, bool decay) {
  std::vector<at::Tensor> masters, gradients, exp_avg, exp_avg_sq, steps;
  for (Slot& slot : slots_) {
    const at::Tensor g = gradient(slot);
    if (slot.fused || slot.decay != decay || !g.defined()) continue;
    masters.push_back(slot.master);
    gradients.push_back(g);
    exp_avg.push_back(slot.exp_avg);
    exp_avg_sq.push_back(slot.exp_avg_sq);
  }
  if (masters.empty()) return;
  // The operator only reads the step count, so all parameters share one.
  const at::Tensor count =
      at::full({}, static_cast<double>(updates_), masters[0].options().dtype(at::kFloat));
  steps.assign(masters.size(), count);
  at::_fused_adamw_(masters, gradients, exp_avg, exp_avg_sq, /*max_exp_avg_sqs=*/{}, steps, learning_rate,
                    options_.beta1, options_.beta2, decay ? options_.weight_decay : 0.0, options_.epsilon,
                    /*amsgrad=*/false, /*maximize=*/false);
  for (Slot& slot : slots_) {
    if (!slot.fused && slot.decay == decay) refresh(slot);
  }
}

void AdamW::step_fused(double learning_rate, bool decay) {
  fused::AdamWUpdate update;
  for (Slot& slot : slots_) {
    const at::Tensor g = gradient(slot);
    if (!slot.fused || slot.decay != decay || !g.defined()) continue;
    update.parameters.push_back(slot.parameter);
    update.masters.push_back(slot.master);
    update.gradients.push_back(g.contiguous());
    update.exp_avg.push_back(slot.exp_avg);
    update.exp_avg_sq.push_back(slot.exp_avg_sq);
  }
  if (update.parameters.empty()) return;
  update.learning_rate = learning_rate;
  update.beta1 = options_.beta1;
  update.beta2 = options_.beta2;
  update.epsilon = options_.epsilon;
  update.weight_decay = decay ? options_.weight_decay : 0.0;
  update.gradient_scale = gradient_scale_;
  update.step = updates_;
  fused::adamw(update);
}

NamedTensors AdamW::masters() const {
  NamedTensors out;
  for (const Slot& slot : slots_) out.emplace_back(slot.name, slot.master);
  return out;
}

NamedTensors AdamW::exp_avg() const {
  NamedTensors out;
  for (const Slot& slot : slots_) out.emplace_back(slot.name, slot.exp_avg);
  return out;
}

NamedTensors AdamW::exp_avg_sq() const {
  NamedTensors out;
  for (const Slot& slot : slots_) out.emplace_back(slot.name, slot.exp_avg_sq);
  return out;
}

void AdamW::restore(int64_t updates, const std::vector<at::Tensor>& masters,
                    const std::vector<at::Tensor>& exp_avg, const std::vector<at::Tensor>& exp_avg_sq) {
  const at::NoGradGuard no_grad;
  if (masters.size() != slots_.size() || exp_avg.size() != slots_.size() ||
      exp_avg_sq.size() != slots_.size()) {
    fail("the optimizer has {} parameters, but {} were given", slots_.size(), masters.size());
  }
  updates_ = updates;
  for (size_t i = 0; i < slots_.size(); ++i) {
    slots_[i].master.copy_(masters[i]);
    slots_[i].exp_avg.copy_(exp_avg[i]);
    slots_[i].exp_avg_sq.copy_(exp_avg_sq[i]);
    refresh(slots_[i]);
  }
}

}  // namespace topk_sft
