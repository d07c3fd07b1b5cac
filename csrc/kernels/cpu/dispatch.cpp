// Chooses the instruction set at run time, once, and forwards to its kernels.

#include <cstring>

#include "cpu/table.h"
#include "params.h"

namespace topk_attn::cpu {

namespace generic {
extern const KernelTable kTable;
}
#if defined(TOPK_X86)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
#endif

namespace {

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa detect() {
#if defined(TOPK_X86)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    return Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

// A head dim that is no multiple of a 512-bit vector goes to the 256-bit kernels: both make the same scores.
const KernelTable& table(int64_t head_dim, int64_t v_dim) {
#if defined(TOPK_X86)
  if (isa() == Isa::kAvx512 && head_dim % avx512::kTable.lanes == 0 && v_dim % avx512::kTable.lanes == 0) {
    return avx512::kTable;
  }
  if (isa() != Isa::kGeneric) return avx2::kTable;
#else
  (void)head_dim;
  (void)v_dim;
#endif
  return generic::kTable;
}

}  // namespace

void forward(const ForwardParams& p, const Executor& executor) {
  table(p.problem.head_dim, p.problem.v_dim).forward[static_cast<int>(p.problem.dtype)](p, executor);
}

bool backward(const BackwardParams& p, const Executor& executor) {
  return table(p.problem.head_dim, p.problem.v_dim).backward[static_cast<int>(p.problem.dtype)](p, executor);
}

void forward_kvcache(const CacheParams& p, const Executor& executor) {
  table(p.problem.head_dim, p.problem.v_dim).forward_kvcache[static_cast<int>(p.problem.dtype)](p, executor);
}

void select_scores(const SelectScoresParams& p, const Executor& executor) {
  table(0, 0).select_scores[static_cast<int>(p.dtype)](p, executor);
}

void append(const AppendParams& p) {
  const int64_t bytes = p.row_dim * p.element_size;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t position = p.start[b] + t;
      const int64_t entry = p.block_table ? p.block_table[b * p.max_pages + position / p.page_size] : b;
      const int64_t token = p.block_table ? position % p.page_size : position;
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const int64_t to = entry * p.cache.batch + token * p.cache.token + h * p.cache.head;
        const int64_t from = b * p.src.batch + t * p.src.token + h * p.src.head;
        std::memcpy(static_cast<char*>(p.cache.data) + to * p.element_size,
                    static_cast<const char*>(p.src.data) + from * p.element_size, bytes);
      }
    }
  }
}

}  // namespace topk_attn::cpu

namespace topk_attn {

const char* cpu_isa() {
  switch (cpu::isa()) {
    case cpu::Isa::kAvx512:
      return "avx512";
    case cpu::Isa::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace topk_attn
