// The chunked linear cross-entropy: logits, loss and both gradients of a chunk of tokens in one go.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "model/functions.h"
#include "model/fused.h"

namespace topk_sft {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Logits alive at a time: 64 MiB in float32 on the CPU; on a device half a GiB in bfloat16, because each
// chunk reads and writes the weight's whole gradient.
int64_t chunk_rows(const at::Tensor& weight) {
  if (weight.device().is_cpu()) return std::max<int64_t>(1, (int64_t{1} << 24) / weight.size(0));
  return std::max<int64_t>(128, (int64_t{1} << 28) / weight.size(0) / 128 * 128);
}

// The losses of a chunk's rows; logits become their gradient when it is asked for.
at::Tensor losses_of(at::Tensor& logits, const at::Tensor& labels, at::ScalarType wide_type, bool gradient) {
  if (fused::available(logits)) return fused::cross_entropy(logits, labels, gradient);
  at::Tensor wide = logits.to(wide_type);
  const at::Tensor target = labels.unsqueeze(1);
  const at::Tensor log_sum = at::logsumexp(wide, 1, /*keepdim=*/true);
  const at::Tensor losses = log_sum - wide.gather(1, target);
  if (gradient) {
    // d loss / d logits = softmax - one_hot(label), in the memory of the logits.
    wide.sub_(log_sum).exp_();
    wide.scatter_add_(1, target, at::full({labels.size(0), 1}, -1.0, wide.options()));
    logits = wide.to(logits.scalar_type());
  }
  return losses;
}

// total += a @ b, in total's type.
void add_product(at::Tensor& total, const at::Tensor& a, const at::Tensor& b) {
  if (total.scalar_type() == a.scalar_type()) {
    total.addmm_(a, b);
  } else if (total.is_cuda()) {
    at::addmm_out(total, total, a, b, total.scalar_type());
  } else {
    total += at::mm(a, b);
  }
}

// The saved gradient times that of the loss, in the type of the tensor it belongs to.
at::Tensor scaled(const at::Tensor& gradient, const at::Tensor& factor, at::ScalarType type) {
  at::Tensor out = at::empty(gradient.sizes(), gradient.options().dtype(type));
  at::mul_out(out, gradient, factor);
  return out;
}

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& labels, bool need_hidden, bool need_weight) {
    const at::ScalarType wide_type = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    at::Tensor total = at::zeros({}, hidden.options().dtype(at::kDouble));
    at::Tensor grad_hidden = need_hidden ? at::empty_like(hidden) : at::Tensor();
    at::Tensor grad_weight =
        need_weight ? at::zeros(weight.sizes(), hidden.options().dtype(wide_type)) : at::Tensor();

    const int64_t rows = chunk_rows(weight);
    for (int64_t begin = 0; begin < hidden.size(0); begin += rows) {
      const int64_t size = std::min(rows, hidden.size(0) - begin);
      const at::Tensor chunk = hidden.narrow(0, begin, size);
      at::Tensor logits = at::linear(chunk, weight);
      total += losses_of(logits, labels.narrow(0, begin, size), wide_type, need_hidden || need_weight)
                   .sum(at::kDouble);
      if (need_hidden) grad_hidden.narrow(0, begin, size).copy_(at::mm(logits, weight));
      if (need_weight) add_product(grad_weight, logits.t(), chunk);
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
    at::Tensor grad_hidden;
    at::Tensor grad_weight;
    if (ctx->saved_data["need_hidden"].toBool()) {
      grad_hidden = scaled(saved[0], grads[0], saved[0].scalar_type());
    }
    if (ctx->saved_data["need_weight"].toBool()) {
      grad_weight = scaled(saved.back(), grads[0], ctx->saved_data["weight_type"].toScalarType());
    }
    return {grad_hidden, grad_weight, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight,
                                    const at::Tensor& labels) {
  const bool grad = at::GradMode::is_enabled();
  return LinearCrossEntropy::apply(hidden, weight, labels, grad && hidden.requires_grad(),
                                   grad && weight.requires_grad());
}

}  // namespace topk_sft
