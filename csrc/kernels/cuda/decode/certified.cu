// certified.h: what the certified scan needs, and its steps in order.
#include <algorithm>
#include <cmath>

#include "../built.h"
#include "../common/select_long_row.cuh"
#include "certified_steps.h"

namespace topk_attn::cuda::decode {
namespace {

constexpr int64_t kMostKeys = 1 << 20;
constexpr int kLeastChunk = 64;
constexpr int kMostChunk = 512;
constexpr int64_t kWarpsPerSm = 24;   // of the scan, with up to 4 rows
constexpr int64_t kWarpsPerSm8 = 16;  // with up to 8

int64_t slab_rows(const DecodeCall& c, const Slab& slab) {
  return int64_t{slab.sequences} * c.heads * slab.tokens;
}

int64_t align(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// Keys that a row of n is expected to list when it keeps w: the sample's margin, and bounds that are not
// tight.
double expected_list(int64_t n, int64_t w) {
  const double size = 1 << certified_sample_log(n);
  const double expected = size * static_cast<double>(w) / static_cast<double>(std::max<int64_t>(1, n));
  const double reaching = (expected + 4.0 * std::sqrt(expected) + 4.0) / size * static_cast<double>(n);
  return std::min(static_cast<double>(n), 1.7 * reaching);
}

}  // namespace

std::string no_certified(const DecodeCall& c, const Slab& slab, int arch) {
  const auto number = [](int64_t x) { return std::to_string(x); };
  const int64_t rows = int64_t{c.heads / c.kv_heads} * slab.tokens;
  if (!kBuiltSm90 || arch != 90) {
    return "it needs a GPU of compute capability 9.0 and a build with its kernels (TOPK_CUDA_ARCHS)";
  }
  if (c.dtype != DType::kBFloat16 && c.dtype != DType::kFloat16) return "it serves bfloat16 and float16";
  if (c.kv_group) return "it serves select='head' alone";
  if (codes_width(c.head_dim) == 0) {
    return "it serves head dims up to " + number(kMostCodeChannels) + ", got " + number(c.head_dim);
  }
  if (rows > kCertifiedRows) {
    return "it serves up to " + number(kCertifiedRows) +
           " query rows a KV head (heads of a group times "
           "queries), got " +
           number(rows);
  }
  if (c.capacity > kMostKeys) {
    return "it serves up to " + number(kMostKeys) + " positions, the cache has room for " +
           number(c.capacity);
  }
  if (expected_list(c.capacity, c.kept_width) > longrow::kCandidates * longrow::kMaxTeam) {
    return "its lists are too short for W = " + number(c.kept_width) + " of " + number(c.capacity) + " keys";
  }
  return "";
}

CertifiedScratch certified_scratch(const DecodeCall& c, const Slab& slab, void* workspace, int sms) {
  CertifiedScratch s;
  const int64_t rows = slab_rows(c, slab);
  const int64_t pairs = int64_t{slab.sequences} * c.kv_heads;
  const double list = expected_list(c.capacity, c.kept_width);
  // Teams: so that the list fits in shared memory, the bits of the row too, and few rows fill the device.
  int team = 1;
  while (team < longrow::kMaxTeam &&
         (list > 0.85 * longrow::kCandidates * team || c.capacity / team > longrow::kBitmapWords * 32 ||
          (rows * team * 4 <= sms * 3 && list / (2 * team) > 256))) {
    team *= 2;
  }
  s.team = team;
  s.room = static_cast<int32_t>(std::min<int64_t>(c.capacity, int64_t{longrow::kCandidates} * team));
  // Every warp gets the same number of chunks where all sequences are full.
  const int64_t warps = sms * (int64_t{c.heads / c.kv_heads} * slab.tokens <= 4 ? kWarpsPerSm : kWarpsPerSm8);
  const int64_t mine = (int64_t{c.capacity} * pairs + warps - 1) / warps;
  const int64_t rounds = (mine + kMostChunk - 1) / kMostChunk;
  s.chunk = static_cast<int32_t>(
      std::max<int64_t>(kLeastChunk, (mine / std::max<int64_t>(1, rounds) + 31) / 32 * 32));
  char* const base = static_cast<char*>(workspace);
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    char* const here = base + at;
    at += align(bytes);
    return here;
  };
  s.queries = reinterpret_cast<int8_t*>(take(pairs * 2 * kCertifiedRows * codes_width(c.head_dim)));
  s.rows = reinterpret_cast<CertifiedRow*>(
      take(pairs * kCertifiedRows * static_cast<int64_t>(sizeof(CertifiedRow))));
  s.counts = reinterpret_cast<int32_t*>(take(rows * 4));
  s.lists = reinterpret_cast<unsigned long long*>(take(rows * s.room * 8));
  s.bytes = static_cast<size_t>(at);
  return s;
}

size_t certified_bytes(const DecodeCall& c, const Slab& largest_slab, int sms) {
  return certified_scratch(c, largest_slab, nullptr, sms).bytes;
}

cudaError_t certified(const DecodeCall& c, const Slab& slab, const Scratch& scratch, const KeyCodes& codes,
                      const CertifiedScratch& own, int sms, cudaStream_t stream) {
  cudaError_t error = certified_bound(c, slab, scratch, codes, own, stream);
  if (error == cudaSuccess) error = certified_scan(c, slab, scratch, codes, own, sms, stream);
  if (error == cudaSuccess) error = certified_finish(c, slab, scratch, codes, own, stream);
  return error;
}

}  // namespace topk_attn::cuda::decode
