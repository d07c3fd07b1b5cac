// config.json: defaults of the families, both spellings, and a named error for everything that cannot be
// honoured.
#include "model/config.h"
#include "scratch.h"

using namespace topk_sft;

namespace {

Json base(const std::string& type) {
  Json json = {{"model_type", type},       {"vocab_size", 100},      {"hidden_size", 64},
               {"intermediate_size", 96},  {"num_hidden_layers", 3}, {"num_attention_heads", 8},
               {"num_key_value_heads", 2}, {"rms_norm_eps", 1e-5}};
  if (type == "mistral") json["sliding_window"] = nullptr;
  return json;
}

ModelConfig parse(const Json& json) {
  return parse_model_config(json, "config.json");
}

// The error when `key` of a base config is `value`.
std::string refused(const std::string& type, const std::string& key, const Json& value) {
  Json json = base(type);
  json[key] = value;
  const std::string message = error_of([&] { parse(json); });
  INFO(message);
  CHECK(contains(message, "config.json"));
  CHECK(contains(message, key));
  return message;
}

}  // namespace

TEST_CASE("families and their defaults") {
  const ModelConfig llama = parse(base("llama"));
  CHECK(llama.family == ModelFamily::kLlama);
  CHECK(llama.head_dim == 8);
  CHECK(llama.max_position == 2048);
  CHECK_FALSE(llama.qkv_bias);
  CHECK_FALSE(llama.tie_embeddings);
  CHECK(llama.rope.theta == 10000.0);
  const ModelConfig qwen2 = parse(base("qwen2"));
  CHECK(qwen2.qkv_bias);
  CHECK_FALSE(qwen2.o_bias);
  CHECK_FALSE(qwen2.qk_norm);
  const ModelConfig qwen3 = parse(base("qwen3"));
  CHECK(qwen3.qk_norm);
  CHECK(qwen3.head_dim == 128);
  CHECK_FALSE(qwen3.qkv_bias);
  CHECK(parse(base("mistral")).max_position == 131072);

  Json json = base("llama");
  json.erase("num_key_value_heads");
  CHECK(parse(json).num_kv_heads == 8);
  json["attention_bias"] = true;
  json["mlp_bias"] = true;
  json["head_dim"] = 24;
  json["eos_token_id"] = {3, 4};
  json["pad_token_id"] = -1;
  const ModelConfig config = parse(json);
  CHECK(config.qkv_bias);
  CHECK(config.o_bias);
  CHECK(config.mlp_bias);
  CHECK(config.head_dim == 24);
  CHECK(config.eos_token_ids == std::vector<int64_t>{3, 4});
  CHECK(config.pad_token_id == 99);
  json = base("mistral");
  json.erase("num_key_value_heads");
  CHECK(parse(json).num_kv_heads == 8);
}

TEST_CASE("required keys are named") {
  for (const char* key : {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads"}) {
    Json json = base("llama");
    json.erase(key);
    CHECK(contains(error_of([&] { parse(json); }), std::string("lacks the key ") + key));
    json[key] = nullptr;
    CHECK(contains(error_of([&] { parse(json); }), std::string("lacks the key ") + key));
  }
}

TEST_CASE("wrong types and ranges are named") {
  for (const Json& bad : {Json("64"), Json(64.0), Json(0), Json(-64), Json(uint64_t{1} << 63), Json(1 << 30),
                          Json(true), Json::array({64})}) {
    CHECK(contains(refused("llama", "hidden_size", bad), "must be a whole number"));
  }
  CHECK(contains(refused("llama", "num_key_value_heads", 3), "divisor"));
  CHECK(contains(refused("llama", "head_dim", 7), "even"));
  CHECK(contains(refused("llama", "hidden_size", 65), "multiple of num_attention_heads"));
  refused("llama", "rms_norm_eps", 0);
  refused("llama", "rms_norm_eps", "1e-5");
  refused("llama", "tie_word_embeddings", 1);
  refused("llama", "rope_theta", -1);
  refused("llama", "eos_token_id", -5);
  refused("llama", "eos_token_id", Json::array({1, "x"}));
  refused("llama", "pad_token_id", 100);
  refused("llama", "dtype", "float8_e4m3fn");
  refused("llama", "torch_dtype", 16);
  CHECK(parse([] {
          Json json = base("llama");
          json["torch_dtype"] = "torch.bfloat16";
          return json;
        }())
            .dtype == "bfloat16");
  CHECK(contains(error_of([] { parse(Json::array()); }), "must be a JSON object"));
}

TEST_CASE("what cannot be honoured is refused") {
  CHECK(contains(refused("llama", "model_type", "gemma"), "one of llama, mistral, qwen2, qwen3"));
  refused("llama", "architectures", Json::array({"LlamaForSequenceClassification"}));
  refused("llama", "hidden_act", "gelu");
  refused("llama", "attention_dropout", 0.1);
  refused("llama", "quantization_config", {{"bits", 4}});
  refused("mistral", "sliding_window", 4096);
  Json json = base("mistral");
  json.erase("sliding_window");
  CHECK(contains(error_of([&] { parse(json); }), "absent means 4096"));

  json = base("qwen2");
  json["use_sliding_window"] = true;
  json["max_window_layers"] = 2;
  CHECK(contains(error_of([&] { parse(json); }), "use_sliding_window"));
  json["max_window_layers"] = 3;  // no layer is left to slide
  parse(json);
  json["max_window_layers"] = 2;
  json["sliding_window"] = nullptr;
  parse(json);
  refused("qwen3", "layer_types", Json::array({"full_attention", "sliding_attention", "full_attention"}));
  refused("qwen3", "layer_types", Json::array({"full_attention"}));
}

TEST_CASE("rope in both spellings") {
  Json json = base("llama");
  json["rope_theta"] = 5e5;
  CHECK(parse(json).rope.theta == 5e5);
  json["rope_scaling"] = {{"type", "linear"}, {"factor", 4}};
  CHECK(parse(json).rope.type == RopeType::kLinear);
  CHECK(parse(json).rope.theta == 5e5);
  json["rope_scaling"] = {{"rope_type", "llama3"},
                          {"factor", 8.0},
                          {"low_freq_factor", 1.0},
                          {"high_freq_factor", 4.0},
                          {"original_max_position_embeddings", 64}};
  CHECK(parse(json).rope.original_max_position == 64);
  json["rope_scaling"]["high_freq_factor"] = 0.5;
  CHECK(contains(error_of([&] { parse(json); }), "rope_scaling.high_freq_factor"));
  json.erase("rope_scaling");
  json["rope_parameters"] = {{"rope_type", "yarn"}, {"rope_theta", 1e6}, {"factor", 4.0}};
  json["max_position_embeddings"] = 256;
  CHECK(parse(json).rope.theta == 1e6);
  CHECK(parse(json).rope.original_max_position == 256);
  json["rope_parameters"]["short_factor"] = 1;
  CHECK(contains(error_of([&] { parse(json); }), "unknown key rope_parameters.short_factor"));
  for (const char* type : {"dynamic", "longrope", "proportional", "mrope", ""}) {
    json["rope_parameters"] = {{"rope_type", type}, {"factor", 2.0}};
    CHECK(contains(error_of([&] { parse(json); }), "rope_parameters.rope_type"));
  }
  json["rope_parameters"] = {{"rope_type", "linear"}};
  CHECK(contains(error_of([&] { parse(json); }), "lacks the key rope_parameters.factor"));
  json["rope_parameters"] = {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}};
  CHECK(contains(error_of([&] { parse(json); }), "partial_rotary_factor"));
  json["rope_parameters"] = "linear";
  CHECK(contains(error_of([&] { parse(json); }), "rope_parameters must be a JSON object"));
}

TEST_CASE("the topk_attention block") {
  Json json = base("llama");
  CHECK_FALSE(own_sparsity(parse(json), "config.json").has_value());
  json["attn_implementation"] = "topk_attn";
  CHECK(contains(error_of([&] { own_sparsity(parse(json), "config.json"); }), "topk_attention"));
  json["topk_attention"] = {
      {"version", 1}, {"ratio", 0.05}, {"min_keys", 4},        {"max_keys", nullptr},
      {"sink", 2},    {"recent", 3},   {"select", "kv_group"}, {"dense_layers", {0, 2}}};
  const SparsityConfig sparsity = *own_sparsity(parse(json), "config.json");
  CHECK(sparsity.ratio == 0.05);
  CHECK(sparsity.min_keys == 4);
  CHECK_FALSE(sparsity.max_keys.has_value());
  CHECK(sparsity.select == "kv_group");
  CHECK(sparsity.dense_layers == std::vector<int64_t>{0, 2});
  CHECK(
      sparsity_to_json(sparsity).dump() ==
      R"({"version":1,"ratio":0.05,"min_keys":4,"select":"kv_group","sink":2,"recent":3,"dense_layers":[0,2]})");
  json["attn_implementation"] = "sdpa";
  CHECK(contains(error_of([&] { own_sparsity(parse(json), "config.json"); }), "\"sdpa\""));

  const auto block = [&](const Json& change) {
    Json changed = json;
    changed["topk_attention"].update(change);
    const std::string message = error_of([&] { parse(changed); });
    CHECK(contains(message, "topk_attention"));
    return message;
  };
  CHECK(contains(block({{"version", 2}}), "version"));
  CHECK(contains(block({{"topk", 4}}), "exactly one of topk and ratio"));
  CHECK(contains(block({{"ratio", nullptr}}), "exactly one of topk and ratio"));
  CHECK(contains(block({{"ratio", 0}}), "ratio"));
  CHECK(contains(block({{"ratio", 1.5}}), "ratio"));
  CHECK(contains(block({{"min_keys", 0}}), "min_keys"));
  CHECK(contains(block({{"max_keys", 3}}), "max_keys is 3"));
  CHECK(contains(block({{"select", "group"}}), "select"));
  CHECK(contains(block({{"sink", -1}}), "sink"));
  CHECK(contains(block({{"dense_layers", {3}}}), "layers 0 to 2"));
  CHECK(contains(block({{"dense_layers", {1, 1}}}), "twice"));
  CHECK(contains(block({{"prefill", "sparse"}}), "prefill"));
  CHECK(contains(block({{"top_k", 5}}), "unknown key topk_attention.top_k"));
}
