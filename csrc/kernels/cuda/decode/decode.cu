// How a decode call is cut into slabs, what lies where in the workspace, and which scan serves it.
#include <algorithm>

#include "../built.h"
#include "certified.h"
#include "instances.h"
#include "params.h"

namespace topk_attn::cuda::decode {
namespace {

constexpr int64_t kScratchBytes = int64_t{256} << 20;
constexpr int64_t kMostTokens = 1024;
constexpr int64_t kAlign = 256;

int64_t score_stride(const DecodeCall& c) {
  return (int64_t{c.capacity} + kUnitKeys - 1) / kUnitKeys * kUnitKeys;
}

// Whether a scan of few rows drops what is below a bound: where that is worth a sample, and W keys and the
// margin fit.
bool has_bounds(const DecodeCall& c) {
  return c.heads / c.kv_heads <= kScanRows && c.dtype != DType::kFloat32 && !c.kv_group &&
         c.capacity > kMaxCandidates && c.kept_width <= kMaxCandidates * 5 / 8;
}

}  // namespace

Slab largest_slab(const DecodeCall& c) {
  const int64_t lists = (c.kv_group ? c.kv_heads : c.heads) * c.kept_width;
  const int64_t scores = (c.heads + (c.kv_group ? c.kv_heads : 0)) * score_stride(c);
  const bool few = int64_t{c.heads / c.kv_heads} * c.tq <= kScanRows;
  const int64_t picks = few && has_bounds(c) ? c.heads * (int64_t{kMaxCandidates} * 2 + c.kept_width) : 0;
  const int64_t per_token = (scores + lists + picks) * 4;
  const int64_t units = std::max<int64_t>(1, kScratchBytes / std::max<int64_t>(1, per_token));
  Slab slab;
  const int64_t sequences = std::min<int64_t>(units / std::max(1, c.tq), c.batch);
  const int64_t most = std::min<int64_t>(kMaxSlabSequences, 4096 / std::max(1, c.kv_heads));
  slab.sequences = static_cast<int32_t>(std::clamp<int64_t>(sequences, 1, std::max<int64_t>(1, most)));
  int64_t tokens = std::min<int64_t>(units, c.tq);
  tokens = std::min(tokens, kMostTokens);
  if (tokens < c.tq && tokens > 16) tokens = tokens / 16 * 16;
  slab.tokens = static_cast<int32_t>(tokens);
  return slab;
}

namespace {

int64_t slab_rows(const DecodeCall& c, const Slab& slab) {
  return int64_t{slab.sequences} * c.heads * slab.tokens;
}

// Blocks that share a row's kept keys: enough to fill the card a few times, each with 64 keys or more.
int splits_of(const DecodeCall& c, const Slab& slab, int sms) {
  const int64_t wanted = int64_t{sms} * 16 / std::max<int64_t>(1, slab_rows(c, slab));
  const int64_t most = (c.kept_width + 63) / 64;
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, std::min<int64_t>(most, 64))));
}

bool bounded(const DecodeCall& c, const Slab& slab) {
  return has_bounds(c) && c.heads / c.kv_heads * slab.tokens <= kScanRows;
}

// Whether short.cuh serves the call: where it fills the card less than twice, launches are what costs.
bool is_short(const DecodeCall& c, int sms) {
  return c.dtype != DType::kFloat32 && !c.kv_group && c.indices == nullptr && c.capacity <= kShortKeys &&
         int64_t{c.heads / c.kv_heads} * c.tq <= kShortRows && c.head_dim <= kShortDim &&
         c.v_dim <= kShortDim && int64_t{c.batch} * c.kv_heads * kShortTeam <= 2 * sms;
}

struct Layout {
  Scratch scratch;
  size_t bytes = 0;
};

// Pointers are offsets from `base`.
Layout layout(const DecodeCall& c, int sms, char* base) {
  Layout l;
  const Slab slab = largest_slab(c);
  const int64_t rows = slab_rows(c, slab);
  const int64_t selected = c.kv_group ? rows / (c.heads / c.kv_heads) : rows;
  Scratch& s = l.scratch;
  const auto take = [&](int64_t bytes) {
    char* const at = base + l.bytes;
    l.bytes += static_cast<size_t>((bytes + kAlign - 1) / kAlign * kAlign);
    return at;
  };
  s.ld = score_stride(c);
  s.splits = splits_of(c, slab, sms);
  if (c.block_table != nullptr || c.appended > 0) {
    s.state = reinterpret_cast<State*>(take(int64_t{c.batch} * static_cast<int64_t>(sizeof(State))));
  }
  s.scores = reinterpret_cast<float*>(take(rows * s.ld * 4));
  if (c.kv_group) s.group_scores = reinterpret_cast<float*>(take(selected * s.ld * 4));
  s.lists = reinterpret_cast<int32_t*>(take(selected * c.kept_width * 4));
  if (bounded(c, slab)) {
    s.bounds = reinterpret_cast<float*>(take(rows * 4));
    s.candidates = reinterpret_cast<ScoredKey*>(take(rows * kMaxCandidates * int64_t{sizeof(ScoredKey)}));
    s.counts = reinterpret_cast<int32_t*>(take(rows * 4));
    s.kept_scores = reinterpret_cast<float*>(take(rows * c.kept_width * 4));
    s.flags = reinterpret_cast<int32_t*>(take(int64_t{slab.sequences} * c.kv_heads * 4));
    s.any_flag = reinterpret_cast<int32_t*>(take(4));
  }
  s.arrived = reinterpret_cast<int32_t*>(take(rows * 4));
  if (s.splits > 1) s.partial = reinterpret_cast<float*>(take(rows * s.splits * (c.v_dim + 2) * 4));
  return l;
}

}  // namespace

bool supports(const DecodeCall& c) {
  return c.dtype == DType::kFloat32 || (built_dtype(c.dtype) && padded_head_dim(c.head_dim) != 0);
}

cudaError_t scan(const DecodeCall& c, const Slab& slab, const Scratch& scratch, int sms,
                 cudaStream_t stream) {
  if (c.dtype == DType::kFloat32) return scan_plain(c, slab, scratch, sms, stream);
  const bool few = c.heads / c.kv_heads * slab.tokens <= kScanRows;
  return with_instance(c.dtype, padded_head_dim(c.head_dim), [&]<typename T, int D>() {
    return few ? run_scan<T, D>(c, slab, scratch, sms, stream)
               : run_scan_tile<T, D>(c, slab, scratch, sms, stream);
  });
}

cudaError_t sample(const DecodeCall& c, const Slab& slab, const Scratch& scratch, cudaStream_t stream) {
  return with_instance(c.dtype, padded_head_dim(c.head_dim),
                       [&]<typename T, int D>() { return run_sample<T, D>(c, slab, scratch, stream); });
}

Scratch scratch_of(const DecodeCall& c, void* workspace, int sms) {
  return layout(c, sms, static_cast<char*>(workspace)).scratch;
}

size_t workspace_bytes(const DecodeCall& c, int sms) {
  return layout(c, sms, nullptr).bytes;
}

namespace {

// Fills the encodings and lists of a slab, and the scores at least of the kept keys.
cudaError_t score_and_select(const DecodeCall& c, const Slab& slab, const Scratch& scratch, int sms,
                             cudaStream_t stream) {
  if (scratch.bounds == nullptr) {
    const cudaError_t error = scan(c, slab, scratch, sms, stream);
    return error == cudaSuccess ? select(c, slab, scratch, stream) : error;
  }
  cudaError_t error = sample(c, slab, scratch, stream);
  if (error == cudaSuccess) error = scan(c, slab, scratch, sms, stream);
  if (error == cudaSuccess) error = pick(c, slab, scratch, stream);
  Scratch again = scratch;
  again.only_flagged = true;
  if (error == cudaSuccess) error = scan(c, slab, again, sms, stream);
  if (error == cudaSuccess) error = select(c, slab, again, stream);
  return error;
}

}  // namespace

cudaError_t run(const DecodeCall& c, const Scratch& scratch, int sms, cudaStream_t stream,
                const CertifiedRun* by_codes) {
  if (c.batch == 0 || c.tq == 0 || c.heads == 0) return cudaSuccess;
  if (by_codes == nullptr && is_short(c, sms)) {
    const Slab all{0, c.batch, 0, c.tq};
    const cudaError_t error = with_instance<kShortDim>(
        c.dtype, padded_head_dim(std::max(c.head_dim, c.v_dim)),
        [&]<typename T, int D>() { return run_short<T, D>(c, all, scratch, stream); });
    if (error != cudaErrorNotSupported) return error;
  }
  const Slab most = largest_slab(c);
  for (int32_t sequence = 0; sequence < c.batch; sequence += most.sequences) {
    for (int32_t token = 0; token < c.tq; token += most.tokens) {
      const Slab slab{sequence, std::min(most.sequences, c.batch - sequence), token,
                      std::min(most.tokens, c.tq - token)};
      cudaError_t error = by_codes != nullptr
                              ? certified(c, slab, scratch, by_codes->codes, by_codes->scratch, sms, stream)
                              : score_and_select(c, slab, scratch, sms, stream);
      Scratch chosen = scratch;
      chosen.picked = by_codes == nullptr && scratch.bounds != nullptr;
      if (error == cudaSuccess) error = attend(c, slab, chosen, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace topk_attn::cuda::decode
