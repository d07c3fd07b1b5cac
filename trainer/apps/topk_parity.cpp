// topk-parity GIVEN.safetensors MADE.safetensors: runs the C++ functions of topk_attn on given tensors and
// writes what they return, so that another caller of the operators (Python, another build) can be compared
// with them bit for bit.
//
// GIVEN holds q (1,T,H,D), k (1,T,Hkv,D), v (1,T,Hkv,Dv), dout (1,T,H,Dv) of one dtype; its metadata holds
// the budget and the selection under the names of the functions' arguments (topk, ratio, min_keys, max_keys,
// select, sink, recent). MADE holds
//   out, lse, dq, dk, dv              topk_attn_func, and its backward for dout
//   threshold, tie_index, indices     topk_select
//   varlen_out, varlen_lse            topk_attn_varlen_func on two documents, the first third of the tokens
//   and the rest decode_out, decode_lse, decode_indices    topk_attn_with_kvcache, a token at a time
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "io/error.h"
#include "io/safetensors.h"
#include "topk_attn/topk_attn.h"

namespace {

using topk_sft::DType;

const std::vector<std::pair<DType, at::ScalarType>> kDtypes = {
    {DType::kF32, at::kFloat}, {DType::kF64, at::kDouble}, {DType::kBF16, at::kBFloat16},
    {DType::kF16, at::kHalf},  {DType::kI32, at::kInt},
};

at::Tensor read_tensor(const topk_sft::SafetensorsFile& file, const std::string& name) {
  const topk_sft::TensorInfo& info = file.at(name);
  for (const auto& [stored, type] : kDtypes) {
    if (info.dtype != stored || stored == DType::kI32) continue;
    at::Tensor tensor = at::empty(info.shape, at::TensorOptions().dtype(type));
    const auto bytes = file.bytes(info);
    if (!bytes.empty()) std::memcpy(tensor.data_ptr(), bytes.data(), bytes.size());
    return tensor;
  }
  topk_sft::fail("{}: {} must be F32, F64, BF16 or F16, got {}", file.path(), name,
                 topk_sft::dtype_name(info.dtype));
}

void write_tensors(const std::string& path, const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  topk_sft::SafetensorsWriter writer(path);
  for (const auto& [name, tensor] : tensors) {
    for (const auto& [stored, type] : kDtypes) {
      if (tensor.scalar_type() == type) writer.declare(name, stored, tensor.sizes().vec());
    }
  }
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor dense = tensor.contiguous();
    writer.write(name, dense.const_data_ptr(), dense.nbytes());
  }
  writer.commit();
}

template <typename T>
T number(const std::string& key, const std::string& text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    topk_sft::fail("metadata {} must be a number, got '{}'", key, text);
  }
  return value;
}

topk_attn::Options read_options(const std::map<std::string, std::string>& metadata) {
  topk_attn::Options options;
  for (const auto& [key, text] : metadata) {
    if (key == "topk") {
      options.topk = number<int64_t>(key, text);
    } else if (key == "ratio") {
      options.ratio = number<double>(key, text);
    } else if (key == "min_keys") {
      options.min_keys = number<int64_t>(key, text);
    } else if (key == "max_keys") {
      options.max_keys = number<int64_t>(key, text);
    } else if (key == "select") {
      options.select = text;
    } else if (key == "sink") {
      options.sink = number<int64_t>(key, text);
    } else if (key == "recent") {
      options.recent = number<int64_t>(key, text);
    } else {
      topk_sft::fail("metadata '{}' is not an argument of the selection", key);
    }
  }
  return options;
}

at::Tensor int32s(std::vector<int32_t> values) {
  return at::tensor(at::ArrayRef<int32_t>(values), at::TensorOptions().dtype(at::kInt));
}

void run(const std::string& given, const std::string& made) {
  const topk_sft::SafetensorsFile file(given);
  const topk_attn::Options options = read_options(file.metadata());
  const at::Tensor q = read_tensor(file, "q");
  const at::Tensor k = read_tensor(file, "k");
  const at::Tensor v = read_tensor(file, "v");
  const at::Tensor dout = read_tensor(file, "dout");
  if (q.dim() != 4 || q.size(0) != 1) {
    topk_sft::fail("{}: q must be (1, T, H, D), got {}", given, topk_sft::shape_string(q.sizes().vec()));
  }
  const int64_t tokens = q.size(1);
  std::vector<std::pair<std::string, at::Tensor>> results;

  // Leaves that require a gradient.
  const at::Tensor q_leaf = q.clone().set_requires_grad(true);
  const at::Tensor k_leaf = k.clone().set_requires_grad(true);
  const at::Tensor v_leaf = v.clone().set_requires_grad(true);
  const topk_attn::Attention attention = topk_attn::topk_attn_func(q_leaf, k_leaf, v_leaf, options);
  attention.out.backward(dout);
  results.emplace_back("out", attention.out.detach());
  results.emplace_back("lse", attention.lse.detach());
  results.emplace_back("dq", q_leaf.grad());
  results.emplace_back("dk", k_leaf.grad());
  results.emplace_back("dv", v_leaf.grad());

  const topk_attn::Selected selected = topk_attn::topk_select(q, k, options, std::nullopt, true);
  results.emplace_back("threshold", selected.threshold);
  results.emplace_back("tie_index", selected.tie_index);
  results.emplace_back("indices", selected.indices);

  const int64_t first = tokens / 3;
  const at::Tensor bounds = int32s({0, static_cast<int32_t>(first), static_cast<int32_t>(tokens)});
  const topk_attn::Attention varlen = topk_attn::topk_attn_varlen_func(
      q[0], k[0], v[0], bounds, bounds, tokens - first, tokens - first, options);
  results.emplace_back("varlen_out", varlen.out);
  results.emplace_back("varlen_lse", varlen.lse);

  std::vector<at::Tensor> out, lse, indices;
  topk_attn::Cache cache;
  cache.k_cache = k.clone();
  cache.v_cache = v.clone();
  for (int64_t t = 0; t < tokens; ++t) {
    cache.cache_seqlens = int32s({static_cast<int32_t>(t + 1)});
    const topk_attn::CacheAttention step =
        topk_attn::topk_attn_with_kvcache(q.slice(1, t, t + 1), cache, options, true);
    out.push_back(step.out);
    lse.push_back(step.lse);
    indices.push_back(step.indices);
  }
  results.emplace_back("decode_out", at::cat(out, 1));
  results.emplace_back("decode_lse", at::cat(lse, 2));
  results.emplace_back("decode_indices", at::cat(indices, 2));
  write_tensors(made, results);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: topk-parity GIVEN.safetensors MADE.safetensors\n");
    return 2;
  }
  try {
    run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "topk-parity: error: %s\n", error.what());
    return 1;
  }
  return 0;
}
