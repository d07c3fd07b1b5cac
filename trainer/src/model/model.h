// The causal language model the trainer trains and the generator decodes: Llama, Mistral, Qwen2 and Qwen3 on
// plain ATen tensors. Tokens are packed: T tokens of several documents in a row, no padding, no batch
// dimension.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "model/attention.h"
#include "model/config.h"
#include "model/lora.h"
#include "topk_attn/kv_cache.h"
#include "topk_attn/topk_attn.h"

namespace topk_sft {

// One row of packed documents. Tensors may live on any device; they are moved to the model's.
struct PackedBatch {
  at::Tensor input_ids;     // int64 (T)
  at::Tensor position_ids;  // int64 (T): position inside the document
  at::Tensor labels;        // int64 (T), already shifted: the id to be predicted at t; -100: no loss there
  at::Tensor cu_seqlens;    // int32 (docs + 1), rising from 0 to T: document d is tokens [cu[d], cu[d + 1])
  int64_t max_seqlen = 0;   // length of the longest document
};

inline constexpr int64_t kIgnoreLabel = -100;

struct AttentionSettings {
  bool topk = false;                  // false: dense everywhere, `options` and `dense_layers` are not used
  topk_attn::Options options;         // budget and selection; causal must be true
  std::vector<int64_t> dense_layers;  // layers that stay dense
  bool prefill_dense = false;         // decoding only: calls with several new tokens attend densely
};

// Settings from a config.json block or a recipe; none gives dense.
AttentionSettings attention_settings(const std::optional<SparsityConfig>& sparsity);
// And back, for config.json; none for dense.
std::optional<SparsityConfig> sparsity_config(const AttentionSettings& settings);

struct LoadOptions {
  at::ScalarType dtype =
      at::kFloat;  // of the parameters and the arithmetic: float32, bfloat16 (float64: tests)
  at::Device device = at::kCPU;
  // Filled, if not null, with the float32 values of the parameters before they are rounded to `dtype`.
  std::vector<at::Tensor>* masters = nullptr;
};

// What the backward computes again instead of keeping it.
enum class Recompute {
  kNothing,
  kAllButAttention,  // keeps each layer's input and what attention returns, with its selection
  kAll,              // keeps each layer's input
};

// What decoding keeps between calls. Made by CausalLM::make_kv_state; the members are the operator's
// arguments.
struct KvState {
  std::vector<at::Tensor> k;          // per layer (B, S, Hkv, D), model dtype
  std::vector<at::Tensor> v;          // per layer (B, S, Hkv, D)
  at::Tensor cache_seqlens;           // int32 (B): tokens in the cache, padding included
  std::optional<at::Tensor> leftpad;  // int32 (B): leading tokens that are padding; set before the first call
  bool prefill_dense = false;  // calls with more than one new token attend densely (the paper's decoding
                               // experiment), single-token calls by the model's settings; starts as
                               // AttentionSettings::prefill_dense
};

class AttentionProbe;

class CausalLM {
 public:
  // Reads config.json and the weights of a Hugging Face folder. Missing, unexpected or mis-shaped tensors and
  // NaN or infinite weights are errors that name the tensor. Attention starts dense.
  static std::unique_ptr<CausalLM> load(const std::string& hf_dir, const LoadOptions& options);

  // Random weights, as transformers initialises them: normal(0, initializer_range), norms 1, biases 0.
  static std::unique_ptr<CausalLM> create(const ModelConfig& config, const LoadOptions& options,
                                          uint64_t seed);

  ~CausalLM();
  CausalLM(const CausalLM&) = delete;
  CausalLM& operator=(const CausalLM&) = delete;

  const ModelConfig& config() const;
  at::ScalarType dtype() const;
  at::Device device() const;

  void set_attention(const AttentionSettings& settings);  // Error when it cannot be honoured
  const AttentionSettings& attention() const;
  // What the layers keep (layer_checkpoint.h). `offload`: what is kept waits in pinned host memory; only on a
  // CUDA device. `chunk_tokens`: tokens at a time outside attention, 0: by the model's size; gradients are
  // the same to the bit where one chunk holds all tokens.
  void set_activation_checkpointing(Recompute recompute, bool offload = false, int64_t chunk_tokens = 0);

  // Freezes all parameters and gives the maps that `lora` names an adapter, in the model's dtype: A uniform
  // within 1 / sqrt(in), drawn from `seed`, B zero. `masters`, if not null, gets their float32 values.
  void add_lora(const LoraOptions& lora, uint64_t seed, std::vector<at::Tensor>* masters = nullptr);
  // What trains: the adapters' A and B, named <map>.lora_A.weight and <map>.lora_B.weight, layer by layer;
  // all parameters without adapters.
  std::vector<std::pair<std::string, at::Tensor>> trained_parameters() const;
  // A parameter of named_parameters() with its adapter merged in: the sum is taken in float32 and rounded
  // once.
  at::Tensor merged(const std::string& name) const;

  // Records attention entropies in the next forward passes that compute gradients; null: no more.
  void set_attention_probe(std::shared_ptr<AttentionProbe> probe);

  // Hugging Face names, a tied weight once (as model.embed_tokens.weight), in a fixed order: embedding,
  // layers, final norm, lm_head. The tensors are the model's own leaves: updating them in place updates the
  // model.
  std::vector<std::pair<std::string, at::Tensor>> named_parameters() const;

  // For a model whose parameters are not all in memory: called around each layer of the packed forward, with
  // its number and the hidden states, which they return; their gradients are asked for in the backward.
  // Empty: none.
  struct LayerHooks {
    std::function<at::Tensor(int64_t, const at::Tensor&)> enter, leave;
  };
  void set_layer_hooks(LayerHooks hooks);
  // For sequence parallelism: batches hold one of `ranks` equal parts of the tokens whose documents
  // cu_seqlens bounds, and `attention` makes attention over a part of attention over all tokens.
  using AttentionOfPart =
      std::function<std::shared_ptr<const PackedAttention>(std::shared_ptr<const PackedAttention>)>;
  void set_sequence_parallel(int64_t ranks, AttentionOfPart attention);

  // (T, hidden_size) after the final norm.
  at::Tensor hidden_states(const PackedBatch& batch) const;
  // hidden (..., hidden_size) -> (..., vocab_size), model dtype.
  at::Tensor logits(const at::Tensor& hidden) const;
  // Sum of the cross-entropy over labels != -100, a float32 scalar (float64 for a float64 model). The logits
  // exist a chunk of tokens at a time; softmax and log in float32.
  at::Tensor loss_sum(const PackedBatch& batch) const;

  // Empty caches for `batch` sequences of at most `capacity` tokens each (padding included).
  KvState make_kv_state(int64_t batch, int64_t capacity) const;
  // Appends input_ids int64 (B, Tnew) to the caches and returns the logits of the last position, (B,
  // vocab_size). Error when the cache is full. No gradient.
  at::Tensor decode(const at::Tensor& input_ids, KvState& state) const;

  // An empty cache of pages for this model; see KVCacheOptions.
  topk_attn::KVCache make_kv_cache(int64_t pages, int64_t page_size, int64_t max_length,
                                   bool key_codes = false) const;
  // The same with a cache of pages: appends input_ids int64 (B, Tnew) to the sequences of the cache's batch,
  // which must have room. Several tokens at the beginning of all sequences are attended to by the kernels of
  // training, and CUDA's dense decode steps by torch's. No gradient.
  at::Tensor decode(const at::Tensor& input_ids, topk_attn::KVCache& cache) const;

 private:
  struct Impl;
  explicit CausalLM(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace topk_sft
