// The layer's arithmetic, in the order and the dtypes of transformers.
#include "model/layer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>

#include "model/functions.h"

namespace topk_sft {

at::Tensor Linear::operator()(const at::Tensor& x) const {
  return at::linear(x, weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt);
}

std::vector<at::Tensor> Layer::parameters() const {
  std::vector<at::Tensor> all;
  for (const at::Tensor& tensor :
       {input_norm, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias, o.weight, o.bias, q_norm, k_norm,
        post_norm, gate.weight, gate.bias, up.weight, up.bias, down.weight, down.bias}) {
    if (tensor.defined()) all.push_back(tensor);
  }
  return all;
}

at::Tensor layer_forward(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                         const RopeTable& rope, const Attend& attend) {
  const double eps = config.rms_norm_eps;
  const auto heads = [&](const at::Tensor& flat) { return flat.unflatten(-1, {-1, config.head_dim}); };

  const at::Tensor normed = rms_norm(x, layer.input_norm, eps);
  at::Tensor q = heads(layer.q(normed));
  at::Tensor k = heads(layer.k(normed));
  const at::Tensor v = heads(layer.v(normed));
  if (config.qk_norm) {
    q = rms_norm(q, layer.q_norm, eps);
    k = rms_norm(k, layer.k_norm, eps);
  }
  const at::Tensor attended = attend(apply_rope(q, rope), apply_rope(k, rope), v);
  const at::Tensor middle = x + layer.o(attended.flatten(-2));

  const at::Tensor post = rms_norm(middle, layer.post_norm, eps);
  return middle + layer.down(at::silu(layer.gate(post)) * layer.up(post));
}

at::Tensor dense_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::vector<int64_t>& bounds) {
  const int64_t kv_heads = k.size(1);
  const int64_t group = q.size(1) / kv_heads;
  // SDPA's batch is the KV head, its heads are the group: (Hkv, G, L, D).
  const auto queries = [&](const at::Tensor& x) {
    return x.unflatten(1, {kv_heads, group}).permute({1, 2, 0, 3});
  };
  const auto keys = [&](const at::Tensor& x) {
    return x.transpose(0, 1).unsqueeze(1).expand({kv_heads, group, x.size(0), x.size(2)});
  };
  std::vector<at::Tensor> outputs;
  for (size_t d = 0; d + 1 < bounds.size(); ++d) {
    const int64_t length = bounds[d + 1] - bounds[d];
    if (length == 0) continue;
    const auto document = [&](const at::Tensor& x) { return x.narrow(0, bounds[d], length); };
    const at::Tensor out = at::scaled_dot_product_attention(queries(document(q)), keys(document(k)),
                                                            keys(document(v)), std::nullopt,
                                                            /*dropout_p=*/0.0, /*is_causal=*/true);
    outputs.push_back(out.permute({2, 0, 1, 3}).flatten(1, 2));
  }
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs, 0);
}

}  // namespace topk_sft
