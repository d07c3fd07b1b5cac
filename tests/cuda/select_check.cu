// Checks the fused selection of sm_90a against a brute force that uses the kernel's own score order (mma.sync
// scores, sorted on the host), and times it.
//
//   select_check              every check: kinds of data, shapes, budgets, packed documents
//   select_check little       a few small cases, for compute-sanitizer
//   select_check time S W D   times S keys and rows, B1 H32 Hkv8 bf16 causal, random and real-like, and
//   checks some
//                             tiles; W 0: 1 %, W -5: 5 %
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cuda/common/mma.cuh"
#include "cuda/common/sequence.cuh"
#include "cuda/sm90/select.h"

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
  kRealLike,
  kMixed,
  kAllEqual,
  kTwoValues,
  kDuplicated,
  kNaN,
  kInf,
  kPermuted,
  kDataKinds
};
const char* const kDataNames[] = {"random",     "real-like", "mixed", "all equal", "two values",
                                  "duplicated", "NaN",       "inf",   "permuted"};

__device__ uint32_t hash(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

__device__ float normal(uint32_t index, uint32_t seed) {
  const float u = (static_cast<float>(hash(index * 2 + seed * 0x9e3779b9u) >> 8) + 1.0f) / 16777216.0f;
  const float v = static_cast<float>(hash(index * 2 + 1 + seed * 0x9e3779b9u) >> 8) / 16777216.0f;
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

// Channel `channel` of a vector of mixed exponents.
__device__ float mixed(int channel, uint32_t seed) {
  const uint32_t h = hash(channel + seed);
  const float magnitude = ldexpf(1.0f + 0.125f * (h % 8), static_cast<int>(h / 8 % 13) - 6);
  return h / 128 % 4 != 0 ? magnitude : -magnitude;  // the sum is above zero
}

// One thread per (batch, head, channel) walks the tokens. Element (b, t, h, c) lies at ((b * tokens + t) *
// heads + h)
// * channels + c. `smooth` is the share of variance that is an AR(1) process of correlation time `tau`.
template <typename T>
__global__ void fill(T* out, int batch, int tokens, int heads, int channels, int kind, bool is_key,
                     uint32_t seed) {
  const int series = blockIdx.x * blockDim.x + threadIdx.x;
  if (series >= batch * heads * channels) return;
  const int channel = series % channels, head = series / channels % heads, b = series / channels / heads;
  const float decay = expf(-1.0f / (is_key ? 50.0f : 400.0f)), kick = sqrtf(1.0f - decay * decay);
  float state = normal(series, seed + 17);
  for (int t = 0; t < tokens; ++t) {
    const uint32_t index = static_cast<uint32_t>(((b * tokens + t) * heads + head) * channels + channel);
    const float white = normal(index, seed);
    float x = white;
    // Mixed: real-like queries and white ones, 200 tokens each.
    if (kind == kRealLike || (kind == kMixed && (is_key || t / 200 % 2 == 0))) {
      state = decay * state + kick * normal(index, seed + 5);
      x = is_key ? sqrtf(0.8f) * state + sqrtf(0.2f) * white
                 : (state + 0.35f * white) / sqrtf(1.0f + 0.35f * 0.35f);
    } else if (kind == kAllEqual && is_key) {
      x = normal(series, seed);
    } else if (kind == kTwoValues && is_key) {
      x = normal(series, seed) * (hash(t * 7u + seed) % 3 == 0 ? 1.0f : -0.5f);
    } else if (kind == kDuplicated && is_key) {
      x = normal(series + (t / 2) * 65537u, seed);
    } else if (kind == kNaN && is_key && channel == 3 && hash(t * 11u + seed) % 97 == 0) {
      x = __int_as_float(0x7fc00000);
    } else if (kind == kInf && is_key && channel == 5 && hash(t * 13u + seed) % 61 == 0) {
      x = __int_as_float(0x7f800000);
    } else if (kind == kPermuted) {
      // One key in 16 is a channel permutation of one vector, the others are half of one, and queries are
      // constant: rounding alone decides who is kept, and the marks of all other keys are few.
      const uint32_t h = hash(t * 17u + seed);
      const int from = static_cast<int>((channel * (h % 64 * 2 + 1) + h / 64) % channels);
      x = !is_key ? 1.0f + 0.0625f * (t % 16) : mixed(from, seed + head) * (h / 4096 % 16 == 0 ? 1.0f : 0.5f);
    }
    out[index] = static_cast<T>(x);
  }
}

// Scores of the 64 rows of each listed (head, tile): scores[(list index * 64 + row) * max_k + key].
template <typename T>
__global__ void score_tiles(Call c, const int2* list, float* scores) {
  const int2 entry = list[blockIdx.x];
  const Tile t = tile_at(c, entry.y);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv_head = entry.x / (c.heads / c.kv_heads);
  const int g = lane / 4, u = lane % 4 * 2;
  for (int block = 0; block < 4; ++block) {
    for (int key = warp * 8; key < t.tk; key += 8 * (blockDim.x / 32)) {
      float s[4] = {0, 0, 0, 0};
      const T* k = row_pointer<T>(c.k, t.batch, int64_t{t.k_begin} + min(key + g, t.tk - 1), kv_head);
      const T* rows[2];
      for (int upper = 0; upper < 2; ++upper) {
        const int row = min(block * 16 + g + 8 * upper, t.rows - 1);
        rows[upper] = row_pointer<T>(c.q, t.batch, int64_t{t.q_begin} + t.row0 + row, entry.x);
      }
      for (int d = 0; d < c.head_dim; d += 16) {
        const auto load = [&](const T* p) { return *reinterpret_cast<const uint32_t*>(p + d + u); };
        const uint32_t a[4] = {load(rows[0]), load(rows[1]), load(rows[0] + 8), load(rows[1] + 8)};
        mma_16816<T>(s, a, load(k), load(k + 8));
      }
      for (int e = 0; e < 4; ++e) {
        const int row = block * 16 + g + 8 * (e >> 1), j = key + u + (e & 1);
        if (j < t.tk) scores[(int64_t{blockIdx.x} * 64 + row) * c.max_k + j] = s[e];
      }
    }
  }
}

// Compares bitmaps of every tile with nothing but their own row encodings is not needed: the host does it
// below.
struct Case {
  std::string name;
  DType dtype = DType::kBFloat16;
  Data data = kRandom;
  int batch = 1, heads = 4, kv_heads = 2, dim = 128, tq = 256, tk = 256;
  bool causal = true;
  Budget budget;
  std::vector<int> documents;  // lengths; packed if not empty (tq = tk)
  int check_tiles = 1 << 30;   // how many (head, tile) are compared
  int timed = 0;               // timed runs
  bool bitmap = true;
};

template <typename T>
bool run_case(const Case& x) {
  Call c;
  c.dtype = x.dtype;
  c.heads = x.heads;
  c.kv_heads = x.kv_heads;
  c.head_dim = c.v_dim = x.dim;
  c.batch = x.batch;
  c.tq = c.max_q = x.tq;
  c.tk = c.max_k = x.tk;
  c.causal = x.causal;
  c.budget = x.budget;
  int tensor_batch = x.batch;
  std::vector<int2> tiles;
  std::vector<int> offsets{0};
  int* cu = nullptr;
  int2* device_tiles = nullptr;
  if (!x.documents.empty()) {
    int longest = 0;
    for (int n : x.documents) offsets.push_back(offsets.back() + n), longest = std::max(longest, n);
    c.batch = static_cast<int>(x.documents.size());
    c.tq = c.tk = offsets.back();
    c.max_q = c.max_k = longest;
    tensor_batch = 1;
    for (int d = 0; d < c.batch; ++d) {
      for (int row = 0; row < x.documents[d]; row += kTileRows) tiles.push_back(make_int2(d, row));
    }
    tiles.resize((c.tq + kTileRows - 1) / kTileRows + c.batch, make_int2(-1, 0));
    CHECK(cudaMalloc(&cu, offsets.size() * sizeof(int)));
    CHECK(cudaMemcpy(cu, offsets.data(), offsets.size() * sizeof(int), cudaMemcpyHostToDevice));
    CHECK(cudaMalloc(&device_tiles, tiles.size() * sizeof(int2)));
    CHECK(cudaMemcpy(device_tiles, tiles.data(), tiles.size() * sizeof(int2), cudaMemcpyHostToDevice));
    c.cu_q = c.cu_k = cu;
    c.tiles = device_tiles;
    c.num_tiles = static_cast<int>(tiles.size());
  } else {
    c.num_tiles = x.batch * ((x.tq + kTileRows - 1) / kTileRows);
  }
  T *q, *k;
  const int64_t q_size = int64_t{tensor_batch} * c.tq * c.heads * x.dim;
  const int64_t k_size = int64_t{tensor_batch} * c.tk * c.kv_heads * x.dim;
  CHECK(cudaMalloc(&q, std::max<int64_t>(q_size, 8) * 2));
  CHECK(cudaMalloc(&k, std::max<int64_t>(k_size, 8) * 2));
  fill<T><<<(tensor_batch * c.heads * x.dim + 63) / 64, 64>>>(q, tensor_batch, c.tq, c.heads, x.dim, x.data,
                                                              false, 11);
  fill<T><<<(tensor_batch * c.kv_heads * x.dim + 63) / 64, 64>>>(k, tensor_batch, c.tk, c.kv_heads, x.dim,
                                                                 x.data, true, 23);
  c.q = View{q, int64_t{c.tq} * c.heads * x.dim, int64_t{c.heads} * x.dim, x.dim};
  c.k = View{k, int64_t{c.tk} * c.kv_heads * x.dim, int64_t{c.kv_heads} * x.dim, x.dim};
  c.rows = RowLayout{int64_t{c.heads} * c.tq, c.tq};
  const int64_t rows = int64_t{tensor_batch} * c.heads * c.tq;
  const int64_t words = bitmap_words(c), bitmap_size = int64_t{c.heads} * c.num_tiles * words;
  Selection s;
  CHECK(cudaMalloc(&s.threshold, rows * 4));
  CHECK(cudaMalloc(&s.tie_index, rows * 4));
  uint32_t* device_bitmap;
  CHECK(cudaMalloc(&device_bitmap, std::max<int64_t>(bitmap_size, 1) * 4));
  if (x.bitmap) s.bitmap = device_bitmap;
  CHECK(cudaMemset(s.threshold, 0xab, rows * 4));
  CHECK(cudaMemset(s.tie_index, 0xab, rows * 4));
  if (!sm90::supports_select(c)) {
    std::printf("%-44s not supported\n", x.name.c_str());
    return false;
  }
  const size_t bytes = sm90::select_workspace(c);
  void* workspace;
  CHECK(cudaMalloc(&workspace, bytes));
  CHECK(cudaMemset(workspace, 0xcd, bytes));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run < 1 + x.timed; ++run) {
    CHECK(cudaMemsetAsync(device_bitmap, 0, bitmap_size * 4));
    CHECK(cudaEventRecord(begin));
    CHECK(sm90::select(c, s, workspace, bytes, nullptr));
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (run > 0) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());

  // The listed tiles, a few at a time, on all cores.
  std::vector<float> threshold(rows);
  std::vector<int32_t> tie_index(rows);
  std::vector<uint32_t> bitmap(bitmap_size);
  CHECK(cudaMemcpy(threshold.data(), s.threshold, rows * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(tie_index.data(), s.tie_index, rows * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(bitmap.data(), device_bitmap, bitmap_size * 4, cudaMemcpyDeviceToHost));
  std::vector<int2> list;
  const int64_t all = int64_t{c.heads} * c.num_tiles;
  const int64_t stride = std::max<int64_t>(1, all / std::max(1, x.check_tiles)) | 1;
  for (int64_t i = all - 1; i >= 0; i -= stride) {
    list.push_back(make_int2(static_cast<int>(i / c.num_tiles), static_cast<int>(i % c.num_tiles)));
  }
  int64_t wrong = 0, wrong_bits = 0, checked = 0;
  const size_t chunk = std::max<size_t>(1, (size_t{1} << 28) / (size_t{256} * std::max(1, c.max_k)));
  int2* device_list;
  float* device_scores;
  const size_t most = std::min(chunk, list.size());
  CHECK(cudaMalloc(&device_list, most * sizeof(int2)));
  CHECK(cudaMalloc(&device_scores, most * 64 * std::max(1, c.max_k) * 4));
  std::vector<float> scores(most * 64 * std::max(1, c.max_k));
  std::string first_error;
  for (size_t from = 0; from < list.size(); from += chunk) {
    const size_t count = std::min(chunk, list.size() - from);
    CHECK(cudaMemcpy(device_list, list.data() + from, count * sizeof(int2), cudaMemcpyHostToDevice));
    if (c.tk > 0) {
      score_tiles<T><<<static_cast<unsigned>(count), 256>>>(c, device_list, device_scores);
      CHECK(cudaMemcpy(scores.data(), device_scores, count * 64 * c.max_k * 4, cudaMemcpyDeviceToHost));
    }
    const int workers = std::max(1u, std::min(32u, std::thread::hardware_concurrency()));
    std::vector<int64_t> bad(workers), bad_bits(workers), done(workers);
    std::vector<std::string> message(workers);
    std::vector<std::thread> threads;
    for (int worker = 0; worker < workers; ++worker) {
      threads.emplace_back([&, worker] {
        for (size_t i = worker; i < count; i += workers) {
          const auto [head, tile] = std::pair(list[from + i].x, list[from + i].y);
          int batch = 0, q_begin = 0, tq = c.tq, tk = c.tk, row0;
          if (tiles.empty()) {
            const int per = (c.tq + kTileRows - 1) / kTileRows;
            batch = tile / per;
            row0 = tile % per * kTileRows;
          } else {
            if (tiles[tile].x < 0) continue;
            q_begin = offsets[tiles[tile].x];
            tq = tk = x.documents[tiles[tile].x];
            row0 = tiles[tile].y;
          }
          std::vector<uint32_t> expected(words);
          for (int r = 0; r < kTileRows && row0 + r < tq; ++r) {
            const RowPlan plan = plan_row(visible(row0 + r, tq, tk, c.causal), c.budget, 0, 0);
            const int n = static_cast<int>(plan.seen.end);
            const float* row = scores.data() + (i * 64 + r) * c.max_k;
            std::vector<std::pair<int32_t, int32_t>> order(n);
            for (int j = 0; j < n; ++j)
              order[j] = {-1 - order_key(row[j]), j};  // ~key: ascending, no overflow
            float want = order_score(INT32_MAX);
            int32_t want_tie = -1;
            if (plan.kept > 0) {
              std::nth_element(order.begin(), order.begin() + plan.kept - 1, order.end());
              want = order_score(-1 - order[plan.kept - 1].first);
              want_tie = order[plan.kept - 1].second;
              for (int j = 0; j < plan.kept; ++j)
                expected[order[j].second / 32] |= 1u << order[j].second % 32;
            }
            const int64_t at = c.rows.at(batch, head, q_begin + row0 + r);
            ++done[worker];
            if (std::memcmp(&want, &threshold[at], 4) != 0 || want_tie != tie_index[at]) {
              if (bad[worker]++ == 0) {
                char text[200];
                std::snprintf(text, sizeof text, "head %d row %d n %d W %d: want %.9g / %d, got %.9g / %d",
                              head, row0 + r, n, static_cast<int>(plan.kept), want, want_tie, threshold[at],
                              tie_index[at]);
                message[worker] = text;
              }
            }
          }
          const uint32_t* got = bitmap.data() + (int64_t{head} * c.num_tiles + tile) * words;
          for (int64_t w = 0; x.bitmap && w < words; ++w) {
            if (expected[w] != got[w] && bad_bits[worker]++ == 0 && message[worker].empty()) {
              char text[200];
              std::snprintf(text, sizeof text, "bitmap head %d tile %d word %d: want %08x, got %08x", head,
                            tile, static_cast<int>(w), expected[w], got[w]);
              message[worker] = text;
            }
          }
        }
      });
    }
    for (auto& t : threads) t.join();
    for (int worker = 0; worker < workers; ++worker) {
      wrong += bad[worker];
      wrong_bits += bad_bits[worker];
      checked += done[worker];
      if (first_error.empty()) first_error = message[worker];
    }
  }
  const bool good = wrong == 0 && wrong_bits == 0;
  std::printf("%-52s %s %lld rows", x.name.c_str(), good ? "ok " : "BAD", static_cast<long long>(checked));
  if (!good) {
    std::printf(", wrong rows %lld, words %lld; %s", static_cast<long long>(wrong),
                static_cast<long long>(wrong_bits), first_error.c_str());
  }
  // Rows and tiles that were repaired, and tiles that were settled from their marks: the arrays lie behind
  // the counters in the workspace.
  const auto array = [&](auto sample, int64_t offset) {
    std::vector<decltype(sample)> values(all);
    CHECK(cudaMemcpy(values.data(), static_cast<char*>(workspace) + offset, all * sizeof sample,
                     cudaMemcpyDeviceToHost));
    return values;
  };
  const int64_t rebuild_offset = 256 + (all * 8 + 255) / 256 * 256;
  int64_t repaired = 0, rebuilt = 0, settled = 0;
  for (uint64_t u : array(uint64_t{}, 256)) repaired += __builtin_popcountll(u);
  for (uint32_t u : array(uint32_t{}, rebuild_offset)) rebuilt += u != 0;
  for (int32_t n : array(int32_t{}, rebuild_offset + (all * 4 + 255) / 256 * 256)) {
    settled += n >= 0 && n < 0x7ffffffe;  // not written: negative
  }
  std::printf(" | of %lld tiles settled %lld, rebuilt %lld; repaired rows %lld", static_cast<long long>(all),
              static_cast<long long>(settled), static_cast<long long>(rebuilt),
              static_cast<long long>(repaired));
  if (!times.empty()) {
    std::printf(" | %.3f ms (min %.3f, max %.3f), workspace %.0f MiB", times[times.size() / 2], times.front(),
                times.back(), bytes / 1048576.0);
  }
  std::printf("\n");
  std::fflush(stdout);
  for (void* p : {static_cast<void*>(q), static_cast<void*>(k), static_cast<void*>(s.threshold),
                  static_cast<void*>(s.tie_index), static_cast<void*>(device_bitmap), workspace,
                  static_cast<void*>(device_list), static_cast<void*>(device_scores), static_cast<void*>(cu),
                  static_cast<void*>(device_tiles)}) {
    CHECK(cudaFree(p));
  }
  return good;
}

bool run(const Case& x) {
  return x.dtype == DType::kFloat16 ? run_case<__half>(x) : run_case<__nv_bfloat16>(x);
}

Budget topk(int w) {
  Budget b;
  b.topk = w;
  return b;
}
Budget ratio(double r) {
  Budget b;
  b.ratio = r;
  return b;
}

int check() {
  int bad = 0;
  const auto add = [&](Case x) { bad += !run(x); };
  for (int data = 0; data < kDataKinds; ++data) {
    for (int dim : {128, 64}) {
      Case x;
      x.name = std::string(kDataNames[data]) + " D" + std::to_string(dim) + " S 1,100 W 33";
      x.data = static_cast<Data>(data);
      x.dim = dim;
      x.dtype = dim == 64 ? DType::kFloat16 : DType::kBFloat16;
      x.tq = x.tk = 1100;
      x.budget = topk(33);
      add(x);
      x.name = std::string(kDataNames[data]) + " D" + std::to_string(dim) + " S 4,500 1 % H6 Hkv2";
      x.heads = 6;
      x.tq = x.tk = 4500;
      x.budget = ratio(0.01);
      x.check_tiles = 40;
      add(x);
    }
  }
  for (int s : {1, 2, 63, 64, 65, 127, 128, 129, 191, 257, 513, 700}) {
    for (int w : {1, 7, 10000}) {
      Case x;
      x.name = "S " + std::to_string(s) + " W " + std::to_string(w);
      x.tq = x.tk = s;
      x.heads = 3;
      x.kv_heads = 1;
      x.budget = topk(w);
      add(x);
    }
  }
  Case x;
  x.name = "Tq 100 Tk 900, MHA, B2";
  x.batch = 2, x.heads = x.kv_heads = 3, x.tq = 100, x.tk = 900, x.budget = topk(50);
  add(x);
  x.name = "Tq 900 Tk 300 (rows that see nothing), MQA";
  x.heads = 5, x.kv_heads = 1, x.tq = 900, x.tk = 300, x.budget = topk(20);
  add(x);
  x.name = "not causal, B3, Tq 130 Tk 2,000, 5 %";
  x.batch = 3, x.tq = 130, x.tk = 2000, x.causal = false, x.budget = ratio(0.05);
  add(x);
  x.name = "half of the keys, S 3,000";
  x.batch = 1, x.heads = 4, x.kv_heads = 2, x.causal = true, x.tq = x.tk = 3000, x.budget = ratio(0.5),
  x.check_tiles = 40;
  add(x);
  x.name = "W 2,048, S 5,000";
  x.tq = x.tk = 5000, x.budget = topk(2048);
  add(x);
  x.name = "every key, S 2,500";
  x.tq = x.tk = 2500, x.budget = ratio(1.0);
  add(x);
  x = Case{};
  x.name = "packed documents, H6 Hkv2 D64";
  x.documents = {1, 300, 0, 64, 65, 2000, 5, 128, 0, 777};
  x.heads = 6, x.kv_heads = 2, x.dim = 64, x.budget = ratio(0.05);
  add(x);
  x.name = "packed documents, MHA D128";
  x.heads = x.kv_heads = 2, x.dim = 128, x.budget = topk(40);
  add(x);
  x = Case{};
  x.check_tiles = 60;
  for (Data data : {kRealLike, kMixed, kRandom, kDuplicated, kTwoValues, kNaN, kInf, kPermuted}) {
    x.data = data;
    x.tq = x.tk = 9000;
    x.budget = ratio(0.01);
    x.name = std::string(kDataNames[data]) + " S 9,000 1 %";
    add(x);
    x.budget = ratio(0.05);
    x.name = std::string(kDataNames[data]) + " S 9,000 5 %";
    add(x);
    x.budget = topk(1500);
    x.name = std::string(kDataNames[data]) + " S 9,000 W 1,500";
    add(x);
  }
  x.data = kRealLike;
  x.bitmap = false;
  x.name = "real-like S 9,000 W 1,500, no bitmap";
  add(x);
  x.bitmap = true;
  x.name = "real-like S 9,000 W 300 D64";
  x.dim = 64, x.dtype = DType::kFloat16, x.budget = topk(300);
  add(x);
  x.name = "packed documents, mixed, 5 %";
  x.data = kMixed, x.documents = {4000, 70, 0, 5001, 640, 1}, x.budget = ratio(0.05);
  add(x);
  x.name = "packed documents, real-like, 1 %";
  x.data = kRealLike, x.dim = 128, x.heads = 6, x.budget = ratio(0.01);
  add(x);
  std::printf("%d cases failed\n", bad);
  return bad != 0;
}

// A few small cases of every kernel, for compute-sanitizer.
int check_little() {
  int bad = 0;
  Case x;
  x.data = kDuplicated;
  x.name = "little: duplicated, S 700 W 33";
  x.tq = x.tk = 700, x.budget = topk(33);
  bad += !run(x);
  x.name = "little: NaN, fp16, D64, packed";
  x.data = kNaN, x.dim = 64, x.dtype = DType::kFloat16;
  x.documents = {1, 200, 0, 65};
  bad += !run(x);
  return bad;
}

int time_select(int s, int w, int dim) {
  int bad = 0;
  for (Data data : {kRandom, kRealLike}) {
    Case x;
    x.name = std::string(kDataNames[data]) + " S " + std::to_string(s) + " W " +
             (w > 0   ? std::to_string(w)
              : w < 0 ? std::to_string(-w) + " %"
                      : "1 %") +
             " D" + std::to_string(dim);
    x.data = data;
    x.heads = 32, x.kv_heads = 8, x.tq = x.tk = s, x.dim = dim;
    x.budget = w > 0 ? topk(w) : ratio(w < 0 ? -0.01 * w : 0.01);
    x.check_tiles = 16;
    x.timed = 7;
    bad += !run(x);
  }
  return bad;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 3 && std::strcmp(argv[1], "time") == 0)
    return time_select(std::atoi(argv[2]), std::atoi(argv[3]), argc > 4 ? std::atoi(argv[4]) : 128);
  if (argc > 1 && std::strcmp(argv[1], "little") == 0) return check_little();
  return check();
}
