// RMSNorm, the norm with the linear maps behind it, rotary heads and SwiGLU with its projection, as autograd
// functions.
#include "model/functions.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

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

// An absent tensor as an argument of an autograd function.
using MaybeTensor = std::optional<at::Tensor>;

MaybeTensor maybe(const at::Tensor& x) {
  return x.defined() ? MaybeTensor(x) : std::nullopt;
}

// Gradients of a linear map, in two parts, because what the map was given may be known only after the first.
// `grad` (rows, out) is that of its result.

// What the adapter's inner product gets, (rows, rank); undefined without an adapter.
at::Tensor inner_gradient(const Linear& map, const at::Tensor& grad) {
  return map.lora_a.defined() ? at::mm(grad, map.lora_b).mul_(map.lora_scaling) : at::Tensor();
}

// Adds the gradient of what the map was given to `total`, or makes it.
void add_input_gradient(const Linear& map, const at::Tensor& grad, const at::Tensor& grad_inner,
                        at::Tensor& total) {
  if (total.defined()) {
    total.addmm_(grad, map.weight);
  } else {
    total = at::mm(grad, map.weight);
  }
  if (grad_inner.defined()) total.addmm_(grad_inner, map.lora_a);
}

// The gradients of those of the map's tensors that train; y (rows, in) is what the map was given.
std::array<at::Tensor, Linear::kTensors> own_gradients(const Linear& map, const at::Tensor& y,
                                                       const at::Tensor& grad, const at::Tensor& grad_inner) {
  std::array<at::Tensor, Linear::kTensors> out;
  if (map.weight.requires_grad()) out[0] = at::mm(grad.t(), y);
  if (map.bias.defined() && map.bias.requires_grad()) out[1] = grad.sum(0);
  if (map.lora_a.defined()) {
    out[2] = at::mm(grad_inner.t(), y);
    out[3] = at::mm(grad.t(), at::linear(y, map.lora_a)).mul_(map.lora_scaling);
  }
  return out;
}

// The map whose tensors() are tensors[0..3].
Linear linear_of(const at::Tensor* tensors, double scaling) {
  return {tensors[0], tensors[1], tensors[2], tensors[3], scaling};
}

class NormLinear : public torch::autograd::Function<NormLinear> {
 public:
  static constexpr size_t kMaps = 3;
  // Positions in the argument list.
  enum : size_t { kX, kResidual, kNorm, kEps, kScaling, kFirstMap };

  // `tensors`: tensors() of each map; a map without a weight is absent.
  template <typename... Tensors>
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const MaybeTensor& maybe_residual,
                               const at::Tensor& norm_weight, double eps, double scaling,
                               const Tensors&... tensors) {
    static_assert(sizeof...(Tensors) == kMaps * Linear::kTensors);
    const at::Tensor residual = maybe_residual.value_or(at::Tensor());
    const fused::Norm norm = norm_forward(x, residual, norm_weight, eps);
    variable_list out;
    if (residual.defined()) out.push_back(norm.sum);
    const variable_list maps = {tensors.value_or(at::Tensor())...};
    for (size_t i = 0; i < maps.size(); i += Linear::kTensors) {
      if (maps[i].defined()) out.push_back(linear_of(&maps[i], scaling)(norm.y));
    }
    variable_list saved = {norm.sum, norm_weight, norm.inverse_rms};
    saved.insert(saved.end(), maps.begin(), maps.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["residual"] = residual.defined();
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["scaling"] = scaling;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& sum = saved[0];
    const bool residual = ctx->saved_data["residual"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const at::Tensor y = rows(norm_forward(sum, at::Tensor(), saved[1], eps).y);

    variable_list result(kFirstMap + kMaps * Linear::kTensors);
    at::Tensor grad_y;
    size_t next = residual ? 1 : 0;
    for (size_t i = 0; i < kMaps * Linear::kTensors; i += Linear::kTensors) {
      const Linear map = linear_of(&saved[3 + i], scaling);
      if (!map.weight.defined()) continue;
      const at::Tensor grad = rows(grads[next++]);
      const at::Tensor grad_inner = inner_gradient(map, grad);
      add_input_gradient(map, grad, grad_inner, grad_y);
      const auto own = own_gradients(map, y, grad, grad_inner);
      std::copy(own.begin(), own.end(), result.begin() + static_cast<std::ptrdiff_t>(kFirstMap + i));
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
  std::array<MaybeTensor, NormLinear::kMaps * Linear::kTensors> all;
  double scaling = 0.0;  // that of the adapters, which have one in common
  for (size_t i = 0; i < maps.size(); ++i) {
    const auto tensors = maps[i].tensors();
    for (size_t t = 0; t < tensors.size(); ++t) all[i * Linear::kTensors + t] = maybe(tensors[t]);
    scaling = std::max(scaling, maps[i].lora_scaling);
  }
  return std::apply(
      [&](const auto&... tensors) {
        return NormLinear::apply(x, maybe(residual), norm_weight, eps, scaling, tensors...);
      },
      all);
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
                            const at::Tensor& weight, const MaybeTensor& bias, const MaybeTensor& lora_a,
                            const MaybeTensor& lora_b, double scaling) {
    const Linear down{weight, bias.value_or(at::Tensor()), lora_a.value_or(at::Tensor()),
                      lora_b.value_or(at::Tensor()), scaling};
    ctx->save_for_backward({gate, up, down.weight, down.bias, down.lora_a, down.lora_b});
    ctx->saved_data["scaling"] = scaling;
    return down(swiglu(gate, up));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &gate = saved[0], &up = saved[1];
    const Linear down = linear_of(&saved[2], ctx->saved_data["scaling"].toDouble());
    const at::Tensor grad = rows(grads[0]);
    const at::Tensor grad_inner = inner_gradient(down, grad);
    at::Tensor flat_grad_y;
    add_input_gradient(down, grad, grad_inner, flat_grad_y);
    const at::Tensor grad_y = flat_grad_y.view(gate.sizes());
    fused::SwigluGradients g;
    if (fused::available(gate)) {
      g = fused::swiglu_backward(gate, up, grad_y);
    } else {
      const at::Tensor activated = at::silu(gate);
      g = {activated * up, at::silu_backward(grad_y * up, gate), grad_y * activated};
    }
    const auto own = own_gradients(down, rows(g.y), grad, grad_inner);
    return {g.gate, g.up, own[0], own[1], own[2], own[3], at::Tensor()};
  }
};

}  // namespace

at::Tensor Linear::operator()(const at::Tensor& x) const {
  const at::Tensor out = at::linear(x, weight, maybe(bias));
  if (!lora_a.defined()) return out;
  const at::Tensor inner = at::linear(rows(x), lora_a);
  at::Tensor flat = rows(out);
  if (at::GradMode::is_enabled()) {
    return at::addmm(flat, inner, lora_b.t(), /*beta=*/1, /*alpha=*/lora_scaling).view(out.sizes());
  }
  flat.addmm_(inner, lora_b.t(), /*beta=*/1, /*alpha=*/lora_scaling);
  return out;
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
  return SwigluLinear::apply(gate, up, down.weight, maybe(down.bias), maybe(down.lora_a), maybe(down.lora_b),
                             down.lora_scaling);
}

}  // namespace topk_sft
