// Typed calls of the registered operators through the dispatcher, for autograd, autocast and the C++
// functions.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace topk_attn {

using at::Tensor;
using c10::SymInt;
using OptTensor = std::optional<Tensor>;
using OptInt = std::optional<int64_t>;
using OptSymInt = std::optional<SymInt>;

inline OptSymInt symbolic(const OptInt& x) {
  return x.has_value() ? OptSymInt(SymInt(*x)) : std::nullopt;
}

// The arguments that follow the tensors in every schema, in schema order.
struct PackedArgs {
  OptTensor cu_seqlens_q;
  OptTensor cu_seqlens_k;
  OptSymInt max_seqlen_q;
  OptSymInt max_seqlen_k;
};

struct SelectionArgs {
  bool causal = true;
  OptSymInt topk;
  std::optional<double> ratio;
  SymInt min_keys = 1;
  OptSymInt max_keys;
  std::string select = "head";
  SymInt sink = 0;
  SymInt recent = 0;
};

using SelectResult = std::tuple<Tensor, Tensor, Tensor>;
using FwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BwdResult = std::tuple<Tensor, Tensor, Tensor>;

SelectResult call_select(const Tensor& q, const Tensor& k, const PackedArgs& packed,
                         const SelectionArgs& selection, bool return_indices);

FwdResult call_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const PackedArgs& packed,
                   const SelectionArgs& selection, std::optional<double> softmax_scale, bool deterministic,
                   std::string_view kept);

// What the forward left for the backward.
struct ForwardState {
  Tensor out, lse, threshold, tie_index, kept_index, kept_prob;
};

BwdResult call_bwd(const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k,
                   const Tensor& v, const ForwardState& state, const PackedArgs& packed,
                   const SelectionArgs& selection, std::optional<double> softmax_scale, bool deterministic);

SelectResult call_select_scores(const Tensor& scores, SymInt topk, const OptTensor& lengths);

FwdResult call_fwd_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k,
                           const OptTensor& v, const Tensor& cache_seqlens, const OptTensor& cache_leftpad,
                           const OptTensor& block_table, const OptTensor& key_codes,
                           const SelectionArgs& selection, std::optional<double> softmax_scale,
                           bool return_indices);

Tensor call_key_codes_new(const Tensor& k_cache);

void call_key_codes_rebuild(const Tensor& key_codes, const Tensor& k_cache, const Tensor& cache_seqlens,
                            const OptTensor& cache_leftpad, const OptTensor& block_table, bool calibrate);

// Signatures of implementations that keep sizes symbolic (Meta, Autograd, Autocast). CPU ones take int64_t
// instead.
using SelectSignature = SelectResult(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&,
                                     OptSymInt, OptSymInt, bool, OptSymInt, std::optional<double>, SymInt,
                                     OptSymInt, std::string_view, SymInt, SymInt, bool);
using FwdSignature = FwdResult(const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                               const OptTensor&, OptSymInt, OptSymInt, bool, OptSymInt, std::optional<double>,
                               SymInt, OptSymInt, std::string_view, SymInt, SymInt, std::optional<double>,
                               bool, std::string_view);
using BwdSignature = BwdResult(const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&, const OptTensor&, const OptTensor&, OptSymInt, OptSymInt, bool,
                               OptSymInt, std::optional<double>, SymInt, OptSymInt, std::string_view, SymInt,
                               SymInt, std::optional<double>, bool);
using SelectScoresSignature = SelectResult(const Tensor&, SymInt, const OptTensor&);
using FwdKvcacheSignature = FwdResult(const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                                      const OptTensor&, const Tensor&, const OptTensor&, const OptTensor&,
                                      const OptTensor&, bool, OptSymInt, std::optional<double>, SymInt,
                                      OptSymInt, std::string_view, SymInt, SymInt, std::optional<double>,
                                      bool);
using KeyCodesNewSignature = Tensor(const Tensor&);
using KeyCodesRebuildSignature = void(const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                                      const OptTensor&, bool);

}  // namespace topk_attn
