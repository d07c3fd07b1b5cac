// CausalLM: parameters, the packed forward with its loss, and decoding with a KV cache.
#include "model/model.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>

#include "io/error.h"
#include "model/attention.h"
#include "model/functions.h"
#include "model/layer.h"
#include "model/layer_checkpoint.h"
#include "model/offload.h"
#include "model/probe.h"
#include "model/weights.h"

namespace topk_sft {

struct CausalLM::Impl {
  ModelConfig config;
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
  std::vector<std::pair<std::string, at::Tensor>> parameters;

  at::Tensor embedding;  // (vocab, hidden)
  std::vector<Layer> layers;
  at::Tensor final_norm;  // (hidden)
  at::Tensor lm_head;     // (vocab, hidden); the embedding itself when tied
  at::Tensor inv_freq;    // float32 (head_dim / 2)
  double rope_scaling = 1.0;

  AttentionSettings attention;
  std::vector<bool> layer_is_sparse;
  Recompute recompute = Recompute::kNothing;
  int64_t chunk_tokens = 0;
  std::unique_ptr<Offload> offload;
  std::shared_ptr<AttentionProbe> probe;

  std::vector<std::pair<std::string, at::Tensor>> adapters;  // A and B by turns
  std::map<std::string, const Linear*> adapted;              // by the name of the weight

  LayerHooks hooks;
  int64_t sequence_ranks = 1;
  AttentionOfPart sequence_attention;

  Impl(const ModelConfig& model_config, const LoadOptions& options);
  void bind_parameters();
  // Takes the values of the next parameter, in any dtype, on the CPU.
  void add_parameter(const std::string& name, const at::Tensor& values, const LoadOptions& options);
  // The logits of the last position, (B, vocab): `attend` is called layer by layer.
  using LayerAttend =
      std::function<at::Tensor(size_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v)>;
  at::Tensor decode(const at::Tensor& input_ids, const at::Tensor& positions,
                    const LayerAttend& attend) const;
  at::Tensor embed(const at::Tensor& ids) const {
    return at::embedding(embedding, ids, config.pad_token_id.value_or(-1));
  }
};

namespace {

// A PackedBatch on the model's device, checked; `bounds` is cu_seqlens on the host, filled when asked for.
struct Packing {
  at::Tensor ids;
  at::Tensor positions;
  at::Tensor cu_seqlens;
  std::vector<int64_t> bounds;
};

void check_vector(const at::Tensor& tensor, const char* name, at::ScalarType dtype, int64_t size) {
  if (!tensor.defined() || tensor.scalar_type() != dtype || tensor.dim() != 1 ||
      (size >= 0 && tensor.size(0) != size)) {
    fail("batch: {} must be {} ({}), got {}", name, c10::toString(dtype),
         size >= 0 ? std::to_string(size) : "T",
         tensor.defined()
             ? fmt::format("{} {}", c10::toString(tensor.scalar_type()), shape_string(tensor.sizes().vec()))
             : "nothing");
  }
}

// Values are checked where that costs no synchronisation.
void check_range(const at::Tensor& tensor, const char* name, int64_t low, int64_t high) {
  if (!tensor.device().is_cpu() || tensor.numel() == 0) return;
  const int64_t least = tensor.min().item<int64_t>();
  const int64_t most = tensor.max().item<int64_t>();
  if (least < low || most > high) {
    fail("batch: {} has values from {} to {}: they must lie from {} to {}", name, least, most, low, high);
  }
}

std::vector<int64_t> check_bounds(const at::Tensor& cu_seqlens, int64_t tokens, int64_t max_seqlen) {
  const at::Tensor host = cu_seqlens.to(at::kCPU).to(at::kLong).contiguous();
  std::vector<int64_t> bounds(host.const_data_ptr<int64_t>(), host.const_data_ptr<int64_t>() + host.numel());
  const bool rising = std::is_sorted(bounds.begin(), bounds.end());
  if (bounds.size() < 2 || bounds.front() != 0 || bounds.back() != tokens || !rising) {
    fail("batch: cu_seqlens must rise from 0 to the number of tokens, {}", tokens);
  }
  for (size_t d = 0; d + 1 < bounds.size(); ++d) {
    if (bounds[d + 1] - bounds[d] > max_seqlen) {
      fail("batch: max_seqlen is {}, but document {} has {} tokens", max_seqlen, d,
           bounds[d + 1] - bounds[d]);
    }
  }
  return bounds;
}

// Nothing waits for the copy if the tensor is in pinned memory.
at::Tensor on_device(const at::Tensor& tensor, at::Device device) {
  return tensor.to(at::TensorOptions().device(device), /*non_blocking=*/true);
}

Packing check_batch(const PackedBatch& batch, const ModelConfig& config, at::Device device, bool need_bounds,
                    int64_t sequence_ranks) {
  check_vector(batch.input_ids, "input_ids", at::kLong, -1);
  const int64_t tokens = batch.input_ids.size(0);
  if (tokens == 0) fail("batch: input_ids is empty");
  check_vector(batch.position_ids, "position_ids", at::kLong, tokens);
  check_vector(batch.cu_seqlens, "cu_seqlens", at::kInt, -1);
  check_range(batch.input_ids, "input_ids", 0, config.vocab_size - 1);
  check_range(batch.position_ids, "position_ids", 0, INT64_MAX);
  Packing packing{on_device(batch.input_ids, device),
                  on_device(batch.position_ids, device),
                  on_device(batch.cu_seqlens, device),
                  {}};
  if (need_bounds || batch.cu_seqlens.device().is_cpu()) {
    packing.bounds = check_bounds(batch.cu_seqlens, tokens * sequence_ranks, batch.max_seqlen);
  }
  return packing;
}

// Every visible key kept: dense attention through the top-k operator.
topk_attn::Options keep_all() {
  topk_attn::Options options;
  options.ratio = 1.0;
  return options;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------
// Parameters
// ---------------------------------------------------------------------------------------------------------------

CausalLM::Impl::Impl(const ModelConfig& model_config, const LoadOptions& options)
    : config(model_config),
      dtype(options.dtype),
      device(options.device),
      layer_is_sparse(config.num_layers, false) {
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kDouble) {
    fail("the model's dtype must be float32, bfloat16 or float64, got {}", c10::toString(dtype));
  }
  RopeFrequencies rope = rope_frequencies(config.rope, config.head_dim);
  const auto count = static_cast<int64_t>(rope.inv_freq.size());
  inv_freq = at::from_blob(rope.inv_freq.data(), {count}, at::kFloat).clone().to(device);
  rope_scaling = rope.attention_scaling;
}

void CausalLM::Impl::add_parameter(const std::string& name, const at::Tensor& values,
                                   const LoadOptions& options) {
  if (options.masters == nullptr) {
    parameters.emplace_back(name, values.to(options.dtype).to(options.device));
    return;
  }
  const at::Tensor there = values.to(options.device);
  options.masters->push_back(there.to(at::kFloat));
  parameters.emplace_back(name, there.to(options.dtype));
}

void CausalLM::Impl::bind_parameters() {
  size_t next = 0;
  const auto take = [&]() -> at::Tensor {
    at::Tensor& tensor = parameters.at(next++).second;
    tensor.set_requires_grad(true);
    return tensor;
  };
  const auto linear = [&](bool bias) {
    Linear map;
    map.weight = take();
    if (bias) map.bias = take();
    return map;
  };
  // The order of parameter_specs().
  embedding = take();
  layers.resize(static_cast<size_t>(config.num_layers));
  for (Layer& layer : layers) {
    layer.input_norm = take();
    layer.q = linear(config.qkv_bias);
    layer.k = linear(config.qkv_bias);
    layer.v = linear(config.qkv_bias);
    layer.o = linear(config.o_bias);
    if (config.qk_norm) {
      layer.q_norm = take();
      layer.k_norm = take();
    }
    layer.post_norm = take();
    layer.gate = linear(config.mlp_bias);
    layer.up = linear(config.mlp_bias);
    layer.down = linear(config.mlp_bias);
  }
  final_norm = take();
  lm_head = config.tie_embeddings ? embedding : take();
}

std::unique_ptr<CausalLM> CausalLM::load(const std::string& hf_dir, const LoadOptions& options) {
  auto impl = std::make_unique<Impl>(read_model_config(hf_dir), options);
  const SafetensorsFolder folder(hf_dir);
  const std::vector<ParameterSpec> specs = parameter_specs(impl->config);
  check_names(folder, specs, impl->config, hf_dir);
  const at::ScalarType dtype = options.masters != nullptr ? at::kFloat : options.dtype;
  for (const ParameterSpec& spec : specs) {
    impl->add_parameter(spec.name, read_parameter(folder, spec, dtype), options);
  }
  impl->bind_parameters();
  return std::unique_ptr<CausalLM>(new CausalLM(std::move(impl)));
}

std::unique_ptr<CausalLM> CausalLM::create(const ModelConfig& config, const LoadOptions& options,
                                           uint64_t seed) {
  auto impl = std::make_unique<Impl>(config, options);
  for (const ParameterSpec& spec : parameter_specs(config)) {
    impl->add_parameter(spec.name, draw_parameter(spec, config, seed), options);
  }
  impl->bind_parameters();
  return std::unique_ptr<CausalLM>(new CausalLM(std::move(impl)));
}

CausalLM::CausalLM(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
CausalLM::~CausalLM() = default;

const ModelConfig& CausalLM::config() const {
  return impl_->config;
}
at::ScalarType CausalLM::dtype() const {
  return impl_->dtype;
}
at::Device CausalLM::device() const {
  return impl_->device;
}
const AttentionSettings& CausalLM::attention() const {
  return impl_->attention;
}
void CausalLM::set_activation_checkpointing(Recompute recompute, bool offload, int64_t chunk_tokens) {
  if (chunk_tokens < 0) fail("checkpointing: chunk_tokens must be at least 0, got {}", chunk_tokens);
  if (offload && recompute == Recompute::kNothing) fail("offload needs activation checkpointing");
  impl_->recompute = recompute;
  impl_->chunk_tokens = chunk_tokens;
  impl_->offload = offload ? std::make_unique<Offload>(impl_->device) : nullptr;
}
void CausalLM::set_attention_probe(std::shared_ptr<AttentionProbe> probe) {
  impl_->probe = std::move(probe);
}
std::vector<std::pair<std::string, at::Tensor>> CausalLM::named_parameters() const {
  return impl_->parameters;
}
void CausalLM::set_layer_hooks(LayerHooks hooks) {
  impl_->hooks = std::move(hooks);
}
void CausalLM::set_sequence_parallel(int64_t ranks, AttentionOfPart attention) {
  const ModelConfig& config = impl_->config;
  if (config.num_kv_heads % ranks != 0) {
    fail(
        "sequence parallelism over {} ranks needs a number of KV heads that is a multiple of it, the model "
        "has {}",
        ranks, config.num_kv_heads);
  }
  impl_->sequence_ranks = ranks;
  impl_->sequence_attention = std::move(attention);
}

// ---------------------------------------------------------------------------------------------------------------
// Adapters
// ---------------------------------------------------------------------------------------------------------------

namespace {

Linear& map_of(Layer& layer, const std::string& target) {
  static const std::map<std::string, Linear Layer::*> maps = {
      {"q_proj", &Layer::q},       {"k_proj", &Layer::k},   {"v_proj", &Layer::v},      {"o_proj", &Layer::o},
      {"gate_proj", &Layer::gate}, {"up_proj", &Layer::up}, {"down_proj", &Layer::down}};
  const auto found = maps.find(target);
  if (found == maps.end()) fail("lora: there is no map {}", printable(target));
  return layer.*found->second;
}

}  // namespace

void CausalLM::add_lora(const LoraOptions& lora, uint64_t seed, std::vector<at::Tensor>* masters) {
  Impl& m = *impl_;
  if (!m.adapters.empty()) fail("lora: the model has adapters already");
  if (lora.rank < 1) fail("lora: the rank must be at least 1, got {}", lora.rank);
  if (lora.targets.empty()) fail("lora: there is no map to adapt");
  for (auto& [name, parameter] : m.parameters) parameter.set_requires_grad(false);
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const auto add = [&](const std::string& name, const at::Tensor& values) {
    const at::Tensor there = values.to(m.device);
    if (masters != nullptr) masters->push_back(there);
    at::Tensor parameter = there.to(m.dtype, /*non_blocking=*/false, /*copy=*/true);
    parameter.set_requires_grad(true);
    m.adapters.emplace_back(name, parameter);
    return parameter;
  };
  for (size_t i = 0; i < m.layers.size(); ++i) {
    // In the order of kLoraTargets, whatever the order of the request.
    for (const std::string target : kLoraTargets) {
      if (std::count(lora.targets.begin(), lora.targets.end(), target) == 0) continue;
      Linear& map = map_of(m.layers[i], target);
      const int64_t out = map.weight.size(0);
      const int64_t in = map.weight.size(1);
      const char* block =
          target.ends_with("o_proj") || target[0] == 'q' || target[0] == 'k' || target[0] == 'v' ? "self_attn"
                                                                                                 : "mlp";
      const std::string name = fmt::format("model.layers.{}.{}.{}", i, block, target);
      const double bound = 1.0 / std::sqrt(static_cast<double>(in));
      map.lora_a =
          add(name + ".lora_A.weight", at::empty({lora.rank, in}).uniform_(-bound, bound, generator));
      map.lora_b = add(name + ".lora_B.weight", at::zeros({out, lora.rank}));
      map.lora_scaling = lora.scaling();
      m.adapted[name + ".weight"] = &map;
    }
  }
  for (const std::string& target : lora.targets) map_of(m.layers.front(), target);  // known, all of them
}

std::vector<std::pair<std::string, at::Tensor>> CausalLM::trained_parameters() const {
  return impl_->adapters.empty() ? impl_->parameters : impl_->adapters;
}

at::Tensor CausalLM::merged(const std::string& name) const {
  const Impl& m = *impl_;
  const at::NoGradGuard no_grad;
  if (const auto found = m.adapted.find(name); found != m.adapted.end()) {
    const Linear& map = *found->second;
    const at::ScalarType wide = m.dtype == at::kDouble ? at::kDouble : at::kFloat;
    return at::addmm(map.weight.to(wide), map.lora_b.to(wide), map.lora_a.to(wide), /*beta=*/1,
                     /*alpha=*/map.lora_scaling)
        .to(m.dtype);
  }
  for (const auto& [other, parameter] : m.parameters) {
    if (other == name) return parameter.detach();
  }
  fail("the model has no parameter {}", printable(name));
}

// ---------------------------------------------------------------------------------------------------------------
// Attention settings
// ---------------------------------------------------------------------------------------------------------------

AttentionSettings attention_settings(const std::optional<SparsityConfig>& sparsity) {
  AttentionSettings settings;
  if (!sparsity) return settings;
  settings.topk = true;
  settings.options.topk = sparsity->topk;
  settings.options.ratio = sparsity->ratio;
  settings.options.min_keys = sparsity->min_keys;
  settings.options.max_keys = sparsity->max_keys;
  settings.options.select = sparsity->select;
  settings.options.sink = sparsity->sink;
  settings.options.recent = sparsity->recent;
  settings.options.deterministic = sparsity->deterministic;
  settings.dense_layers = sparsity->dense_layers;
  settings.prefill_dense = sparsity->prefill_dense;
  return settings;
}

std::optional<SparsityConfig> sparsity_config(const AttentionSettings& settings) {
  if (!settings.topk) return std::nullopt;
  SparsityConfig sparsity;
  sparsity.topk = settings.options.topk;
  sparsity.ratio = settings.options.ratio;
  sparsity.min_keys = settings.options.min_keys;
  sparsity.max_keys = settings.options.max_keys;
  sparsity.select = settings.options.select;
  sparsity.sink = settings.options.sink;
  sparsity.recent = settings.options.recent;
  sparsity.deterministic = settings.options.deterministic;
  sparsity.dense_layers = settings.dense_layers;
  sparsity.prefill_dense = settings.prefill_dense;
  return sparsity;
}

void CausalLM::set_attention(const AttentionSettings& settings) {
  const ModelConfig& config = impl_->config;
  std::vector<bool> sparse(static_cast<size_t>(config.num_layers), settings.topk);
  if (settings.topk) {
    check_sparsity(*sparsity_config(settings), config.num_layers, "attention");
    if (!settings.options.causal) fail("attention: causal must be true in a causal language model");
    if (settings.options.softmax_scale) {
      fail("attention: softmax_scale must not be given, the model fixes it to 1 / sqrt(head_dim)");
    }
    if (config.head_dim % 8 != 0 || config.head_dim > 256) {
      fail(
          "attention: top-k attention needs a head_dim that is a multiple of 8 and at most 256, the model "
          "has {}",
          config.head_dim);
    }
    for (const int64_t layer : settings.dense_layers) sparse[static_cast<size_t>(layer)] = false;
  }
  impl_->attention = settings;
  impl_->layer_is_sparse = std::move(sparse);
}

// ---------------------------------------------------------------------------------------------------------------
// Packed forward
// ---------------------------------------------------------------------------------------------------------------

at::Tensor CausalLM::hidden_states(const PackedBatch& batch) const {
  const Impl& m = *impl_;
  if (m.attention.topk && m.attention.prefill_dense) {
    fail("attention: prefill \"dense\" is a decoding mode; the packed forward needs prefill \"topk\"");
  }
  const bool any_dense = std::count(m.layer_is_sparse.begin(), m.layer_is_sparse.end(), false) > 0;
  const bool probing = m.probe != nullptr && at::GradMode::is_enabled();
  // Shared with the checkpointed layers, which run again in the backward, after this function returned.
  const Packing packing = check_batch(batch, m.config, m.device, any_dense || probing, m.sequence_ranks);
  const auto rope =
      std::make_shared<const RopeTable>(rope_table(packing.positions, m.inv_freq, m.rope_scaling, m.dtype));
  std::shared_ptr<const PackedAttention> dense, topk;
  if (any_dense) dense = dense_attention(packing.cu_seqlens, packing.bounds);
  if (m.attention.topk) topk = topk_attention(packing.cu_seqlens, batch.max_seqlen, m.attention.options);
  if (probing) m.probe->begin(packing.bounds, m.config.num_layers, m.device);
  CheckpointOptions checkpointing;
  checkpointing.keep_attention = m.recompute == Recompute::kAllButAttention;
  checkpointing.chunk_tokens = m.chunk_tokens;
  checkpointing.offload = m.offload.get();

  at::Tensor x = m.embed(packing.ids);
  for (size_t i = 0; i < m.layers.size(); ++i) {
    std::shared_ptr<const PackedAttention> attention = m.layer_is_sparse[i] ? topk : dense;
    if (probing) attention = probed_attention(attention, m.probe, static_cast<int64_t>(i));
    if (m.sequence_ranks > 1) attention = m.sequence_attention(attention);
    if (m.hooks.enter) x = m.hooks.enter(static_cast<int64_t>(i), x);
    if (m.recompute == Recompute::kNothing) {
      x = layer_forward(m.config, m.layers[i], x, *rope,
                        [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
                          return attention->attend(q, k, v);
                        });
    } else {
      x = checkpointed_layer(m.config, m.layers[i], x, rope, attention, checkpointing);
    }
    if (m.hooks.leave) x = m.hooks.leave(static_cast<int64_t>(i), x);
  }
  return rms_norm(x, m.final_norm, m.config.rms_norm_eps);
}

at::Tensor CausalLM::logits(const at::Tensor& hidden) const {
  return at::linear(hidden, impl_->lm_head);
}

at::Tensor CausalLM::loss_sum(const PackedBatch& batch) const {
  const Impl& m = *impl_;
  check_vector(batch.input_ids, "input_ids", at::kLong, -1);
  check_vector(batch.labels, "labels", at::kLong, batch.input_ids.size(0));
  const auto to_model = [&](const at::Tensor& x) {
    return on_device(batch.labels.is_pinned() ? x.pin_memory() : x, m.device);
  };
  // Only the tokens with a loss reach the vocabulary.
  const at::Tensor kept = batch.labels.ne(kIgnoreLabel).nonzero().squeeze(1);
  const at::Tensor labels = batch.labels.index_select(0, kept);
  check_range(labels, "labels", 0, m.config.vocab_size - 1);
  at::Tensor hidden = hidden_states(batch);
  if (kept.size(0) < hidden.size(0)) hidden = hidden.index_select(0, to_model(kept));
  return linear_cross_entropy_sum(hidden, m.lm_head, to_model(labels));
}

// ---------------------------------------------------------------------------------------------------------------
// Decoding
// ---------------------------------------------------------------------------------------------------------------

namespace {

void check_new_ids(const at::Tensor& input_ids, int64_t batch, int64_t vocab_size) {
  if (input_ids.scalar_type() != at::kLong || input_ids.dim() != 2 || input_ids.size(0) != batch ||
      input_ids.size(1) < 1) {
    fail("decode: input_ids must be int64 ({}, Tnew) with Tnew >= 1, got {} {}", batch,
         c10::toString(input_ids.scalar_type()), shape_string(input_ids.sizes().vec()));
  }
  check_range(input_ids, "input_ids", 0, vocab_size - 1);
}

// Of `fresh` new tokens behind those that are there, (B, fresh).
at::Tensor new_positions(const at::Tensor& cache_seqlens, int64_t fresh) {
  return cache_seqlens.to(at::kLong).unsqueeze(1) +
         at::arange(fresh, cache_seqlens.options().dtype(at::kLong));
}

void check_cache_head_dim(int64_t head_dim) {
  if (head_dim % 8 != 0 || head_dim > 256) {
    fail("kv cache: decoding needs a head_dim that is a multiple of 8 and at most 256, the model has {}",
         head_dim);
  }
}

// Causal attention inside each of B sequences without a past: q (B, T, H, D), k and v (B, T, Hkv, D).
at::Tensor dense_prefill(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const int64_t batch = q.size(0), fresh = q.size(1);
  std::vector<int64_t> bounds;
  for (int64_t b = 0; b <= batch; ++b) bounds.push_back(b * fresh);
  const at::Tensor cu_seqlens =
      at::arange(batch + 1, q.options().dtype(at::kInt)) * static_cast<int32_t>(fresh);
  return dense_attention(cu_seqlens, bounds)
      ->attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
      .reshape(q.sizes());
}

// One query token of each sequence against its `lengths` rows: q (B, 1, H, D), k and v (B, longest, Hkv, D).
at::Tensor dense_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const std::vector<int64_t>& lengths) {
  const int64_t kv_heads = k.size(2);
  // The heads of a group become query rows: no KV head is repeated in memory.
  const bool half = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  const at::Tensor grouped = q.squeeze(1).unflatten(1, {kv_heads, q.size(2) / kv_heads});
  const auto attend = [&](int64_t first, int64_t count, int64_t length) {
    const auto rows = [&](const at::Tensor& x) {
      return x.narrow(0, first, count).narrow(1, 0, length).transpose(1, 2);
    };
    const at::Tensor queries = grouped.narrow(0, first, count);
    if (!half) return at::scaled_dot_product_attention(queries, rows(k), rows(v));
    // Not the general call: it may choose cuDNN, which builds a plan for every length, that is for every
    // token.
    return std::get<0>(at::_scaled_dot_product_flash_attention(queries, rows(k), rows(v), /*dropout_p=*/0.0,
                                                               /*is_causal=*/false));
  };
  const auto batch = static_cast<int64_t>(lengths.size());
  const bool even = std::count(lengths.begin(), lengths.end(), lengths[0]) == batch;
  std::vector<at::Tensor> parts;
  if (even) {
    parts.push_back(attend(0, batch, lengths[0]));
  } else {
    for (int64_t b = 0; b < batch; ++b) parts.push_back(attend(b, 1, lengths[static_cast<size_t>(b)]));
  }
  return (parts.size() == 1 ? parts[0] : at::cat(parts)).reshape(q.sizes());
}

}  // namespace

at::Tensor CausalLM::Impl::decode(const at::Tensor& input_ids, const at::Tensor& positions,
                                  const LayerAttend& attend) const {
  const RopeTable rope = rope_table(positions, inv_freq, rope_scaling, dtype);
  at::Tensor x = embed(input_ids.to(device));
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto attend_layer = [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
      return attend(i, q, k, v);
    };
    x = layer_forward(config, layers[i], x, rope, attend_layer);
  }
  const at::Tensor last = rms_norm(x.select(1, x.size(1) - 1), final_norm, config.rms_norm_eps);
  return at::linear(last, lm_head);
}

KvState CausalLM::make_kv_state(int64_t batch, int64_t capacity) const {
  const Impl& m = *impl_;
  if (batch < 1 || capacity < 1)
    fail("kv cache: batch and capacity must be at least 1, got {} and {}", batch, capacity);
  check_cache_head_dim(m.config.head_dim);
  KvState state;
  const at::TensorOptions options = at::TensorOptions().dtype(m.dtype).device(m.device);
  for (int64_t i = 0; i < m.config.num_layers; ++i) {
    state.k.push_back(at::zeros({batch, capacity, m.config.num_kv_heads, m.config.head_dim}, options));
    state.v.push_back(at::zeros({batch, capacity, m.config.num_kv_heads, m.config.head_dim}, options));
  }
  state.cache_seqlens = at::zeros({batch}, options.dtype(at::kInt));
  state.prefill_dense = m.attention.prefill_dense;
  return state;
}

at::Tensor CausalLM::decode(const at::Tensor& input_ids, KvState& state) const {
  const Impl& m = *impl_;
  const at::NoGradGuard no_grad;
  if (state.k.size() != m.layers.size() || state.v.size() != m.layers.size() ||
      !state.cache_seqlens.defined()) {
    fail("decode: the cache was not made by make_kv_state of a model with {} layers", m.layers.size());
  }
  check_new_ids(input_ids, state.cache_seqlens.size(0), m.config.vocab_size);
  const int64_t fresh = input_ids.size(1);
  const int64_t capacity = state.k.at(0).size(1);
  if (m.device.is_cpu()) {
    const int64_t longest = state.cache_seqlens.max().item<int64_t>();
    if (longest + fresh > capacity) {
      fail("decode: the cache holds {} tokens of at most {}; {} more do not fit", longest, capacity, fresh);
    }
  }

  at::Tensor positions = new_positions(state.cache_seqlens, fresh);
  if (state.leftpad) positions = (positions - state.leftpad->to(at::kLong).unsqueeze(1)).clamp_min(0);
  const bool dense_call = state.prefill_dense && fresh > 1;
  const at::Tensor result = m.decode(
      input_ids, positions, [&](size_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
        const bool sparse = m.layer_is_sparse[layer] && !dense_call;
        topk_attn::Cache cache;
        cache.k_cache = state.k[layer];
        cache.v_cache = state.v[layer];
        cache.k = k;
        cache.v = v;
        cache.cache_seqlens = state.cache_seqlens;
        cache.cache_leftpad = state.leftpad;
        return topk_attn::topk_attn_with_kvcache(q, cache, sparse ? m.attention.options : keep_all()).out;
      });
  state.cache_seqlens += fresh;
  return result;
}

topk_attn::KVCache CausalLM::make_kv_cache(int64_t pages, int64_t page_size, int64_t max_length,
                                           bool key_codes) const {
  const Impl& m = *impl_;
  check_cache_head_dim(m.config.head_dim);
  topk_attn::KVCacheOptions options;
  options.layers = m.config.num_layers;
  options.kv_heads = m.config.num_kv_heads;
  options.head_dim = m.config.head_dim;
  options.pages = pages;
  options.page_size = page_size;
  options.max_length = max_length;
  options.dtype = m.dtype;
  options.device = m.device;
  options.key_codes = key_codes;
  return topk_attn::KVCache(options);
}

at::Tensor CausalLM::decode(const at::Tensor& input_ids, topk_attn::KVCache& cache) const {
  const Impl& m = *impl_;
  const at::NoGradGuard no_grad;
  check_new_ids(input_ids, static_cast<int64_t>(cache.batch().size()), m.config.vocab_size);
  const int64_t fresh = input_ids.size(1);
  std::vector<int64_t> lengths;  // with the new tokens
  for (const int64_t sequence : cache.batch()) lengths.push_back(cache.length(sequence) + fresh);
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  const bool prefill = longest == fresh && fresh > 1;
  const bool dense_call = m.attention.prefill_dense && fresh > 1;
  const at::Tensor result =
      m.decode(input_ids, new_positions(cache.lengths(), fresh),
               [&](size_t index, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
                 const auto layer = static_cast<int64_t>(index);
                 const bool sparse = m.layer_is_sparse[index] && !dense_call;
                 const bool dense_on_device = !sparse && !m.device.is_cpu() && fresh == 1;
                 if (!prefill && !dense_on_device) {
                   const topk_attn::Options options = sparse ? m.attention.options : keep_all();
                   return cache.append_and_attend(layer, q, k, v, options).out;
                 }
                 cache.append(layer, k, v);
                 if (prefill && sparse) return topk_attn::topk_attn_func(q, k, v, m.attention.options).out;
                 if (prefill) return dense_prefill(q, k, v);
                 const auto [all_k, all_v] = cache.rows(layer, longest);
                 return dense_step(q, all_k, all_v, lengths);
               });
  cache.advance(fresh);
  return result;
}

}  // namespace topk_sft
