// config.json -> ModelConfig. Defaults of absent keys are those of the family's class in transformers 5.
#include "model/config.h"

#include <algorithm>
#include <filesystem>
#include <limits>

#include "io/error.h"
#include "model/json_reader.h"

namespace topk_sft {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 24;  // of one dimension: products of two stay far inside int64
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct FamilyRow {
  ModelFamily family;
  const char* model_type;
  const char* architecture;
  int64_t default_kv_heads;  // 0: as many as heads
  int64_t default_max_position;
};
constexpr FamilyRow kFamilies[] = {{ModelFamily::kLlama, "llama", "LlamaForCausalLM", 0, 2048},
                                   {ModelFamily::kMistral, "mistral", "MistralForCausalLM", 8, 131072},
                                   {ModelFamily::kQwen2, "qwen2", "Qwen2ForCausalLM", 32, 32768},
                                   {ModelFamily::kQwen3, "qwen3", "Qwen3ForCausalLM", 32, 32768}};

const FamilyRow& read_family(const JsonReader& config) {
  const auto type = config.string("model_type");
  if (!type) config.missing("model_type");
  for (const FamilyRow& row : kFamilies) {
    if (*type != row.model_type) continue;
    if (!config.has("architectures")) return row;
    const Json& names = config.raw("architectures");
    if (!names.is_array() || std::find(names.begin(), names.end(), row.architecture) == names.end()) {
      config.bad("architectures", fmt::format("a list with {}", row.architecture));
    }
    return row;
  }
  config.bad("model_type", "one of llama, mistral, qwen2, qwen3");
}

void read_sizes(const JsonReader& config, const FamilyRow& family, ModelConfig& out) {
  out.vocab_size = config.required_integer("vocab_size", 1, kMaxSize);
  out.hidden_size = config.required_integer("hidden_size", 1, kMaxSize);
  out.intermediate_size = config.required_integer("intermediate_size", 1, kMaxSize);
  out.num_layers = config.required_integer("num_hidden_layers", 1, 4096);
  out.num_heads = config.required_integer("num_attention_heads", 1, 65536);
  const int64_t default_kv = config.present("num_key_value_heads") || family.default_kv_heads == 0
                                 ? out.num_heads
                                 : family.default_kv_heads;
  out.num_kv_heads = config.integer("num_key_value_heads", 1, 65536).value_or(default_kv);
  if (out.num_heads % out.num_kv_heads != 0) {
    if (!config.has("num_key_value_heads")) config.missing("num_key_value_heads");
    config.bad("num_key_value_heads",
               fmt::format("a divisor of num_attention_heads, which is {}", out.num_heads));
  }
  out.max_position =
      config.integer("max_position_embeddings", 1, int64_t{1} << 40).value_or(family.default_max_position);

  const auto head_dim = config.integer("head_dim", 2, 65536);
  if (!head_dim && family.family != ModelFamily::kQwen3 && out.hidden_size % out.num_heads != 0) {
    config.bad("hidden_size",
               fmt::format("a multiple of num_attention_heads, which is {}, when head_dim is absent",
                           out.num_heads));
  }
  out.head_dim =
      head_dim.value_or(family.family == ModelFamily::kQwen3 ? 128 : out.hidden_size / out.num_heads);
  if (out.head_dim < 2 || out.head_dim % 2 != 0) {
    config.bad(head_dim ? "head_dim" : "hidden_size",
               fmt::format("so that head_dim is even; it is {}", out.head_dim));
  }
}

// What this model does not do is refused here, by name.
void refuse_unsupported(const JsonReader& config, const FamilyRow& family, int64_t num_layers) {
  if (const auto act = config.string("hidden_act"); act && *act != "silu")
    config.bad("hidden_act", "\"silu\"");
  if (config.has("attention_dropout") && (!config.raw("attention_dropout").is_number() ||
                                          config.raw("attention_dropout").get<double>() != 0.0)) {
    config.bad("attention_dropout", "0: attention dropout is not supported");
  }
  if (config.has("quantization_config")) {
    config.bad("quantization_config", "absent: quantised weights are not supported");
  }

  const char* sliding = "inactive: sliding-window attention is not supported";
  if (family.family == ModelFamily::kMistral) {
    if (config.has("sliding_window"))
      config.bad("sliding_window", std::string("null: it must be ") + sliding);
    if (!config.present("sliding_window"))
      config.missing("sliding_window (absent means 4096; null: no window)");
  }
  if (family.family == ModelFamily::kQwen2 || family.family == ModelFamily::kQwen3) {
    const bool used = config.boolean("use_sliding_window").value_or(false);
    const bool window = config.has("sliding_window") || !config.present("sliding_window");
    const int64_t first = config.integer("max_window_layers", 0, int64_t{1} << 40).value_or(28);
    if (used && window && !config.has("layer_types") && first < num_layers) {
      config.bad("use_sliding_window", sliding);
    }
  }
  if (config.has("layer_types")) {
    const Json& types = config.raw("layer_types");
    if (!types.is_array() || static_cast<int64_t>(types.size()) != num_layers ||
        !std::all_of(types.begin(), types.end(), [](const Json& type) { return type == "full_attention"; })) {
      config.bad("layer_types", fmt::format("a list of {} times \"full_attention\"", num_layers));
    }
  }
}

// transformers' rule: a filled rope_scaling (version 4) wins over rope_parameters (version 5); rope_theta
// inside the dict wins over the one beside it.
RopeConfig read_rope(const JsonReader& config, const std::string& where, int64_t max_position) {
  static const Json kEmpty = Json::object();
  const bool old_keys = config.has("rope_scaling") && !config.raw("rope_scaling").empty();
  const char* dict_name = old_keys ? "rope_scaling" : "rope_parameters";
  const JsonReader rope(config.has(dict_name) ? config.raw(dict_name) : kEmpty, where,
                        std::string(dict_name) + ".");

  RopeConfig out;
  const auto outer_theta = config.number("rope_theta", 1.0, kInfinity);
  out.theta = rope.number("rope_theta", 1.0, kInfinity).value_or(outer_theta.value_or(out.theta));
  for (const JsonReader* reader : {&config, &rope}) {
    if (reader->has("partial_rotary_factor") && reader->raw("partial_rotary_factor") != 1.0) {
      reader->bad("partial_rotary_factor", "1: partial rotary embeddings are not supported");
    }
  }

  const char* type_key = rope.has("rope_type") ? "rope_type" : "type";
  const std::string type = rope.string(type_key).value_or("default");
  const auto original_length = [&] {
    constexpr const char* key = "original_max_position_embeddings";
    const auto outer = config.integer(key, 1, int64_t{1} << 40);
    return outer ? *outer : rope.integer(key, 1, int64_t{1} << 40).value_or(max_position);
  };
  if (type == "default") {
    rope.only({"rope_type", "type", "rope_theta", "partial_rotary_factor"});
  } else if (type == "linear") {
    out.type = RopeType::kLinear;
    rope.only({"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"});
    out.factor = rope.required_number("factor", 0.0, kInfinity);
  } else if (type == "llama3") {
    out.type = RopeType::kLlama3;
    rope.only({"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor",
               "high_freq_factor", "original_max_position_embeddings"});
    out.factor = rope.required_number("factor", 0.0, kInfinity);
    out.low_freq_factor = rope.required_number("low_freq_factor", 0.0, kInfinity);
    out.high_freq_factor = rope.required_number("high_freq_factor", out.low_freq_factor, kInfinity);
    out.original_max_position = original_length();
  } else if (type == "yarn") {
    out.type = RopeType::kYarn;
    rope.only({"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor",
               "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
               "mscale_all_dim", "truncate"});
    out.original_max_position = original_length();
    if (!rope.present("factor")) rope.missing("factor");
    out.factor =
        rope.number("factor", 0.0, kInfinity)
            .value_or(static_cast<double>(max_position) / static_cast<double>(out.original_max_position));
    out.attention_factor = rope.number("attention_factor", 0.0, kInfinity);
    out.mscale = rope.number("mscale", -kInfinity, kInfinity);
    out.mscale_all_dim = rope.number("mscale_all_dim", -kInfinity, kInfinity);
    out.beta_fast = rope.number("beta_fast", 0.0, kInfinity).value_or(out.beta_fast);
    out.beta_slow = rope.number("beta_slow", 0.0, kInfinity).value_or(out.beta_slow);
    out.truncate = rope.boolean("truncate").value_or(out.truncate);
  } else {
    rope.bad(type_key, "one of \"default\", \"linear\", \"llama3\", \"yarn\"");
  }
  return out;
}

std::string read_dtype(const JsonReader& config) {
  const char* key = config.has("dtype") ? "dtype" : "torch_dtype";
  std::string name = config.string(key).value_or("");
  if (name.starts_with("torch.")) name = name.substr(6);
  if (!name.empty() && name != "float32" && name != "bfloat16" && name != "float16" && name != "float64") {
    config.bad(key, "\"float32\", \"bfloat16\", \"float16\" or \"float64\"");
  }
  return name;
}

}  // namespace

const char* family_name(ModelFamily family) {
  return kFamilies[static_cast<size_t>(family)].model_type;
}

ModelConfig parse_model_config(const Json& json, const std::string& where) {
  const JsonReader config(json, where);
  const FamilyRow& family = read_family(config);
  ModelConfig out;
  out.family = family.family;
  read_sizes(config, family, out);
  refuse_unsupported(config, family, out.num_layers);
  out.rms_norm_eps = config.number("rms_norm_eps", 0.0, 1.0).value_or(out.rms_norm_eps);
  out.initializer_range = config.number("initializer_range", 0.0, 1.0).value_or(out.initializer_range);
  out.tie_embeddings = config.boolean("tie_word_embeddings").value_or(false);
  out.qk_norm = family.family == ModelFamily::kQwen3;
  const bool attention_bias = config.boolean("attention_bias").value_or(false);
  const bool bias_key_counts = family.family == ModelFamily::kLlama || family.family == ModelFamily::kQwen3;
  out.qkv_bias = family.family == ModelFamily::kQwen2 || (bias_key_counts && attention_bias);
  out.o_bias = bias_key_counts && attention_bias;
  out.mlp_bias = family.family == ModelFamily::kLlama && config.boolean("mlp_bias").value_or(false);
  out.rope = read_rope(config, where, out.max_position);
  out.dtype = read_dtype(config);

  out.attn_implementation = config.string("attn_implementation").value_or("");
  if (config.has("topk_attention")) {
    out.topk_attention = sparsity_from_json(config.raw("topk_attention"), out.num_layers, where);
  }

  constexpr int64_t kMaxId = std::numeric_limits<int32_t>::max();
  if (config.has("eos_token_id") && config.raw("eos_token_id").is_array()) {
    out.eos_token_ids = *config.integers("eos_token_id", 0, kMaxId);
  } else if (const auto eos = config.integer("eos_token_id", 0, kMaxId)) {
    out.eos_token_ids = {*eos};
  }
  out.bos_token_id = config.integer("bos_token_id", 0, kMaxId);
  out.pad_token_id = config.integer("pad_token_id", -1, out.vocab_size - 1);
  if (out.pad_token_id == -1) out.pad_token_id = out.vocab_size - 1;  // transformers counts from the end
  return out;
}

ModelConfig read_model_config(const std::string& folder) {
  const std::string path = (std::filesystem::path(folder) / "config.json").string();
  return parse_model_config(read_json_file(path), path);
}

}  // namespace topk_sft
