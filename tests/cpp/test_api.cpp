// The public C++ functions of topk_attn.h: shapes, values against a masked dense computation, gradients,
// errors.

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <cmath>
#include <string>
#include <vector>

#include "catch_shim.h"
#include "topk_attn/topk_attn.h"

namespace {

using topk_attn::Options;

at::Tensor random(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) {
  return at::randn(shape, at::TensorOptions().dtype(at::kDouble)).to(dtype);
}

at::Tensor int32(std::vector<int> values) {
  return at::tensor(at::IntArrayRef(std::vector<int64_t>(values.begin(), values.end()))).to(at::kInt);
}

Options keep(int64_t topk) {
  Options options;
  options.topk = topk;
  return options;
}

Options share(double ratio) {
  Options options;
  options.ratio = ratio;
  return options;
}

// Kept keys (B,H,Tq,Tk) as a bool mask, from the index lists of topk_select.
at::Tensor mask_of(const at::Tensor& indices, int64_t keys) {
  const at::Tensor slots = at::where(indices < 0, at::full_like(indices, keys), indices).to(at::kLong);
  auto shape = indices.sizes().vec();
  shape.back() = keys + 1;
  at::Tensor mask = at::zeros(shape, at::kBool).scatter_(-1, slots, true);
  return mask.narrow(-1, 0, keys);
}

struct Dense {
  at::Tensor out, lse;
};

// Dense attention under a kept mask (B,H,Tq,Tk), built of differentiable torch operations.
Dense masked_dense(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& kept) {
  const int64_t group = q.size(2) / k.size(2);
  const at::Tensor kk = k.repeat_interleave(group, 2), vv = v.repeat_interleave(group, 2);
  at::Tensor z = at::einsum("bihd,bjhd->bhij", {q, kk}) / std::sqrt(static_cast<double>(q.size(3)));
  z = z.masked_fill(kept.logical_not(), -INFINITY);
  return {at::einsum("bhij,bjhd->bihd", {at::softmax(z, -1), vv}), at::logsumexp(z, -1)};
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return at::equal(a, b);
}

double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// The message of the error that f raises; empty when it raises none.
template <typename F>
std::string error_of(F f) {
  try {
    f();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

bool names(const std::string& message, const std::vector<std::string>& words) {
  for (const auto& word : words) {
    if (message.find(word) == std::string::npos) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("topk_attn_func: output and lse of the kept keys") {
  for (auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    at::manual_seed(1);
    const auto q = random({2, 12, 4, 16}, dtype), k = random({2, 15, 2, 16}, dtype),
               v = random({2, 15, 2, 24}, dtype);
    const auto result = topk_attn::topk_attn_func(q, k, v, keep(5));
    const auto chosen = topk_attn::topk_select(q, k, keep(5), std::nullopt, true);
    CHECK(result.out.sizes() == at::IntArrayRef({2, 12, 4, 24}));
    CHECK(result.lse.sizes() == at::IntArrayRef({2, 4, 12}));
    CHECK(result.out.scalar_type() == dtype);
    CHECK(result.lse.scalar_type() == (dtype == at::kDouble ? at::kDouble : at::kFloat));
    CHECK(chosen.threshold.sizes() == at::IntArrayRef({2, 4, 12}));
    CHECK(chosen.tie_index.scalar_type() == at::kInt);
    CHECK(chosen.indices.sizes() == at::IntArrayRef({2, 4, 12, 5}));
    const auto want =
        masked_dense(q.to(at::kDouble), k.to(at::kDouble), v.to(at::kDouble), mask_of(chosen.indices, 15));
    const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-5 : 2e-2;
    CHECK(distance(result.out, want.out) < tolerance);
    CHECK(distance(result.lse, want.lse) < (dtype == at::kDouble ? 1e-12 : 1e-5));
  }
}

TEST_CASE("topk_attn_func: ratio 1 is dense attention, rows without keys give zeros") {
  const auto q = random({1, 9, 2, 8}), k = random({1, 4, 1, 8}), v = random({1, 4, 1, 8});
  const auto result = topk_attn::topk_attn_func(q, k, v, share(1.0));
  CHECK(result.out.narrow(1, 0, 5).eq(0).all().item<bool>());
  CHECK(result.lse.narrow(2, 0, 5).eq(-INFINITY).all().item<bool>());
  Options all = share(1.0);
  all.causal = false;
  const auto dense = masked_dense(q, k, v, at::ones({1, 2, 9, 4}, at::kBool));
  CHECK(distance(topk_attn::topk_attn_func(q, k, v, all).out, dense.out) < 1e-5);
}

TEST_CASE("topk_attn_func: gradients of tensors that require them") {
  at::manual_seed(2);
  auto q = random({1, 14, 4, 8}, at::kDouble), k = random({1, 14, 2, 8}, at::kDouble),
       v = random({1, 14, 2, 16}, at::kDouble);
  for (const char* select : {"head", "kv_group"}) {
    Options options = keep(4);
    options.select = select;
    options.sink = 1;
    options.recent = 1;
    const auto kept = mask_of(topk_attn::topk_select(q, k, options, std::nullopt, true).indices, 14);
    std::vector<at::Tensor> grads[2];
    const auto weight = random({1, 14, 4, 16}, at::kDouble), lse_weight = random({1, 4, 14}, at::kDouble);
    for (int which = 0; which < 2; ++which) {
      std::vector<at::Tensor> in;
      for (const auto& x : {q, k, v}) in.push_back(x.detach().clone().requires_grad_());
      at::Tensor out, lse;
      if (which == 0) {
        const auto result = topk_attn::topk_attn_func(in[0], in[1], in[2], options);
        out = result.out;
        lse = result.lse;
      } else {
        const auto result = masked_dense(in[0], in[1], in[2], kept);
        out = result.out;
        lse = result.lse;
      }
      ((out * weight).sum() + (lse * lse_weight).sum()).backward();
      for (const auto& x : in) grads[which].push_back(x.grad());
    }
    for (int i = 0; i < 3; ++i) CHECK(distance(grads[0][i], grads[1][i]) < 1e-11);
  }
  const auto unused = random({1, 14, 4, 8});
  CHECK_FALSE(topk_attn::topk_attn_func(unused, random({1, 14, 2, 8}), random({1, 14, 2, 8}), keep(3))
                  .out.requires_grad());
}

TEST_CASE("topk_attn_varlen_func and packed topk_select equal the documents alone") {
  at::manual_seed(3);
  const std::vector<int> bounds = {0, 5, 5, 6, 20};
  const auto cu = int32(bounds);
  const auto q = random({20, 4, 8}), k = random({20, 2, 8}), v = random({20, 2, 8});
  Options options = share(0.3);
  options.min_keys = 2;
  const auto packed = topk_attn::topk_attn_varlen_func(q, k, v, cu, cu, 14, 14, options);
  const auto chosen = topk_attn::topk_select(q, k, options, topk_attn::Packed{cu, cu, 14, 14}, true);
  CHECK(packed.out.sizes() == at::IntArrayRef({20, 4, 8}));
  CHECK(packed.lse.sizes() == at::IntArrayRef({4, 20}));
  CHECK(chosen.threshold.sizes() == at::IntArrayRef({4, 20}));
  CHECK(chosen.indices.sizes() == at::IntArrayRef({4, 20, 5}));
  for (size_t b = 0; b + 1 < bounds.size(); ++b) {
    const int64_t begin = bounds[b], n = bounds[b + 1] - bounds[b];
    if (n == 0) continue;
    const auto qb = q.narrow(0, begin, n).unsqueeze(0), kb = k.narrow(0, begin, n).unsqueeze(0);
    const auto vb = v.narrow(0, begin, n).unsqueeze(0);
    const auto alone = topk_attn::topk_attn_func(qb, kb, vb, options);
    const auto set = topk_attn::topk_select(qb, kb, options, std::nullopt, true);
    CHECK(distance(packed.out.narrow(0, begin, n), alone.out[0]) < 1e-6);
    CHECK(same_bits(chosen.tie_index.narrow(1, begin, n), set.tie_index[0]));
    CHECK(same_bits(chosen.threshold.narrow(1, begin, n), set.threshold[0]));
    CHECK(same_bits(chosen.indices.narrow(1, begin, n).narrow(2, 0, set.indices.size(3)), set.indices[0]));
  }
}

TEST_CASE("topk_select_scores") {
  const float nan = NAN;
  const auto scores = at::tensor({1.0f, nan, 3.0f, 3.0f, -0.0f, 0.0f}).reshape({1, 6});
  const auto chosen = topk_attn::topk_select_scores(scores, 3);
  CHECK(same_bits(chosen.indices, int32({1, 2, 3}).reshape({1, 3})));
  CHECK(chosen.threshold.item<float>() == 3.0f);
  CHECK(chosen.tie_index.item<int>() == 3);
  const auto shorter = topk_attn::topk_select_scores(scores, 3, int32({1}));
  CHECK(same_bits(shorter.indices, int32({0, -1, -1}).reshape({1, 3})));
}

TEST_CASE("topk_attn_with_kvcache: contiguous and paged decode give the training forward's rows") {
  at::manual_seed(4);
  const int64_t n = 18, page = 4, pages = 5;
  const auto q = random({1, n, 4, 8}), k = random({1, n, 2, 8}), v = random({1, n, 2, 16});
  const auto whole = topk_attn::topk_attn_func(q, k, v, keep(5));
  const auto chosen = topk_attn::topk_select(q, k, keep(5), std::nullopt, true);
  const auto table = int32({3, 0, 4, 1, 2}).reshape({1, pages});
  for (bool paged : {false, true}) {
    topk_attn::Cache cache;
    cache.k_cache =
        at::full(paged ? std::vector<int64_t>{pages, page, 2, 8} : std::vector<int64_t>{1, 20, 2, 8}, NAN);
    cache.v_cache =
        at::full(paged ? std::vector<int64_t>{pages, page, 2, 16} : std::vector<int64_t>{1, 20, 2, 16}, NAN);
    if (paged) cache.block_table = table;
    for (int64_t t = 0; t < n; ++t) {
      cache.k = k.narrow(1, t, 1);
      cache.v = v.narrow(1, t, 1);
      cache.cache_seqlens = int32({static_cast<int>(t)});
      const auto step = topk_attn::topk_attn_with_kvcache(q.narrow(1, t, 1), cache, keep(5), true);
      CHECK(distance(step.out, whole.out.narrow(1, t, 1)) < 1e-6);
      CHECK(distance(step.lse, whole.lse.narrow(2, t, 1)) < 1e-6);
      CHECK(same_bits(step.indices, chosen.indices.narrow(2, t, 1)));
      CHECK(same_bits(step.threshold, chosen.threshold.narrow(2, t, 1)));
      CHECK(same_bits(step.tie_index, chosen.tie_index.narrow(2, t, 1)));
      const auto position = step.indices.to(at::kLong).clamp_min(0);
      const auto slot = paged ? table[0].to(at::kLong).index({position.div(page, "floor")}) * page +
                                    position.remainder(page)
                              : position;
      CHECK(same_bits(step.slots, at::where(step.indices < 0, at::full_like(slot, -1), slot).to(at::kInt)));
    }
  }
}

TEST_CASE("indices are empty unless asked for") {
  const auto q = random({1, 4, 2, 8}), k = random({1, 4, 1, 8});
  CHECK(topk_attn::topk_select(q, k, keep(2)).indices.numel() == 0);
  topk_attn::Cache cache;
  cache.k_cache = k;
  cache.v_cache = k;
  cache.cache_seqlens = int32({4});
  const auto result = topk_attn::topk_attn_with_kvcache(q, cache, keep(2));
  CHECK(result.indices.numel() == 0);
  CHECK(result.slots.numel() == 0);
}

TEST_CASE("budget with checked arguments") {
  CHECK(topk_attn::budget(100, share(0.07)) == 7);
  CHECK(topk_attn::budget(0, keep(3)) == 0);
  Options options = share(0.01);
  options.min_keys = 8;
  options.max_keys = 16;
  CHECK(topk_attn::budget(100, options) == 8);
  CHECK(topk_attn::budget(10'000, options) == 16);
  CHECK(names(error_of([] { topk_attn::budget(5, Options{}); }), {"topk", "ratio"}));
  CHECK(names(error_of([] { topk_attn::budget(-1, keep(3)); }), {"n", "-1"}));
}

TEST_CASE("errors name the argument, its value and what it must be") {
  const auto q = random({1, 4, 2, 8}), k = random({1, 4, 1, 8});
  auto call = [&](const Options& o) { return error_of([&] { topk_attn::topk_attn_func(q, k, k, o); }); };
  Options o;
  CHECK(names(call(o), {"topk", "ratio"}));
  CHECK(names(call(keep(0)), {"topk", "0"}));
  CHECK(names(call(share(1.5)), {"ratio", "1.5"}));
  CHECK(names(call(share(NAN)), {"ratio", "nan"}));
  o = keep(3);
  o.ratio = 0.5;
  CHECK(names(call(o), {"topk", "ratio"}));
  o = keep(3);
  o.min_keys = 5;
  o.max_keys = 4;
  CHECK(names(call(o), {"min_keys", "max_keys", "5", "4"}));
  o = keep(3);
  o.select = "tokens";
  CHECK(names(call(o), {"select", "tokens", "head", "kv_group"}));
  o = keep(3);
  o.sink = -2;
  CHECK(names(call(o), {"sink", "-2"}));
  o = keep(3);
  o.softmax_scale = 0.0;
  CHECK(names(call(o), {"softmax_scale", "0"}));
  CHECK(names(error_of([&] {
                topk_attn::topk_attn_func(random({1, 4, 2, 12}), random({1, 4, 1, 12}), k, keep(2));
              }),
              {"12", "8"}));
  CHECK(names(error_of([&] {
                topk_attn::topk_attn_func(random({1, 4, 3, 8}), random({1, 4, 2, 8}), k, keep(2));
              }),
              {"3", "2"}));
  CHECK_FALSE(error_of([&] { topk_attn::topk_attn_func(at::Tensor(), k, k, keep(2)); }).empty());
  topk_attn::Cache cache;
  cache.k_cache = k;
  cache.v_cache = k;
  cache.cache_seqlens = int32({5});
  CHECK(names(error_of([&] { topk_attn::topk_attn_with_kvcache(q, cache, keep(2)); }),
              {"cache_seqlens", "5", "4"}));
  cache.cache_seqlens = at::Tensor();
  CHECK_FALSE(error_of([&] { topk_attn::topk_attn_with_kvcache(q, cache, keep(2)); }).empty());
  cache.cache_seqlens = int32({4});
  CHECK(
      names(error_of([&] { topk_attn::topk_attn_with_kvcache(q.clone().requires_grad_(), cache, keep(2)); }),
            {"grad"}));
  const auto p = random({6, 2, 8});
  CHECK(names(error_of([&] {
                topk_attn::topk_attn_varlen_func(p, p, p, int32({0, 7}), int32({0, 6}), 7, 6, keep(2));
              }),
              {"cu_seqlens_q", "7", "6"}));
}
