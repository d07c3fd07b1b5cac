// Checks the certified scan of the decode kernels against a sort of scores made by mma.sync, and times it.
//
//   certified_check          every check: kinds of keys, caches, shapes, forced overflow
//   certified_check little   a few small cases, for compute-sanitizer
//   certified_check time     times of the steps, L2 flushed, and survivors
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/common/mma.cuh"
#include "cuda/decode/cache.cuh"
#include "cuda/decode/certified_steps.h"

namespace {

using namespace topk_attn;
using namespace topk_attn::cuda;
using namespace topk_attn::cuda::decode;

#define CHECK(call)                                                                    \
  do {                                                                                 \
    const cudaError_t error_ = (call);                                                 \
    if (error_ != cudaSuccess) {                                                       \
      std::printf("%s at line %d: %s\n", #call, __LINE__, cudaGetErrorString(error_)); \
      std::exit(1);                                                                    \
    }                                                                                  \
  } while (false)

enum Data {
  kRandom,
  kOutliers,
  kDuplicates,
  kNorms,
  kTiny,
  kNonFinite,
  kEqual,
  kZeroQuery,
  kPermuted,
  kDrift,
  kHuge,
  kKinds
};
const char* const kNames[] = {"random",   "outliers, offset", "duplicates", "norms 2^-20..2^20",
                              "denormal", "NaN and inf",      "equal",      "zero query",
                              "permuted", "drifting mean",    "huge"};

__device__ uint32_t hash(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}
__device__ float normal(uint64_t i, uint32_t seed) {
  const uint32_t h =
      hash(static_cast<uint32_t>(i) ^ hash(static_cast<uint32_t>(i >> 32) + seed * 0x9e3779b9u));
  return normcdfinvf((static_cast<float>(h >> 8) + 0.5f) / 16777216.0f);
}

// Element i of (tokens, heads, channels).
template <typename T>
__global__ void fill(T* out, int64_t count, int heads, int channels, int kind, bool key, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int channel = static_cast<int>(i % channels);
    const int head = static_cast<int>(i / channels % heads);
    const int64_t token = i / channels / heads;
    float x = normal(i, seed);
    const uint32_t h = hash(static_cast<uint32_t>(token * 31 + head) + seed);
    if (key) {
      if (kind == kOutliers)
        x = x * (channel % 8 == 3 ? 8.0f : 1.0f) + 6.0f * sinf(static_cast<float>(channel * 7 + head));
      if (kind == kDuplicates) x = normal((token / 3 * heads + head) * channels + channel, seed);
      if (kind == kNorms) x = ldexpf(x, static_cast<int>(h % 41) - 20);
      if (kind == kTiny) x = ldexpf(x, -126 - static_cast<int>(h % 8));
      if (kind == kNonFinite && h % 301 == 0) x = h % 2 == 0 ? NAN : channel % 2 == 0 ? INFINITY : x;
      if (kind == kEqual) x = normal(head * channels + channel, seed);
      if (kind == kPermuted)
        x = normal((channel * 5 + token * 37) % channels, seed) *
            ldexpf(1.0f, (channel * 5 + token * 37) % 13 - 6);
      if (kind == kDrift)
        x += static_cast<float>(token % 100000) * 0.001f * (channel % 3 == 0 ? 1.0f : -0.3f);
      if (kind == kHuge && h % 50 == 0) x *= 1e18f;
    } else {
      if (kind == kZeroQuery && head % 2 == 0) x = 0.0f;
      if (kind == kPermuted) x = 1.0f;
      if (kind == kNonFinite && head == 3 && channel == 5) x = NAN;
      if (kind == kHuge) x *= 1e20f;
    }
    out[i] = static_cast<T>(x);
  }
}

// Scores of the slab rows of one KV head, as the contract says: rows of the group first operand.
template <typename T>
__global__ void reference_scores(const DecodeCall c, const Slab slab, const Scratch scratch, float* scores) {
  const int pair = blockIdx.y, s = pair / c.kv_heads, kv_head = pair % c.kv_heads;
  const int rows = c.heads / c.kv_heads * slab.tokens;
  const State state = state_of(c, scratch, slab.first_sequence + s);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warps = gridDim.x * blockDim.x / 32;
  for (int base = (blockIdx.x * blockDim.x + threadIdx.x) / 32 * 8; base < state.keys; base += warps * 8) {
    float out[4] = {};
    for (int channel = 0; channel < c.head_dim; channel += 16) {
      uint32_t a[4] = {}, b[2] = {};
      for (int part = 0; part < 2; ++part) {
        const int at = channel + 8 * part + 2 * t;
        if (at >= c.head_dim) continue;
        for (int half = 0; half < 2; ++half) {
          if (g + 8 * half < rows) {
            a[half + 2 * part] =
                *reinterpret_cast<const uint32_t*>(query_row<T>(c, slab, s, kv_head, g + 8 * half) + at);
          }
        }
        if (base + g < state.keys) {
          b[part] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(c.k.data) +
                                                       row_offset(c, c.k, slab.first_sequence + s, base + g) +
                                                       kv_head * c.k.head + at);
        }
      }
      mma_16816<T>(out, a, b[0], b[1]);
    }
    for (int e = 0; e < 4; ++e) {
      const int m = g + e / 2 * 8, j = base + 2 * t + e % 2;
      if (m < rows && j < state.keys) scores[(first_row(c, slab, s, kv_head) + m) * scratch.ld + j] = out[e];
    }
  }
}

template <typename F>
void parallel(int64_t count, const F& body) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t) {
    threads.emplace_back([&] {
      for (int64_t i = next++; i < count; i = next++) body(i);
    });
  }
  for (auto& t : threads) t.join();
}

struct Case {
  int kind = kRandom;
  DType dtype = DType::kBFloat16;
  int batch = 4, heads = 8, kv_heads = 2, dim = 128, tq = 1;
  int capacity = 20000;
  Budget budget;
  int page = 0;
  int64_t sink = 0, recent = 0;
  bool padded = false;
  int room = 0;  // of lists; 0: as it is
  bool calibrated = true;
  bool partly = false;  // the codes of the last rows are never written
  bool expect_certified = false;
  bool full = false;  // every sequence has all keys
};

struct Setup {
  DecodeCall c;
  Slab slab;
  Scratch scratch;
  KeyCodes codes;
  CertifiedScratch own;
  CertifiedStats* stats;
  std::vector<void*> memory;
  std::vector<int32_t> seqlens, pads;
  void* take(size_t bytes) {
    void* p;
    CHECK(cudaMalloc(&p, bytes + 256));
    memory.push_back(p);
    return p;
  }
  ~Setup() {
    for (void* p : memory) cudaFree(p);
  }
};

int sms() {
  int n;
  CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
  return n;
}

void make(const Case& k, Setup& s) {
  DecodeCall& c = s.c;
  c.dtype = k.dtype;
  c.heads = k.heads;
  c.kv_heads = k.kv_heads;
  c.head_dim = c.v_dim = k.dim;
  c.batch = k.batch;
  c.tq = k.tq;
  c.budget = k.budget;
  c.sink = k.sink;
  c.recent = k.recent;
  c.rows = RowLayout{int64_t{k.heads} * k.tq, k.tq};
  c.capacity = k.capacity;
  c.kept_width = budget(k.capacity, k.budget);
  const int64_t rows = int64_t{k.batch} * k.heads * k.tq;
  int64_t blocks = k.batch, per_block = k.capacity;
  if (k.page > 0) {
    c.max_pages = (k.capacity + k.page - 1) / k.page;
    c.page_size = k.page;
    blocks = int64_t{k.batch} * c.max_pages;
    per_block = k.page;
    c.pages = static_cast<int32_t>(blocks);
    std::vector<int32_t> table(static_cast<size_t>(blocks));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(3));
    auto* d = static_cast<int32_t*>(s.take(table.size() * 4));
    CHECK(cudaMemcpy(d, table.data(), table.size() * 4, cudaMemcpyHostToDevice));
    c.block_table = d;
  }
  std::mt19937 g(11);
  for (int b = 0; b < k.batch; ++b) {
    const int n = k.full   ? k.capacity
                  : b == 0 ? k.capacity
                  : b == 1 ? 0
                  : b == 2 ? 1
                           : static_cast<int>(g() % static_cast<uint32_t>(k.capacity));
    s.seqlens.push_back(n);
    s.pads.push_back(k.padded ? std::min(n, 37 * b) : 0);
  }
  auto* lengths = static_cast<int32_t*>(s.take(k.batch * 4));
  auto* pads = static_cast<int32_t*>(s.take(k.batch * 4));
  CHECK(cudaMemcpy(lengths, s.seqlens.data(), k.batch * 4, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(pads, s.pads.data(), k.batch * 4, cudaMemcpyHostToDevice));
  c.cache_seqlens = lengths;
  if (k.padded) c.cache_leftpad = pads;
  const int64_t elements = blocks * per_block * k.kv_heads * k.dim;
  void* keys = s.take(static_cast<size_t>(elements) * 2);
  void* q = s.take(static_cast<size_t>(rows) * k.dim * 2);
  c.k = View{keys, per_block * k.kv_heads * k.dim, int64_t{k.kv_heads} * k.dim, k.dim};
  c.q = View{q, int64_t{k.tq} * k.heads * k.dim, int64_t{k.heads} * k.dim, k.dim};
  if (k.dtype == DType::kBFloat16) {
    fill<<<2048, 256>>>(static_cast<__nv_bfloat16*>(keys), elements, k.kv_heads, k.dim, k.kind, true, 1);
    fill<<<256, 256>>>(static_cast<__nv_bfloat16*>(q), rows * k.dim, k.heads, k.dim, k.kind, false, 2);
  } else {
    fill<<<2048, 256>>>(static_cast<__half*>(keys), elements, k.kv_heads, k.dim, k.kind, true, 1);
    fill<<<256, 256>>>(static_cast<__half*>(q), rows * k.dim, k.heads, k.dim, k.kind, false, 2);
  }
  c.threshold = static_cast<float*>(s.take(rows * 4));
  c.tie_index = static_cast<int32_t*>(s.take(rows * 4));
  s.slab = Slab{0, k.batch, 0, k.tq};
  s.scratch.ld = (k.capacity + 31) / 32 * 32;
  s.scratch.scores = static_cast<float*>(s.take(rows * s.scratch.ld * 4));
  s.scratch.lists = static_cast<int32_t*>(s.take(rows * c.kept_width * 4));
  s.scratch.arrived = static_cast<int32_t*>(s.take(rows * 4));
  if (const std::string problem = no_certified(c, s.slab, 90); !problem.empty()) {
    std::printf("%s\n", problem.c_str());
    std::exit(1);
  }
  const int64_t bytes = codes_layout(blocks, per_block, k.kv_heads, k.dim).bytes;
  void* buffer = s.take(static_cast<size_t>(bytes));
  CHECK(cudaMemset(buffer, 0, static_cast<size_t>(bytes)));
  s.codes = codes_of(buffer, blocks, per_block, k.kv_heads, k.dim);
  s.own = certified_scratch(c, s.slab, s.take(certified_bytes(c, s.slab, sms())), sms());
  if (k.room > 0) s.own.room = std::min(k.room, s.own.room);
  s.stats = s.codes.stats;
  CHECK(cudaMemset(s.stats, 0, sizeof(CertifiedStats)));
  if (k.calibrated) CHECK(calibrate(c, s.scratch, s.codes, blocks, nullptr));
  if (k.partly) {
    std::vector<int32_t> fewer = s.seqlens;
    for (int32_t& n : fewer) n = std::max(0, n - 5);
    CHECK(cudaMemcpy(lengths, fewer.data(), k.batch * 4, cudaMemcpyHostToDevice));
    CHECK(encode(c, s.scratch, s.codes, true, nullptr));
    CHECK(cudaMemcpy(lengths, s.seqlens.data(), k.batch * 4, cudaMemcpyHostToDevice));
  } else {
    CHECK(encode(c, s.scratch, s.codes, true, nullptr));
  }
  CHECK(cudaDeviceSynchronize());
}

int64_t total_rows = 0, total_certified = 0, total_fallback = 0;

bool run_case(const Case& k) {
  Setup s;
  make(k, s);
  const DecodeCall& c = s.c;
  const int64_t rows = int64_t{k.batch} * k.heads * k.tq;
  const size_t ld = static_cast<size_t>(s.scratch.ld);
  std::vector<float> want(static_cast<size_t>(rows) * ld), got(want), threshold(static_cast<size_t>(rows));
  std::vector<int32_t> tie(static_cast<size_t>(rows)), lists(static_cast<size_t>(rows * c.kept_width)),
      again(lists);
  float* reference = static_cast<float*>(s.take(static_cast<size_t>(rows) * ld * 4));
  const dim3 grid(64, static_cast<unsigned>(k.batch * k.kv_heads));
  if (k.dtype == DType::kBFloat16) {
    reference_scores<__nv_bfloat16><<<grid, 256>>>(c, s.slab, s.scratch, reference);
  } else {
    reference_scores<__half><<<grid, 256>>>(c, s.slab, s.scratch, reference);
  }
  CHECK(cudaMemcpy(want.data(), reference, want.size() * 4, cudaMemcpyDeviceToHost));
  CertifiedStats stats;
  for (int run = 0; run < 2; ++run) {
    CHECK(cudaMemset(s.scratch.scores, 0xff, want.size() * 4));
    CHECK(cudaMemset(s.scratch.lists, 0x55, lists.size() * 4));
    CHECK(cudaMemset(s.stats, 0, sizeof(CertifiedStats)));
    CHECK(certified(c, s.slab, s.scratch, s.codes, s.own, sms(), nullptr));
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy((run == 0 ? again : lists).data(), s.scratch.lists, lists.size() * 4,
                     cudaMemcpyDeviceToHost));
  }
  CHECK(cudaMemcpy(&stats, s.stats, sizeof stats, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(got.data(), s.scratch.scores, got.size() * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(threshold.data(), c.threshold, threshold.size() * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(tie.data(), c.tie_index, tie.size() * 4, cudaMemcpyDeviceToHost));
  std::atomic<int64_t> wrong{0};
  parallel(rows, [&](int64_t r) {
    const int b = static_cast<int>(r / k.tq / k.heads), token = static_cast<int>(r % k.tq);
    const RowPlan plan = plan_row(
        visible(token, k.tq, s.seqlens[static_cast<size_t>(b)], true, s.pads[static_cast<size_t>(b)]),
        c.budget, c.sink, c.recent);
    const int64_t begin = plan.contested().begin, end = plan.contested().end, w = plan.contested_kept();
    const float* const scores = want.data() + static_cast<size_t>(r) * ld;
    std::vector<std::pair<int32_t, int32_t>> keys;
    for (int64_t j = begin; j < end; ++j) keys.push_back({-order_key(scores[j]), static_cast<int32_t>(j)});
    float want_threshold = NAN;
    int32_t want_tie = -1;
    std::vector<int32_t> list;
    if (w > 0) {
      std::nth_element(keys.begin(), keys.begin() + (w - 1), keys.end());
      want_threshold = order_score(-keys[static_cast<size_t>(w - 1)].first);
      want_tie = keys[static_cast<size_t>(w - 1)].second;
      for (int64_t i = 0; i < w; ++i) list.push_back(keys[static_cast<size_t>(i)].second);
      std::sort(list.begin(), list.end());
    }
    const size_t at = static_cast<size_t>(r);
    bool same =
        (want_threshold == threshold[at] || (std::isnan(want_threshold) && std::isnan(threshold[at]))) &&
        tie[at] == want_tie && std::equal(list.begin(), list.end(), lists.begin() + r * c.kept_width) &&
        std::equal(list.begin(), list.end(), again.begin() + r * c.kept_width);
    const auto check_score = [&](int64_t j) {
      const float x = got[at * ld + static_cast<size_t>(j)];
      same = same && (std::memcmp(&x, scores + j, 4) == 0 || (std::isnan(x) && std::isnan(scores[j])));
    };
    for (const int32_t j : list) check_score(j);
    for (int64_t j = plan.seen.begin; j < begin; ++j) check_score(j);
    for (int64_t j = end; j < plan.seen.end; ++j) check_score(j);
    if (!same && ++wrong < 3) {
      std::printf("  row %lld: threshold %g want %g, tie %d want %d, w %lld\n", static_cast<long long>(r),
                  threshold[at], want_threshold, tie[at], want_tie, static_cast<long long>(w));
    }
  });
  const bool bad_share = k.expect_certified && stats.certified * 100 < stats.rows * 99;
  // Sequences of one key fit in any list.
  const bool bad_overflow = k.room > 0 && stats.kept > stats.certified;
  std::printf(
      "%s %-18s %s B%d H%d/%d D%d Tq%d n %d W %lld page %d: %llu rows, %llu certified, survivors / W %.3f, "
      "listed / W %.2f\n",
      wrong > 0                   ? "WRONG"
      : bad_share || bad_overflow ? "SHARE"
                                  : "ok   ",
      kNames[k.kind], k.dtype == DType::kBFloat16 ? "bf16" : "fp16", k.batch, k.heads, k.kv_heads, k.dim,
      k.tq, k.capacity, static_cast<long long>(c.kept_width), k.page, stats.rows, stats.certified,
      static_cast<double>(stats.survivors) / static_cast<double>(std::max(1ull, stats.kept)),
      static_cast<double>(stats.listed) / static_cast<double>(std::max(1ull, stats.kept)));
  total_rows += rows;
  total_certified += static_cast<int64_t>(stats.certified);
  total_fallback += static_cast<int64_t>(stats.rows - stats.certified);
  return wrong == 0 && !bad_share && !bad_overflow;
}

Budget share(double ratio) {
  Budget b;
  b.ratio = ratio;
  return b;
}
Budget number(int64_t topk) {
  Budget b;
  b.topk = topk;
  return b;
}

int check_all(bool little) {
  int failed = 0;
  const auto run = [&](const Case& k) { failed += run_case(k) ? 0 : 1; };
  Case base;
  base.budget = share(0.01);
  if (little) base.capacity = 9000;
  for (int kind = 0; kind < kKinds; ++kind) {
    Case k = base;
    k.kind = kind;
    k.expect_certified = kind == kRandom || kind == kOutliers;
    run(k);
    if (little && kind >= kOutliers) break;
    k.dtype = DType::kFloat16;
    k.dim = 64;
    run(k);
  }
  for (const int page : {16, 48, 256}) {
    Case k = base;
    k.page = page;
    k.padded = true;
    k.sink = 4;
    k.recent = 70;
    run(k);
  }
  for (const bool overflow : {false, true}) {
    Case k = base;
    k.heads = 16;  // groups of 8
    k.room = overflow ? 100 : 0;
    run(k);
    k.heads = 4;
    k.tq = 4;
    k.padded = true;
    run(k);
    k.heads = 2;
    k.dim = 96;
    run(k);
  }
  Case k = base;
  k.partly = true;
  run(k);
  if (little) return failed;
  k = base;
  k.calibrated = false;
  run(k);
  k.kind = kOutliers;
  run(k);
  for (const int64_t w : {1, 300, 2048, 6000}) {
    k = base;
    k.budget = number(w);
    k.capacity = 131072;
    k.expect_certified = true;
    k.full = true;
    k.batch = 1;
    run(k);
    k.kind = kOutliers;
    run(k);
  }
  k = base;
  k.batch = 1;
  k.capacity = 1 << 20;
  k.expect_certified = true;
  run(k);
  k = base;
  k.batch = 40;
  k.heads = 32;
  k.kv_heads = 8;
  k.capacity = 10000;
  run(k);
  std::printf("%lld rows compared, %lld certified, %lld fell back, %d cases failed\n",
              static_cast<long long>(total_rows), static_cast<long long>(total_certified),
              static_cast<long long>(total_fallback), failed);
  return failed;
}

int time_all() {
  struct Shape {
    int batch, n;
    Budget budget;
    int kind;
  };
  const Shape shapes[] = {{8, 131072, share(0.01), kRandom},   {8, 131072, number(2048), kRandom},
                          {8, 131072, share(0.01), kOutliers}, {1, 131072, share(0.01), kRandom},
                          {1, 131072, number(2048), kRandom},  {32, 32768, share(0.01), kRandom},
                          {32, 32768, number(2048), kRandom},  {1, 1048576, share(0.01), kRandom}};
  void* cold;
  const size_t cold_bytes = size_t{192} << 20;
  CHECK(cudaMalloc(&cold, cold_bytes));
  cudaEvent_t at[5];
  for (cudaEvent_t& e : at) CHECK(cudaEventCreate(&e));
  for (const Shape& shape : shapes) {
    Case k;
    k.batch = shape.batch;
    k.heads = 32;
    k.kv_heads = 8;
    k.capacity = shape.n;
    k.budget = shape.budget;
    k.kind = shape.kind;
    k.full = true;
    Setup s;
    make(k, s);
    std::vector<float> times[4];
    for (int i = 0; i < 9; ++i) {
      CHECK(cudaMemsetAsync(cold, i, cold_bytes));
      CHECK(cudaMemsetAsync(s.stats, 0, sizeof(CertifiedStats)));
      CHECK(cudaEventRecord(at[0]));
      CHECK(certified_bound(s.c, s.slab, s.scratch, s.codes, s.own, nullptr));
      CHECK(cudaEventRecord(at[1]));
      CHECK(certified_scan(s.c, s.slab, s.scratch, s.codes, s.own, sms(), nullptr));
      CHECK(cudaEventRecord(at[2]));
      CHECK(certified_finish(s.c, s.slab, s.scratch, s.codes, s.own, nullptr));
      CHECK(cudaEventRecord(at[3]));
      CHECK(cudaEventSynchronize(at[3]));
      for (int j = 0; j < 4 && i >= 2; ++j) {
        float ms;
        CHECK(cudaEventElapsedTime(&ms, at[j == 3 ? 0 : j], at[j == 3 ? 3 : j + 1]));
        times[j].push_back(ms * 1e3f);
      }
    }
    for (auto& t : times) std::sort(t.begin(), t.end());
    CertifiedStats stats;
    CHECK(cudaMemcpy(&stats, s.stats, sizeof stats, cudaMemcpyDeviceToHost));
    const double bytes = static_cast<double>(shape.batch) * shape.n * 8 * 132;
    std::printf(
        "%s B%d n %d W %lld team %d chunk %d: bound %.1f, scan %.1f (%.0f GB/s), finish %.1f, all %.1f us; "
        "codes once at 2.95 TB/s: %.0f; "
        "%llu of %llu certified, survivors / W %.3f, listed / W %.2f\n",
        kNames[shape.kind], shape.batch, shape.n, static_cast<long long>(s.c.kept_width), s.own.team,
        s.own.chunk, times[0][3], times[1][3], bytes / times[1][3] * 1e-3, times[2][3], times[3][3],
        bytes / 2.95e6, stats.certified, stats.rows,
        static_cast<double>(stats.survivors) / static_cast<double>(std::max(1ull, stats.kept)),
        static_cast<double>(stats.listed) / static_cast<double>(std::max(1ull, stats.kept)));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "time") return time_all();
  return check_all(mode == "little") == 0 ? 0 : 1;
}
