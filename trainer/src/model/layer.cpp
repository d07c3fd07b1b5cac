// The layer's arithmetic, in the order and the dtypes of transformers.
#include "model/layer.h"

#include <ATen/TensorOperators.h>

namespace topk_sft {

namespace {

// Norm weights and maps: their tensors that exist.
std::vector<at::Tensor> defined_ones(const std::vector<at::Tensor>& norms, const std::vector<Linear>& maps) {
  std::vector<at::Tensor> out;
  const auto add = [&](const at::Tensor& tensor) {
    if (tensor.defined()) out.push_back(tensor);
  };
  for (const at::Tensor& norm : norms) add(norm);
  for (const Linear& map : maps) {
    for (const at::Tensor& tensor : map.tensors()) add(tensor);
  }
  return out;
}

}  // namespace

std::vector<at::Tensor> Layer::head_parameters() const {
  return defined_ones({input_norm, q_norm, k_norm}, {q, k, v});
}

std::vector<at::Tensor> Layer::output_parameters() const {
  return defined_ones({post_norm}, {o, gate, up, down});
}

std::vector<at::Tensor> layer_heads(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                                    const RopeTable& rope) {
  const double eps = config.rms_norm_eps;
  const auto heads = [&](const at::Tensor& flat) { return flat.unflatten(-1, {-1, config.head_dim}); };
  const std::vector<at::Tensor> qkv = norm_linear(x, layer.input_norm, eps, {layer.q, layer.k, layer.v});
  return {norm_rope(heads(qkv[0]), layer.q_norm, eps, rope),
          norm_rope(heads(qkv[1]), layer.k_norm, eps, rope), heads(qkv[2])};
}

at::Tensor layer_output(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                        const at::Tensor& attended) {
  const std::vector<at::Tensor> middle = add_norm_linear(x, layer.o(attended.flatten(-2)), layer.post_norm,
                                                         config.rms_norm_eps, {layer.gate, layer.up});
  return middle[0] + swiglu_linear(middle[1], middle[2], layer.down);
}

at::Tensor layer_forward(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                         const RopeTable& rope, const Attend& attend) {
  const std::vector<at::Tensor> qkv = layer_heads(config, layer, x, rope);
  return layer_output(config, layer, x, attend(qkv[0], qkv[1], qkv[2]));
}

}  // namespace topk_sft
