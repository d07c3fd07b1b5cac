// CUDA implementations of select, fwd, bwd and select_scores: checks, allocation, plan, kernels. Nothing here
// waits for the device: values inside tensors are validated by the kernels (contract section 9).

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <mutex>

#include "common.h"
#include "cuda/built.h"
#include "cuda/common/delta.h"
#include "cuda/common/schedule.h"
#include "cuda/common/select_scores.h"
#include "cuda/common/union_size.h"
#include "cuda/plain/plain.h"
#include "cuda/plan.h"
#include "cuda/portable/portable.h"
#include "cuda/portable/select.h"
#include "cuda/sm90/masked.h"
#include "cuda/sm90/select.h"
#include "cuda/sm90/union.h"
#include "cuda_bits.h"
#include "cuda_common.h"

namespace topk_attn {
namespace {

using cuda::Build;
using cuda::Plan;
using cuda::Selector;

// Scores of a few tiles that the slab selection keeps at a time: they should stay in the L2 cache.
constexpr int64_t kSlabBytes = int64_t{32} << 20;

// The sm_90a kernels, which a build may leave out; a plan never asks for them then.
#define TOPK_SM90(call)               \
  [&]() -> cudaError_t {              \
    if constexpr (cuda::kBuiltSm90) { \
      return cuda::sm90::call;        \
    } else {                          \
      return cudaErrorNotSupported;   \
    }                                 \
  }()

// ---------------------------------------------------------------------------------------------------------------
// Wishes
// ---------------------------------------------------------------------------------------------------------------

// What topk_attn.cuda.override() set, and what the last call used. Process-wide: the backward runs on
// autograd's threads.
struct Shared {
  std::mutex mutex;
  cuda::Wish wish;
  Plan last;
};
Shared& shared() {
  static Shared instance;
  return instance;
}

cuda::Wish current_wish() {
  if (bits::forced() != nullptr) return *bits::forced();
  const std::lock_guard<std::mutex> lock(shared().mutex);
  return shared().wish;
}

// Whether the card's tensor cores give the plan's kernels the same scores (cuda_bits.h).
bool bits_agree(const Plan& plan, const cuda::Call& call, bool attend) {
  if (plan.build == Build::kPlain || bits::forced() != nullptr) return true;
  const auto dtype = call.dtype == DType::kBFloat16 ? at::kBFloat16 : at::kHalf;
  const int32_t dim = attend ? std::max(call.head_dim, call.v_dim) : call.head_dim;
  return bits::of(plan.build, dtype, dim) != bits::Verdict::kDisagree;
}

Plan make_plan(const cuda::Call& call, bool attend, bool deterministic) {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  const int arch = device->major * 10 + device->minor;
  TORCH_CHECK(arch >= 80, "topk_attn: the GPU must have compute capability 8.0 or higher, ", device->name,
              " has ", device->major, ".", device->minor);
  cuda::Wish wish = current_wish();
  Plan plan = cuda::plan(call, arch, attend, deterministic, wish);
  TORCH_CHECK(plan.problem.empty(), "topk_attn: ", plan.problem);
  if (!bits_agree(plan, call, attend) && plan.build == Build::kSm90 && wish.build.empty() &&
      wish.selection.empty() && wish.largest_share <= 0.0f) {
    TORCH_WARN_ONCE(
        "topk_attn: on this ", device->name,
        " the sm90 kernels do not compute identical scores, "
        "so that training and decoding could keep different keys; build 'portable' serves instead");
    wish.build = cuda::name_of(Build::kPortable);
    plan = cuda::plan(call, arch, attend, deterministic, wish);
    TORCH_CHECK(plan.problem.empty(), "topk_attn: ", plan.problem);
  }
  TORCH_CHECK(bits_agree(plan, call, attend), "topk_attn: on this ", device->name, " the kernels of build '",
              cuda::name_of(plan.build),
              "' do not compute identical scores in selection, forward and backward: "
              "the selection would not be exact");
  return plan;
}

void remember(const Plan& plan) {
  if (bits::forced() != nullptr) return;
  const std::lock_guard<std::mutex> lock(shared().mutex);
  shared().last = plan;
}

// ---------------------------------------------------------------------------------------------------------------
// From tensors to a Call
// ---------------------------------------------------------------------------------------------------------------

// The kernels make copy-engine descriptors of the strides: rows that several indices share are copied too.
Tensor own_rows(const Tensor& t) {
  bool shared = false;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) shared = shared || (t.size(d) > 1 && t.stride(d) <= 0);
  return shared ? t.clone(at::MemoryFormat::Contiguous) : aligned(t);
}

// The strides of dimensions of size 1 or less mean nothing: they are given the value that they would have.
View aligned_view(const Tensor& t) {
  View v = view_of(t);
  if (t.size(-2) <= 1) v.head = t.size(-1);
  if (t.size(-3) <= 1) v.token = std::max(v.head, t.size(-2) * t.size(-1));
  if (t.dim() == 4 && t.size(0) <= 1) v.batch = std::max<int64_t>(v.token * t.size(1), t.size(-1));
  return v;
}

// A checked call with everything that its pointers lead to.
struct Prepared {
  Shape shape;
  cuda::Call call;
  Tensor q, k, v, cu_q, cu_k, tiles;
  cudaStream_t stream = nullptr;
};

// q's device, for calls that the dispatcher sent here because of another tensor.
c10::Device device_of(const Tensor& q, const Tensor& other) {
  TORCH_CHECK(q.is_cuda(), "topk_attn: q is on ", q.device(), ", but k is on ", other.device(),
              ": they must be on one device");
  return q.device();
}

Prepared prepare(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
                 const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k, bool causal,
                 const Settings& settings, std::optional<double> softmax_scale) {
  Prepared p;
  p.shape =
      check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, symbolic(max_seqlen_q), symbolic(max_seqlen_k));
  TORCH_CHECK(
      q.scalar_type() != at::kDouble,
      "topk_attn: q must be float32, bfloat16 or float16 on CUDA, got Double (float64 runs on the CPU)");
  p.q = own_rows(q);
  p.k = own_rows(k);
  if (v.defined()) p.v = own_rows(v);
  p.stream = at::cuda::getCurrentCUDAStream();

  const Shape& shape = p.shape;
  cuda::Call& c = p.call;
  c.dtype = dtype_of(q);
  c.heads = narrow(shape.heads, "the number of heads");
  c.kv_heads = narrow(shape.kv_heads, "the number of KV heads");
  c.head_dim = static_cast<int32_t>(shape.head_dim);
  c.v_dim = static_cast<int32_t>(shape.v_dim);
  c.tq = narrow(shape.tq.expect_int(), "the number of queries");
  c.tk = narrow(shape.tk.expect_int(), "the number of keys");
  c.causal = causal;
  c.kv_group = settings.kv_group && shape.heads > shape.kv_heads;
  c.budget = settings.budget;
  c.sink = settings.sink;
  c.recent = settings.recent;
  c.softmax_scale = static_cast<float>(check_scale(softmax_scale, shape.head_dim));
  c.rows = RowLayout{shape.packed ? 0 : shape.heads * c.tq, c.tq};
  c.q = aligned_view(p.q);
  c.k = aligned_view(p.k);
  if (v.defined()) c.v = aligned_view(p.v);

  const TileGrid grid = tile_grid(shape, cu_seqlens_q);
  c.num_tiles = narrow(grid.tiles.expect_int(), "the number of query tiles");
  narrow(int64_t{c.num_tiles} * c.heads, "the number of query tiles over all heads");
  if (shape.packed) {
    p.cu_q = cu_seqlens_q->contiguous();
    p.cu_k = cu_seqlens_k->contiguous();
    c.cu_q = p.cu_q.data_ptr<int32_t>();
    c.cu_k = p.cu_k.data_ptr<int32_t>();
    c.batch = narrow(p.cu_q.size(0) - 1, "the number of documents");
    c.max_q = static_cast<int32_t>(std::min<int64_t>(c.tq, max_seqlen_q.value_or(c.tq)));
    c.max_k = static_cast<int32_t>(std::min<int64_t>(c.tk, max_seqlen_k.value_or(c.tk)));
    p.tiles = at::empty({c.num_tiles, 2}, q.options().dtype(at::kInt));
    check(cuda::make_tiles(c, reinterpret_cast<int2*>(p.tiles.data_ptr()), p.stream), "the tile schedule");
    c.tiles = reinterpret_cast<const int2*>(p.tiles.data_ptr());
  } else {
    c.batch = narrow(shape.batch.expect_int(), "the batch size");
    c.max_q = c.tq;
    c.max_k = c.tk;
  }
  return p;
}

// Whether every row keeps all that it sees, whatever its length.
bool keeps_everything(const cuda::Call& c) {
  const int64_t n = c.max_k;
  if (n == 0) return false;
  const Budget& b = c.budget;
  return b.max_keys >= n && (b.topk >= n || b.ratio == 1.0 || b.min_keys >= n);
}

// ---------------------------------------------------------------------------------------------------------------
// Selection
// ---------------------------------------------------------------------------------------------------------------

void select_by_slabs(const Prepared& p, const Plan& plan, const cuda::Selection& selection) {
  const cuda::Call& c = p.call;
  const int64_t ld = (int64_t{c.max_k} + 63) / 64 * 64;
  const int64_t unit_bytes = cuda::kTileRows * ld * int64_t{sizeof(float)};
  const int64_t group = c.kv_group ? c.heads / c.kv_heads : 1;
  const int64_t total = cuda::num_units(c);
  const int64_t sets = std::clamp<int64_t>(kSlabBytes / (unit_bytes * group), 1, 32768 / group);
  const int64_t units = std::min(sets * group, total);
  const Tensor slab = at::empty({units * cuda::kTileRows * ld}, p.q.options().dtype(at::kFloat));
  for (int64_t first = 0; first < total; first += units) {
    const int64_t count = std::min(units, total - first);
    const auto scores = plan.build == Build::kPlain ? cuda::plain::scores : cuda::portable::scores;
    check(scores(c, first, count, slab.data_ptr<float>(), ld, p.stream), "the score kernel");
    check(
        cuda::select_rows(c, cuda::ScoreSlab{slab.data_ptr<float>(), ld, first, count}, selection, p.stream),
        "the row selection");
  }
}

struct Encoding {
  Tensor threshold, tie_index, bitmap, indices;
};

// threshold, tie_index; the bitmap if `tiles`; the indices if `index_width` >= 0.
Encoding run_select(const Prepared& p, const Plan& plan, bool tiles, OptInt index_width) {
  const cuda::Call& c = p.call;
  const auto floats = p.q.options().dtype(at::kFloat);
  const auto ints = p.q.options().dtype(at::kInt);
  Encoding e;
  e.threshold = at::empty(row_sizes(p.shape), floats);
  e.tie_index = at::empty(row_sizes(p.shape), ints);
  e.bitmap = tiles ? at::zeros({c.heads, c.num_tiles, cuda::bitmap_words(c)}, ints) : at::empty({0}, ints);
  e.indices =
      index_width.has_value() ? at::full(row_sizes(p.shape, *index_width), -1, ints) : at::empty({0}, ints);
  cuda::Selection s;
  s.threshold = e.threshold.data_ptr<float>();
  s.tie_index = e.tie_index.data_ptr<int32_t>();
  if (tiles) s.bitmap = reinterpret_cast<uint32_t*>(e.bitmap.data_ptr<int32_t>());
  if (index_width.value_or(0) > 0) {
    s.indices = e.indices.data_ptr<int32_t>();
    s.index_width = *index_width;
  }
  if (p.shape.packed || c.max_k == 0) {
    check(cuda::init_rows(c, View{}, nullptr, s.threshold, s.tie_index, p.stream), "the row initialisation");
  }
  if (c.num_tiles == 0 || c.max_k == 0) return e;
  if (plan.selector == Selector::kFused && s.indices == nullptr) {
    const bool portable = plan.selector_build == Build::kPortable;
    size_t bytes = portable ? cuda::portable::select_workspace(c) : 0;
    if constexpr (cuda::kBuiltSm90) {
      if (!portable) bytes = cuda::sm90::select_workspace(c);
    }
    const Tensor workspace = at::empty({static_cast<int64_t>(bytes)}, p.q.options().dtype(at::kByte));
    check(portable ? cuda::portable::select(c, s, workspace.data_ptr(), bytes, p.stream)
                   : TOPK_SM90(select(c, s, workspace.data_ptr(), bytes, p.stream)),
          "the fused selection");
  } else {
    select_by_slabs(p, plan, s);
  }
  return e;
}

}  // namespace

SelectResult cuda_ops::select(const Tensor& q, const Tensor& k, const OptTensor& cu_seqlens_q,
                              const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k,
                              bool causal, OptInt topk, std::optional<double> ratio, int64_t min_keys,
                              OptInt max_keys, std::string_view select, int64_t sink, int64_t recent,
                              bool return_indices) {
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  const c10::cuda::CUDAGuard guard(device_of(q, k));
  const Prepared p =
      prepare(q, k, Tensor(), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, settings, 1.0);
  const Plan plan = make_plan(p.call, false, false);
  remember(plan);
  OptInt width;
  if (return_indices) width = budget(p.shape.longest.expect_int(), settings.budget);
  const Encoding e = run_select(p, plan, false, width);
  return {e.threshold, e.tie_index, e.indices};
}

// ---------------------------------------------------------------------------------------------------------------
// Attention
// ---------------------------------------------------------------------------------------------------------------

namespace {

// union_size of every (head, tile), for a plan that gathers.
Tensor union_sizes(const Prepared& p, const uint32_t* bitmap) {
  const Tensor sizes = at::empty({p.call.heads, p.call.num_tiles}, p.q.options().dtype(at::kInt));
  check(cuda::count_union(p.call, bitmap, sizes.data_ptr<int32_t>(), p.stream), "the union count");
  return sizes;
}

}  // namespace

FwdResult cuda_ops::fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_seqlens_q,
                        const OptTensor& cu_seqlens_k, OptInt max_seqlen_q, OptInt max_seqlen_k, bool causal,
                        OptInt topk, std::optional<double> ratio, int64_t min_keys, OptInt max_keys,
                        std::string_view select, int64_t sink, int64_t recent,
                        std::optional<double> softmax_scale, bool deterministic, std::string_view kept) {
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  const Kept form = check_kept(kept);
  TORCH_CHECK(form != Kept::kLists, "topk_attn: kept='lists' is made on the CPU only, got it for tensors on ",
              q.device());
  TORCH_CHECK(v.defined(), "topk_attn: v must be given");
  const c10::cuda::CUDAGuard guard(device_of(q, k));
  const Prepared p = prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
                             settings, softmax_scale);
  const cuda::Call& c = p.call;
  Plan plan = make_plan(c, true, deterministic);
  const auto ints = q.options().dtype(at::kInt);
  const auto floats = q.options().dtype(at::kFloat);

  auto sizes = q.sizes().vec();
  sizes.back() = p.shape.v_dim;
  const Tensor out = at::empty(sizes, q.options());
  const Tensor lse = at::empty(row_sizes(p.shape), floats);
  Encoding e;
  const bool everything = keeps_everything(c);
  if (everything) {
    plan.forward_share = plan.backward_share = 0.0f;
    e.threshold = at::empty(row_sizes(p.shape), floats);
    e.tie_index = at::empty(row_sizes(p.shape), ints);
    auto* const thresholds = e.threshold.data_ptr<float>();
    auto* const ties = e.tie_index.data_ptr<int32_t>();
    if (p.shape.packed) {
      check(cuda::init_rows(c, View{}, nullptr, thresholds, ties, p.stream), "the row initialisation");
    }
    check(cuda::admit_all(c, thresholds, ties, p.stream), "the row initialisation");
    e.bitmap = form == Kept::kTiles ? at::full({c.heads, c.num_tiles, cuda::bitmap_words(c)}, -1, ints)
                                    : at::empty({0}, ints);
  } else {
    e = run_select(p, plan, true, std::nullopt);
  }
  remember(plan);

  cuda::ForwardCall f;
  f.call = c;
  f.threshold = e.threshold.data_ptr<float>();
  f.tie_index = e.tie_index.data_ptr<int32_t>();
  if (!everything) f.bitmap = reinterpret_cast<const uint32_t*>(e.bitmap.data_ptr<int32_t>());
  f.out = aligned_view(out);
  f.lse = lse.data_ptr<float>();
  if (p.shape.packed || c.max_k == 0) {
    check(cuda::init_rows(c, f.out, f.lse, nullptr, nullptr, p.stream), "the row initialisation");
  }
  if (c.num_tiles > 0 && c.max_k > 0) {
    Tensor union_size;
    if (plan.forward_share > 0.0f) {
      union_size = union_sizes(p, f.bitmap);
      f.regimes = cuda::Regimes{union_size.data_ptr<int32_t>(), plan.forward_share};
      if (plan.build == Build::kSm90) check(TOPK_SM90(forward_union(f, p.stream)), "the gathered forward");
    }
    switch (plan.build) {
      case Build::kPlain:
        check(cuda::plain::forward(f, p.stream), "the plain forward");
        break;
      case Build::kPortable:
        check(cuda::portable::forward(f, p.stream), "the portable forward");
        break;
      case Build::kSm90:
        check(TOPK_SM90(forward_masked(f, p.stream)), "the masked forward");
        break;
    }
  }
  const Tensor saved = form == Kept::kTiles ? e.bitmap : at::empty({0}, ints);
  return {out, lse, e.threshold, e.tie_index, saved, at::empty({0}, floats)};
}

namespace {

// Float32 sums of the backward that may be alive at a time, if more than one KV head needs them.
constexpr int64_t kSumBytes = int64_t{1} << 30;

// The KV heads [first, first + count) of a call, with their query heads.
cuda::BackwardCall slice(const cuda::BackwardCall& all, int32_t first, int32_t count) {
  cuda::BackwardCall b = all;
  cuda::Call& c = b.call;
  const int32_t group = c.heads / c.kv_heads;
  const int64_t size = c.dtype == DType::kFloat32 ? 4 : 2;
  const auto advance = [&](View& v, int64_t heads) {
    v.data = static_cast<char*>(v.data) + heads * v.head * size;
  };
  const int64_t head = int64_t{first} * group;
  for (View* v : {&c.q, &b.dout, &b.dq}) advance(*v, head);
  for (View* v : {&c.k, &c.v, &b.dk, &b.dv}) advance(*v, first);
  b.threshold += head * c.rows.head;
  b.tie_index += head * c.rows.head;
  b.lse += head * c.rows.head;
  b.delta += head * c.rows.head;
  if (b.bitmap != nullptr) b.bitmap += head * c.num_tiles * cuda::bitmap_words(c);
  c.kv_heads = count;
  c.heads = count * group;
  return b;
}

int32_t kv_heads_at_a_time(const cuda::Call& c, const Plan& plan, bool gather) {
  int64_t bytes = 0;
  if constexpr (cuda::kBuiltSm90) {
    if (plan.build == Build::kSm90) bytes += cuda::sm90::backward_masked_workspace(c) / c.kv_heads;
  }
  if (gather) bytes += int64_t{4} * (c.cu_q == nullptr ? c.batch : 1) * c.tk * (c.head_dim + c.v_dim);
  return static_cast<int32_t>(
      std::clamp<int64_t>(bytes == 0 ? c.kv_heads : kSumBytes / bytes, 1, c.kv_heads));
}

// dQ, dK and dV of the KV heads of `b`.
void backward_of(const Prepared& p, const Plan& plan, cuda::BackwardCall b, bool gather,
                 const int2* key_tile_list, int32_t num_key_tiles, bool deterministic) {
  const cuda::Call& c = b.call;
  const auto floats = p.q.options().dtype(at::kFloat);
  // The gathered regime needs to know the unions.
  Tensor union_size, dk_sum, dv_sum, steps;
  void* step_data = nullptr;  // null: float sums, in no fixed order
  if (gather) {
    union_size = at::empty({c.heads, c.num_tiles}, p.q.options().dtype(at::kInt));
    check(cuda::count_union(c, b.bitmap, union_size.data_ptr<int32_t>(), p.stream), "the union count");
    b.regimes = cuda::Regimes{union_size.data_ptr<int32_t>(), plan.backward_share};
    auto sizes = p.k.sizes().vec();
    sizes[sizes.size() - 2] = c.kv_heads;
    dk_sum = at::zeros(sizes, floats);
    sizes.back() = c.v_dim;
    dv_sum = at::zeros(sizes, floats);
    b.dk_sum = dk_sum.data_ptr<float>();
    b.dv_sum = dv_sum.data_ptr<float>();
    if (deterministic && plan.build == Build::kSm90) {
      size_t bytes = 0;
      if constexpr (cuda::kBuiltSm90) bytes = cuda::sm90::union_workspace(c);
      steps = at::empty({static_cast<int64_t>(bytes)}, p.q.options().dtype(at::kByte));
      step_data = steps.data_ptr();
    }
    if (plan.build == Build::kSm90) {
      check(TOPK_SM90(backward_union_dq(b, p.stream, step_data)), "the gathered backward (dQ)");
    }
  }
  switch (plan.build) {
    case Build::kPlain:
      check(cuda::plain::backward(b, key_tile_list, num_key_tiles, p.stream), "the plain backward");
      break;
    case Build::kPortable:
      check(cuda::portable::backward(b, key_tile_list, num_key_tiles, p.stream), "the portable backward");
      break;
    case Build::kSm90: {
      size_t bytes = 0;
      if constexpr (cuda::kBuiltSm90) bytes = cuda::sm90::backward_masked_workspace(c);
      const Tensor workspace = at::empty({static_cast<int64_t>(bytes)}, p.q.options().dtype(at::kByte));
      check(TOPK_SM90(backward_masked(b, workspace.data_ptr(), bytes, p.stream, deterministic)),
            "the masked backward");
      break;
    }
  }
  if (gather) {
    if (plan.build == Build::kSm90) {
      check(TOPK_SM90(backward_union_dkv(b, p.stream, step_data)), "the gathered backward (dK, dV)");
    }
    if (step_data != nullptr) {
      check(TOPK_SM90(finish_union_gradients(b, step_data, p.stream)), "the gradient conversion");
    } else {
      check(cuda::finish_gradients(c, b.dk_sum, b.dv_sum, b.dk, b.dv, p.stream), "the gradient conversion");
    }
  }
}

}  // namespace

BwdResult cuda_ops::bwd(const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& threshold,
                        const Tensor& tie_index, const Tensor& kept_index, const Tensor& /*kept_prob*/,
                        const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, OptInt max_seqlen_q,
                        OptInt max_seqlen_k, bool causal, OptInt topk, std::optional<double> ratio,
                        int64_t min_keys, OptInt max_keys, std::string_view select, int64_t sink,
                        int64_t recent, std::optional<double> softmax_scale, bool deterministic) {
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  deterministic = deterministic || at::globalContext().deterministicAlgorithms();
  TORCH_CHECK(v.defined(), "topk_attn: v must be given");
  const c10::cuda::CUDAGuard guard(device_of(q, k));
  const Prepared p = prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
                             settings, softmax_scale);
  const cuda::Call& c = p.call;
  const Plan plan = make_plan(c, true, deterministic);
  auto out_sizes = q.sizes().vec();
  out_sizes.back() = p.shape.v_dim;
  check_state(dout, "dout", q, q.scalar_type(), out_sizes);
  check_state(out, "out", q, q.scalar_type(), out_sizes);
  check_state(lse, "lse", q, at::kFloat, row_sizes(p.shape));
  check_state(threshold, "threshold", q, at::kFloat, row_sizes(p.shape));
  check_state(tie_index, "tie_index", q, at::kInt, row_sizes(p.shape));
  if (dlse.has_value()) check_state(*dlse, "dlse", q, at::kFloat, row_sizes(p.shape));
  if (kept_index.numel() > 0) {
    check_state(kept_index, "kept_index", q, at::kInt, {c.heads, c.num_tiles, cuda::bitmap_words(c)});
  }

  const auto floats = q.options().dtype(at::kFloat);
  const Tensor dout_rows = own_rows(dout);
  const Tensor out_rows = out.stride(-1) == 1 ? out : out.contiguous();
  const Tensor lse_rows = lse.contiguous();
  const Tensor threshold_rows = threshold.contiguous();
  const Tensor tie_rows = tie_index.contiguous();
  const Tensor kept_rows = kept_index.contiguous();
  const Tensor dlse_rows = dlse.has_value() ? dlse->contiguous() : Tensor();
  const Tensor delta = at::empty(row_sizes(p.shape), floats);
  // Packed: tokens between documents have no gradient.
  const auto make = [&](const Tensor& like) {
    return p.shape.packed ? at::zeros(like.sizes(), like.options()) : at::empty(like.sizes(), like.options());
  };
  const Tensor dq = make(q);
  const Tensor dk = c.tq == 0 ? at::zeros(k.sizes(), k.options()) : make(k);
  const Tensor dv = c.tq == 0 ? at::zeros(v.sizes(), v.options()) : make(v);
  if (c.max_k == 0) return {dq.zero_(), dk.zero_(), dv.zero_()};
  if (c.num_tiles == 0) return {dq, dk, dv};

  cuda::BackwardCall b;
  b.call = c;
  b.threshold = threshold_rows.data_ptr<float>();
  b.tie_index = tie_rows.data_ptr<int32_t>();
  if (kept_rows.numel() > 0) b.bitmap = reinterpret_cast<const uint32_t*>(kept_rows.data_ptr<int32_t>());
  b.lse = lse_rows.data_ptr<float>();
  b.delta = delta.data_ptr<float>();
  b.dout = aligned_view(dout_rows);
  b.dq = aligned_view(dq);
  b.dk = aligned_view(dk);
  b.dv = aligned_view(dv);
  check(cuda::delta(c, aligned_view(out_rows), b.dout,
                    dlse_rows.defined() ? dlse_rows.data_ptr<float>() : nullptr, b.lse,
                    delta.data_ptr<float>(), p.stream),
        "the delta kernel");

  Tensor key_tiles;
  int32_t num_key_tiles = narrow(int64_t{c.batch} * ((int64_t{c.tk} + 63) / 64), "the number of key tiles");
  if (p.shape.packed) {
    num_key_tiles = narrow((int64_t{c.tk} + 63) / 64 + c.batch, "the number of key tiles");
    key_tiles = at::empty({num_key_tiles, 2}, q.options().dtype(at::kInt));
    check(cuda::make_key_tiles(c, reinterpret_cast<int2*>(key_tiles.data_ptr()), num_key_tiles, p.stream),
          "the key tile schedule");
  }
  narrow(int64_t{num_key_tiles} * c.kv_heads, "the number of key tiles over all KV heads");
  const int2* key_tile_list = p.shape.packed ? reinterpret_cast<const int2*>(key_tiles.data_ptr()) : nullptr;

  // A few KV heads at a time, so that the float32 sums stay small beside the inputs of long sequences.
  const bool gather = plan.backward_share > 0.0f && b.bitmap != nullptr && !keeps_everything(c);
  const int32_t step = kv_heads_at_a_time(c, plan, gather);
  for (int32_t first = 0; first < c.kv_heads; first += step) {
    const int32_t count = std::min(step, c.kv_heads - first);
    backward_of(p, plan, slice(b, first, count), gather, key_tile_list, num_key_tiles, deterministic);
  }
  return {dq, dk, dv};
}

namespace {

SelectResult select_scores(const Tensor& scores, int64_t topk, const OptTensor& lengths) {
  check_select_scores(scores, topk, lengths);
  const c10::cuda::CUDAGuard guard(scores.device());
  const Tensor lengths_rows = lengths.has_value() ? lengths->contiguous() : Tensor();
  SelectScoresParams p;
  p.dtype = dtype_of(scores);
  p.scores = scores.data_ptr();
  p.row_stride = scores.stride(0);
  p.rows = scores.size(0);
  p.n = scores.size(1);
  p.topk = topk;
  p.lengths = lengths_rows.defined() ? lengths_rows.data_ptr<int32_t>() : nullptr;
  const auto ints = scores.options().dtype(at::kInt);
  const Tensor threshold = at::empty({p.rows}, scores.options().dtype(at::kFloat));
  const Tensor tie_index = at::empty({p.rows}, ints);
  const Tensor indices = at::empty({p.rows, topk}, ints);
  p.threshold = threshold.data_ptr<float>();
  p.tie_index = tie_index.data_ptr<int32_t>();
  p.indices = indices.data_ptr<int32_t>();
  if (p.rows > 0) check(cuda::select_scores(p, at::cuda::getCurrentCUDAStream()), "the row selection");
  return {threshold, tie_index, indices};
}

// ---------------------------------------------------------------------------------------------------------------
// Plans, for topk_attn.cuda
// ---------------------------------------------------------------------------------------------------------------

using PlanTuple = std::tuple<std::string, std::string, double, double>;

PlanTuple tuple_of(const Plan& p) {
  return {cuda::name_of(p.build), cuda::name_of(p.selector), p.forward_share, p.backward_share};
}

PlanTuple plan_of(const Tensor& q, const Tensor& k, const OptTensor& v, bool causal, OptInt topk,
                  std::optional<double> ratio, int64_t min_keys, OptInt max_keys, std::string_view select,
                  int64_t sink, int64_t recent, bool deterministic) {
  TORCH_CHECK(q.is_cuda(), "topk_attn: q must be on CUDA to plan for a GPU, got ", q.device());
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  const c10::cuda::CUDAGuard guard(device_of(q, k));
  const Prepared p = prepare(q, k, v.value_or(Tensor()), std::nullopt, std::nullopt, std::nullopt,
                             std::nullopt, causal, settings, 1.0);
  return tuple_of(make_plan(p.call, v.has_value(), deterministic));
}

void set_wish(std::string_view build, std::string_view selection, double largest_share) {
  const cuda::Wish wish{std::string(build), std::string(selection), static_cast<float>(largest_share)};
  const std::lock_guard<std::mutex> lock(shared().mutex);
  shared().wish = wish;
}

void reset_bits(std::string_view corrupt) {
  bits::reset(std::string(corrupt));
}

PlanTuple last_plan() {
  const std::lock_guard<std::mutex> lock(shared().mutex);
  return tuple_of(shared().last);
}

}  // namespace
}  // namespace topk_attn

TORCH_LIBRARY_IMPL(topk_attn, CUDA, m) {
  m.impl("select", &topk_attn::cuda_ops::select);
  m.impl("fwd", &topk_attn::cuda_ops::fwd);
  m.impl("bwd", &topk_attn::cuda_ops::bwd);
  m.impl("select_scores", &topk_attn::select_scores);
}

TORCH_LIBRARY_FRAGMENT(topk_attn, m) {
  m.def(
      "_cuda_plan(Tensor q, Tensor k, Tensor? v, *, bool causal=True, int? topk=None, float? ratio=None, int "
      "min_keys=1, int? max_keys=None, str select='head', int sink=0, int recent=0, bool "
      "deterministic=False) -> "
      "(str, str, float, float)",
      &topk_attn::plan_of);
  m.def("_cuda_reset_bits(str corrupt) -> ()", &topk_attn::reset_bits);
  m.def("_cuda_override(str build, str selection, float largest_share) -> ()", &topk_attn::set_wish);
  m.def("_cuda_last_plan() -> (str, str, float, float)", &topk_attn::last_plan);
}
