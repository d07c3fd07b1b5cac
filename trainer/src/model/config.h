// config.json of a Hugging Face folder, read into plain values: Llama, Mistral, Qwen2 and Qwen3 (dense).
//
// Both spellings are read: rope_parameters / dtype (transformers 5) and rope_theta + rope_scaling /
// torch_dtype (transformers 4). Keys that transformers lets be absent get its defaults; whatever this model
// cannot honour (sliding windows, attention dropout, other activations or RoPE types, quantised weights) is
// an Error that names the file and the key. Torch-free.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "io/json.h"

namespace topk_sft {

enum class ModelFamily { kLlama, kMistral, kQwen2, kQwen3 };

enum class RopeType { kDefault, kLinear, kLlama3, kYarn };

struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 10000.0;
  double factor = 1.0;                     // linear, llama3, yarn
  double low_freq_factor = 1.0;            // llama3
  double high_freq_factor = 4.0;           // llama3
  int64_t original_max_position = 0;       // llama3, yarn: context length before the scaling
  std::optional<double> attention_factor;  // yarn: scale of cos and sin; none: from factor and the mscales
  std::optional<double> mscale;            // yarn
  std::optional<double> mscale_all_dim;    // yarn
  double beta_fast = 32.0;                 // yarn
  double beta_slow = 1.0;                  // yarn
  bool truncate = true;                    // yarn: round the correction range to whole dims
};

// The contract's budget and selection arguments as a config.json or a recipe gives them. Exactly one of topk
// and ratio is set.
struct SparsityConfig {
  std::optional<int64_t> topk;
  std::optional<double> ratio;
  int64_t min_keys = 1;
  std::optional<int64_t> max_keys;
  std::string select = "head";  // or "kv_group"
  int64_t sink = 0;
  int64_t recent = 0;
  bool deterministic = false;
  std::vector<int64_t> dense_layers;  // distinct: these layers stay dense
  bool prefill_dense = false;  // "prefill": "dense": only single-token decode steps are sparse; no training
};

struct ModelConfig {
  ModelFamily family = ModelFamily::kLlama;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position = 0;
  double rms_norm_eps = 1e-6;
  double initializer_range = 0.02;
  bool tie_embeddings = false;
  bool qkv_bias = false;  // q_proj, k_proj, v_proj
  bool o_bias = false;    // o_proj
  bool mlp_bias = false;  // gate_proj, up_proj, down_proj
  bool qk_norm = false;   // RMSNorm over head_dim of q and k, before RoPE
  RopeConfig rope;
  std::string dtype;  // as stored: "float32", "bfloat16", "float16"; empty when the file does not say
  std::string attn_implementation;               // empty when absent
  std::optional<SparsityConfig> topk_attention;  // the block of that name, when present
  std::vector<int64_t> eos_token_ids;            // eos_token_id: none, one or several
  std::optional<int64_t> bos_token_id;
  std::optional<int64_t>
      pad_token_id;  // its embedding row gets no gradient from the input side, as in transformers
};

const char* family_name(ModelFamily family);  // "llama", ...: config.json's model_type

// Reads <folder>/config.json. Throws Error.
ModelConfig read_model_config(const std::string& folder);

// The same from parsed JSON; `where` opens every message.
ModelConfig parse_model_config(const Json& json, const std::string& where);

// Checks a SparsityConfig by the contract's rules (one of topk and ratio, ranges, known select, dense_layers
// inside [0, num_layers) without repeats). `where` opens the message.
void check_sparsity(const SparsityConfig& sparsity, int64_t num_layers, const std::string& where);

// The topk_attention block as JSON, only non-default keys besides "version" and topk or ratio; and back.
OrderedJson sparsity_to_json(const SparsityConfig& sparsity);
SparsityConfig sparsity_from_json(const Json& json, int64_t num_layers, const std::string& where);

// The sparsity the folder itself asks for: none when attn_implementation is not "topk_attn" and no block is
// there. Error when only one of the two is present: transformers would run another attention than the block
// says.
std::optional<SparsityConfig> own_sparsity(const ModelConfig& config, const std::string& where);

}  // namespace topk_sft
