// Checks the portable build: the fused selection against a brute force that uses the kernel's own score order
// (mma.sync scores, sorted on the host), forward and backward of both regimes against a float64 reference.
// And times them.
//
//   portable_check              every check: kinds of data, shapes, budgets, packed documents
//   portable_check little       a few small cases, for compute-sanitizer
//   portable_check time S W     times S keys and rows, B1 H32 Hkv8 D128 bf16 causal, random and real-like,
//                               and checks some tiles
//   portable_check select S W   the selection alone
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cuda/common/delta.h"
#include "cuda/common/select_scores.h"
#include "cuda/common/union_size.h"
#include "cuda/portable/portable.h"
#include "cuda/portable/select.h"
#include "portable_reference.cuh"

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
  bool attend = false;         // forward and backward too
  float mixed_share = 0.4f;    // of the case where both regimes meet
  float gain = 1.0f;           // of q and k; W = 1: what is checked is that out is one row of V, exactly
};

struct Timer {
  cudaEvent_t begin, end;
  Timer() {
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
  }
  // Median of `runs` after one that is not counted.
  template <typename Run>
  float median(int runs, const Run& run) {
    std::vector<float> times;
    for (int i = 0; i <= runs; ++i) {
      CHECK(cudaEventRecord(begin));
      run();
      CHECK(cudaEventRecord(end));
      CHECK(cudaEventSynchronize(end));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (i > 0 || runs == 0) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }
};

// Forward and backward with the selection `s`: masked, gathered, and both, with the given shares.
template <typename T>
bool attend_case(const Case& x, Call c, const Selection& s) {
  std::vector<void*> owned;
  const auto make = [&](int64_t bytes) {
    void* p = nullptr;
    CHECK(cudaMalloc(&p, std::max<int64_t>(bytes, 16)));
    CHECK(cudaMemset(p, 0x7f, std::max<int64_t>(bytes, 16)));  // large values: what is not written shows
    owned.push_back(p);
    return p;
  };
  const int batch = c.cu_q == nullptr ? c.batch : 1;
  const int64_t q_size = int64_t{batch} * c.tq * c.heads * c.head_dim;
  const int64_t k_size = int64_t{batch} * c.tk * c.kv_heads * c.head_dim;
  const int64_t rows = int64_t{batch} * c.heads * c.tq;
  const auto view = [&](void* p, const View& like) { return View{p, like.batch, like.token, like.head}; };
  c.v = view(make(k_size * 2), c.k);
  ForwardCall f;
  BackwardCall b;
  b.dout = view(make(q_size * 2), c.q);
  fill<T><<<(batch * c.kv_heads * c.head_dim + 63) / 64, 64>>>(static_cast<T*>(c.v.data), batch, c.tk,
                                                               c.kv_heads, c.head_dim, kRandom, true, 37);
  fill<T><<<(batch * c.heads * c.head_dim + 63) / 64, 64>>>(static_cast<T*>(b.dout.data), batch, c.tq,
                                                            c.heads, c.head_dim, kRandom, false, 41);
  c.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  f.call = b.call = c;
  f.threshold = b.threshold = s.threshold;
  f.tie_index = b.tie_index = s.tie_index;
  f.bitmap = b.bitmap = s.bitmap;
  f.out = view(make(q_size * 2), c.q);
  f.lse = static_cast<float*>(make(rows * 4));
  float* const delta_rows = static_cast<float*>(make(rows * 4));
  b.lse = f.lse;
  b.delta = delta_rows;
  b.dq = view(make(q_size * 2), c.q);
  b.dk = view(make(k_size * 2), c.k);
  b.dv = view(make(k_size * 2), c.k);
  float* const dk_sum = static_cast<float*>(make(k_size * 4));
  float* const dv_sum = static_cast<float*>(make(k_size * 4));
  const int64_t entries = int64_t{c.heads} * c.num_tiles;
  auto* const union_size = static_cast<int32_t*>(make(entries * 4));
  CHECK(count_union(c, s.bitmap, union_size, nullptr));
  // Packed: the documents' key tiles are their query tiles.
  const int2* key_tiles = c.tiles;
  const int num_key_tiles = c.tiles != nullptr ? c.num_tiles : c.batch * ((c.tk + kTileRows - 1) / kTileRows);

  float* scores = nullptr;
  float* p = nullptr;
  float* ds = nullptr;
  float* size = nullptr;
  float* const errors = static_cast<float*>(make(5 * 4));
  const int64_t pairs = entries * kTileRows * c.max_k;
  if (x.timed == 0) {
    std::vector<int2> list;
    for (int64_t i = 0; i < entries; ++i)
      list.push_back(make_int2(static_cast<int>(i / c.num_tiles), static_cast<int>(i % c.num_tiles)));
    auto* const device_list = static_cast<int2*>(make(entries * 8));
    CHECK(cudaMemcpy(device_list, list.data(), entries * 8, cudaMemcpyHostToDevice));
    scores = static_cast<float*>(make(pairs * 4));
    p = static_cast<float*>(make(pairs * 4));
    ds = static_cast<float*>(make(pairs * 4));
    size = static_cast<float*>(make(pairs * 4));
    score_tiles<T><<<static_cast<unsigned>(entries), 256>>>(c, device_list, scores);
    CHECK(cudaGetLastError());
  }
  Timer timer;
  bool good = true;
  for (float share : {0.0f, 1.0f, x.mixed_share}) {
    const Regimes regimes{share > 0.0f ? union_size : nullptr, share};
    f.regimes = b.regimes = regimes;
    b.dk_sum = share > 0.0f ? dk_sum : nullptr;
    b.dv_sum = share > 0.0f ? dv_sum : nullptr;
    const float forward_ms = timer.median(x.timed, [&] { CHECK(portable::forward(f, nullptr)); });
    CHECK(delta(c, f.out, b.dout, nullptr, f.lse, delta_rows, nullptr));
    const float backward_ms = timer.median(x.timed, [&] {
      CHECK(portable::backward(b, key_tiles, num_key_tiles, nullptr));
      if (share > 0.0f) CHECK(finish_gradients(c, dk_sum, dv_sum, b.dk, b.dv, nullptr));
    });
    std::printf("    gathered up to %.2f: ", share);
    if (x.timed > 0) {
      std::printf("forward %.3f ms, backward %.3f ms\n", forward_ms, backward_ms);
      continue;
    }
    if (x.gain != 1.0f) {  // lse is rounded to float32: no gradient can be right
      CHECK(cudaMemset(errors, 0, 4));
      check_single<T><<<static_cast<unsigned>(entries * kTileRows), 128>>>(f, reinterpret_cast<int*>(errors));
      int different;
      CHECK(cudaMemcpy(&different, errors, 4, cudaMemcpyDeviceToHost));
      good = good && different == 0;
      std::printf("%s %d channels differ\n", different == 0 ? "ok " : "BAD", different);
      continue;
    }
    CHECK(cudaMemset(errors, 0, 5 * 4));
    CHECK(cudaMemset(p, 0, pairs * 4));
    check_rows<T><<<static_cast<unsigned>(entries * kTileRows), 128>>>(b, f.out, scores, p, ds, size, errors);
    check_keys<T><<<dim3(c.tk, c.kv_heads, batch), 128>>>(b, p, ds, size, errors);
    CHECK(cudaGetLastError());
    float e[5];
    CHECK(cudaMemcpy(e, errors, sizeof e, cudaMemcpyDeviceToHost));
    const bool right = e[0] < 8e-3f && e[1] < 1e-4f && e[2] < 1e-2f && e[3] < 1e-2f && e[4] < 2e-2f;
    good = good && right;
    std::printf("%s out %.1e lse %.1e dq %.1e dk %.1e dv %.1e\n", right ? "ok " : "BAD", e[0], e[1], e[2],
                e[3], e[4]);
  }
  for (void* q : owned) CHECK(cudaFree(q));
  return good;
}

// Milliseconds of the selection by score slabs, with slabs as the operator makes them.
float time_slabs(const Call& c, const Selection& s, int64_t bitmap_size) {
  const int64_t ld = (int64_t{c.max_k} + 63) / 64 * 64;
  const int64_t units = std::max<int64_t>(1, (int64_t{32} << 20) / (kTileRows * ld * 4));
  float* slab;
  CHECK(cudaMalloc(&slab, units * kTileRows * ld * 4));
  Timer timer;
  const float ms = timer.median(1, [&] {
    CHECK(cudaMemsetAsync(s.bitmap, 0, bitmap_size * 4));
    for (int64_t first = 0; first < num_units(c); first += units) {
      const int64_t count = std::min(units, num_units(c) - first);
      CHECK(portable::scores(c, first, count, slab, ld, nullptr));
      CHECK(select_rows(c, ScoreSlab{slab, ld, first, count}, s, nullptr));
    }
  });
  CHECK(cudaFree(slab));
  return ms;
}

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
                                                              false, 11, x.gain);
  fill<T><<<(tensor_batch * c.kv_heads * x.dim + 63) / 64, 64>>>(k, tensor_batch, c.tk, c.kv_heads, x.dim,
                                                                 x.data, true, 23, x.gain);
  c.q = View{q, int64_t{c.tq} * c.heads * x.dim, int64_t{c.heads} * x.dim, x.dim};
  c.k = View{k, int64_t{c.tk} * c.kv_heads * x.dim, int64_t{c.kv_heads} * x.dim, x.dim};
  c.rows = RowLayout{int64_t{c.heads} * c.tq, c.tq};
  const int64_t rows = int64_t{tensor_batch} * c.heads * c.tq;
  const int64_t words = bitmap_words(c), bitmap_size = int64_t{c.heads} * c.num_tiles * words;
  Selection s;
  CHECK(cudaMalloc(&s.threshold, rows * 4));
  CHECK(cudaMalloc(&s.tie_index, rows * 4));
  CHECK(cudaMalloc(&s.bitmap, std::max<int64_t>(bitmap_size, 1) * 4));
  CHECK(cudaMemset(s.threshold, 0xab, rows * 4));
  CHECK(cudaMemset(s.tie_index, 0xab, rows * 4));
  if (!portable::supports_select(c)) {
    std::printf("%-44s not supported\n", x.name.c_str());
    return false;
  }
  const size_t bytes = portable::select_workspace(c);
  void* workspace;
  CHECK(cudaMalloc(&workspace, bytes));
  CHECK(cudaMemset(workspace, 0xcd, bytes));
  const float slab_ms = x.timed > 0 ? time_slabs(c, s, bitmap_size) : 0.0f;
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run < 1 + x.timed; ++run) {
    CHECK(cudaMemsetAsync(s.bitmap, 0, bitmap_size * 4));
    CHECK(cudaEventRecord(begin));
    CHECK(portable::select(c, s, workspace, bytes, nullptr));
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
  CHECK(cudaMemcpy(bitmap.data(), s.bitmap, bitmap_size * 4, cudaMemcpyDeviceToHost));
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
          for (int64_t w = 0; w < words; ++w) {
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
  bool good = wrong == 0 && wrong_bits == 0;
  std::printf("%-52s %s %lld rows", x.name.c_str(), good ? "ok " : "BAD", static_cast<long long>(checked));
  if (!good) {
    std::printf(", wrong rows %lld, words %lld; %s", static_cast<long long>(wrong),
                static_cast<long long>(wrong_bits), first_error.c_str());
  }
  if (!times.empty()) {
    // Rows that were repaired: see the offsets in select.cu.
    int32_t counters[2];
    CHECK(cudaMemcpy(counters, workspace, sizeof counters, cudaMemcpyDeviceToHost));
    std::vector<uint32_t> unsettled(2 * all);
    std::vector<int32_t> repairs(2 * all);
    CHECK(cudaMemcpy(unsettled.data(), static_cast<char*>(workspace) + 256, all * 8, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(repairs.data(), static_cast<char*>(workspace) + 256 + (all * 8 + 255) / 256 * 256,
                     all * 8, cudaMemcpyDeviceToHost));
    int64_t repaired = 0;
    for (int i = 0; i < counters[1]; ++i) repaired += __builtin_popcount(unsettled[repairs[i]]);
    std::printf(
        " | by slabs %.1f ms, fused %.3f ms (min %.3f, max %.3f), repaired %lld rows in %d, workspace %.0f "
        "MiB",
        slab_ms, times[times.size() / 2], times.front(), times.back(), static_cast<long long>(repaired),
        counters[1], static_cast<double>(bytes) / 1048576.0);
  }
  std::printf("\n");
  if (x.attend) good = attend_case<T>(x, c, s) && good;
  std::fflush(stdout);
  for (void* p : {static_cast<void*>(q), static_cast<void*>(k), static_cast<void*>(s.threshold),
                  static_cast<void*>(s.tie_index), static_cast<void*>(s.bitmap), workspace,
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
    for (int dim : {128, 64, 40}) {
      Case x;
      x.name = std::string(kDataNames[data]) + " D" + std::to_string(dim) + " S 1,100 W 33";
      x.data = static_cast<Data>(data);
      x.dim = dim;
      x.dtype = dim != 128 ? DType::kFloat16 : DType::kBFloat16;
      x.tq = x.tk = 1100;
      x.budget = topk(33);
      x.attend = data <= kDuplicated;  // a reference with NaN would prove nothing
      add(x);
      x.attend = false;
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
  x.attend = true;
  x.name = "Tq 100 Tk 900, MHA, B2";
  x.batch = 2, x.heads = x.kv_heads = 3, x.tq = 100, x.tk = 900, x.budget = topk(50);
  add(x);
  x.name = "Tq 900 Tk 300 (rows that see nothing), MQA";
  x.heads = 5, x.kv_heads = 1, x.tq = 900, x.tk = 300, x.budget = topk(20);
  add(x);
  x.name = "not causal, B3, Tq 130 Tk 2,000, 5 %";
  x.batch = 3, x.tq = 130, x.tk = 2000, x.causal = false, x.budget = ratio(0.05);
  add(x);
  x.attend = false;
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
  x.attend = true;
  x.name = "one key of scores about 10^7";
  x.tq = 300, x.tk = 900, x.budget = topk(1), x.gain = 1024.0f;
  add(x);
  x = Case{};
  x.attend = true;
  x.name = "packed documents, H6 Hkv2 D64";
  x.documents = {1, 300, 0, 64, 65, 2000, 5, 128, 0, 777};
  x.heads = 6, x.kv_heads = 2, x.dim = 64, x.budget = ratio(0.05);
  add(x);
  x.name = "packed documents, MHA D128";
  x.heads = x.kv_heads = 2, x.dim = 128, x.budget = topk(40);
  add(x);
  std::printf("%d cases failed\n", bad);
  return bad != 0;
}

// A few small cases of every kernel, for compute-sanitizer.
int check_little() {
  int bad = 0;
  Case x;
  x.data = kDuplicated;
  x.attend = true;
  x.name = "little: duplicated, S 700 W 33";
  x.tq = x.tk = 700, x.budget = topk(33);
  bad += !run(x);
  x.attend = false;
  x.name = "little: NaN, fp16, D64, packed";
  x.data = kNaN, x.dim = 64, x.dtype = DType::kFloat16;
  x.documents = {1, 200, 0, 65};
  bad += !run(x);
  return bad;
}

int time_all(int s, int w, bool attend) {
  int bad = 0;
  for (Data data : {kRandom, kRealLike}) {
    Case x;
    x.name = std::string(kDataNames[data]) + " S " + std::to_string(s) + " W " +
             (w > 0 ? std::to_string(w) : "1 %");
    x.data = data;
    x.heads = 32, x.kv_heads = 8, x.tq = x.tk = s;
    x.budget = w > 0 ? topk(w) : ratio(0.01);
    x.check_tiles = 16;
    x.timed = 5;
    x.attend = attend;
    bad += !run(x);
  }
  return bad;
}

}  // namespace

int main(int argc, char** argv) {
  for (const char* what : {"time", "select"}) {
    if (argc > 3 && std::strcmp(argv[1], what) == 0)
      return time_all(std::atoi(argv[2]), std::atoi(argv[3]), what[0] == 't');
  }
  if (argc > 1 && std::strcmp(argv[1], "little") == 0) return check_little();
  return check();
}
