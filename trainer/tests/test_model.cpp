// The model's C++ face: hand-written gradients against ATen's, frozen parameters, settings, caches, exports.
// Equality with transformers is tested from Python (tests/python/test_trainer_model*.py).
#include "model/model.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/tensor.h>

#include <fstream>

#include "io/json.h"
#include "model/export_hf.h"
#include "model/functions.h"
#include "scratch.h"

using namespace topk_sft;

namespace {

constexpr auto kDouble = at::kDouble;

ModelConfig tiny(bool tied = false) {
  ModelConfig config;
  config.vocab_size = 50;
  config.hidden_size = 32;
  config.intermediate_size = 40;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.max_position = 128;
  config.tie_embeddings = tied;
  return config;
}

PackedBatch batch_of(const std::vector<int64_t>& lengths) {
  int64_t total = 0;
  std::vector<int32_t> bounds = {0};
  std::vector<at::Tensor> positions;
  PackedBatch batch;
  for (const int64_t length : lengths) {
    total += length;
    bounds.push_back(static_cast<int32_t>(total));
    positions.push_back(at::arange(length, at::kLong));
    batch.max_seqlen = std::max(batch.max_seqlen, length);
  }
  batch.input_ids = at::arange(total, at::kLong) % 50;
  batch.labels = (batch.input_ids + 1) % 50;
  batch.position_ids = at::cat(positions);
  batch.cu_seqlens = at::tensor(bounds, at::kInt);
  return batch;
}

bool close(const at::Tensor& a, const at::Tensor& b, double tolerance) {
  return (a - b).abs().max().item<double>() <= tolerance * b.abs().max().item<double>();
}

at::Tensor leaf(at::IntArrayRef sizes) {
  return at::randn(sizes, kDouble).requires_grad_(true);
}

std::vector<at::Tensor> gradients(const CausalLM& model, const PackedBatch& batch) {
  for (auto& [name, parameter] : model.named_parameters()) parameter.mutable_grad() = at::Tensor();
  model.loss_sum(batch).backward();
  std::vector<at::Tensor> grads;
  for (const auto& [name, parameter] : model.named_parameters()) grads.push_back(parameter.grad());
  return grads;
}

}  // namespace

TEST_CASE("rms_norm has ATen's value and gradient") {
  const at::Tensor x = leaf({3, 5, 16});
  const at::Tensor weight = leaf({16});
  const at::Tensor upstream = at::randn({3, 5, 16}, kDouble);
  const at::Tensor out = rms_norm(x, weight, 1e-3);
  out.backward(upstream);
  const at::Tensor grad_x = x.grad().clone();
  const at::Tensor grad_weight = weight.grad().clone();
  x.mutable_grad().zero_();
  weight.mutable_grad().zero_();
  const at::Tensor want = x * at::rsqrt((x * x).mean(-1, true) + 1e-3) * weight;
  want.backward(upstream);
  CHECK(close(out, want, 1e-12));
  CHECK(close(grad_x, x.grad(), 1e-12));
  CHECK(close(grad_weight, weight.grad(), 1e-12));
}

TEST_CASE("linear_cross_entropy_sum has ATen's value and gradient, for any upstream factor") {
  const at::Tensor hidden = leaf({37, 12});
  const at::Tensor weight = leaf({29, 12});
  const at::Tensor labels = at::randint(29, {37}, at::kLong);
  const at::Tensor loss = linear_cross_entropy_sum(hidden, weight, labels);
  (loss * 0.37).backward({}, /*retain_graph=*/true);
  const at::Tensor grad_hidden = hidden.grad().clone();
  const at::Tensor grad_weight = weight.grad().clone();
  (loss * 0.37).backward();  // once more over the same graph: twice the gradient
  CHECK(close(hidden.grad(), grad_hidden * 2, 1e-15));
  hidden.mutable_grad().zero_();
  weight.mutable_grad().zero_();
  const at::Tensor want =
      at::cross_entropy_loss(at::linear(hidden, weight), labels, std::nullopt, /*reduction=sum*/ 2) * 0.37;
  want.backward();
  CHECK(close(loss * 0.37, want, 1e-12));
  CHECK(close(grad_hidden, hidden.grad(), 1e-12));
  CHECK(close(grad_weight, weight.grad(), 1e-12));

  const at::Tensor frozen = weight.detach();
  hidden.mutable_grad().zero_();
  linear_cross_entropy_sum(hidden, frozen, labels).backward();
  CHECK(close(hidden.grad() * 0.37, grad_hidden, 1e-12));
  CHECK_FALSE(linear_cross_entropy_sum(hidden.detach(), frozen, labels).requires_grad());
}

TEST_CASE("weights drawn from a seed") {
  const auto a = CausalLM::create(tiny(), {}, 7)->named_parameters();
  const auto b = CausalLM::create(tiny(), {}, 7)->named_parameters();
  const auto c = CausalLM::create(tiny(), {}, 8)->named_parameters();
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) CHECK(a[i].second.equal(b[i].second));
  CHECK_FALSE(a[0].second.equal(c[0].second));
  CHECK(a[0].first == "model.embed_tokens.weight");
  CHECK(a.back().first == "lm_head.weight");
  CHECK(a[0].second.std().item<double>() == Approx(0.02).epsilon(0.1));
  const auto tied = CausalLM::create(tiny(true), {}, 7)->named_parameters();
  CHECK(tied.back().first == "model.norm.weight");
  CHECK(tied.size() + 1 == a.size());
  CHECK(contains(error_of([] {
                   LoadOptions options;
                   options.dtype = at::kHalf;
                   CausalLM::create(tiny(), options, 1);
                 }),
                 "must be float32, bfloat16 or float64, got Half"));
}

TEST_CASE("parameters are the model's own leaves") {
  const auto model = CausalLM::create(tiny(), {}, 1);
  const PackedBatch batch = batch_of({9, 4});
  const at::NoGradGuard no_grad;
  const double before = model->loss_sum(batch).item<double>();
  for (auto& [name, parameter] : model->named_parameters()) parameter.mul_(1.5);
  CHECK(model->loss_sum(batch).item<double>() != Approx(before));
}

TEST_CASE("checkpointing with frozen parameters") {
  const auto model = CausalLM::create(tiny(true), {}, 3);
  const PackedBatch batch = batch_of({9, 14});
  for (const auto& [name, parameter] : model->named_parameters()) {
    if (name.find("layers.0") != name.npos || name.find("up_proj") != name.npos)
      parameter.set_requires_grad(false);
  }
  const auto plain = gradients(*model, batch);
  model->set_activation_checkpointing(Recompute::kAll);
  const auto again = gradients(*model, batch);
  size_t frozen = 0;
  for (size_t i = 0; i < plain.size(); ++i) {
    REQUIRE(plain[i].defined() == again[i].defined());
    frozen += plain[i].defined() ? 0 : 1;
    if (plain[i].defined()) CHECK(plain[i].equal(again[i]));
  }
  CHECK(frozen == 10);
}

TEST_CASE("attention settings are checked and survive the way to config.json and back") {
  const auto model = CausalLM::create(tiny(), {}, 1);
  AttentionSettings settings;
  settings.topk = true;
  CHECK(contains(error_of([&] { model->set_attention(settings); }), "exactly one of topk and ratio"));
  settings.options.ratio = 0.25;
  settings.options.min_keys = 3;
  settings.options.max_keys = 9;
  settings.options.select = "kv_group";
  settings.options.sink = 1;
  settings.options.recent = 2;
  settings.options.deterministic = true;
  settings.dense_layers = {1};
  settings.prefill_dense = true;
  model->set_attention(settings);
  const std::string block = sparsity_to_json(*sparsity_config(settings)).dump();
  const auto back = attention_settings(sparsity_from_json(parse_json(block, "block"), 2, "block"));
  CHECK(sparsity_to_json(*sparsity_config(back)).dump() == block);
  CHECK(back.prefill_dense);
  CHECK(back.options.deterministic);
  CHECK_FALSE(sparsity_config(AttentionSettings()).has_value());
  CHECK(model->make_kv_state(1, 4).prefill_dense);

  settings.options.causal = false;
  CHECK(contains(error_of([&] { model->set_attention(settings); }), "causal must be true"));
  settings.options.causal = true;
  settings.options.softmax_scale = 1.0;
  CHECK(contains(error_of([&] { model->set_attention(settings); }), "softmax_scale"));
  settings.options.softmax_scale = std::nullopt;
  settings.dense_layers = {2};
  CHECK(contains(error_of([&] { model->set_attention(settings); }), "layers 0 to 1"));
}

TEST_CASE("every recipe of top-k attention at ratio 1 is dense attention") {
  LoadOptions options;
  options.dtype = kDouble;
  const auto model = CausalLM::create(tiny(), options, 5);
  const PackedBatch batch = batch_of({17, 1, 30});
  const auto dense = gradients(*model, batch);
  AttentionSettings settings;
  settings.topk = true;
  settings.options.ratio = 1.0;
  model->set_attention(settings);
  const auto sparse = gradients(*model, batch);
  for (size_t i = 0; i < dense.size(); ++i) CHECK(close(sparse[i], dense[i], 1e-9));
}

TEST_CASE("decoding checks its input and its room") {
  const auto model = CausalLM::create(tiny(), {}, 1);
  CHECK(contains(error_of([&] { model->make_kv_state(0, 4); }), "at least 1, got 0 and 4"));
  KvState foreign;
  CHECK(contains(error_of([&] {
                   model->decode(at::tensor({1}, at::kLong).view({1, 1}), foreign);
                 }),
                 "make_kv_state"));
  KvState state = model->make_kv_state(2, 4);
  CHECK(state.k.size() == 2);
  CHECK(state.k[0].sizes().vec() == std::vector<int64_t>{2, 4, 2, 8});
  const at::Tensor ids = at::tensor({1, 2, 3, 4, 5, 6}, at::kLong).view({2, 3});
  CHECK(contains(error_of([&] { model->decode(ids.narrow(0, 0, 1), state); }), "must be int64 (2, Tnew)"));
  CHECK(contains(error_of([&] { model->decode(ids.to(at::kInt), state); }), "got Int [2, 3]"));
  CHECK(contains(error_of([&] { model->decode(ids + 45, state); }), "from 0 to 49"));
  const at::Tensor logits = model->decode(ids, state);
  CHECK(logits.sizes().vec() == std::vector<int64_t>{2, 50});
  CHECK_FALSE(logits.requires_grad());
  CHECK(state.cache_seqlens.equal(at::tensor({3, 3}, at::kInt)));
  CHECK(contains(error_of([&] { model->decode(ids, state); }),
                 "holds 3 tokens of at most 4; 3 more do not fit"));
  CHECK(state.cache_seqlens.equal(at::tensor({3, 3}, at::kInt)));
  ModelConfig odd = tiny();
  odd.head_dim = 12;
  const auto no_operator = CausalLM::create(odd, {}, 1);
  CHECK(contains(error_of([&] { no_operator->make_kv_state(1, 4); }), "multiple of 8"));
}

TEST_CASE("export replaces a folder only when asked, and only by a whole one") {
  ScratchFolder scratch;
  const std::string source = scratch / "source";
  const std::string target = scratch / "target";
  std::filesystem::create_directory(source);
  std::ofstream(source + "/config.json")
      << R"({"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,)"
      << R"("num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32"})";
  std::ofstream(source + "/tokenizer.json") << "{}";
  const auto model = CausalLM::create(tiny(), {}, 1);
  export_hf(*model, source, target, {});
  const auto loaded = CausalLM::load(target, {})->named_parameters();
  const auto parameters = model->named_parameters();
  for (size_t i = 0; i < parameters.size(); ++i) CHECK(loaded[i].second.equal(parameters[i].second));

  CHECK(contains(error_of([&] { export_hf(*model, source, target, {}); }), "not empty"));
  {
    const at::NoGradGuard no_grad;
    parameters[3].second.fill_(NAN);
  }
  const std::string message = error_of([&] { export_hf(*model, source, target, {}, /*replace=*/true); });
  CHECK(contains(message, parameters[3].first));
  CHECK(CausalLM::load(target, {})
            ->named_parameters()[3]
            .second.equal(loaded[3].second));  // the old one is whole
  {
    const at::NoGradGuard no_grad;
    parameters[3].second.fill_(0.5);
  }
  export_hf(*model, source, target, {}, /*replace=*/true);
  CHECK(CausalLM::load(target, {})->named_parameters()[3].second.eq(0.5).all().item<bool>());
  CHECK(std::distance(std::filesystem::directory_iterator(scratch.path), {}) == 2);

  ModelConfig other = tiny();
  other.num_layers = 3;
  const auto larger = CausalLM::create(other, {}, 1);
  CHECK(
      contains(error_of([&] { export_hf(*larger, source, scratch / "x", {}); }), "describes another model"));
}
