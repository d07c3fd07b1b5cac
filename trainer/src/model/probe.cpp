// The rows' scores in float32, a range of keys at a time, and what follows from them.
#include "model/probe.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "topk_attn/contract.h"

namespace topk_sft {
namespace {

constexpr int64_t kKeysAtATime = 16384;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor on(at::Device device, const std::vector<int64_t>& values) {
  return at::from_blob(const_cast<int64_t*>(values.data()), {static_cast<int64_t>(values.size())}, at::kLong)
      .to(device, at::kLong, /*non_blocking=*/false, /*copy=*/true);
}

// (Hkv, R, G, K): q (R, H, D) against the keys k (K, Hkv, D).
at::Tensor scores_of(const at::Tensor& q, const at::Tensor& k, int64_t begin, int64_t end) {
  const int64_t kv_heads = k.size(1);
  const int64_t group = q.size(1) / kv_heads;
  const at::Tensor queries =
      q.unflatten(1, {kv_heads, group}).permute({1, 0, 2, 3}).flatten(1, 2).to(at::kFloat);
  at::Tensor scores = at::empty({kv_heads, queries.size(1), end - begin}, queries.options());
  for (int64_t at = begin; at < end; at += kKeysAtATime) {
    const int64_t size = std::min(kKeysAtATime, end - at);
    const at::Tensor keys = k.narrow(0, at, size).permute({1, 2, 0}).to(at::kFloat);
    scores.narrow(2, at - begin, size).copy_(at::bmm(queries, keys));
  }
  return scores.unflatten(1, {q.size(0), group});
}

class ProbedAttention : public PackedAttention {
 public:
  ProbedAttention(std::shared_ptr<const PackedAttention> inner, std::shared_ptr<AttentionProbe> probe,
                  int64_t layer)
      : inner_(std::move(inner)), probe_(std::move(probe)), layer_(layer) {}
  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const override {
    probe_->record(layer_, q, k);
    return inner_->attend(q, k, v);
  }
  bool separable(const at::TensorOptions& heads, int64_t head_dim) const override {
    return inner_->separable(heads, head_dim);
  }
  std::vector<at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                  const at::Tensor& v) const override {
    probe_->record(layer_, q, k);
    return inner_->forward(q, k, v);
  }
  std::array<at::Tensor, 3> gradients(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                                      const at::Tensor& v,
                                      const std::vector<at::Tensor>& results) const override {
    return inner_->gradients(grad, q, k, v, results);
  }

 private:
  std::shared_ptr<const PackedAttention> inner_;
  std::shared_ptr<AttentionProbe> probe_;
  int64_t layer_;
};

}  // namespace

AttentionProbe::AttentionProbe(std::optional<topk_attn::Options> budget) : budget_(std::move(budget)) {}

void AttentionProbe::begin(const std::vector<int64_t>& bounds, int64_t layers, at::Device device) {
  rows_.clear();
  entropy_.assign(static_cast<size_t>(layers), at::Tensor());
  kept_mass_.assign(static_cast<size_t>(layers), at::Tensor());
  const int64_t tokens = bounds.back();
  const int64_t count = std::min(kRows, tokens);
  std::vector<int64_t> positions;
  for (int64_t r = 0; r < count; ++r) {
    // The middle of each of `count` equal parts.
    const int64_t position = (2 * r + 1) * tokens / (2 * count);
    const auto next = std::upper_bound(bounds.begin(), bounds.end(), position);
    positions.push_back(position);
    rows_.push_back({*std::prev(next), position + 1});
  }
  queries_ = on(device, positions);
}

void AttentionProbe::record(int64_t layer, const at::Tensor& q, const at::Tensor& k) {
  at::Tensor& entropy = entropy_[static_cast<size_t>(layer)];
  if (entropy.defined()) return;
  const at::NoGradGuard no_grad;
  const auto count = static_cast<int64_t>(rows_.size());
  int64_t begin = rows_[0].begin, end = 0, most_kept = 0;
  std::vector<int64_t> first, last, kept, sink_end, recent_begin;
  for (const Row& row : rows_) {
    begin = std::min(begin, row.begin);
    end = std::max(end, row.end);
    first.push_back(row.begin);
    last.push_back(row.end);
    if (!budget_) continue;
    const int64_t seen = row.end - row.begin;
    kept.push_back(topk_attn::budget(seen, *budget_));
    most_kept = std::max(most_kept, kept.back());
    // The contract's always-kept keys: sinks first, then recent ones, within the budget.
    const int64_t sinks = std::min(budget_->sink, kept.back());
    sink_end.push_back(row.begin + sinks);
    recent_begin.push_back(row.end - std::min(budget_->recent, kept.back() - sinks));
  }
  const at::Device device = q.device();
  const auto per_row = [&](const std::vector<int64_t>& values) {
    return on(device, values).view({1, count, 1, 1});
  };
  // (Hkv, R, G, K)
  at::Tensor scores = scores_of(q.detach().index_select(0, queries_), k.detach(), begin, end);
  const at::Tensor keys = at::arange(begin, end, at::TensorOptions().dtype(at::kLong).device(device));
  const at::Tensor hidden = keys.lt(per_row(first)).logical_or_(keys.ge(per_row(last)));
  scores.mul_(1.0 / std::sqrt(static_cast<double>(q.size(-1)))).masked_fill_(hidden, -kInfinity);
  const at::Tensor log_sum = at::logsumexp(scores, -1, /*keepdim=*/true);
  const at::Tensor probabilities = (scores - log_sum).exp_();
  // -sum p log p, with log p = score - log_sum; hidden keys have p = 0.
  const at::Tensor finite = scores.masked_fill(hidden, 0.0);
  entropy = (log_sum.squeeze(-1) - (probabilities * finite).sum(-1)).mean();
  if (!budget_) return;

  at::Tensor order = scores;
  if (budget_->select == "kv_group") order = std::get<0>(scores.max(2, /*keepdim=*/true));
  if (budget_->sink > 0 || budget_->recent > 0) {
    const at::Tensor always = keys.lt(per_row(sink_end)).logical_or_(keys.ge(per_row(recent_begin)));
    order = order.masked_fill(always.logical_and_(hidden.logical_not()), kInfinity);
  }
  const at::Tensor chosen = std::get<1>(at::topk(order, most_kept, -1)).expand({-1, -1, scores.size(2), -1});
  const at::Tensor rank = at::arange(most_kept, keys.options());
  const at::Tensor mass = probabilities.gather(-1, chosen).masked_fill_(rank.ge(per_row(kept)), 0.0);
  kept_mass_[static_cast<size_t>(layer)] = mass.sum(-1).mean();
}

AttentionProbeResult AttentionProbe::result() const {
  const auto values = [](const std::vector<at::Tensor>& tensors) {
    std::vector<double> out;
    if (tensors.empty() || !tensors.front().defined()) return out;
    const at::Tensor host = at::stack(tensors).to(at::kCPU, at::kDouble).contiguous();
    out.assign(host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel());
    return out;
  };
  return {values(entropy_), values(kept_mass_)};
}

std::shared_ptr<const PackedAttention> probed_attention(std::shared_ptr<const PackedAttention> attention,
                                                        std::shared_ptr<AttentionProbe> probe,
                                                        int64_t layer) {
  return std::make_shared<ProbedAttention>(std::move(attention), std::move(probe), layer);
}

}  // namespace topk_sft
