// The kernels of one instruction set, indexed by DType.
#pragma once

#include "params.h"

namespace topk_attn::cpu {

struct KernelTable {
  int lanes;  // float32 lanes of a vector: head dims must be a multiple
  void (*forward[4])(const ForwardParams&, const Executor&);
  bool (*backward[4])(const BackwardParams&, const Executor&);
  void (*forward_kvcache[4])(const CacheParams&, const Executor&);
  void (*select_scores[4])(const SelectScoresParams&, const Executor&);
};

}  // namespace topk_attn::cpu
