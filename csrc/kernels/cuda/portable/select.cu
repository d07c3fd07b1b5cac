// Exact top-k selection without ever storing S x S scores, on mma.sync.
//
//   bracket  a sample of the keys gives every row a bound that a few more than W keys reach
//            (select_bracket.cuh)
//   sweep    one Q K^T pass logs the scores at or above it (select_sweep.cuh)
//   pick     the exact threshold among the logged ones, by the warp that logged them (select_pick.cuh)
//   repair   rows with fewer than W logged scores are done again from all of them (select_repair.cuh)
//
// Exact by count: W or more scores at or above a bound hold the W best. Cost at S keys, W kept: one product
// over all pairs, 1 / sample_step of that for the sample, and W + margin * sqrt(W * sample_step) candidates a
// row of 8 bytes, written once and read twice. Logs belong to the running warps, so that the workspace does
// not grow with S; where a budget keeps many keys fewer blocks run.
#include <algorithm>
#include <cmath>

#include "../built.h"
#include "instances.h"
#include "select_bracket.cuh"
#include "select_repair.cuh"

namespace topk_attn::cuda::portable {
namespace {

constexpr int64_t kLogBytes = int64_t{256} << 20;
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int64_t kLargestCapacity = int64_t{1} << 18;  // candidates of a warp: at least 30 blocks run

int64_t align(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// How the keys are sampled, and the candidates that the longest rows are expected to get.
struct Sampling {
  int32_t step;
  float margin;
  double candidates;
};

Sampling sampling_of(const Call& c) {
  Sampling s;
  const double kept = static_cast<double>(budget(c.max_k, c.budget));
  // A group should hold about one key above the threshold.
  s.step = 8;
  while (kept / s.step > kSampleGroups * 1.25 && s.step < 256) s.step *= 2;
  s.margin = 3.0f;
  // The standard deviation of the sampled rank, as in occupied_groups(), in keys.
  const double share = std::min(0.999, kept / std::max(1, c.max_k));
  const double each = static_cast<double>(c.max_k) / s.step / kSampleGroups;
  const double outside = std::pow(1 - share, each);
  const double slope = std::max(each * outside / (1 - share), 1e-3);
  const double deviation = std::sqrt(outside * (1 - outside) / kSampleGroups) / slope * c.max_k;
  s.candidates = std::min<double>(c.max_k, kept + s.margin * deviation + 2 * s.step);
  return s;
}

// Room for the log of a warp: a quarter more than expected, since the rows of a tile err together.
int64_t capacity_of(const Sampling& s) {
  return (static_cast<int64_t>(s.candidates * 1.25) + 24) * kWarpRows;
}

struct Plan {
  Sampling sampling;
  int32_t capacity;
  int32_t sweep_blocks;
  int32_t repair_blocks;
  int64_t unsettled_offset;
  int64_t repair_list_offset;
  int64_t logs_offset;
  int64_t score_stride;
  int64_t bytes;
};

cudaError_t plan_select(const Call& c, Plan& plan) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  plan.sampling = sampling_of(c);
  const int64_t capacity = capacity_of(plan.sampling);
  const int64_t block_bytes = capacity * kSelectWarps * static_cast<int64_t>(sizeof(uint2));
  plan.capacity = static_cast<int32_t>(capacity);
  plan.sweep_blocks = static_cast<int32_t>(
      std::clamp<int64_t>(kLogBytes / block_bytes, 1, kBlocksPerMultiprocessor * multiprocessors));
  const int64_t halves = 2 * int64_t{c.heads} * c.num_tiles;
  plan.unsettled_offset = 256;
  plan.repair_list_offset = plan.unsettled_offset + align(halves * 4);
  plan.logs_offset = plan.repair_list_offset + align(halves * 4);
  const int64_t logs = plan.sweep_blocks * block_bytes;
  plan.score_stride = (int64_t{c.max_k} + 63) / 64 * 64;
  const int64_t scores = std::max<int64_t>(plan.score_stride, 64) * kRepairRows * 4;
  plan.repair_blocks = static_cast<int32_t>(std::clamp<int64_t>(logs / scores, 1, 2 * multiprocessors));
  plan.bytes = plan.logs_offset + align(std::max(logs, plan.repair_blocks * scores));
  return cudaSuccess;
}

}  // namespace

bool supports_select(const Call& c) {
  const int dim = padded_head_dim(c.head_dim);
  if (!built_dtype(c.dtype) || dim == 0 || dim > 128) return false;
  if (c.kv_heads <= 0 || c.heads % c.kv_heads != 0) return false;
  if (c.kv_group || c.sink != 0 || c.recent != 0) return false;
  return c.max_k < (1 << kKeyBits) && capacity_of(sampling_of(c)) <= kLargestCapacity;
}

size_t select_workspace(const Call& call) {
  Plan plan;
  return plan_select(call, plan) == cudaSuccess ? static_cast<size_t>(plan.bytes) : 0;
}

cudaError_t select(const Call& call, const Selection& selection, void* workspace, size_t bytes,
                   cudaStream_t stream) {
  if (!supports_select(call) || selection.indices != nullptr) return cudaErrorNotSupported;
  if (call.num_tiles == 0 || call.heads == 0) return cudaSuccess;
  Plan plan;
  const cudaError_t error = plan_select(call, plan);
  if (error != cudaSuccess) return error;
  if (bytes < static_cast<size_t>(plan.bytes)) return cudaErrorInvalidValue;
  auto* const base = static_cast<uint8_t*>(workspace);
  SelectParams p;
  p.call = call;
  p.out = selection;
  p.group = call.heads / call.kv_heads;
  p.items_per_kv = (call.num_tiles * p.group + kItemSlots - 1) / kItemSlots;
  p.items = p.items_per_kv * call.kv_heads;
  p.sample_step = plan.sampling.step;
  p.margin = plan.sampling.margin;
  p.capacity = plan.capacity;
  p.sweep_blocks = std::min(plan.sweep_blocks, p.items);
  p.repair_blocks = plan.repair_blocks;
  p.counters = reinterpret_cast<SelectCounters*>(base);
  p.unsettled = reinterpret_cast<uint32_t*>(base + plan.unsettled_offset);
  p.repair_list = reinterpret_cast<int32_t*>(base + plan.repair_list_offset);
  p.logs = reinterpret_cast<uint2*>(base + plan.logs_offset);
  p.scores = reinterpret_cast<float*>(base + plan.logs_offset);
  p.score_stride = plan.score_stride;
  return with_instance<128>(call.dtype, padded_head_dim(call.head_dim),
                            [&]<typename T, int D>() { return run_select<T, D>(p, stream); });
}

}  // namespace topk_attn::cuda::portable
