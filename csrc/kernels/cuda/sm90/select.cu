// Exact top-k selection without ever storing S x S scores.
//
//   bracket   a sample of the keys brackets every row's threshold: (lo, hi]            select_bracket.cuh
//   count     optional Q K^T pass: narrows the brackets, marks keys above lo            select_count.cuh
//   settle    tiles with few marked keys: exact thresholds among those                  settle.cu
//   sweep     Q K^T pass over all other tiles: keeps the scores inside the bracket,
//             counts and marks those above it, then picks the exact threshold           select_sweep.cuh
//             among the kept ones                                                       select_pick.cuh
//   repair    rows that the counts do not prove are done again from all their scores    select_repair.cuh
//
// The counting pass runs where the sample's brackets would hold too many candidates (large W).
//
// Cost at S keys, W kept: half a dense forward pass of tensor-core work for each of the two passes that a
// tile takes part in, 1 / sample_step of that for the sample, and what the candidates cost: about 2 * margin
// * sqrt(W * sample_step) a row, after the counting pass some dozens. Candidates live in buffers of the
// running CTAs, so that the workspace does not grow with S.
#include "select.h"

#include <algorithm>
#include <cmath>

#include "hopper.cuh"
#include "select_bracket.cuh"
#include "select_count.cuh"
#include "select_params.cuh"
#include "select_repair.cuh"
#include "select_sweep.cuh"
#include "settle.h"

namespace topk_attn::cuda::sm90 {
namespace {

constexpr int64_t kCandidateBytes = int64_t{256} << 20;
// Wider brackets, in candidates of the longest rows, are narrowed by the counting pass.
constexpr double kWideBracket = 550;
// Of a tile's keys marked by the counting pass: worth settling.
constexpr float kSettledShare = 0.36f;

int64_t align(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// How the keys are sampled, and the candidates that the longest rows are expected to get.
struct Sampling {
  int32_t groups;
  int32_t step;
  float margin;
  double width;
};

// One key in `step`, for at most `kept` keys of a row.
Sampling sampling_of(const Call& c, double kept, int groups, int step) {
  Sampling s;
  s.groups = groups;
  s.step = step;
  while (kept / s.step > s.groups * 1.25 && s.step < 256) s.step *= 2;
  s.margin = 3.5f;
  // The standard deviation of the sampled rank, as in occupied_groups(), in keys.
  const double share = std::min(0.999, kept / std::max(1, c.max_k));
  const double each = static_cast<double>(c.max_k) / s.step / s.groups;
  const double outside = std::pow(1 - share, each);
  const double slope = std::max(each * outside / (1 - share), 1e-3);
  const double deviation = std::sqrt(outside * (1 - outside) / s.groups) / slope * c.max_k;
  s.width = 2 * s.margin * deviation + 3 * s.step;
  return s;
}

// More groups for more keys above the threshold: a group should hold about one of them.
Sampling usual_sampling(const Call& c) {
  const double kept = static_cast<double>(budget(c.max_k, c.budget));
  return sampling_of(c, kept, kept <= 1200 ? 128 : 256, 8);
}

bool wide(const Call& c) {
  return usual_sampling(c).width > kWideBracket;
}

Sampling best_sampling(const Call& c) {
  const double kept = static_cast<double>(budget(c.max_k, c.budget));
  if (wide(c)) return sampling_of(c, kept, 256, 16);
  // A denser sample pays where most rows keep many keys.
  if (budget(c.max_k / 2, c.budget) > 250) return sampling_of(c, kept, 256, 4);
  return usual_sampling(c);
}

struct Plan {
  int32_t ctas;  // of the sweep, even
  Sampling sampling;
  int32_t capacity;
  int32_t repair_ctas;
  int64_t tiles_offset;  // of unsettled; rebuild and mark_count follow
  int64_t rebuild_offset;
  int64_t marks_offset;
  int64_t repair_list_offset;
  int64_t rebuild_list_offset;
  int64_t candidates_offset;
  int64_t bytes;
};

cudaError_t plan_select(const Call& c, Plan& plan) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  plan.ctas = std::max(2, multiprocessors / 2 * 2);
  plan.sampling = best_sampling(c);
  const int64_t room =
      kCandidateBytes / (int64_t{plan.ctas} * kCtaRows * 4 * static_cast<int64_t>(sizeof(uint2)));
  const int64_t wanted = static_cast<int64_t>(usual_sampling(c).width * 1.5 / 4) + 48;  // room for its spread
  plan.capacity =
      static_cast<int32_t>(std::max<int64_t>(64, std::min<int64_t>({wanted, room, kMaxCapacity}) / 8 * 8));
  const int64_t tiles = int64_t{c.heads} * c.num_tiles;
  plan.tiles_offset = 256;
  plan.rebuild_offset = plan.tiles_offset + align(tiles * 8);
  plan.marks_offset = plan.rebuild_offset + align(tiles * 4);
  plan.repair_list_offset = plan.marks_offset + align(tiles * 4);
  plan.rebuild_list_offset = plan.repair_list_offset + align(tiles * 4);
  plan.candidates_offset = plan.rebuild_list_offset + align(tiles * 4);
  const int64_t candidates = int64_t{plan.ctas} * kCtaRows * 4 * plan.capacity * sizeof(uint2);
  const int64_t row = std::max<int64_t>(4, int64_t{c.max_k} * 4);
  plan.repair_ctas = static_cast<int32_t>(std::clamp<int64_t>(candidates / row, 1, 2 * multiprocessors));
  plan.bytes = plan.candidates_offset + align(std::max(candidates, plan.repair_ctas * row));
  return cudaSuccess;
}

template <typename T, int D>
cudaError_t launch(const Call& c, const SelectParams& p, const Plan& plan, cudaStream_t stream) {
  const View& keys = c.tk > 0 ? c.k : c.q;  // no keys: the map is never read
  const int64_t tokens = c.tk > 0 ? c.tk : 1;
  const int64_t batch = c.cu_q != nullptr ? 1 : c.batch;
  CUtensorMap key_map, sample_map;
  cudaError_t error = tensor_map(&key_map, c.dtype, keys, D, tokens, c.kv_heads, batch, kHalfKeys / 2);
  if (error != cudaSuccess) return error;
  View sample = keys;
  sample.token *= p.sample_step;
  error = tensor_map(&sample_map, c.dtype, sample, D, (tokens + p.sample_step - 1) / p.sample_step,
                     c.kv_heads, batch, kBlockKeys);
  if (error != cudaSuccess) return error;

  error = cudaMemsetAsync(p.counters, 0, sizeof(SelectCounters), stream);
  if (error != cudaSuccess) return error;
  const auto set_shared = [](auto kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  constexpr int kBracketBytes = bracket_shared_bytes<D>();
  const auto bracket = plan.sampling.groups == 128 ? bracket_kernel<T, D, 128> : bracket_kernel<T, D, 256>;
  error = set_shared(bracket, kBracketBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = int64_t{c.heads} * c.num_tiles;
  bracket<<<static_cast<unsigned>(tiles), 128, kBracketBytes, stream>>>(sample_map, p);

  if (p.mark_count != nullptr) {
    constexpr int kCountBytes = CountShared<D>::kBytes + 1024;
    error = set_shared(count_kernel<T, D>, kCountBytes);
    if (error != cudaSuccess) return error;
    CUtensorMap block_map;
    error = tensor_map(&block_map, c.dtype, keys, D, tokens, c.kv_heads, batch, kBlockKeys);
    if (error != cudaSuccess) return error;
    count_kernel<T, D><<<std::min(plan.ctas, p.items), kCountThreads, kCountBytes, stream>>>(block_map, p);
    if (p.out.bitmap != nullptr) {
      SettleCall s;
      s.call = c;
      s.out = p.out;
      s.marks = p.out.bitmap;
      s.mark_count = p.mark_count;
      s.largest_share = p.settled_share;
      s.lower = p.out.threshold;
      s.upper = reinterpret_cast<const float*>(p.out.tie_index);
      s.unsettled = p.unsettled;
      error = settle(s, stream);
      if (error != cudaSuccess) return error;
      list_unproven_kernel<<<static_cast<unsigned>((tiles + 255) / 256), 256, 0, stream>>>(p);
    }
  }

  constexpr int kSweepBytes = SweepShared<D>::kBytes + 1024;
  const auto sweep = p.mark_count != nullptr ? sweep_kernel<T, D, true> : sweep_kernel<T, D, false>;
  error = set_shared(sweep, kSweepBytes);
  if (error != cudaSuccess) return error;
  const int sweep_ctas = std::min(plan.ctas, 2 * p.items);
  sweep<<<sweep_ctas, kSweepThreads, kSweepBytes, stream>>>(key_map, p);

  repair_kernel<T, D><<<p.repair_ctas, kRepairThreads, 0, stream>>>(p);
  if (p.out.bitmap != nullptr) rebuild_kernel<T, D><<<p.repair_ctas, 256, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Call& c, const SelectParams& p, const Plan& plan, cudaStream_t stream) {
  return c.head_dim == 64 ? launch<T, 64>(c, p, plan, stream) : launch<T, 128>(c, p, plan, stream);
}

}  // namespace

bool supports_select(const Call& c) {
  const bool type = c.dtype == DType::kBFloat16 || c.dtype == DType::kFloat16;
  const bool shape = (c.head_dim == 64 || c.head_dim == 128) && c.kv_heads > 0 && c.heads % c.kv_heads == 0;
  if (!type || !shape || c.kv_group || c.sink != 0 || c.recent != 0) return false;
  // Wider brackets do not fit the candidate buffers: most rows would be repaired.
  if (usual_sampling(c).width * 1.15 > 4 * kMaxCapacity) return false;
  const int64_t batch = c.cu_q != nullptr ? 1 : c.batch;
  // The stride of a sample (at most 256 tokens) must fit a map too.
  return c.tk == 0 || (mappable(c.k, c.tk, c.kv_heads, batch) && c.k.token < (int64_t{1} << 31));
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
  p.counters = reinterpret_cast<SelectCounters*>(base);
  // Without a bitmap there are no marks, so that tiles are only counted to narrow their brackets.
  p.settled_share = supports_settle(call) ? kSettledShare : -1.0f;
  p.mark_count = wide(call) ? reinterpret_cast<int32_t*>(base + plan.marks_offset) : nullptr;
  p.unsettled = reinterpret_cast<uint64_t*>(base + plan.tiles_offset);
  p.rebuild = reinterpret_cast<uint32_t*>(base + plan.rebuild_offset);
  p.repair_list = reinterpret_cast<int32_t*>(base + plan.repair_list_offset);
  p.rebuild_list = reinterpret_cast<int32_t*>(base + plan.rebuild_list_offset);
  p.candidates = reinterpret_cast<uint2*>(base + plan.candidates_offset);
  p.scores = reinterpret_cast<int32_t*>(base + plan.candidates_offset);
  p.repair_ctas = plan.repair_ctas;
  return call.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(call, p, plan, stream)
                                        : launch<__half>(call, p, plan, stream);
}

}  // namespace topk_attn::cuda::sm90
