// RMSNorm and the chunked linear cross-entropy, as autograd functions.
#include "model/functions.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace topk_sft {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

class RmsNorm : public torch::autograd::Function<RmsNorm> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, double eps) {
    const at::Tensor wide = x.to(accumulate_type(x));
    const at::Tensor inverse_rms = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
    ctx->save_for_backward({x, weight, inverse_rms});
    return weight * (wide * inverse_rms).to(x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& x = saved[0];
    const at::Tensor& weight = saved[1];
    const at::Tensor& inverse_rms = saved[2];
    const at::ScalarType wide_type = inverse_rms.scalar_type();
    const at::Tensor normed = x.to(wide_type) * inverse_rms;

    at::Tensor grad_weight;
    if (ctx->needs_input_grad(1)) {
      const at::Tensor rounded = normed.to(x.scalar_type()).to(wide_type);
      const int64_t size = weight.size(0);
      grad_weight = (grads[0].to(wide_type) * rounded).reshape({-1, size}).sum(0).to(weight.scalar_type());
    }
    at::Tensor grad_x;
    if (ctx->needs_input_grad(0)) {
      const at::Tensor grad_normed = (grads[0] * weight).to(wide_type);
      const at::Tensor along = (grad_normed * normed).mean(-1, /*keepdim=*/true);
      grad_x = ((grad_normed - normed * along) * inverse_rms).to(x.scalar_type());
    }
    return {grad_x, grad_weight, at::Tensor()};
  }
};

// Logits alive at a time: 64 MiB in float32 on the CPU, four times that on a device.
int64_t chunk_rows(const at::Tensor& weight) {
  const int64_t elements = int64_t{1} << (weight.device().is_cpu() ? 24 : 26);
  return std::max<int64_t>(1, elements / weight.size(0));
}

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& labels, bool need_hidden, bool need_weight) {
    const at::ScalarType wide_type = accumulate_type(hidden);
    const at::TensorOptions wide = hidden.options().dtype(wide_type);
    at::Tensor total = at::zeros({}, hidden.options().dtype(at::kDouble));
    at::Tensor grad_hidden = need_hidden ? at::empty_like(hidden) : at::Tensor();
    at::Tensor grad_weight = need_weight ? at::zeros(weight.sizes(), wide) : at::Tensor();

    const int64_t rows = chunk_rows(weight);
    for (int64_t begin = 0; begin < hidden.size(0); begin += rows) {
      const int64_t size = std::min(rows, hidden.size(0) - begin);
      const at::Tensor chunk = hidden.narrow(0, begin, size);
      const at::Tensor target = labels.narrow(0, begin, size).unsqueeze(1);
      at::Tensor logits = at::linear(chunk, weight).to(wide_type);
      const at::Tensor log_sum = at::logsumexp(logits, 1, /*keepdim=*/true);
      total += (log_sum - logits.gather(1, target)).sum(at::kDouble);
      if (!need_hidden && !need_weight) continue;
      // d loss / d logits = softmax - one_hot(label), in the memory of the logits.
      at::Tensor grad_logits = logits.sub_(log_sum).exp_();
      grad_logits.scatter_add_(1, target, at::full({size, 1}, -1.0, wide));
      grad_logits = grad_logits.to(hidden.scalar_type());
      if (need_hidden) grad_hidden.narrow(0, begin, size).copy_(at::mm(grad_logits, weight));
      if (need_weight) {
        if (weight.scalar_type() == wide_type) {
          grad_weight.addmm_(grad_logits.t(), chunk);
        } else {
          grad_weight += at::mm(grad_logits.t(), chunk);
        }
      }
    }
    ctx->saved_data["need_hidden"] = need_hidden;
    ctx->saved_data["need_weight"] = need_weight;
    ctx->saved_data["weight_type"] = weight.scalar_type();
    variable_list saved;
    if (need_hidden) saved.push_back(grad_hidden);
    if (need_weight) saved.push_back(grad_weight);
    ctx->save_for_backward(saved);
    return total.to(wide_type);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool need_hidden = ctx->saved_data["need_hidden"].toBool();
    const bool need_weight = ctx->saved_data["need_weight"].toBool();
    at::Tensor grad_hidden;
    at::Tensor grad_weight;
    if (need_hidden) grad_hidden = (saved[0] * grads[0]).to(saved[0].scalar_type());
    if (need_weight) {
      grad_weight = (saved.back() * grads[0]).to(ctx->saved_data["weight_type"].toScalarType());
    }
    return {grad_hidden, grad_weight, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return RmsNorm::apply(x, weight, eps);
}

at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight,
                                    const at::Tensor& labels) {
  const bool grad = at::GradMode::is_enabled();
  return LinearCrossEntropy::apply(hidden, weight, labels, grad && hidden.requires_grad(),
                                   grad && weight.requires_grad());
}

}  // namespace topk_sft
