// Runs a model on given tokens and writes what came out, for comparison with other implementations.
//
//   topk-model-probe MODEL_DIR INPUT.safetensors OUTPUT.safetensors [key=value ...]
//
// INPUT: input_ids, position_ids, labels int64 (T), cu_seqlens int32 (docs + 1)
//        -> loss, logits (T, V), hidden (T, N), grad.<parameter> of loss_sum
//        with lora=: adapter.<name> float32, the values of A and B, whose gradients are written instead
//        with probe=: probe.entropy and probe.kept_mass (layers)
//        decode_ids int64 (B, T), optional leftpad int32 (B)
//        -> decode_logits (T - prefill + 1, B, V): after a first call with `prefill` tokens, then one by one
// keys:  dtype=float32|bfloat16|float64   device=cpu|cuda[:N]   attention=dense|own|{JSON block}
//        recompute=all|all_but_attention (default: nothing)   deterministic=0|1   prefill=N
//        chunk_tokens=N   offload=0|1   lora={"r": N, "alpha": x, "targets": [...]}   probe={JSON block}
//        capacity=N (of the cache; default T)   export=DIR   max_shard_bytes=N
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <map>

#include "io/error.h"
#include "io/json.h"
#include "model/export_hf.h"
#include "model/model.h"
#include "model/probe.h"
#include "model/tensor_io.h"

namespace {
using namespace topk_sft;

at::ScalarType parse_dtype(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float64") return at::kDouble;
  fail("dtype is {}: it must be float32, bfloat16 or float64", name);
}

AttentionSettings parse_attention(const std::string& value, const ModelConfig& config) {
  if (value == "dense") return {};
  if (value == "own") return attention_settings(own_sparsity(config, "config.json"));
  return attention_settings(
      sparsity_from_json(parse_json(value, "attention"), config.num_layers, "attention"));
}

void run(const std::string& model_dir, const std::string& input, const std::string& output,
         std::map<std::string, std::string> options) {
  LoadOptions load;
  load.dtype = parse_dtype(options.contains("dtype") ? options["dtype"] : "float32");
  if (options.contains("device")) load.device = at::Device(options["device"]);
  const auto model = CausalLM::load(model_dir, load);
  AttentionSettings attention =
      parse_attention(options.contains("attention") ? options["attention"] : "dense", model->config());
  if (options["deterministic"] == "1") {
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    attention.options.deterministic = true;
  }
  model->set_attention(attention);
  const std::string& recompute = options["recompute"];
  const Recompute again = recompute == "all"                 ? Recompute::kAll
                          : recompute == "all_but_attention" ? Recompute::kAllButAttention
                                                             : Recompute::kNothing;
  const int64_t chunk_tokens = options.contains("chunk_tokens") ? std::stoll(options["chunk_tokens"]) : 0;
  model->set_activation_checkpointing(again, options["offload"] == "1", chunk_tokens);

  const SafetensorsFile file(input);
  const auto tensor = [&](const std::string& name) { return read_tensor(file, file.at(name)); };
  if (options.contains("lora")) {
    const Json json = parse_json(options["lora"], "lora");
    model->add_lora({json.at("r").get<int64_t>(), json.at("alpha").get<double>(),
                     json.at("targets").get<std::vector<std::string>>()},
                    /*seed=*/1);
    const at::NoGradGuard no_grad;
    for (auto& [name, parameter] : model->trained_parameters()) {
      if (file.find("adapter." + name) != nullptr) parameter.copy_(tensor("adapter." + name));
    }
  }
  if (options.contains("export")) {
    const int64_t shard =
        options.contains("max_shard_bytes") ? std::stoll(options["max_shard_bytes"]) : kMaxShardBytes;
    export_hf(*model, model_dir, options["export"], model->attention(), /*replace=*/false, shard);
  }

  std::vector<std::pair<std::string, at::Tensor>> results;
  if (file.find("input_ids") != nullptr) {
    PackedBatch batch{tensor("input_ids"), tensor("position_ids"), tensor("labels"), tensor("cu_seqlens"), 0};
    const at::Tensor lengths = batch.cu_seqlens.diff();
    batch.max_seqlen = lengths.max().item<int64_t>();
    std::shared_ptr<AttentionProbe> probe;
    if (options.contains("probe")) {
      probe = std::make_shared<AttentionProbe>(parse_attention(options["probe"], model->config()).options);
      model->set_attention_probe(probe);
    }
    const at::Tensor loss = model->loss_sum(batch);
    loss.backward();
    results.emplace_back("loss", loss.detach());
    if (probe != nullptr) {
      const AttentionProbeResult seen = probe->result();
      results.emplace_back("probe.entropy", at::tensor(seen.entropy, at::kDouble));
      results.emplace_back("probe.kept_mass", at::tensor(seen.kept_mass, at::kDouble));
    }
    for (const auto& [name, parameter] : model->trained_parameters()) {
      if (!parameter.grad().defined()) fail("{} got no gradient", name);
      results.emplace_back("grad." + name, parameter.grad());
    }
    const at::NoGradGuard no_grad;
    const at::Tensor hidden = model->hidden_states(batch);
    results.emplace_back("hidden", hidden);
    results.emplace_back("logits", model->logits(hidden));
    results.emplace_back("loss_without_grad", model->loss_sum(batch));
  }
  if (file.find("decode_ids") != nullptr) {
    const at::Tensor ids = tensor("decode_ids");
    const int64_t prefill = options.contains("prefill") ? std::stoll(options["prefill"]) : 1;
    const int64_t capacity = options.contains("capacity") ? std::stoll(options["capacity"]) : ids.size(1);
    KvState state = model->make_kv_state(ids.size(0), capacity);
    if (file.find("leftpad") != nullptr) state.leftpad = tensor("leftpad").to(load.device);
    std::vector<at::Tensor> logits = {model->decode(ids.narrow(1, 0, prefill), state)};
    for (int64_t t = prefill; t < ids.size(1); ++t)
      logits.push_back(model->decode(ids.narrow(1, t, 1), state));
    results.emplace_back("decode_logits", at::stack(logits));
  }

  SafetensorsWriter writer(output);
  for (const auto& [name, value] : results) declare_tensor(writer, name, value);
  for (const auto& [name, value] : results) write_tensor(writer, name, value);
  writer.commit();
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> options;
  for (int i = 4; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    if (equals == std::string::npos) argc = 0;
    options[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  if (argc < 4) {
    std::fputs("usage: topk-model-probe MODEL_DIR INPUT.safetensors OUTPUT.safetensors [key=value ...]\n",
               stderr);
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3], options);
  } catch (const std::exception& error) {
    fmt::print(stderr, "topk-model-probe: error: {}\n", error.what());
    return 1;
  }
  return 0;
}
