// Which kernels serve dense attention, and the operators of top-k attention called one by one.
#include "model/attention.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>

#include "io/error.h"

namespace topk_sft {
namespace {

using Heads = std::array<at::Tensor, 3>;

// ---------------------------------------------------------------------------------------------------------------
// Dense
// ---------------------------------------------------------------------------------------------------------------

// cuDNN builds a plan for every length it meets, which takes far longer than running it: lengths are rounded
// up to multiples of this. Under the causal mask the rows that are added at the end change nothing before
// them.
constexpr int64_t kLengthStep = 512;

// Documents of one length, one behind the other, as cuDNN takes them.
class CudnnAttention : public PackedAttention {
 public:
  CudnnAttention(int64_t documents, int64_t length)
      : documents_(documents),
        length_(length),
        padded_((length + kLengthStep - 1) / kLengthStep * kLengthStep) {}

  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const override {
    return flat(std::get<0>(at::_scaled_dot_product_cudnn_attention(
        whole(q), whole(k), whole(v), /*attn_bias=*/std::nullopt,
        /*compute_log_sumexp=*/at::GradMode::is_enabled(), /*dropout_p=*/0.0, /*is_causal=*/true)));
  }

  bool separable(const at::TensorOptions&, int64_t) const override { return true; }

  std::vector<at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                  const at::Tensor& v) const override {
    const auto r = at::_scaled_dot_product_cudnn_attention(
        whole(q), whole(k), whole(v), /*attn_bias=*/std::nullopt, /*compute_log_sumexp=*/true,
        /*dropout_p=*/0.0, /*is_causal=*/true);
    return {flat(std::get<0>(r)), std::get<1>(r), std::get<6>(r), std::get<7>(r)};
  }

  Heads gradients(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const std::vector<at::Tensor>& results) const override {
    // The gradients of the rows that were added are zero, so what they held does not matter.
    const at::Tensor none;
    const auto r = at::_scaled_dot_product_cudnn_attention_backward(
        whole(grad), whole(q), whole(k), whole(v), whole(results[0]), results[1], results[2], results[3],
        /*attn_bias=*/none, /*cum_seq_q=*/none, /*cum_seq_k=*/none, padded_, padded_, /*dropout_p=*/0.0,
        /*is_causal=*/true);
    return {flat(std::get<0>(r)), flat(std::get<1>(r)), flat(std::get<2>(r))};
  }

 private:
  // (documents, H, padded length, D)
  at::Tensor whole(const at::Tensor& x) const {
    const at::Tensor split = x.unflatten(0, {documents_, length_});
    const int64_t extra = padded_ - length_;
    const at::Tensor padded = extra > 0 ? at::constant_pad_nd(split, {0, 0, 0, 0, 0, extra}) : split;
    return padded.transpose(1, 2);
  }
  at::Tensor flat(const at::Tensor& x) const { return x.transpose(1, 2).narrow(1, 0, length_).flatten(0, 1); }

  int64_t documents_, length_, padded_;
};

class FlashAttention : public PackedAttention {
 public:
  FlashAttention(at::Tensor cu_seqlens, int64_t longest)
      : cu_seqlens_(std::move(cu_seqlens)), longest_(longest) {}

  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const override {
    return std::get<0>(call(q, k, v));
  }

  bool separable(const at::TensorOptions&, int64_t) const override { return true; }

  std::vector<at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                  const at::Tensor& v) const override {
    const auto r = call(q, k, v);
    return {std::get<0>(r), std::get<1>(r), std::get<2>(r), std::get<3>(r)};
  }

  Heads gradients(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const std::vector<at::Tensor>& results) const override {
    const auto r = at::_flash_attention_backward(
        grad.contiguous(), q, k, v, results[0], results[1], cu_seqlens_, cu_seqlens_, longest_, longest_,
        /*dropout_p=*/0.0, /*is_causal=*/true, results[2], results[3]);
    return {std::get<0>(r), std::get<1>(r), std::get<2>(r)};
  }

 private:
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> call(const at::Tensor& q,
                                                                              const at::Tensor& k,
                                                                              const at::Tensor& v) const {
    return at::_flash_attention_forward(q, k, v, cu_seqlens_, cu_seqlens_, longest_, longest_,
                                        /*dropout_p=*/0.0, /*is_causal=*/true, /*return_debug_mask=*/false);
  }

  at::Tensor cu_seqlens_;
  int64_t longest_;
};

at::Tensor attention_by_document(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const std::vector<int64_t>& bounds) {
  const int64_t kv_heads = k.size(1);
  const int64_t group = q.size(1) / kv_heads;
  // SDPA's batch is the KV head, its heads are the group: (Hkv, G, L, D).
  const auto queries = [&](const at::Tensor& x) {
    return x.unflatten(1, {kv_heads, group}).permute({1, 2, 0, 3});
  };
  const auto keys = [&](const at::Tensor& x) {
    return x.transpose(0, 1).unsqueeze(1).expand({kv_heads, group, x.size(0), x.size(2)});
  };
  std::vector<at::Tensor> outputs;
  for (size_t d = 0; d + 1 < bounds.size(); ++d) {
    const int64_t length = bounds[d + 1] - bounds[d];
    if (length == 0) continue;
    const auto document = [&](const at::Tensor& x) { return x.narrow(0, bounds[d], length); };
    const at::Tensor out = at::scaled_dot_product_attention(queries(document(q)), keys(document(k)),
                                                            keys(document(v)), std::nullopt,
                                                            /*dropout_p=*/0.0, /*is_causal=*/true);
    outputs.push_back(out.permute({2, 0, 1, 3}).flatten(1, 2));
  }
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs, 0);
}

// The documents' common length; 0 when they differ.
int64_t common_length(const std::vector<int64_t>& bounds) {
  const int64_t length = bounds[1] - bounds[0];
  for (size_t d = 1; d + 1 < bounds.size(); ++d) {
    if (bounds[d + 1] - bounds[d] != length) return 0;
  }
  return length;
}

// Chooses by type, device and head_dim, which are known when the heads come.
class DenseAttention : public PackedAttention {
 public:
  DenseAttention(const at::Tensor& cu_seqlens, const std::vector<int64_t>& bounds)
      : bounds_(bounds), common_(common_length(bounds)) {
    int64_t longest = 0;
    for (size_t d = 0; d + 1 < bounds.size(); ++d) longest = std::max(longest, bounds[d + 1] - bounds[d]);
    flash_ = std::make_unique<FlashAttention>(cu_seqlens, longest);
    if (common_ >= kLengthStep) {
      cudnn_ = std::make_unique<CudnnAttention>(static_cast<int64_t>(bounds.size()) - 1, common_);
    }
  }

  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const override {
    const PackedAttention* kernels = kernels_for(q.options(), q.size(-1));
    return kernels != nullptr ? kernels->attend(q, k, v) : attention_by_document(q, k, v, bounds_);
  }

  bool separable(const at::TensorOptions& heads, int64_t head_dim) const override {
    return kernels_for(heads, head_dim) != nullptr;
  }

  std::vector<at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                  const at::Tensor& v) const override {
    return kernels_for(q.options(), q.size(-1))->forward(q, k, v);
  }

  Heads gradients(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const std::vector<at::Tensor>& results) const override {
    return kernels_for(q.options(), q.size(-1))->gradients(grad, q, k, v, results);
  }

 private:
  // Null: neither cuDNN nor flash takes such heads.
  const PackedAttention* kernels_for(const at::TensorOptions& heads, int64_t head_dim) const {
    const at::ScalarType type = c10::typeMetaToScalarType(heads.dtype());
    const bool half = type == at::kBFloat16 || type == at::kHalf;
    if (!heads.device().is_cuda() || !half || head_dim % 8 != 0 || head_dim > 256) return nullptr;
    const bool deterministic = at::globalContext().deterministicAlgorithms();
    if (!deterministic && head_dim <= 128 && cudnn_ != nullptr) return cudnn_.get();
    return flash_.get();
  }

  std::vector<int64_t> bounds_;
  int64_t common_;
  std::unique_ptr<FlashAttention> flash_;
  std::unique_ptr<CudnnAttention> cudnn_;
};

// ---------------------------------------------------------------------------------------------------------------
// Top-k
// ---------------------------------------------------------------------------------------------------------------

using MaybeTensor = std::optional<at::Tensor>;
using MaybeInt = std::optional<c10::SymInt>;

// The schemas of topk_attn::fwd and topk_attn::bwd (csrc/ops/schema.h).
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using ForwardSchema = ForwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                    const MaybeTensor&, const MaybeTensor&, MaybeInt, MaybeInt, bool,
                                    MaybeInt, std::optional<double>, c10::SymInt, MaybeInt, std::string_view,
                                    c10::SymInt, c10::SymInt, std::optional<double>, bool, std::string_view);
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using BackwardSchema = BackwardResult(const at::Tensor&, const MaybeTensor&, const at::Tensor&,
                                      const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                      const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                      const at::Tensor&, const at::Tensor&, const MaybeTensor&,
                                      const MaybeTensor&, MaybeInt, MaybeInt, bool, MaybeInt,
                                      std::optional<double>, c10::SymInt, MaybeInt, std::string_view,
                                      c10::SymInt, c10::SymInt, std::optional<double>, bool);

template <typename Schema>
c10::TypedOperatorHandle<Schema> operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

MaybeInt symbolic(const std::optional<int64_t>& x) {
  return x ? MaybeInt(c10::SymInt(*x)) : std::nullopt;
}

class TopkAttention : public PackedAttention {
 public:
  TopkAttention(at::Tensor cu_seqlens, int64_t max_seqlen, topk_attn::Options options)
      : cu_seqlens_(std::move(cu_seqlens)), max_seqlen_(max_seqlen), options_(std::move(options)) {}

  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const override {
    return topk_attn::topk_attn_varlen_func(q, k, v, cu_seqlens_, cu_seqlens_, max_seqlen_, max_seqlen_,
                                            options_)
        .out;
  }

  bool separable(const at::TensorOptions&, int64_t) const override { return true; }

  std::vector<at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                  const at::Tensor& v) const override {
    static const auto call = operator_handle<ForwardSchema>("topk_attn::fwd");
    const topk_attn::Options& o = options_;
    const char* kept = q.is_cuda() ? "tiles" : "lists";
    auto [out, lse, threshold, tie_index, kept_index, kept_prob] = call.call(
        q, k, v, cu_seqlens_, cu_seqlens_, c10::SymInt(max_seqlen_), c10::SymInt(max_seqlen_), o.causal,
        symbolic(o.topk), o.ratio, c10::SymInt(o.min_keys), symbolic(o.max_keys), o.select,
        c10::SymInt(o.sink), c10::SymInt(o.recent), o.softmax_scale, o.deterministic, kept);
    return {out, lse, threshold, tie_index, kept_index, kept_prob};
  }

  Heads gradients(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const std::vector<at::Tensor>& r) const override {
    static const auto call = operator_handle<BackwardSchema>("topk_attn::bwd");
    const topk_attn::Options& o = options_;
    auto [dq, dk, dv] =
        call.call(grad, std::nullopt, q, k, v, r[0], r[1], r[2], r[3], r[4], r[5], cu_seqlens_, cu_seqlens_,
                  c10::SymInt(max_seqlen_), c10::SymInt(max_seqlen_), o.causal, symbolic(o.topk), o.ratio,
                  c10::SymInt(o.min_keys), symbolic(o.max_keys), o.select, c10::SymInt(o.sink),
                  c10::SymInt(o.recent), o.softmax_scale, o.deterministic);
    return {dq, dk, dv};
  }

 private:
  at::Tensor cu_seqlens_;
  int64_t max_seqlen_;
  topk_attn::Options options_;
};

}  // namespace

std::shared_ptr<const PackedAttention> dense_attention(const at::Tensor& cu_seqlens,
                                                       const std::vector<int64_t>& bounds) {
  return std::make_shared<DenseAttention>(cu_seqlens, bounds);
}

std::shared_ptr<const PackedAttention> topk_attention(const at::Tensor& cu_seqlens, int64_t max_seqlen,
                                                      const topk_attn::Options& options) {
  return std::make_shared<TopkAttention>(cu_seqlens, max_seqlen, options);
}

}  // namespace topk_sft
