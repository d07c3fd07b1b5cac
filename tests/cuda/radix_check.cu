// Checks the selection of given score rows (common/select_long.h) against a sort on the host, and times it.
//
//   radix_check          every check: kinds of data, types, shapes, lengths, alignments, key names
//   radix_check little   a few small cases, for compute-sanitizer
//   radix_check time     times, L2 flushed
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check_data.cuh"
#include "cuda/common/select_long.h"
#include "topk_attn/contract.h"

namespace {

using namespace topk_attn;
using namespace topk_attn::cuda;

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
  kClustered,
  kEqual,
  kTwoValues,
  kAscending,
  kDescending,
  kSpecial,
  kMostlyZero,
  kAdjacent,
  kSpike,
  kDenormal,
  kManyNaN,
  kKinds
};
const char* const kNames[] = {"random",        "clustered",  "equal",    "two values",
                              "ascending",     "descending", "special",  "mostly 0",
                              "adjacent bits", "spike",      "denormal", "many NaN"};

std::vector<float> make_row(int kind, int64_t n, uint64_t seed) {
  std::mt19937 g(static_cast<uint32_t>(seed * 7919 + kind));
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  float state = normal(g);
  for (int64_t i = 0; i < n; ++i) {
    float v = 0.0f;
    switch (kind) {
      case kRandom:
        v = normal(g);
        break;
      case kClustered:
        state = 0.998f * state + 0.0632f * normal(g);
        v = state + 0.05f * normal(g);
        break;
      case kEqual:
        v = 2.5f;
        break;
      case kTwoValues:
        v = g() % 3 == 0 ? 1.0f : -0.5f;
        break;
      case kAscending:
        v = static_cast<float>(i);
        break;
      case kDescending:
        v = -static_cast<float>(i);
        break;
      case kSpecial: {
        const float table[] = {0.0f, -0.0f, 1.0f, -1.0f, NAN, INFINITY, -INFINITY, -NAN};
        v = table[g() % 8];
        break;
      }
      case kMostlyZero:
        v = std::max(0.0f, normal(g) - 2.0f) * (g() % 2 == 0 ? 1.0f : -1.0f);
        break;
      case kAdjacent: {
        const uint32_t bits = 0x3f800000u + static_cast<uint32_t>(g() % 5000);
        std::memcpy(&v, &bits, 4);
        break;
      }
      case kSpike:
        v = i == n / 3 ? 1e30f : 1.0f;
        break;
      case kDenormal: {
        const uint32_t bits = (g() % 2 << 31) | (g() % 3000);
        std::memcpy(&v, &bits, 4);
        break;
      }
      default:
        v = g() % 10 == 0 ? NAN : normal(g);
    }
    x[static_cast<size_t>(i)] = v;
  }
  return x;
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
  DType dtype;
  int kind;
  int64_t rows;
  int64_t n;
  int64_t w;
  bool ragged = false;
  int64_t gap = 0;   // row_stride - n
  int64_t skip = 0;  // elements before the first row
  bool named = false;
};

size_t element(DType t) {
  return t == DType::kFloat32 ? 4 : 2;
}

int64_t checked_rows = 0;

bool run_case(const Case& c) {
  const int64_t stride = c.n + c.gap;
  const int64_t total = c.skip + c.rows * stride;
  std::vector<float> values(static_cast<size_t>(total), NAN);
  std::vector<uint8_t> raw(static_cast<size_t>(total) * element(c.dtype));
  parallel(c.rows, [&](int64_t r) {
    const std::vector<float> row = make_row(c.kind, c.n, static_cast<uint64_t>(r + 1));
    std::copy(row.begin(), row.end(), values.begin() + c.skip + r * stride);
  });
  parallel(64, [&](int64_t part) {
    for (int64_t i = total * part / 64; i < total * (part + 1) / 64; ++i) {
      float& v = values[static_cast<size_t>(i)];
      uint8_t* const at = raw.data() + i * static_cast<int64_t>(element(c.dtype));
      if (c.dtype == DType::kFloat32) {
        std::memcpy(at, &v, 4);
      } else if (c.dtype == DType::kBFloat16) {
        const __nv_bfloat16 h = __float2bfloat16(v);
        std::memcpy(at, &h, 2);
        v = __bfloat162float(h);
      } else {
        const __half h = __float2half(v);
        std::memcpy(at, &h, 2);
        v = __half2float(h);
      }
    }
  });
  std::vector<int32_t> lengths(static_cast<size_t>(c.rows));
  std::mt19937 g(5);
  for (int64_t r = 0; r < c.rows; ++r) {
    lengths[static_cast<size_t>(r)] = !c.ragged ? static_cast<int32_t>(c.n)
                                      : r == 0  ? 0
                                      : r == 1  ? -3
                                      : r == 2  ? static_cast<int32_t>(c.n + 5)
                                      : r == 3  ? 1
                                                : static_cast<int32_t>(g() % static_cast<uint32_t>(c.n + 1));
  }
  std::vector<int32_t> columns;
  if (c.named) {
    columns.resize(static_cast<size_t>(c.rows * c.n));
    for (int64_t r = 0; r < c.rows; ++r) {
      int32_t at = static_cast<int32_t>(g() % 10);
      for (int64_t i = 0; i < c.n; ++i) {
        columns[static_cast<size_t>(r * c.n + i)] = at;
        at += 1 + static_cast<int32_t>(g() % 3);
      }
    }
  }

  uint8_t* d_scores;
  int32_t *d_lengths, *d_columns = nullptr, *d_tie, *d_indices, *d_kept;
  float* d_threshold;
  CHECK(cudaMalloc(&d_scores, raw.size() + 16));
  CHECK(cudaMemcpy(d_scores, raw.data(), raw.size(), cudaMemcpyHostToDevice));
  CHECK(cudaMalloc(&d_lengths, c.rows * 4));
  CHECK(cudaMemcpy(d_lengths, lengths.data(), c.rows * 4, cudaMemcpyHostToDevice));
  if (c.named) {
    CHECK(cudaMalloc(&d_columns, columns.size() * 4));
    CHECK(cudaMemcpy(d_columns, columns.data(), columns.size() * 4, cudaMemcpyHostToDevice));
  }
  CHECK(cudaMalloc(&d_tie, c.rows * 4));
  CHECK(cudaMalloc(&d_kept, c.rows * 4));
  CHECK(cudaMalloc(&d_threshold, c.rows * 4));
  CHECK(cudaMalloc(&d_indices, c.rows * c.w * 4));
  ScoreRows rows;
  rows.dtype = c.dtype;
  rows.scores = d_scores + c.skip * static_cast<int64_t>(element(c.dtype));
  rows.row_stride = stride;
  rows.rows = c.rows;
  rows.n = c.n;
  rows.lengths = c.ragged ? d_lengths : nullptr;
  rows.budget.topk = c.w;
  rows.columns = d_columns;
  rows.column_stride = c.n;
  rows.threshold = d_threshold;
  rows.tie_index = d_tie;
  rows.indices = d_indices;
  rows.index_width = c.w;
  rows.kept = d_kept;
  std::vector<float> threshold(static_cast<size_t>(c.rows)), again(threshold);
  std::vector<int32_t> tie(static_cast<size_t>(c.rows)), kept(tie),
      indices(static_cast<size_t>(c.rows * c.w)), second(indices);
  for (int run = 0; run < 2; ++run) {
    CHECK(cudaMemset(d_indices, 0x55, c.rows * c.w * 4));
    CHECK(select_long(rows, nullptr));
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy((run == 0 ? indices : second).data(), d_indices, c.rows * c.w * 4,
                     cudaMemcpyDeviceToHost));
  }
  CHECK(cudaMemcpy(threshold.data(), d_threshold, c.rows * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(tie.data(), d_tie, c.rows * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(kept.data(), d_kept, c.rows * 4, cudaMemcpyDeviceToHost));
  for (void* p : {(void*)d_scores, (void*)d_lengths, (void*)d_columns, (void*)d_tie, (void*)d_kept,
                  (void*)d_threshold, (void*)d_indices}) {
    CHECK(cudaFree(p));
  }

  std::atomic<int64_t> wrong{0};
  std::atomic<int64_t> first_wrong{c.rows};
  parallel(c.rows, [&](int64_t r) {
    const int64_t n = std::clamp<int64_t>(lengths[static_cast<size_t>(r)], 0, c.n);
    const int64_t w = std::min(c.w, n);
    std::vector<std::pair<int32_t, int32_t>> keys(static_cast<size_t>(n));
    for (int64_t j = 0; j < n; ++j) {
      const float v = values[static_cast<size_t>(c.skip + r * stride + j)];
      keys[static_cast<size_t>(j)] = {-order_key(v), static_cast<int32_t>(j)};
    }
    std::vector<int32_t> want(static_cast<size_t>(c.w), -1);
    float want_threshold = NAN;
    int32_t want_tie = -1;
    const auto name = [&](int32_t j) { return c.named ? columns[static_cast<size_t>(r * c.n + j)] : j; };
    if (w > 0) {
      std::nth_element(keys.begin(), keys.begin() + (w - 1), keys.end());
      want_threshold = order_score(-keys[static_cast<size_t>(w - 1)].first);
      want_tie = name(keys[static_cast<size_t>(w - 1)].second);
      for (int64_t i = 0; i < w; ++i)
        want[static_cast<size_t>(i)] = name(keys[static_cast<size_t>(i)].second);
      std::sort(want.begin(), want.begin() + w);
    }
    const size_t at = static_cast<size_t>(r);
    const bool good = std::memcmp(&want_threshold, &threshold[at], 4) == 0 ||
                      (std::isnan(want_threshold) && std::isnan(threshold[at]));
    const bool same = good && tie[at] == want_tie && kept[at] == w &&
                      std::equal(want.begin(), want.end(), indices.begin() + r * c.w) &&
                      std::equal(want.begin(), want.end(), second.begin() + r * c.w);
    if (!same) {
      ++wrong;
      int64_t seen = first_wrong;
      while (r < seen && !first_wrong.compare_exchange_weak(seen, r)) {
      }
      if (wrong < 3) {
        std::printf("  row %lld: threshold %g want %g, tie %d want %d, kept %d want %lld\n",
                    static_cast<long long>(r), threshold[at], want_threshold, tie[at], want_tie, kept[at],
                    static_cast<long long>(w));
      }
    }
  });
  checked_rows += c.rows;
  if (wrong > 0) {
    std::printf(
        "WRONG %lld of %lld rows (first %lld): dtype %d, %s, n %lld, W %lld, ragged %d, gap %lld, skip "
        "%lld\n",
        static_cast<long long>(wrong), static_cast<long long>(c.rows), static_cast<long long>(first_wrong),
        static_cast<int>(c.dtype), kNames[c.kind], static_cast<long long>(c.n), static_cast<long long>(c.w),
        c.ragged, static_cast<long long>(c.gap), static_cast<long long>(c.skip));
  }
  return wrong == 0;
}

int check_all(bool little) {
  int failed = 0;
  int cases = 0;
  const auto run = [&](const Case& c) {
    ++cases;
    if (!run_case(c)) ++failed;
  };
  for (const DType t : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int kind = 0; kind < kKinds; ++kind) {
      for (const int64_t n : {1, 7, 33, 1000, 2048, 2049}) {
        for (const int64_t w : {int64_t{1}, n / 3 + 1, n}) run(Case{t, kind, 5, n, w, n > 7});
      }
      run(Case{t, kind, 6, 1500, 100, true, 3, 1});
      run(Case{t, kind, 9, 9001, 300, true, 1, 5});
      run(Case{t, kind, 4, 9000, 300, false, 0, 0, true});
      if (little && kind >= 2) break;
      run(Case{t, kind, 3, 20000, 20000});
      run(Case{t, kind, 300, 20001, 700});              // one block a row
      run(Case{t, kind, 3, 70001, 5000, false, 1, 3});  // teams of 8
      if (little) continue;
      run(Case{t, kind, 3, 300000, 65536, true, 2, 7});
      run(Case{t, kind, 300, 40000, 16000});  // bracket above and below
      run(Case{t, kind, 2, 1048576, 10486});
      run(Case{t, kind, 1, 1400000, 2000});  // longer than the bitmaps
    }
    if (little) break;
    run(Case{t, kRandom, 70, 300000, 3000, true});  // bitmap too short for one block, teams of four
    run(Case{t, kClustered, 70, 300000, 3000, true});
  }
  std::printf("%d cases, %lld rows, %d failed\n", cases, static_cast<long long>(checked_rows), failed);
  return failed == 0 ? 0 : 1;
}

__global__ void fill(float* x, int64_t count, int64_t n, int kind) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t j = i % n;
    const float z = normal(static_cast<uint32_t>(i), 1);
    x[i] = kind == 0 ? z : kind == 1 ? sinf(static_cast<float>(j) * 0.003f) + 0.006f * z : 1.0f;
  }
}

__global__ void to_bf16(const float* x, __nv_bfloat16* y, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    y[i] = __float2bfloat16(x[i]);
  }
}

int time_all() {
  struct Shape {
    int64_t rows, n, w;
    int kind = 0;
    bool bf16 = false;
  };
  const Shape shapes[] = {{256, 131072, 2048},    {256, 131072, 1311},   {256, 131072, 2048, 1},
                          {256, 131072, 2048, 2}, {256, 131072, 65536},  {256, 131072, 2048, 0, true},
                          {32, 131072, 1311},     {32, 131072, 1311, 1}, {1, 1048576, 2048},
                          {1, 1048576, 65536},    {32, 1048576, 10486},  {1024, 32768, 328},
                          {1024, 32768, 2048},    {4096, 8192, 128},     {16384, 2048, 64},
                          {65536, 512, 16},       {1, 131072, 2048},     {32, 4096, 256}};
  void* flush;
  const size_t flush_bytes = size_t{192} << 20;
  CHECK(cudaMalloc(&flush, flush_bytes));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (const Shape& s : shapes) {
    float *scores, *threshold;
    __nv_bfloat16* narrow;
    int32_t *tie, *indices;
    CHECK(cudaMalloc(&scores, s.rows * s.n * 4));
    CHECK(cudaMalloc(&narrow, s.rows * s.n * 2));
    CHECK(cudaMalloc(&threshold, s.rows * 4));
    CHECK(cudaMalloc(&tie, s.rows * 4));
    CHECK(cudaMalloc(&indices, s.rows * s.w * 4));
    fill<<<1024, 256>>>(scores, s.rows * s.n, s.n, s.kind);
    to_bf16<<<1024, 256>>>(scores, narrow, s.rows * s.n);
    ScoreRows rows;
    rows.dtype = s.bf16 ? DType::kBFloat16 : DType::kFloat32;
    rows.scores = s.bf16 ? static_cast<const void*>(narrow) : scores;
    rows.row_stride = s.n;
    rows.rows = s.rows;
    rows.n = s.n;
    rows.budget.topk = s.w;
    rows.threshold = threshold;
    rows.tie_index = tie;
    rows.indices = indices;
    rows.index_width = s.w;
    std::vector<float> times;
    for (int i = 0; i < 14; ++i) {
      CHECK(cudaMemsetAsync(flush, i, flush_bytes));
      CHECK(cudaEventRecord(begin));
      CHECK(select_long(rows, nullptr));
      CHECK(cudaEventRecord(end));
      CHECK(cudaEventSynchronize(end));
      float ms;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (i >= 3) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    const float ms = times[times.size() / 2];
    const double bytes = static_cast<double>(s.rows * s.n) * (s.bf16 ? 2 : 4);
    std::printf("%6lld x %8lld W %6lld %s%s: %8.1f us (%.1f to %.1f)  %7.1f GB/s\n",
                static_cast<long long>(s.rows), static_cast<long long>(s.n), static_cast<long long>(s.w),
                s.kind == 0   ? "normal"
                : s.kind == 1 ? "waves"
                              : "equal",
                s.bf16 ? " bf16" : "", ms * 1e3, times.front() * 1e3, times.back() * 1e3, bytes / ms * 1e-6);
    for (void* p : {(void*)scores, (void*)narrow, (void*)threshold, (void*)tie, (void*)indices})
      CHECK(cudaFree(p));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "time") return time_all();
  return check_all(mode == "little");
}
