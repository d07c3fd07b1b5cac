// Schedules and AdamW against formulas written out here.
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch_shim.h"
#include "io/error.h"
#include "optim/adamw.h"
#include "optim/schedule.h"
#include "recipe/recipe.h"

using namespace topk_sft;

TEST_CASE("schedules at their corners", "[optim]") {
  Schedule s;
  s.peak = 2.0;
  s.total_steps = 110;
  s.warmup_steps = 10;
  for (const char* kind : {"cosine", "linear", "constant", "wsd"}) {
    s.kind = kind;
    s.decay_steps = 20;
    INFO(kind);
    CHECK(s.learning_rate(0) == 0.0);
    CHECK(s.learning_rate(5) == Approx(1.0));
    CHECK(s.learning_rate(10) == Approx(2.0));
  }
  s.kind = "cosine";
  CHECK(s.learning_rate(60) == Approx(1.0));
  CHECK(s.learning_rate(110) == Approx(0.0).margin(1e-12));
  s.min_ratio = 0.1;
  CHECK(s.learning_rate(60) == Approx(2 * (0.5 * 0.9 + 0.1)));
  CHECK(s.learning_rate(110) == Approx(0.2));
  s.kind = "linear";
  CHECK(s.learning_rate(35) == Approx(2 * (0.75 * 0.9 + 0.1)));
  s.kind = "constant";
  CHECK(s.learning_rate(109) == 2.0);
  s.kind = "wsd";
  CHECK(s.learning_rate(89) == 2.0);
  CHECK(s.learning_rate(100) == Approx(2 * (0.5 * 0.9 + 0.1)));
  s.decay_shape = "linear";
  CHECK(s.learning_rate(95) == Approx(2 * (0.75 * 0.9 + 0.1)));
  s.decay_shape = "sqrt";
  CHECK(s.learning_rate(95) == Approx(2 * (0.5 * 0.9 + 0.1)));
}

TEST_CASE("schedules of a recipe", "[optim]") {
  OptimSection o;
  CHECK(make_schedule(o, 10).warmup_steps == 0);
  o.warmup_ratio = 0.03;
  CHECK(make_schedule(o, 10).warmup_steps == 1);
  CHECK(make_schedule(o, 100).warmup_steps == 3);
  o.warmup_ratio.reset();
  o.warmup_steps = 4;
  o.lr_scheduler = "wsd";
  CHECK(make_schedule(o, 20).decay_steps == 2);
  o.decay_ratio = 0.25;
  CHECK(make_schedule(o, 20).decay_steps == 5);
  o.decay_ratio.reset();
  o.decay_steps = 17;
  CHECK_THROWS_AS(make_schedule(o, 20), Error);
  CHECK(make_schedule(o, 21).decay_steps == 17);
}

TEST_CASE("which parameters decay", "[optim]") {
  CHECK(AdamW::decays("model.layers.0.mlp.up_proj.weight", 2, false));
  CHECK_FALSE(AdamW::decays("model.norm.weight", 1, false));
  CHECK_FALSE(AdamW::decays("model.layers.0.self_attn.q_proj.bias", 1, true));
  CHECK_FALSE(AdamW::decays("model.embed_tokens.weight", 2, false));
  CHECK(AdamW::decays("model.embed_tokens.weight", 2, true));
  CHECK_FALSE(AdamW::decays("lm_head.weight", 2, false));
}

namespace {

// One value under AdamW, in double.
struct Reference {
  double w, m = 0, v = 0;
  int t = 0;
  void step(double g, double lr, const AdamWOptions& o, double decay) {
    ++t;
    w -= lr * decay * w;
    m = o.beta1 * m + (1 - o.beta1) * g;
    v = o.beta2 * v + (1 - o.beta2) * g * g;
    w -= lr * (m / (1 - std::pow(o.beta1, t))) / (std::sqrt(v / (1 - std::pow(o.beta2, t))) + o.epsilon);
  }
};

at::Tensor leaf(const at::Tensor& values) {
  return values.clone().requires_grad_(true);
}

void add_gradient(const at::Tensor& parameter, const at::Tensor& gradient) {
  parameter.mul(gradient.to(parameter.scalar_type())).sum().backward();
}

}  // namespace

TEST_CASE("AdamW in float32", "[optim]") {
  AdamWOptions o;
  o.beta2 = 0.99;
  o.weight_decay = 0.1;
  const at::Tensor matrix = leaf(at::full({2, 3}, 1.5));
  const at::Tensor vector = leaf(at::full({3}, 1.5));
  AdamW adam({{"w", matrix}, {"norm", vector}}, o);
  Reference decayed{1.5}, plain{1.5};
  for (int step = 0; step < 5; ++step) {
    const double g = 0.3 - 0.1 * step;
    adam.zero_grad();
    for (const double part : {0.25, 0.75}) {  // two micro-batches
      add_gradient(matrix, at::full({2, 3}, g * part));
      add_gradient(vector, at::full({3}, g * part));
      adam.accumulate();
    }
    CHECK(adam.grad_norm().item<double>() == Approx(std::abs(g) * 3).margin(1e-6));
    adam.step(0.01);
    decayed.step(g, 0.01, o, 0.1);
    plain.step(g, 0.01, o, 0.0);
    CHECK(matrix[1][2].item<double>() == Approx(decayed.w).epsilon(1e-5));
    CHECK(vector[0].item<double>() == Approx(plain.w).epsilon(1e-5));
  }
  CHECK(adam.updates() == 5);
}

TEST_CASE("bfloat16 parameters move by their float32 masters", "[optim]") {
  // Updates far below bfloat16's spacing under 1 (1/256): only a float32 master can add them up.
  AdamWOptions o;
  const at::Tensor parameter = leaf(at::ones({4, 4}, at::kBFloat16));
  AdamW adam({{"w", parameter}}, o);
  for (int step = 0; step < 100; ++step) {
    adam.zero_grad();
    add_gradient(parameter, at::ones({4, 4}));
    adam.accumulate();
    CHECK_FALSE(parameter.grad().defined());
    adam.step(1e-4);
  }
  CHECK(adam.masters()[0].second.scalar_type() == at::kFloat);
  CHECK(adam.masters()[0].second[0][0].item<double>() == Approx(0.99).epsilon(1e-5));
  CHECK(parameter[0][0].item<double>() == 0.98828125);  // 0.99 rounded to bfloat16
}

TEST_CASE("bfloat16 gradients are added up in float32", "[optim]") {
  const at::Tensor parameter = leaf(at::ones({1, 1}, at::kBFloat16));
  AdamW adam({{"w", parameter}}, {});
  adam.zero_grad();
  for (int i = 0; i < 1024; ++i) {  // in bfloat16 the sum would stop at 256
    add_gradient(parameter, at::ones({1, 1}));
    adam.accumulate();
  }
  CHECK(adam.grad_norm().item<double>() == 1024.0);
  adam.scale_gradients(0.5);
  CHECK(adam.grad_norm().item<double>() == 512.0);
  adam.zero_grad();
  CHECK(adam.grad_norm().item<double>() == 0.0);
}

TEST_CASE("given masters replace the rounded parameters", "[optim]") {
  const at::Tensor start = at::full({2, 2}, 1.001);
  const at::Tensor parameter = leaf(start.to(at::kBFloat16));
  const AdamW adam({{"w", parameter}}, {}, {start});
  CHECK(adam.masters()[0].second.equal(start));
  CHECK(parameter[0][0].item<double>() == 1.0);
}

TEST_CASE("the non-finite gradient nearest to the loss is named", "[optim]") {
  const at::Tensor a = leaf(at::ones({2, 2}));
  const at::Tensor b = leaf(at::ones({2}));
  AdamW adam({{"a", a}, {"b", b}}, {});
  adam.zero_grad();
  add_gradient(a, at::ones({2, 2}));
  add_gradient(b, at::ones({2}));
  CHECK(adam.nonfinite_gradient().empty());
  add_gradient(a, at::full({2, 2}, std::numeric_limits<float>::infinity()));
  CHECK(adam.nonfinite_gradient() == "a");
  CHECK(std::isinf(adam.grad_norm().item<double>()));
  add_gradient(b, at::full({2}, std::nan("")));
  CHECK(adam.nonfinite_gradient() == "b");
}

TEST_CASE("restore puts weights and moments back to the bit", "[optim]") {
  const at::Tensor p = leaf(at::linspace(-1, 1, 6).view({2, 3}).to(at::kBFloat16));
  AdamW adam({{"w", p}}, {});
  const auto advance = [&](AdamW& optimizer, const at::Tensor& parameter) {
    optimizer.zero_grad();
    add_gradient(parameter, at::linspace(1, 2, 6).view({2, 3}));
    optimizer.accumulate();
    optimizer.step(0.01);
  };
  advance(adam, p);
  advance(adam, p);
  const at::Tensor master = adam.masters()[0].second.clone();
  const at::Tensor m = adam.exp_avg()[0].second.clone();
  const at::Tensor v = adam.exp_avg_sq()[0].second.clone();
  advance(adam, p);

  const at::Tensor q = leaf(at::zeros({2, 3}, at::kBFloat16));
  AdamW other({{"w", q}}, {});
  other.restore(2, {master}, {m}, {v});
  advance(other, q);
  CHECK(q.equal(p));
  CHECK(other.updates() == 3);
  CHECK(other.masters()[0].second.equal(adam.masters()[0].second));
  CHECK(other.exp_avg()[0].second.equal(adam.exp_avg()[0].second));
  CHECK(other.exp_avg_sq()[0].second.equal(adam.exp_avg_sq()[0].second));
  CHECK_THROWS_AS(other.restore(2, {}, {}, {}), Error);
}
