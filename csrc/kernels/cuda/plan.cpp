#include "plan.h"

#include <algorithm>

#include "built.h"
#include "portable/portable.h"
#include "portable/select.h"
#include "sm90/masked.h"
#include "sm90/select.h"
#include "sm90/union.h"

namespace topk_attn::cuda {
namespace {

// Shares of the visible keys up to which a tile costs less gathered than masked dense (docs/kernels.md).
constexpr float kForwardShare = 0.55f;
constexpr float kBackwardShare = 0.30f;
constexpr float kPortableForwardShare = 0.70f;
// Since sm_90 rows of dK and dV are added by bulk reductions, and gathering costs less at any share. Without
// them it costs more; nobody has measured on such a GPU, so that share is an older kernel's.
constexpr float kPortableBackwardShare = 1.0f;
constexpr float kPortableBackwardShareBefore90 = 0.65f;

std::string number(int value) {
  return std::to_string(value);
}

std::string no_portable(const Call& c, bool attend) {
  if (c.dtype == DType::kFloat32) return "float32 inputs are served by build 'plain' alone";
  if (!built_dtype(c.dtype))
    return "this build of the library has no kernels for the inputs' dtype (TOPK_CUDA_DTYPES)";
  if (!portable::supports(c, attend)) {
    const int dim = attend ? std::max(c.head_dim, c.v_dim) : c.head_dim;
    return "this build of the library has no kernels for head dim " + number(dim) + " (TOPK_CUDA_HEAD_DIMS)" +
           (c.kv_group ? " and select='kv_group'" : "");
  }
  return "";
}

std::string no_sm90(int arch) {
  if (!kBuiltSm90) return "this build of the library has no sm_90a kernels (TOPK_CUDA_ARCHS)";
  if (arch != 90)
    return "the sm90 kernels need compute capability 9.0, the GPU has " + number(arch / 10) + "." +
           number(arch % 10);
  return "";
}

}  // namespace

const char* name_of(Build build) {
  return build == Build::kPlain ? "plain" : build == Build::kPortable ? "portable" : "sm90";
}
const char* name_of(Selector selector) {
  return selector == Selector::kSlab ? "slab" : "fused";
}

Plan plan(const Call& c, int arch, bool attend, bool deterministic, const Wish& wish) {
  Plan p;
  const auto fail = [&](const std::string& reason) {
    p.problem = reason;
    return p;
  };
  if (!wish.build.empty() && wish.build != "plain" && wish.build != "portable" && wish.build != "sm90") {
    return fail("build must be 'plain', 'portable' or 'sm90', got '" + wish.build + "'");
  }
  if (!wish.selection.empty() && wish.selection != "slab" && wish.selection != "fused") {
    return fail("selection must be 'slab' or 'fused', got '" + wish.selection + "'");
  }

  // The build of the masked dense passes.
  const std::string portable_problem = no_portable(c, attend);
  const std::string arch_problem = no_sm90(arch);
  bool masked = false;
  bool fused = false;
  bool gather = false;
  if constexpr (kBuiltSm90) {
    if (arch_problem.empty() && c.dtype != DType::kFloat32) {
      Call probe = c;
      if (!attend) {  // a selection has no values
        probe.v = probe.k;
        probe.v_dim = probe.head_dim;
      }
      masked = sm90::supports_masked(probe);
      fused = sm90::supports_select(probe);
      gather = sm90::supports_union(probe);
    }
  }
  if (c.dtype == DType::kFloat32) {
    if (wish.build == "portable" || wish.build == "sm90")
      return fail("float32 inputs are served by build 'plain' alone");
    p.build = Build::kPlain;
  } else if (wish.build == "plain") {
    return fail("build 'plain' serves float32 inputs alone");
  } else if (wish.build == "sm90") {
    if (!arch_problem.empty()) return fail(arch_problem);
    if (!masked) {
      return fail(
          "build 'sm90' serves head dims 64 and 128, equal for k and v, and select='head'; got head dims " +
          number(c.head_dim) + " and " + number(c.v_dim) + (c.kv_group ? ", select='kv_group'" : ""));
    }
    p.build = Build::kSm90;
  } else if (masked && wish.build.empty()) {
    p.build = Build::kSm90;
  } else {
    if (!portable_problem.empty()) return fail(portable_problem);
    p.build = Build::kPortable;
  }

  // Selection.
  const bool portable_fused = c.dtype != DType::kFloat32 && portable::supports_select(c);
  const bool sm90_fused = fused && wish.build != "portable";
  if (wish.selection == "fused" && !sm90_fused && !portable_fused) {
    return fail(
        "selection 'fused' needs bf16 or fp16, a head dim up to 128, select='head', no sink or recent keys "
        "and a budget whose candidates fit its workspace");
  }
  p.selector =
      wish.selection != "slab" && (sm90_fused || portable_fused) ? Selector::kFused : Selector::kSlab;
  p.selector_build = sm90_fused ? Build::kSm90 : Build::kPortable;
  if (p.selector == Selector::kSlab && p.build == Build::kSm90 && !portable_problem.empty())
    return fail(portable_problem);

  // Regimes.
  if (wish.largest_share > 1.0f)
    return fail("largest_share must be at most 1, got " + std::to_string(wish.largest_share));
  if (p.build == Build::kPortable) gather = portable::supports_gathered(c);
  const bool may_gather = attend && gather && p.build != Build::kPlain;
  if (attend && wish.largest_share > 0.0f && !may_gather) {
    return fail(
        "gathered tiles (largest_share above 0) need bf16 or fp16, head dims up to 128 and select='head'");
  }
  if (may_gather) {
    const bool portable = p.build == Build::kPortable;
    const float forward_share = portable ? kPortableForwardShare : kForwardShare;
    const float backward_share = !portable    ? kBackwardShare
                                 : arch >= 90 ? kPortableBackwardShare
                                              : kPortableBackwardShareBefore90;
    p.forward_share = wish.largest_share < 0.0f ? forward_share : wish.largest_share;
    p.backward_share = wish.largest_share < 0.0f ? backward_share : wish.largest_share;
    // The portable gathered pass adds its tiles' dK and dV in no fixed order.
    if (portable && deterministic) p.backward_share = 0.0f;
  }
  return p;
}

}  // namespace topk_attn::cuda
