// Names, shapes, reading with its checks, and random initialisation.
#include "model/weights.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "io/error.h"
#include "model/tensor_io.h"

namespace topk_sft {
namespace {

constexpr int64_t kDrawnAtOnce = int64_t{1} << 22;

bool ends_with(const std::string& text, std::string_view end) {
  return text.ends_with(end);
}

bool is_weight_dtype(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kF64;
}

}  // namespace

std::vector<ParameterSpec> parameter_specs(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size;
  const int64_t q_size = config.num_heads * config.head_dim;
  const int64_t kv_size = config.num_kv_heads * config.head_dim;
  std::vector<ParameterSpec> specs = {{"model.embed_tokens.weight", {config.vocab_size, hidden}}};
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string layer = fmt::format("model.layers.{}.", i);
    const auto linear = [&](const char* name, int64_t out, int64_t in, bool bias) {
      specs.push_back({layer + name + ".weight", {out, in}});
      if (bias) specs.push_back({layer + name + ".bias", {out}});
    };
    const auto norm = [&](const char* name, int64_t size) {
      specs.push_back({layer + name + ".weight", {size}});
    };
    norm("input_layernorm", hidden);
    linear("self_attn.q_proj", q_size, hidden, config.qkv_bias);
    linear("self_attn.k_proj", kv_size, hidden, config.qkv_bias);
    linear("self_attn.v_proj", kv_size, hidden, config.qkv_bias);
    linear("self_attn.o_proj", hidden, q_size, config.o_bias);
    if (config.qk_norm) {
      norm("self_attn.q_norm", config.head_dim);
      norm("self_attn.k_norm", config.head_dim);
    }
    norm("post_attention_layernorm", hidden);
    linear("mlp.gate_proj", config.intermediate_size, hidden, config.mlp_bias);
    linear("mlp.up_proj", config.intermediate_size, hidden, config.mlp_bias);
    linear("mlp.down_proj", hidden, config.intermediate_size, config.mlp_bias);
  }
  specs.push_back({"model.norm.weight", {hidden}});
  if (!config.tie_embeddings) specs.push_back({"lm_head.weight", {config.vocab_size, hidden}});
  return specs;
}

at::Tensor read_parameter(const SafetensorsFolder& folder, const ParameterSpec& spec, at::ScalarType dtype) {
  const SafetensorsFolder::Entry* entry = folder.find(spec.name);
  if (entry == nullptr) fail("the weights lack the tensor {}", spec.name);
  const std::string what = fmt::format("{}: tensor {}", entry->file->path(), spec.name);
  if (!is_weight_dtype(entry->tensor->dtype)) {
    fail("{} is {}: it must be F32, BF16, F16 or F64", what, dtype_name(entry->tensor->dtype));
  }
  if (entry->tensor->shape != spec.shape) {
    fail("{} has shape {}: config.json asks for {}", what, shape_string(entry->tensor->shape),
         shape_string(spec.shape));
  }
  const at::Tensor tensor = read_tensor(*entry->file, *entry->tensor).to(dtype);
  const at::Tensor finite = at::isfinite(tensor);
  if (!finite.all().item<bool>()) {
    const int64_t at = finite.flatten().to(at::kByte).argmin().item<int64_t>();
    const double value = tensor.flatten()[at].item<double>();
    fail("{} holds {} values that are NaN or infinite{}; the first is {} at element {}", what,
         finite.numel() - finite.sum().item<int64_t>(),
         scalar_type(entry->tensor->dtype) == dtype ? "" : fmt::format(" as {}", c10::toString(dtype)), value,
         at);
  }
  return tensor;
}

void check_names(const SafetensorsFolder& folder, const std::vector<ParameterSpec>& specs,
                 const ModelConfig& config, const std::string& where) {
  std::set<std::string> expected;
  std::vector<std::string> missing;
  for (const ParameterSpec& spec : specs) {
    expected.insert(spec.name);
    if (folder.find(spec.name) == nullptr) missing.push_back(spec.name);
  }
  std::vector<std::string> unexpected;
  for (const SafetensorsFolder::Entry& entry : folder.entries()) {
    const std::string& name = entry.tensor->name;
    if (expected.contains(name) || ends_with(name, ".rotary_emb.inv_freq")) continue;
    if (config.tie_embeddings && name == "lm_head.weight") continue;
    unexpected.push_back(printable(name));
  }
  const auto list = [](std::vector<std::string>& names) {
    const size_t all = names.size();
    names.resize(std::min<size_t>(all, 3));
    return fmt::format("{}{}", fmt::join(names, ", "), all > 3 ? fmt::format(" and {} more", all - 3) : "");
  };
  if (!missing.empty()) {
    const std::string also =
        unexpected.empty() ? "" : "; tensors that the model does not have: " + list(unexpected);
    fail("{}: missing tensors: {}{}", where, list(missing), also);
  }
  if (!unexpected.empty()) {
    fail("{}: tensors that a {} model with this config.json does not have: {}", where,
         family_name(config.family), list(unexpected));
  }

  const SafetensorsFolder::Entry* head = config.tie_embeddings ? folder.find("lm_head.weight") : nullptr;
  if (head != nullptr) {
    const SafetensorsFolder::Entry* embedding = folder.find("model.embed_tokens.weight");
    const auto head_bytes = head->file->bytes(*head->tensor);
    const auto embedding_bytes = embedding->file->bytes(*embedding->tensor);
    const bool equal = head->tensor->dtype == embedding->tensor->dtype &&
                       head->tensor->shape == embedding->tensor->shape &&
                       std::memcmp(head_bytes.data(), embedding_bytes.data(), head_bytes.size()) == 0;
    if (!equal) {
      fail(
          "{}: lm_head.weight differs from model.embed_tokens.weight, but config.json ties them "
          "(tie_word_embeddings)",
          where);
    }
  }
}

at::Tensor draw_parameter(const ParameterSpec& spec, const ModelConfig& config, uint64_t seed) {
  if (ends_with(spec.name, ".bias")) return at::zeros(spec.shape);
  if (ends_with(spec.name, "norm.weight")) return at::ones(spec.shape);
  at::Tensor weight = at::empty(spec.shape);
  const at::Tensor flat = weight.flatten();
  uint64_t of_name = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : spec.name) of_name = (of_name ^ static_cast<uint8_t>(c)) * 0x100000001b3;
  const int64_t pieces = (flat.numel() + kDrawnAtOnce - 1) / kDrawnAtOnce;
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const uint64_t mixed = seed * 0x9e3779b97f4a7c15 ^ of_name ^ static_cast<uint64_t>(piece) << 40;
      at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(mixed * 0xbf58476d1ce4e5b9 >> 1);
      const int64_t at = piece * kDrawnAtOnce;
      flat.narrow(0, at, std::min(kDrawnAtOnce, flat.numel() - at))
          .normal_(0.0, config.initializer_range, generator);
    }
  });
  if (spec.name == "model.embed_tokens.weight" && config.pad_token_id) weight[*config.pad_token_id].zero_();
  return weight;
}

}  // namespace topk_sft
