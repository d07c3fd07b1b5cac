// The two exchanges as autograd functions, each the other's gradient.
#include "dist/sequence.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

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

Attend sequence_attention(Ranks& ranks, const Attend& inner) {
  const auto address = reinterpret_cast<int64_t>(&ranks);
  return [inner, address](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    const variable_list heads = ToHeads::apply(q, k, v, address);
    return ToTokens::apply(inner(heads[0], heads[1], heads[2]), address);
  };
}

}  // namespace topk_sft
