// The two exchanges as autograd functions, each the other's gradient.
#include "dist/sequence.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "io/error.h"

namespace topk_sft {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// (T / N tokens, N * heads, D) of every rank -> (T tokens, heads, D)
at::Tensor to_heads(Ranks& ranks, const std::vector<at::Tensor>& tensors) {
  const int64_t n = ranks.layout().sequence_ranks;
  std::vector<at::Tensor> split;
  for (const at::Tensor& x : tensors) split.push_back(x.unflatten(1, {n, -1}));  // (T / N, N, heads, D)
  // One exchange for all of them. Slices arrive in the order of ranks, which is that of the tokens.
  return ranks.exchange_slices(at::cat(split, 2).transpose(0, 1)).flatten(0, 1);
}

// And back.
at::Tensor to_tokens(Ranks& ranks, const at::Tensor& x) {
  const int64_t n = ranks.layout().sequence_ranks;
  // (N, T / N, heads, D) by heads -> (T / N, N, heads, D)
  return ranks.exchange_slices(x.unflatten(0, {n, -1})).transpose(0, 1);
}

class ToHeads : public torch::autograd::Function<ToHeads> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, int64_t ranks) {
    ctx->saved_data["ranks"] = ranks;
    auto& all = *reinterpret_cast<Ranks*>(ranks);
    const int64_t n = all.layout().sequence_ranks;
    const std::vector<int64_t> heads = {q.size(1) / n, k.size(1) / n, v.size(1) / n};
    ctx->saved_data["heads"] = heads;
    variable_list out;
    for (const at::Tensor& x : to_heads(all, {q, k, v}).split_with_sizes(heads, 1)) {
      out.push_back(x.contiguous());
    }
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& all = *reinterpret_cast<Ranks*>(ctx->saved_data["ranks"].toInt());
    const std::vector<int64_t> heads = ctx->saved_data["heads"].toIntVector();
    const std::vector<at::Tensor> back =
        to_tokens(all, at::cat({grads[0], grads[1], grads[2]}, 1)).split_with_sizes(heads, 2);
    return {back[0].flatten(1, 2), back[1].flatten(1, 2), back[2].flatten(1, 2), at::Tensor()};
  }
};

class ToTokens : public torch::autograd::Function<ToTokens> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, int64_t ranks) {
    ctx->saved_data["ranks"] = ranks;
    return to_tokens(*reinterpret_cast<Ranks*>(ranks), x).flatten(1, 2);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& all = *reinterpret_cast<Ranks*>(ctx->saved_data["ranks"].toInt());
    return {to_heads(all, {grads[0]}), at::Tensor()};
  }
};

class SequenceAttention : public PackedAttention {
 public:
  SequenceAttention(Ranks& ranks, std::shared_ptr<const PackedAttention> inner)
      : ranks_(ranks), inner_(std::move(inner)) {}

  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const override {
    const auto address = reinterpret_cast<int64_t>(&ranks_);
    const variable_list heads = ToHeads::apply(q, k, v, address);
    return ToTokens::apply(inner_->attend(heads[0], heads[1], heads[2]), address);
  }

  bool separable(const at::TensorOptions& heads, int64_t head_dim) const override {
    return inner_->separable(heads, head_dim);
  }

  // The first result is kept by tokens only: its heads are one exchange away.
  std::vector<at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                  const at::Tensor& v) const override {
    const variable_list heads = split_heads({q, k, v});
    std::vector<at::Tensor> results = inner_->forward(heads[0], heads[1], heads[2]);
    results[0] = to_tokens(ranks_, results[0]).flatten(1, 2);
    return results;
  }

  std::array<at::Tensor, 3> gradients(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                                      const at::Tensor& v,
                                      const std::vector<at::Tensor>& results) const override {
    const variable_list heads = split_heads({q, k, v, results[0], grad});
    std::vector<at::Tensor> inner_results = results;
    inner_results[0] = heads[3];
    const auto found = inner_->gradients(heads[4], heads[0], heads[1], heads[2], inner_results);
    const std::vector<int64_t> sizes = {found[0].size(1), found[1].size(1), found[2].size(1)};
    const std::vector<at::Tensor> back =
        to_tokens(ranks_, at::cat({found[0], found[1], found[2]}, 1)).split_with_sizes(sizes, 2);
    return {back[0].flatten(1, 2), back[1].flatten(1, 2), back[2].flatten(1, 2)};
  }

 private:
  // Tensors of all heads and this rank's tokens, as those of all tokens and this rank's heads.
  variable_list split_heads(const variable_list& tensors) const {
    std::vector<int64_t> sizes;
    for (const at::Tensor& x : tensors) sizes.push_back(x.size(1) / ranks_.layout().sequence_ranks);
    variable_list out;
    for (const at::Tensor& x : to_heads(ranks_, tensors).split_with_sizes(sizes, 1))
      out.push_back(x.contiguous());
    return out;
  }

  Ranks& ranks_;
  std::shared_ptr<const PackedAttention> inner_;
};

at::Tensor padded(const at::Tensor& x, int64_t extra, int64_t value) {
  return extra == 0 ? x : at::cat({x, at::full({extra}, value, x.options())});
}

}  // namespace

PackedBatch sequence_part(const PackedBatch& batch, const RankLayout& layout) {
  const int64_t n = layout.sequence_ranks;
  if (n == 1) return batch;
  const int64_t tokens = batch.input_ids.size(0);
  const int64_t extra = (n - tokens % n) % n;
  const int64_t part = (tokens + extra) / n;
  const bool pinned = batch.input_ids.is_pinned();
  const auto mine = [&](const at::Tensor& whole) {
    const at::Tensor slice = whole.narrow(0, layout.sequence_rank() * part, part);
    return pinned ? slice.contiguous().pin_memory() : slice;
  };
  PackedBatch out;
  out.input_ids = mine(padded(batch.input_ids, extra, 0));
  out.position_ids = mine(at::cat({batch.position_ids, at::arange(extra, at::kLong)}));
  out.labels = mine(padded(batch.labels, extra, kIgnoreLabel));
  out.cu_seqlens = padded(batch.cu_seqlens, extra > 0 ? 1 : 0, tokens + extra);
  if (pinned) out.cu_seqlens = out.cu_seqlens.pin_memory();
  out.max_seqlen = std::max(batch.max_seqlen, extra);
  return out;
}

std::shared_ptr<const PackedAttention> sequence_attention(Ranks& ranks,
                                                          std::shared_ptr<const PackedAttention> inner) {
  return std::make_shared<SequenceAttention>(ranks, std::move(inner));
}

}  // namespace topk_sft
