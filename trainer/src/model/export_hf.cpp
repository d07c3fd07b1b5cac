// The exported folder: copied files, an edited config.json, the weights; renamed into place at the end.
#include "model/export_hf.h"

#include <ATen/ops/isfinite.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <filesystem>

#include "io/atomic_file.h"
#include "io/error.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "model/tensor_io.h"
#include "model/weights.h"

namespace topk_sft {
namespace fs = std::filesystem;
namespace {

using Parameters = std::vector<std::pair<std::string, at::Tensor>>;

// Weights in any format, and lists of them: everything else of a model folder is carried over.
bool is_weight_file(const std::string& name) {
  static constexpr std::array kEndings = {".safetensors", ".safetensors.index.json",
                                          ".bin",         ".bin.index.json",
                                          ".pt",          ".pth",
                                          ".gguf",        ".h5",
                                          ".msgpack",     ".onnx",
                                          ".onnx_data"};
  for (const std::string_view ending : kEndings) {
    if (name.ends_with(ending)) return true;
  }
  return false;
}

void carry_over(const fs::path& from, const fs::path& to) {
  AtomicFile file(to.string());
  file.write(read_file(from.string()));
  file.commit();
}

void copy_other_files(const std::string& source_dir, const std::string& target) {
  for (const auto& entry : fs::directory_iterator(source_dir)) {
    const std::string name = entry.path().filename().string();
    if (name == "additional_chat_templates" && entry.is_directory()) {
      fs::create_directory(fs::path(target) / name);
      for (const auto& inner : fs::directory_iterator(entry.path())) {
        if (inner.is_regular_file())
          carry_over(inner.path(), fs::path(target) / name / inner.path().filename());
      }
    }
    const bool skip = name.starts_with(".") || name == "config.json" || is_weight_file(name);
    if (!skip && entry.is_regular_file()) carry_over(entry.path(), fs::path(target) / name);
  }
}

const char* dtype_key_value(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    default:
      return "float64";
  }
}

// Sets `key`, keeping its place when it exists. Returns whether anything changed.
bool set_key(OrderedJson& config, const char* key, const OrderedJson& value) {
  if (config.contains(key) && config[key] == value) return false;
  config[key] = value;
  return true;
}

void write_config(const std::string& source_dir, const std::string& target, at::ScalarType dtype,
                  const AttentionSettings& attention) {
  const std::string source = (fs::path(source_dir) / "config.json").string();
  const std::string text = read_file(source, kMaxJsonFileBytes);
  OrderedJson config = parse_ordered_json(text, source);
  bool changed = false;
  if (const auto sparsity = sparsity_config(attention)) {
    changed |= set_key(config, "attn_implementation", "topk_attn");
    changed |= set_key(config, "topk_attention", sparsity_to_json(*sparsity));
  } else {
    if (config.contains("attn_implementation") && config["attn_implementation"] == "topk_attn") {
      changed |= config.erase("attn_implementation") > 0;
    }
    changed |= config.erase("topk_attention") > 0;
  }
  const bool old_key = config.contains("torch_dtype");
  if (old_key) changed |= set_key(config, "torch_dtype", dtype_key_value(dtype));
  if (!old_key || config.contains("dtype")) changed |= set_key(config, "dtype", dtype_key_value(dtype));
  write_file_atomic((fs::path(target) / "config.json").string(), changed ? config.dump(2) + "\n" : text);
}

void write_shard(const std::string& path, const CausalLM& model, const Parameters& parameters, size_t begin,
                 size_t end) {
  SafetensorsWriter writer(path, {{"format", "pt"}});
  for (size_t i = begin; i < end; ++i) declare_tensor(writer, parameters[i].first, parameters[i].second);
  for (size_t i = begin; i < end; ++i) {
    const std::string& name = parameters[i].first;
    const at::Tensor tensor = model.merged(name);
    if (!at::isfinite(tensor.detach()).all().item<bool>())
      fail("tensor {} holds NaN or infinite values", name);
    write_tensor(writer, name, tensor);
  }
  writer.commit();
}

void write_weights(const std::string& target, const CausalLM& model, int64_t max_shard_bytes) {
  const Parameters parameters = model.named_parameters();
  // first[s] is the first parameter of shard s; a shard takes at least one.
  std::vector<size_t> first = {0};
  int64_t shard_bytes = 0;
  int64_t total_bytes = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto bytes = static_cast<int64_t>(parameters[i].second.nbytes());
    if (shard_bytes > 0 && shard_bytes + bytes > max_shard_bytes) {
      first.push_back(i);
      shard_bytes = 0;
    }
    shard_bytes += bytes;
    total_bytes += bytes;
  }
  const size_t shards = first.size();
  first.push_back(parameters.size());
  if (shards == 1) {
    write_shard((fs::path(target) / "model.safetensors").string(), model, parameters, 0, parameters.size());
    return;
  }
  Json weight_map = Json::object();
  for (size_t s = 0; s < shards; ++s) {
    const std::string name = fmt::format("model-{:05}-of-{:05}.safetensors", s + 1, shards);
    write_shard((fs::path(target) / name).string(), model, parameters, first[s], first[s + 1]);
    for (size_t i = first[s]; i < first[s + 1]; ++i) weight_map[parameters[i].first] = name;
  }
  const Json index = {{"metadata", {{"total_size", total_bytes}}}, {"weight_map", weight_map}};
  write_file_atomic((fs::path(target) / "model.safetensors.index.json").string(), index.dump(2) + "\n");
}

// The folder's config.json must describe this model, or the export would not load.
void check_source(const CausalLM& model, const std::string& source_dir) {
  const std::vector<ParameterSpec> specs = parameter_specs(read_model_config(source_dir));
  const Parameters parameters = model.named_parameters();
  bool same = specs.size() == parameters.size();
  for (size_t i = 0; same && i < specs.size(); ++i) {
    same = specs[i].name == parameters[i].first && specs[i].shape == parameters[i].second.sizes().vec();
  }
  if (!same) fail("{}: config.json describes another model than the one to export", source_dir);
}

}  // namespace

void export_hf(const CausalLM& model, const std::string& source_dir, const std::string& target_dir,
               const AttentionSettings& attention, bool replace, int64_t max_shard_bytes) {
  if (max_shard_bytes < 1) fail("export: max_shard_bytes must be at least 1, got {}", max_shard_bytes);
  if (const auto sparsity = sparsity_config(attention)) {
    check_sparsity(*sparsity, model.config().num_layers, "export: attention");
  }
  check_source(model, source_dir);
  AtomicFolder folder(target_dir, replace);
  try {
    copy_other_files(source_dir, folder.path());
    write_config(source_dir, folder.path(), model.dtype(), attention);
    write_weights(folder.path(), model, max_shard_bytes);
    folder.commit();
  } catch (const std::exception& error) {
    fail("export to {}: {}", target_dir, error.what());
  }
}

}  // namespace topk_sft
