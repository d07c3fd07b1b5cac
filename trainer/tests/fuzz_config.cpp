// Fuzzes the reader of config.json, with the topk_attention block and its way back to JSON.
#include "fuzz.h"
#include "io/error.h"
#include "model/config.h"

namespace {

const std::vector<std::string> kConfigs = {
    R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 64,
"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
"rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, "torch_dtype": "bfloat16",
"max_position_embeddings": 512, "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
"hidden_act": "silu", "eos_token_id": [1, 2], "bos_token_id": 1, "pad_token_id": null})",
    R"({"model_type": "mistral", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
"num_hidden_layers": 3, "num_attention_heads": 8, "sliding_window": null, "attention_dropout": 0.0, "dtype": "float32",
"attn_implementation": "topk_attn", "topk_attention": {"version": 1, "ratio": 0.05, "min_keys": 8, "max_keys": 64,
"select": "kv_group", "sink": 4, "recent": 16, "deterministic": true, "dense_layers": [0, 2], "prefill": "topk"}})",
    R"({"model_type": "qwen2", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "use_sliding_window": false,
"sliding_window": 4096, "max_window_layers": 28, "layer_types": ["full_attention", "full_attention"],
"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
"original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": false}})",
    R"({"model_type": "qwen3", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": true,
"rope_parameters": {"type": "linear", "factor": 2}, "attn_implementation": "topk_attn",
"topk_attention": {"version": 1, "topk": 32}})"};

void read_config(const std::string& text) {
  using namespace topk_sft;
  const ModelConfig config = parse_model_config(parse_json(text, "config.json"), "config.json");
  parse_ordered_json(text, "config.json");
  if (const auto sparsity = own_sparsity(config, "config.json")) {
    const std::string block = sparsity_to_json(*sparsity).dump();
    const SparsityConfig again = sparsity_from_json(parse_json(block, "block"), config.num_layers, "block");
    if (sparsity_to_json(again).dump() != block)
      throw std::logic_error("the block does not survive a round trip");
  }
}

}  // namespace

int main(int argc, char** argv) {
  topk_fuzz::Fuzzer fuzzer;
  fuzzer.name = "config";
  fuzzer.seeds = kConfigs;
  fuzzer.target = read_config;
  fuzzer.mutate = [](const std::string& seed, topk_fuzz::Random& random) {
    return random.below(8) == 0 ? topk_fuzz::mutate_bytes(seed, kConfigs, random)
                                : topk_fuzz::mutate_text(seed, kConfigs, random);
  };
  return topk_fuzz::run_fuzzer(fuzzer, argc, argv);
}
