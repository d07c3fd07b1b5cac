// Shapes, workspaces and the stream for the kernels.
#include "model/fused.h"

#include "io/error.h"

#ifdef TOPK_TRAINER_CUDA

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>

#include "kernels.h"

namespace topk_sft::fused {

namespace {

cuda::Type type_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat ? cuda::Type::kFloat : cuda::Type::kBFloat16;
}

cudaStream_t stream_of(const at::Tensor& x) {
  return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    fail("{}: CUDA error {}: {}", what, static_cast<int>(error), cudaGetErrorString(error));
}

at::Tensor floats(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::empty(sizes, like.options().dtype(at::kFloat));
}

const void* pointer(const at::Tensor& x) {
  return x.defined() ? x.const_data_ptr() : nullptr;
}

}  // namespace

bool available(const at::Tensor& x) {
  return x.is_cuda() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

bool norm_available(const at::Tensor& x) {
  return available(x) && cuda::norm_supported(x.size(-1));
}

Norm norm_forward(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = input.contiguous();
  const at::Tensor other = residual.defined() ? residual.contiguous() : residual;
  const int64_t columns = x.size(-1);
  Norm out;
  out.sum = other.defined() ? at::empty_like(x) : x;
  out.y = at::empty_like(x);
  out.inverse_rms = floats({x.numel() / columns}, x);
  cuda::NormForward call{};
  call.type = type_of(x);
  call.rows = x.numel() / columns;
  call.columns = columns;
  call.eps = static_cast<float>(eps);
  call.x = pointer(x);
  call.residual = pointer(other);
  call.weight = pointer(weight);
  call.sum = out.sum.mutable_data_ptr();
  call.y = out.y.mutable_data_ptr();
  call.inverse_rms = out.inverse_rms.mutable_data_ptr<float>();
  check(cuda::norm_forward(call, stream_of(x)), "RMSNorm");
  return out;
}

std::pair<at::Tensor, at::Tensor> norm_backward(const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& inverse_rms, const at::Tensor& grad_y,
                                                const at::Tensor& grad_sum) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor grad = grad_y.contiguous();
  const at::Tensor past = grad_sum.defined() ? grad_sum.contiguous() : grad_sum;
  const int64_t columns = x.size(-1);
  const int64_t rows = x.numel() / columns;
  at::Tensor grad_x = at::empty_like(x);
  at::Tensor grad_weight = at::empty_like(weight);
  at::Tensor partial = floats({cuda::norm_backward_blocks(rows, columns), columns}, x);
  cuda::NormBackward call{};
  call.type = type_of(x);
  call.rows = rows;
  call.columns = columns;
  call.x = pointer(x);
  call.weight = pointer(weight);
  call.inverse_rms = inverse_rms.const_data_ptr<float>();
  call.grad_y = pointer(grad);
  call.grad_sum = pointer(past);
  call.grad_x = grad_x.mutable_data_ptr();
  call.grad_weight = grad_weight.mutable_data_ptr();
  call.partial = partial.mutable_data_ptr<float>();
  check(cuda::norm_backward(call, stream_of(x)), "gradient of RMSNorm");
  return {grad_x, grad_weight};
}

bool rope_available(const at::Tensor& x) {
  return available(x) && x.size(-1) % 2 == 0 && x.size(-1) <= 256;
}

namespace {

cuda::Rope rope_call(const at::Tensor& heads, const at::Tensor& weight, const at::Tensor& cos,
                     const at::Tensor& sin, double eps) {
  cuda::Rope call{};
  call.type = type_of(heads);
  call.head_dim = heads.size(-1);
  call.heads = heads.size(-2);
  call.tokens = cos.numel() / call.head_dim;
  call.eps = static_cast<float>(eps);
  call.weight = pointer(weight);
  call.cos = pointer(cos);
  call.sin = pointer(sin);
  return call;
}

}  // namespace

at::Tensor rope_forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& cos,
                        const at::Tensor& sin, double eps) {
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = input.contiguous();
  at::Tensor y = at::empty_like(x);
  cuda::Rope call = rope_call(x, weight, cos, sin, eps);
  call.x = pointer(x);
  call.y = y.mutable_data_ptr();
  check(cuda::rope_forward(call, stream_of(x)), "rotary embedding");
  return y;
}

std::pair<at::Tensor, at::Tensor> rope_backward(const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& cos, const at::Tensor& sin,
                                                const at::Tensor& grad_y, double eps) {
  const c10::cuda::CUDAGuard guard(grad_y.device());
  const at::Tensor grad = grad_y.contiguous();
  const at::Tensor source = x.defined() ? x.contiguous() : x;
  at::Tensor grad_x = at::empty_like(grad);
  cuda::Rope call = rope_call(grad, weight, cos, sin, eps);
  call.x = pointer(source);
  call.grad_y = pointer(grad);
  call.grad_x = grad_x.mutable_data_ptr();
  at::Tensor grad_weight, partial;
  if (weight.defined()) {
    grad_weight = at::empty_like(weight);
    partial = floats({cuda::rope_backward_blocks(call.tokens, call.heads), call.head_dim}, grad);
    call.grad_weight = grad_weight.mutable_data_ptr();
    call.partial = partial.mutable_data_ptr<float>();
  }
  check(cuda::rope_backward(call, stream_of(grad)), "gradient of the rotary embedding");
  return {grad_x, grad_weight};
}

at::Tensor swiglu_forward(const at::Tensor& gate, const at::Tensor& up) {
  const c10::cuda::CUDAGuard guard(gate.device());
  at::Tensor y = at::empty_like(gate);
  check(cuda::swiglu_forward(type_of(gate), gate.numel(), pointer(gate), pointer(up), y.mutable_data_ptr(),
                             stream_of(gate)),
        "SwiGLU");
  return y;
}

SwigluGradients swiglu_backward(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& grad_y) {
  const c10::cuda::CUDAGuard guard(gate.device());
  const at::Tensor grad = grad_y.contiguous();
  SwigluGradients out{at::empty_like(gate), at::empty_like(gate), at::empty_like(gate)};
  check(cuda::swiglu_backward(type_of(gate), gate.numel(), pointer(gate), pointer(up), pointer(grad),
                              out.y.mutable_data_ptr(), out.gate.mutable_data_ptr(),
                              out.up.mutable_data_ptr(), stream_of(gate)),
        "gradient of SwiGLU");
  return out;
}

at::Tensor cross_entropy(at::Tensor& logits, const at::Tensor& labels, bool gradient) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor targets = labels.contiguous();
  at::Tensor losses = floats({logits.size(0)}, logits);
  check(cuda::cross_entropy(type_of(logits), logits.size(0), logits.size(1), logits.mutable_data_ptr(),
                            targets.const_data_ptr<int64_t>(), losses.mutable_data_ptr<float>(), gradient,
                            stream_of(logits)),
        "cross-entropy");
  return losses;
}

void adamw(const AdamWUpdate& u) {
  if (u.parameters.empty()) return;
  const c10::cuda::CUDAGuard guard(u.parameters[0].device());
  std::vector<cuda::AdamWTensor> tensors;
  for (size_t i = 0; i < u.parameters.size(); ++i) {
    tensors.push_back({u.parameters[i].mutable_data_ptr(), u.masters[i].mutable_data_ptr<float>(),
                       u.gradients[i].const_data_ptr(), u.exp_avg[i].mutable_data_ptr<float>(),
                       u.exp_avg_sq[i].mutable_data_ptr<float>(), u.parameters[i].numel()});
  }
  const auto step = static_cast<double>(u.step);
  cuda::AdamWSettings settings{};
  settings.gradient_is_float = u.gradients[0].scalar_type() == at::kFloat;
  settings.gradient_scale = static_cast<float>(u.gradient_scale);
  settings.learning_rate = static_cast<float>(u.learning_rate);
  settings.beta1 = static_cast<float>(u.beta1);
  settings.beta2 = static_cast<float>(u.beta2);
  settings.epsilon = static_cast<float>(u.epsilon);
  settings.weight_decay = static_cast<float>(u.weight_decay);
  settings.correction1 = static_cast<float>(1.0 - std::pow(u.beta1, step));
  settings.correction2_sqrt = static_cast<float>(std::sqrt(1.0 - std::pow(u.beta2, step)));
  check(
      cuda::adamw(settings, tensors.data(), static_cast<int64_t>(tensors.size()), stream_of(u.parameters[0])),
      "AdamW");
}

}  // namespace topk_sft::fused

#else

namespace topk_sft::fused {

namespace {
[[noreturn]] void absent() {
  fail("this program was built without CUDA");
}
}  // namespace

bool available(const at::Tensor&) {
  return false;
}
bool norm_available(const at::Tensor&) {
  return false;
}
bool rope_available(const at::Tensor&) {
  return false;
}
Norm norm_forward(const at::Tensor&, const at::Tensor&, const at::Tensor&, double) {
  absent();
}
std::pair<at::Tensor, at::Tensor> norm_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                const at::Tensor&, const at::Tensor&) {
  absent();
}
at::Tensor rope_forward(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double) {
  absent();
}
std::pair<at::Tensor, at::Tensor> rope_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                const at::Tensor&, const at::Tensor&, double) {
  absent();
}
at::Tensor swiglu_forward(const at::Tensor&, const at::Tensor&) {
  absent();
}
SwigluGradients swiglu_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&) {
  absent();
}
at::Tensor cross_entropy(at::Tensor&, const at::Tensor&, bool) {
  absent();
}
void adamw(const AdamWUpdate&) {
  absent();
}

}  // namespace topk_sft::fused

#endif
