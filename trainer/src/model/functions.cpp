// RMSNorm, the norm with the linear maps behind it, rotary heads and SwiGLU with its projection, as autograd
// functions.
#include "model/functions.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "model/fused.h"

namespace topk_sft {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// ---- RMSNorm on tensors
// ----------------------------------------------------------------------------------------

fused::Norm norm_forward(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                         double eps) {
  if (fused::norm_available(x)) return fused::norm_forward(x, residual, weight, eps);
  fused::Norm out;
  out.sum = residual.defined() ? x + residual : x;
  const at::Tensor wide = out.sum.to(accumulate_type(x));
  out.inverse_rms = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
  out.y = weight * (wide * out.inverse_rms).to(x.scalar_type());
  return out;
}

// The gradients of x and weight; `grad_sum`, if defined, is added to that of x.
std::pair<at::Tensor, at::Tensor> norm_backward(const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& inverse_rms, const at::Tensor& grad_y,
                                                const at::Tensor& grad_sum) {
  if (fused::norm_available(x)) return fused::norm_backward(x, weight, inverse_rms, grad_y, grad_sum);
  const at::ScalarType wide_type = inverse_rms.scalar_type();
  const at::Tensor normed = x.to(wide_type) * inverse_rms;
  const at::Tensor rounded = normed.to(x.scalar_type()).to(wide_type);
  const at::Tensor grad_weight =
      (grad_y.to(wide_type) * rounded).reshape({-1, weight.size(0)}).sum(0).to(weight.scalar_type());
  const at::Tensor grad_normed = (grad_y * weight).to(wide_type);
  const at::Tensor along = (grad_normed * normed).mean(-1, /*keepdim=*/true);
  at::Tensor grad_x = ((grad_normed - normed * along) * inverse_rms).to(x.scalar_type());
  if (grad_sum.defined()) grad_x = grad_sum + grad_x;
  return {grad_x, grad_weight};
}

class RmsNorm : public torch::autograd::Function<RmsNorm> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, double eps) {
    const fused::Norm norm = norm_forward(x, at::Tensor(), weight, eps);
    ctx->save_for_backward({x, weight, norm.inverse_rms});
    return norm.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [grad_x, grad_weight] = norm_backward(saved[0], saved[1], saved[2], grads[0], at::Tensor());
    return {grad_x, grad_weight, at::Tensor()};
  }
};

// ---- linear maps
// -----------------------------------------------------------------------------------------------

at::Tensor rows(const at::Tensor& x) {
  return x.reshape({-1, x.size(-1)});
}

at::Tensor bias_gradient(const at::Tensor& bias, const at::Tensor& grad) {
  return bias.defined() ? rows(grad).sum(0) : at::Tensor();
}

// An absent tensor as an argument of an autograd function.
using MaybeTensor = std::optional<at::Tensor>;

MaybeTensor maybe(const at::Tensor& x) {
  return x.defined() ? MaybeTensor(x) : std::nullopt;
}

class NormLinear : public torch::autograd::Function<NormLinear> {
 public:
  static constexpr size_t kMaps = 3;
  // Positions in the argument list.
  enum : size_t { kX, kResidual, kNorm, kFirstMap, kEps = kFirstMap + 2 * kMaps };

  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const MaybeTensor& maybe_residual,
                               const at::Tensor& norm_weight, const at::Tensor& weight0,
                               const MaybeTensor& bias0, const MaybeTensor& weight1, const MaybeTensor& bias1,
                               const MaybeTensor& weight2, const MaybeTensor& bias2, double eps) {
    const at::Tensor residual = maybe_residual.value_or(at::Tensor());
    const fused::Norm norm = norm_forward(x, residual, norm_weight, eps);
    variable_list out;
    if (residual.defined()) out.push_back(norm.sum);
    variable_list maps = {weight0};
    for (const MaybeTensor* tensor : {&bias0, &weight1, &bias1, &weight2, &bias2}) {
      maps.push_back(tensor->value_or(at::Tensor()));
    }
    for (size_t i = 0; i < maps.size(); i += 2) {
      if (maps[i].defined()) out.push_back(Linear{maps[i], maps[i + 1]}(norm.y));
    }
    variable_list saved = {norm.sum, norm_weight, norm.inverse_rms};
    saved.insert(saved.end(), maps.begin(), maps.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["residual"] = residual.defined();
    ctx->saved_data["eps"] = eps;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& sum = saved[0];
    const bool residual = ctx->saved_data["residual"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    const at::Tensor y = rows(norm_forward(sum, at::Tensor(), saved[1], eps).y);

    variable_list result(kEps + 1);
    at::Tensor grad_y;
    size_t next = residual ? 1 : 0;
    for (size_t i = 0; i < 2 * kMaps; i += 2) {
      const at::Tensor& weight = saved[3 + i];
      if (!weight.defined()) continue;
      const at::Tensor grad = rows(grads[next++]);
      if (grad_y.defined()) {
        grad_y.addmm_(grad, weight);
      } else {
        grad_y = at::mm(grad, weight);
      }
      if (weight.requires_grad()) result[kFirstMap + i] = at::mm(grad.t(), y);
      result[kFirstMap + i + 1] = bias_gradient(saved[3 + i + 1], grad);
    }
    auto [grad_x, grad_norm] =
        norm_backward(sum, saved[1], saved[2], grad_y.view(sum.sizes()), residual ? grads[0] : at::Tensor());
    result[kX] = grad_x;
    if (residual) result[kResidual] = grad_x;
    result[kNorm] = grad_norm;
    return result;
  }
};

std::vector<at::Tensor> apply_norm_linear(const at::Tensor& x, const at::Tensor& residual,
                                          const at::Tensor& norm_weight, double eps,
                                          const std::vector<Linear>& maps) {
  TORCH_INTERNAL_ASSERT(!maps.empty() && maps.size() <= NormLinear::kMaps);
  std::vector<Linear> all = maps;
  all.resize(NormLinear::kMaps);
  return NormLinear::apply(x, maybe(residual), norm_weight, all[0].weight, maybe(all[0].bias),
                           maybe(all[1].weight), maybe(all[1].bias), maybe(all[2].weight), maybe(all[2].bias),
                           eps);
}

// ---- rotary heads
// ----------------------------------------------------------------------------------------------

// Only for what fused::rope_available takes.
class NormRope : public torch::autograd::Function<NormRope> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const MaybeTensor& maybe_weight,
                            const at::Tensor& cos, const at::Tensor& sin, double eps) {
    const at::Tensor weight = maybe_weight.value_or(at::Tensor());
    ctx->save_for_backward({weight.defined() ? x : at::Tensor(), weight, cos, sin});
    ctx->saved_data["eps"] = eps;
    return fused::rope_forward(x, weight, cos, sin, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [grad_x, grad_weight] = fused::rope_backward(saved[0], saved[1], saved[2], saved[3], grads[0],
                                                      ctx->saved_data["eps"].toDouble());
    return {grad_x, grad_weight, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// ---- SwiGLU
// ----------------------------------------------------------------------------------------------------

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  return fused::available(gate) ? fused::swiglu_forward(gate, up) : at::silu(gate) * up;
}

class SwigluLinear : public torch::autograd::Function<SwigluLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up,
                            const at::Tensor& weight, const MaybeTensor& bias) {
    const Linear down{weight, bias.value_or(at::Tensor())};
    ctx->save_for_backward({gate, up, weight, down.bias});
    return down(swiglu(gate, up));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &gate = saved[0], &up = saved[1], &weight = saved[2];
    const at::Tensor grad = rows(grads[0]);
    const at::Tensor grad_y = at::mm(grad, weight).view(gate.sizes());
    fused::SwigluGradients g;
    if (fused::available(gate)) {
      g = fused::swiglu_backward(gate, up, grad_y);
    } else {
      const at::Tensor activated = at::silu(gate);
      g = {activated * up, at::silu_backward(grad_y * up, gate), grad_y * activated};
    }
    const at::Tensor grad_weight = weight.requires_grad() ? at::mm(grad.t(), rows(g.y)) : at::Tensor();
    return {g.gate, g.up, grad_weight, bias_gradient(saved[3], grad)};
  }
};

}  // namespace

at::Tensor Linear::operator()(const at::Tensor& x) const {
  return at::linear(x, weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt);
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return RmsNorm::apply(x, weight, eps);
}

std::vector<at::Tensor> norm_linear(const at::Tensor& x, const at::Tensor& norm_weight, double eps,
                                    const std::vector<Linear>& maps) {
  return apply_norm_linear(x, at::Tensor(), norm_weight, eps, maps);
}

std::vector<at::Tensor> add_norm_linear(const at::Tensor& x, const at::Tensor& residual,
                                        const at::Tensor& norm_weight, double eps,
                                        const std::vector<Linear>& maps) {
  return apply_norm_linear(x, residual, norm_weight, eps, maps);
}

at::Tensor norm_rope(const at::Tensor& x, const at::Tensor& norm_weight, double eps, const RopeTable& table) {
  if (fused::rope_available(x)) return NormRope::apply(x, maybe(norm_weight), table.cos, table.sin, eps);
  return apply_rope(norm_weight.defined() ? rms_norm(x, norm_weight, eps) : x, table);
}

at::Tensor swiglu_linear(const at::Tensor& gate, const at::Tensor& up, const Linear& down) {
  return SwigluLinear::apply(gate, up, down.weight, maybe(down.bias));
}

}  // namespace topk_sft
