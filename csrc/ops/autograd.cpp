// Gradients. The selection is a constant of the backward pass; double backward raises.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "operators.h"

namespace topk_attn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Packed and selection arguments, stored with a graph node.
void save_arguments(AutogradContext* ctx, const PackedArgs& p, const SelectionArgs& s,
                    std::optional<double> softmax_scale, bool deterministic) {
  ctx->saved_data["max_seqlen_q"] = p.max_seqlen_q;
  ctx->saved_data["max_seqlen_k"] = p.max_seqlen_k;
  ctx->saved_data["causal"] = s.causal;
  ctx->saved_data["topk"] = s.topk;
  ctx->saved_data["ratio"] = s.ratio;
  ctx->saved_data["min_keys"] = s.min_keys;
  ctx->saved_data["max_keys"] = s.max_keys;
  ctx->saved_data["select"] = s.select;
  ctx->saved_data["sink"] = s.sink;
  ctx->saved_data["recent"] = s.recent;
  ctx->saved_data["softmax_scale"] = softmax_scale;
  ctx->saved_data["deterministic"] = deterministic;
}

OptSymInt optional_symint(const at::IValue& value) {
  return value.isNone() ? std::nullopt : OptSymInt(value.toSymInt());
}

std::optional<double> optional_double(const at::IValue& value) {
  return value.isNone() ? std::nullopt : std::optional<double>(value.toDouble());
}

SelectionArgs load_selection(AutogradContext* ctx) {
  SelectionArgs s;
  s.causal = ctx->saved_data["causal"].toBool();
  s.topk = optional_symint(ctx->saved_data["topk"]);
  s.ratio = optional_double(ctx->saved_data["ratio"]);
  s.min_keys = ctx->saved_data["min_keys"].toSymInt();
  s.max_keys = optional_symint(ctx->saved_data["max_keys"]);
  s.select = ctx->saved_data["select"].toStringRef();
  s.sink = ctx->saved_data["sink"].toSymInt();
  s.recent = ctx->saved_data["recent"].toSymInt();
  return s;
}

class Attend : public torch::autograd::Function<Attend> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const PackedArgs& packed, const SelectionArgs& selection,
                               std::optional<double> softmax_scale, bool deterministic,
                               std::string_view wanted) {
    at::AutoDispatchBelowADInplaceOrView below;
    // What each backend's backward reads (schema.h).
    const std::string_view kept = wanted != "none" ? wanted
                                  : q.is_cpu()     ? "lists"
                                  : q.is_cuda()    ? "tiles"
                                                   : "none";
    auto [out, lse, threshold, tie_index, kept_index, kept_prob] =
        call_fwd(q, k, v, packed, selection, softmax_scale, deterministic, kept);
    save_arguments(ctx, packed, selection, softmax_scale, deterministic);
    ctx->save_for_backward({q, k, v, out, lse, threshold, tie_index, kept_index, kept_prob,
                            packed.cu_seqlens_q.value_or(Tensor()), packed.cu_seqlens_k.value_or(Tensor())});
    if (wanted == "none") {  // saved, but not asked for
      kept_index = at::empty({0}, kept_index.options());
      kept_prob = at::empty({0}, kept_prob.options());
    }
    ctx->mark_non_differentiable({threshold, tie_index, kept_index, kept_prob});
    ctx->set_materialize_grads(false);
    return {out, lse, threshold, tie_index, kept_index, kept_prob};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(8);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    PackedArgs packed;
    if (saved[9].defined()) packed.cu_seqlens_q = saved[9];
    if (saved[10].defined()) packed.cu_seqlens_k = saved[10];
    packed.max_seqlen_q = optional_symint(ctx->saved_data["max_seqlen_q"]);
    packed.max_seqlen_k = optional_symint(ctx->saved_data["max_seqlen_k"]);
    const Tensor& out = saved[3];
    const Tensor dout = grads[0].defined() ? grads[0] : at::zeros_symint(out.sym_sizes(), out.options());
    const OptTensor dlse = grads[1].defined() ? OptTensor(grads[1]) : std::nullopt;
    const ForwardState state{out, saved[4], saved[5], saved[6], saved[7], saved[8]};
    auto [dq, dk, dv] = call_bwd(dout, dlse, saved[0], saved[1], saved[2], state, packed, load_selection(ctx),
                                 optional_double(ctx->saved_data["softmax_scale"]),
                                 ctx->saved_data["deterministic"].toBool());
    result[0] = dq;
    result[1] = dk;
    result[2] = dv;
    return result;
  }
};

// Lets create_graph=True run, and raises when somebody differentiates the gradient.
class AttendBackward : public torch::autograd::Function<AttendBackward> {
 public:
  static variable_list forward(AutogradContext*, const Tensor& dout, const OptTensor& dlse, const Tensor& q,
                               const Tensor& k, const Tensor& v, const ForwardState& state,
                               const PackedArgs& packed, const SelectionArgs& selection,
                               std::optional<double> softmax_scale, bool deterministic) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dq, dk, dv] = call_bwd(dout, dlse, q, k, v, state, packed, selection, softmax_scale, deterministic);
    return {dq, dk, dv};
  }

  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK(false,
                "topk_attn: double backward is not supported: the gradient of top-k attention cannot be "
                "differentiated again");
  }
};

bool needs_grad(const Tensor& t) {
  return t.defined() && t.requires_grad();
}
bool needs_grad(const OptTensor& t) {
  return t.has_value() && needs_grad(*t);
}

FwdResult fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
              const OptTensor& cu_seqlens_k, OptSymInt max_seqlen_q, OptSymInt max_seqlen_k, bool causal,
              OptSymInt topk, std::optional<double> ratio, SymInt min_keys, OptSymInt max_keys,
              std::string_view select, SymInt sink, SymInt recent, std::optional<double> softmax_scale,
              bool deterministic, std::string_view kept) {
  const PackedArgs packed{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const SelectionArgs selection{causal, topk, ratio, min_keys, max_keys, std::string(select), sink, recent};
  if (at::GradMode::is_enabled() && (needs_grad(q) || needs_grad(k) || needs_grad(v))) {
    auto r = Attend::apply(q, k, v, packed, selection, softmax_scale, deterministic, kept);
    return {r[0], r[1], r[2], r[3], r[4], r[5]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_fwd(q, k, v, packed, selection, softmax_scale, deterministic, kept);
}

BwdResult bwd(const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& out, const Tensor& lse, const Tensor& threshold, const Tensor& tie_index,
              const Tensor& kept_index, const Tensor& kept_prob, const OptTensor& cu_seqlens_q,
              const OptTensor& cu_seqlens_k, OptSymInt max_seqlen_q, OptSymInt max_seqlen_k, bool causal,
              OptSymInt topk, std::optional<double> ratio, SymInt min_keys, OptSymInt max_keys,
              std::string_view select, SymInt sink, SymInt recent, std::optional<double> softmax_scale,
              bool deterministic) {
  const PackedArgs packed{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const SelectionArgs selection{causal, topk, ratio, min_keys, max_keys, std::string(select), sink, recent};
  const ForwardState state{out, lse, threshold, tie_index, kept_index, kept_prob};
  if (at::GradMode::is_enabled() &&
      (needs_grad(dout) || needs_grad(dlse) || needs_grad(q) || needs_grad(k) || needs_grad(v))) {
    auto r =
        AttendBackward::apply(dout, dlse, q, k, v, state, packed, selection, softmax_scale, deterministic);
    return {r[0], r[1], r[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_bwd(dout, dlse, q, k, v, state, packed, selection, softmax_scale, deterministic);
}

FwdResult fwd_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k,
                      const OptTensor& v, const Tensor& cache_seqlens, const OptTensor& cache_leftpad,
                      const OptTensor& block_table, const OptTensor& key_codes, bool causal, OptSymInt topk,
                      std::optional<double> ratio, SymInt min_keys, OptSymInt max_keys,
                      std::string_view select, SymInt sink, SymInt recent,
                      std::optional<double> softmax_scale, bool return_indices) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !(needs_grad(q) || needs_grad(k_cache) || needs_grad(v_cache) ||
                                               needs_grad(k) || needs_grad(v)),
              "topk_attn: topk_attn_with_kvcache is not differentiable, but q, k, v or a cache requires a "
              "gradient: call "
              "it under torch.no_grad() or use topk_attn_func");
  const SelectionArgs selection{causal, topk, ratio, min_keys, max_keys, std::string(select), sink, recent};
  at::AutoDispatchBelowADInplaceOrView below;
  return call_fwd_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, cache_leftpad, block_table, key_codes,
                          selection, softmax_scale, return_indices);
}

}  // namespace
}  // namespace topk_attn

TORCH_LIBRARY_IMPL(topk_attn, Autograd, m) {
  m.impl("fwd", &topk_attn::fwd);
  m.impl("bwd", &topk_attn::bwd);
  m.impl("fwd_kvcache", &topk_attn::fwd_kvcache);
  // Selections are not differentiable: nothing to record.
  m.impl("select", torch::CppFunction::makeFallthrough());
  m.impl("select_scores", torch::CppFunction::makeFallthrough());
  m.impl("key_codes_new", torch::CppFunction::makeFallthrough());
  m.impl("key_codes_rebuild", torch::CppFunction::makeFallthrough());
}
