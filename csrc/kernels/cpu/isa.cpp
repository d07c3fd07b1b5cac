// The CPU kernels of one instruction set; compiled once per set with TOPK_ISA naming it.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/table.h"
#include "params.h"

namespace topk_attn::cpu {
namespace TOPK_ISA {
namespace {
// Everything in here has internal linkage: code compiled for one instruction set must never be merged with
// another's.
// Each file needs the ones before it.
// clang-format off
#include "cpu/simd.inl.h"
#include "cpu/scores.inl.h"
#include "cpu/select.inl.h"
#include "cpu/attend.inl.h"
#include "cpu/blocks.inl.h"
#include "cpu/forward.inl.h"
#include "cpu/backward.inl.h"
#include "cpu/decode.inl.h"
// clang-format on
}  // namespace

extern const KernelTable kTable;
const KernelTable kTable = {
    kVectorBytes / 4,
    {forward<float>, forward<double>, forward<BFloat16>, forward<Float16>},
    {backward<float>, backward<double>, backward<BFloat16>, backward<Float16>},
    {forward_kvcache<float>, forward_kvcache<double>, forward_kvcache<BFloat16>, forward_kvcache<Float16>},
    {select_scores<float>, nullptr, select_scores<BFloat16>, select_scores<Float16>},
};
}  // namespace TOPK_ISA
}  // namespace topk_attn::cpu
