// The layer's arithmetic, in the order and the dtypes of transformers, and dense attention.
#include "model/layer.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <algorithm>

namespace topk_sft {

namespace {

std::vector<at::Tensor> defined_ones(std::initializer_list<at::Tensor> tensors) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.defined()) out.push_back(tensor);
  }
  return out;
}

}  // namespace

std::vector<at::Tensor> Layer::head_parameters() const {
  return defined_ones({input_norm, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias, q_norm, k_norm});
}

std::vector<at::Tensor> Layer::output_parameters() const {
  return defined_ones(
      {o.weight, o.bias, post_norm, gate.weight, gate.bias, up.weight, up.bias, down.weight, down.bias});
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

// ---------------------------------------------------------------------------------------------------------------
// Dense attention
// ---------------------------------------------------------------------------------------------------------------

namespace {

// cuDNN builds a plan for every length it meets, which takes far longer than running it: lengths are rounded
// up to multiples of this. Under the causal mask the rows that are added at the end change nothing before
// them.
constexpr int64_t kLengthStep = 512;

// `documents` of one length, one behind the other.
at::Tensor cudnn_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t documents) {
  const int64_t length = q.size(0) / documents;
  const int64_t extra = (length + kLengthStep - 1) / kLengthStep * kLengthStep - length;
  const auto whole = [&](const at::Tensor& x) {
    const at::Tensor split = x.unflatten(0, {documents, length});
    const at::Tensor padded = extra > 0 ? at::constant_pad_nd(split, {0, 0, 0, 0, 0, extra}) : split;
    return padded.transpose(1, 2);  // (documents, H, L, D)
  };
  const at::Tensor out = std::get<0>(at::_scaled_dot_product_cudnn_attention(
      whole(q), whole(k), whole(v), /*attn_bias=*/std::nullopt,
      /*compute_log_sumexp=*/at::GradMode::is_enabled(), /*dropout_p=*/0.0, /*is_causal=*/true));
  return out.transpose(1, 2).narrow(1, 0, length).flatten(0, 1);
}

// The documents' common length; 0 when they differ.
int64_t common_length(const std::vector<int64_t>& bounds) {
  const int64_t length = bounds[1] - bounds[0];
  for (size_t d = 1; d + 1 < bounds.size(); ++d) {
    if (bounds[d + 1] - bounds[d] != length) return 0;
  }
  return length;
}

at::Tensor flash_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& cu_seqlens, const std::vector<int64_t>& bounds) {
  int64_t longest = 0;
  for (size_t d = 0; d + 1 < bounds.size(); ++d) longest = std::max(longest, bounds[d + 1] - bounds[d]);
  return std::get<0>(at::_flash_attention_forward(q, k, v, cu_seqlens, cu_seqlens, longest, longest,
                                                  /*dropout_p=*/0.0, /*is_causal=*/true,
                                                  /*return_debug_mask=*/false));
}

at::Tensor attention_by_document(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
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

}  // namespace

at::Tensor dense_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& cu_seqlens, const std::vector<int64_t>& bounds) {
  const int64_t head_dim = q.size(-1);
  const bool half = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  if (!q.is_cuda() || !half || head_dim % 8 != 0 || head_dim > 256)
    return attention_by_document(q, k, v, bounds);
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  if (!deterministic && head_dim <= 128 && common_length(bounds) >= kLengthStep) {
    return cudnn_attention(q, k, v, static_cast<int64_t>(bounds.size()) - 1);
  }
  return flash_attention(q, k, v, cu_seqlens, bounds);
}

}  // namespace topk_sft
