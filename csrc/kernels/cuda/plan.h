// Which kernels serve a call: one pure function of the call, the GPU and what the user asked for.
//
//   build      plain     float32, no tensor cores, any GPU
//              portable  bf16 and fp16 on mma.sync, every GPU since sm_80
//              sm90      bf16 and fp16 on wgmma and TMA, sm_90a (H100, H200)
//   selection  slab      scores of a few tiles in a reused buffer, radix select per row
//              fused     inside the QK^T pass, certified per row, scores never stored
//   regime     per query tile, on the device: gathered union where the tile's union of kept keys is at most
//              largest_share of what it sees, masked dense elsewhere
//
// A build that cannot serve part of a call is not replaced silently where the user asked for it: the plan
// then fails with the reason. Without a wish the best part for the GPU is taken, part by part; all of them
// compute the same sets.
#pragma once

#include <string>

#include "params.h"

namespace topk_attn::cuda {

enum class Build { kPlain, kPortable, kSm90 };
enum class Selector { kSlab, kFused };

const char* name_of(Build build);
const char* name_of(Selector selector);

// What the user asked for; empty or negative: no wish.
struct Wish {
  std::string build;
  std::string selection;
  float largest_share = -1.0f;
};

struct Plan {
  std::string problem;  // not empty: the request cannot be served, and why; the rest is then meaningless
  Build build = Build::kPortable;  // of the masked dense passes
  Selector selector = Selector::kSlab;
  Build selector_build = Build::kPortable;  // of a fused selection: portable or sm90
  float forward_share = 0.0f;               // largest_share of the forward; 0: no tile is gathered
  float backward_share = 0.0f;
};

// `arch`: compute capability, 10 * major + minor. `attend`: false for selection alone (v_dim is then not
// looked at).
Plan plan(const Call& call, int arch, bool attend, bool deterministic, const Wish& wish);

}  // namespace topk_attn::cuda
