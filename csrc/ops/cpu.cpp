// CPU implementations of select, fwd, bwd and select_scores: checks, allocation, kernels.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu_common.h"

namespace topk_attn {

namespace {

const int32_t* check_offsets(const Tensor& cu, const char* name, int64_t total) {
  const Tensor host = cu.contiguous();
  const int32_t* offsets = host.data_ptr<int32_t>();
  const int64_t n = host.size(0);
  TORCH_CHECK(offsets[0] == 0, "topk_attn: ", name, " must start at 0, got ", offsets[0]);
  for (int64_t i = 1; i < n; ++i) {
    TORCH_CHECK(offsets[i] >= offsets[i - 1], "topk_attn: ", name, " must not decrease, got ", offsets[i - 1],
                " then ", offsets[i], " at entry ", i);
  }
  TORCH_CHECK(offsets[n - 1] == total, "topk_attn: ", name, " must end at the packed length ", total,
              ", got ", offsets[n - 1]);
  return offsets;
}

}  // namespace

std::vector<Sequence> sequences_of(const Shape& shape, const OptTensor& cu_seqlens_q,
                                   const OptTensor& cu_seqlens_k, std::optional<int64_t> max_seqlen_q,
                                   std::optional<int64_t> max_seqlen_k) {
  std::vector<Sequence> sequences;
  const int64_t tq = shape.tq.expect_int();
  const int64_t tk = shape.tk.expect_int();
  if (!shape.packed) {
    if (tq == 0) return sequences;
    for (int64_t b = 0; b < shape.batch.expect_int(); ++b) sequences.push_back({b, 0, 0, tq, tk, 0});
    return sequences;
  }
  const Tensor cu_q = cu_seqlens_q->contiguous();
  const Tensor cu_k = cu_seqlens_k->contiguous();
  const int32_t* q_offsets = check_offsets(cu_q, "cu_seqlens_q", tq);
  const int32_t* k_offsets = check_offsets(cu_k, "cu_seqlens_k", tk);
  for (int64_t i = 0; i + 1 < cu_q.size(0); ++i) {
    const Sequence s{
        0, q_offsets[i], k_offsets[i], q_offsets[i + 1] - q_offsets[i], k_offsets[i + 1] - k_offsets[i], 0};
    TORCH_CHECK(!max_seqlen_q || s.tq <= *max_seqlen_q,
                "topk_attn: max_seqlen_q must be at least the longest document, ", s.tq,
                " queries at document ", i, ", got ", *max_seqlen_q);
    TORCH_CHECK(!max_seqlen_k || s.tk <= *max_seqlen_k,
                "topk_attn: max_seqlen_k must be at least the longest document, ", s.tk, " keys at document ",
                i, ", got ", *max_seqlen_k);
    sequences.push_back(s);
  }
  return sequences;
}

Problem problem_of(const Tensor& q, const Shape& shape, const Settings& settings, bool causal) {
  Problem p;
  p.dtype = dtype_of(q);
  p.heads = shape.heads;
  p.kv_heads = shape.kv_heads;
  p.head_dim = shape.head_dim;
  p.v_dim = shape.v_dim;
  p.causal = causal;
  p.budget = settings.budget;
  p.kv_group = settings.kv_group;
  p.sink = settings.sink;
  p.recent = settings.recent;
  const int64_t tq = shape.tq.expect_int();
  p.rows = RowLayout{shape.packed ? 0 : shape.heads * tq, tq};
  return p;
}

namespace {

// The kept lists are large, written once and read once: with 4 KiB pages their faults cost as much as the
// lists.
void prefer_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes()) / kHuge * kHuge;
  // Advice: where the system does not take it, nothing is lost but time.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Selection, and attention when v is defined.
FwdResult run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
                      const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k, bool causal,
                      const Settings& settings, std::optional<double> softmax_scale, bool save_kept,
                      bool return_indices) {
  const Shape shape =
      check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, symbolic(max_seqlen_q), symbolic(max_seqlen_k));
  ForwardParams p;
  p.problem = problem_of(q, shape, settings, causal);
  p.problem.softmax_scale = check_scale(softmax_scale, shape.head_dim);
  p.q = view_of(q);
  p.k = view_of(k);
  p.attend = v.defined();

  const auto options = q.options();
  const auto acc = options.dtype(accumulation_type(q.scalar_type()));
  const auto ints = options.dtype(at::kInt);
  const Tensor threshold = at::empty(row_sizes(shape), acc);
  const Tensor tie_index = at::empty(row_sizes(shape), ints);
  p.threshold = threshold.data_ptr();
  p.tie_index = tie_index.data_ptr<int32_t>();

  Tensor out, lse;
  if (p.attend) {
    auto sizes = q.sizes().vec();
    sizes.back() = shape.v_dim;
    out = at::empty(sizes, options);
    lse = at::empty(row_sizes(shape), acc);
    p.v = view_of(v);
    p.out = view_of(out);
    p.lse = lse.data_ptr();
  }
  p.kept_width = saved_width(shape, settings, save_kept);
  if (return_indices) p.kept_width = budget(shape.longest.expect_int(), settings.budget);
  p.pad_index = return_indices;
  const Tensor kept_index =
      save_kept || return_indices ? at::empty(row_sizes(shape, p.kept_width), ints) : at::empty({0}, ints);
  const Tensor kept_prob = save_kept ? at::empty(row_sizes(shape, p.kept_width), acc) : at::empty({0}, acc);
  if (p.kept_width > 0) {
    p.kept_index = kept_index.data_ptr<int32_t>();
    if (save_kept) p.kept_prob = kept_prob.data_ptr();
    prefer_huge_pages(kept_index);
    prefer_huge_pages(kept_prob);
  }
  // After the outputs: a size that memory cannot hold has raised by now.
  const auto sequences = sequences_of(shape, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  p.problem.sequences = sequences.data();
  p.problem.num_sequences = static_cast<int64_t>(sequences.size());
  cpu::forward(p, executor());
  return {out, lse, threshold, tie_index, kept_index, kept_prob};
}

SelectResult select(const Tensor& q, const Tensor& k, const OptTensor& cu_seqlens_q,
                    const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k, bool causal,
                    OptInt topk, std::optional<double> ratio, int64_t min_keys, OptInt max_keys,
                    std::string_view select, int64_t sink, int64_t recent, bool return_indices) {
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  const auto r = run_forward(q, k, Tensor(), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
                             settings, 1.0, false, return_indices);
  return {std::get<2>(r), std::get<3>(r), std::get<4>(r)};
}

FwdResult fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
              const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k, bool causal,
              OptInt topk, std::optional<double> ratio, int64_t min_keys, OptInt max_keys,
              std::string_view select, int64_t sink, int64_t recent, std::optional<double> softmax_scale,
              bool /*deterministic: always is*/, std::string_view kept) {
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  const Kept form = check_kept(kept);
  TORCH_CHECK(form != Kept::kTiles, "topk_attn: kept='tiles' is made on CUDA only, got it for tensors on ",
              q.device());
  return run_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, settings,
                     softmax_scale, form == Kept::kLists, false);
}

BwdResult bwd(const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& out, const Tensor& lse, const Tensor& threshold, const Tensor& tie_index,
              const Tensor& kept_index, const Tensor& kept_prob, const OptTensor& cu_seqlens_q,
              const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k, bool causal,
              OptInt topk, std::optional<double> ratio, int64_t min_keys, OptInt max_keys,
              std::string_view select, int64_t sink, int64_t recent, std::optional<double> softmax_scale,
              bool /*deterministic: always is*/) {
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  const Shape shape =
      check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, symbolic(max_seqlen_q), symbolic(max_seqlen_k));
  const auto sequences = sequences_of(shape, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  const auto acc_type = accumulation_type(q.scalar_type());
  const auto acc = q.options().dtype(acc_type);
  auto out_sizes = q.sizes().vec();
  out_sizes.back() = shape.v_dim;
  check_state(dout, "dout", q, q.scalar_type(), out_sizes);
  check_state(out, "out", q, q.scalar_type(), out_sizes);
  check_state(lse, "lse", q, acc_type, row_sizes(shape));
  check_state(threshold, "threshold", q, acc_type, row_sizes(shape));
  check_state(tie_index, "tie_index", q, at::kInt, row_sizes(shape));
  if (dlse.has_value()) check_state(*dlse, "dlse", q, acc_type, row_sizes(shape));

  BackwardParams p;
  p.problem = problem_of(q, shape, settings, causal);
  p.problem.sequences = sequences.data();
  p.problem.num_sequences = static_cast<int64_t>(sequences.size());
  p.problem.softmax_scale = check_scale(softmax_scale, shape.head_dim);
  if (kept_index.numel() > 0) {
    p.kept_width = saved_width(shape, settings, true);
    check_state(kept_index, "kept_index", q, at::kInt, row_sizes(shape, p.kept_width));
    check_state(kept_prob, "kept_prob", q, acc_type, row_sizes(shape, p.kept_width));
  }
  // Gradients may come expanded (stride 0); channels must be adjacent for the kernels.
  const Tensor dout_rows = dout.stride(-1) == 1 ? dout : dout.contiguous();
  const Tensor lse_rows = lse.contiguous();
  const Tensor threshold_rows = threshold.contiguous();
  const Tensor tie_rows = tie_index.contiguous();
  const Tensor kept_index_rows = kept_index.contiguous();
  const Tensor kept_prob_rows = kept_prob.contiguous();
  const Tensor dlse_rows = dlse.has_value() ? dlse->contiguous() : Tensor();
  p.q = view_of(q);
  p.k = view_of(k);
  p.v = view_of(v);
  p.dout = view_of(dout_rows);
  p.lse = lse_rows.data_ptr();
  p.threshold = threshold_rows.data_ptr();
  p.tie_index = tie_rows.data_ptr<int32_t>();
  if (p.kept_width > 0) {
    p.kept_index = kept_index_rows.data_ptr<int32_t>();
    p.kept_prob = kept_prob_rows.data_ptr();
  }
  if (dlse_rows.defined()) p.dlse = dlse_rows.data_ptr();

  const Tensor dq = at::empty(q.sizes(), q.options());
  const Tensor dk = at::zeros(k.sizes(), acc);
  const Tensor dv = at::zeros(v.sizes(), acc);
  p.dq = view_of(dq);
  p.dk = view_of(dk);
  p.dv = view_of(dv);
  TORCH_CHECK(
      cpu::backward(p, executor()),
      "topk_attn: ", p.kept_width > 0 ? "kept_index" : "threshold and tie_index",
      " must be as the forward returned them for these q and k: they do not name that many visible keys");
  return {dq, dk.to(k.scalar_type()), dv.to(v.scalar_type())};
}

SelectResult select_scores(const Tensor& scores, int64_t topk, const OptTensor& lengths) {
  check_select_scores(scores, topk, lengths);
  SelectScoresParams p;
  p.dtype = dtype_of(scores);
  p.rows = scores.size(0);
  p.n = scores.size(1);
  p.topk = topk;
  p.scores = scores.data_ptr();
  p.row_stride = scores.stride(0);
  const Tensor host = lengths.has_value() ? lengths->contiguous() : Tensor();
  if (host.defined()) {
    p.lengths = host.data_ptr<int32_t>();
    for (int64_t r = 0; r < p.rows; ++r) {
      TORCH_CHECK(p.lengths[r] >= 0 && p.lengths[r] <= p.n,
                  "topk_attn: lengths must be between 0 and the row length ", p.n, ", got ", p.lengths[r],
                  " at row ", r);
    }
  }
  const Tensor threshold = at::empty({p.rows}, scores.options().dtype(at::kFloat));
  const Tensor tie_index = at::empty({p.rows}, scores.options().dtype(at::kInt));
  const Tensor indices = at::empty({p.rows, topk}, scores.options().dtype(at::kInt));
  p.threshold = threshold.data_ptr<float>();
  p.tie_index = tie_index.data_ptr<int32_t>();
  p.indices = indices.data_ptr<int32_t>();
  cpu::select_scores(p, executor());
  return {threshold, tie_index, indices};
}

}  // namespace
}  // namespace topk_attn

TORCH_LIBRARY_IMPL(topk_attn, CPU, m) {
  m.impl("select", &topk_attn::select);
  m.impl("fwd", &topk_attn::fwd);
  m.impl("bwd", &topk_attn::bwd);
  m.impl("select_scores", &topk_attn::select_scores);
}
