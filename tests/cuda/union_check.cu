// Check of the attention kernels over gathered unions (csrc/kernels/cuda/sm90/union.h) on an sm_90a GPU.
//
//   union_check [quick] [repeat] [time] [time-random] [heads-first]
//
// quick: small shapes with every feature (dtypes, head dims, GQA, packed documents, strided views, sinks and
// recent keys, ties, mixed regimes), each compared with a float64 reference on sampled rows and keys and with
// exact counts of the kept pairs on all rows. Every case also runs the deterministic dK and dV: 20 times
// (repeat: 1,000 times at S = 8,192) beside a competing stream, bit for bit. time, time-random: S = 32,768
// (8,192) at 32 heads, checked on samples and timed. Without arguments: quick, repeat and time. Exit status 0
// iff everything agrees.
//
// Selections come from a brute force here: a slab of mma.sync scores and one radix selection per row.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/sm90/union.h"
#include "union_deterministic.cuh"
#include "union_reference.cuh"

using namespace topk_attn;
using namespace topk_attn::cuda;
using namespace topk_attn::cuda::reference;

namespace {

void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::printf("CUDA error '%s' at line %d\n", cudaGetErrorString(error), line);
  std::exit(2);
}
#define CHECK(x) check((x), __LINE__)

template <typename T>
T* device_array(size_t n) {
  T* p = nullptr;
  CHECK(cudaMalloc(&p, std::max<size_t>(n, 1) * sizeof(T)));
  CHECK(cudaMemset(p, 0, std::max<size_t>(n, 1) * sizeof(T)));
  return p;
}
template <typename T>
std::vector<T> to_host(const T* p, size_t n) {
  std::vector<T> v(n);
  CHECK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
  return v;
}
template <typename T>
T* to_device(const std::vector<T>& v) {
  T* p = device_array<T>(v.size());
  CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

// ---------------------------------------------------------------------------------------------------------------
// One case
// ---------------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  DType dtype = DType::kBFloat16;
  int dim = 128;
  int heads = 4;
  int kv_heads = 1;
  int batch = 1;
  int tq = 1037;
  int tk = 1037;
  bool causal = true;
  Budget budget;
  int sink = 0;
  int recent = 0;
  Data data = Data::kRandom;
  bool mixed = false;        // only about half of the tiles gathered
  bool heads_first = false;  // (B, H, T, D) in memory
  bool strided = false;      // q, k, v are slices of one tensor (B, T, H + 2 Hkv, D)
  std::vector<int> documents = {};
  bool timed = false;
  bool special = false;  // a key with an infinite channel, a NaN query: out and lse only
  int repeats = 20;      // of the deterministic backward
};

struct Median {
  std::vector<float> values;
  float get() {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  }
};
template <typename Function>
float time_ms(Function run, cudaStream_t stream = nullptr) {
  cudaEvent_t a;
  cudaEvent_t b;
  CHECK(cudaEventCreate(&a));
  CHECK(cudaEventCreate(&b));
  Median median;
  run();
  for (int i = 0; i < 9; ++i) {
    CHECK(cudaEventRecord(a, stream));
    run();
    CHECK(cudaEventRecord(b, stream));
    CHECK(cudaEventSynchronize(b));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, a, b));
    median.values.push_back(ms);
  }
  return median.get();
}

// ---------------------------------------------------------------------------------------------------------------
// Deterministic dK and dV
// ---------------------------------------------------------------------------------------------------------------

// Two sums of dK and dV, their workspace and what they become.
struct Gradients {
  float* dk_sum;
  float* dv_sum;
  void* workspace;
  View dk;
  View dv;
};

// The deterministic backward of a case, whose float sums are in backward.dk_sum and dv_sum. Leaves the
// decoded sums in `dk` and `dv`.
template <typename T>
bool check_deterministic(const BackwardCall& backward, int repeats, bool timed, float* dk, float* dv) {
  const Call& call = backward.call;
  const int dim = call.head_dim;
  const int64_t k_rows = int64_t{call.cu_q == nullptr ? call.batch : 1} * call.tk * call.kv_heads;
  const int64_t n = k_rows * dim;
  const int64_t q_words = int64_t{call.cu_q == nullptr ? call.batch : 1} * call.tq * call.heads * dim / 2;
  std::vector<void*> owned;
  const auto keep = [&owned](auto* p) {
    owned.push_back(p);
    return p;
  };
  const auto new_gradients = [&] {
    const auto rows = [&] {
      return View{keep(device_array<T>(n)), int64_t{call.tk} * call.kv_heads * dim,
                  int64_t{call.kv_heads} * dim, dim};
    };
    return Gradients{keep(device_array<float>(n)), keep(device_array<float>(n)),
                     keep(device_array<char>(sm90::union_workspace(call))), rows(), rows()};
  };
  const Gradients first = new_gradients();
  const Gradients again = new_gradients();
  float* const base = keep(device_array<float>(n));
  uint32_t* const first_dq = keep(device_array<uint32_t>(q_words));
  int* const failures = keep(device_array<int>(kFailures));
  const int64_t traffic_size = int64_t{1} << 24;
  float* const traffic = keep(device_array<float>(traffic_size));
  cudaStream_t stream;
  cudaStream_t other;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  fill_base<<<512, 256>>>(base, dim, n);
  CHECK(cudaDeviceSynchronize());

  const auto run = [&](const Gradients& g, bool on_base) {
    BackwardCall b = backward;
    b.dk_sum = g.dk_sum;
    b.dv_sum = g.dv_sum;
    b.dk = g.dk;
    b.dv = g.dv;
    CHECK(sm90::backward_union_dq(b, stream, g.workspace));
    for (float* sums : {g.dk_sum, g.dv_sum}) {
      if (on_base) {
        CHECK(cudaMemcpyAsync(sums, base, n * 4, cudaMemcpyDeviceToDevice, stream));
      } else {
        CHECK(cudaMemsetAsync(sums, 0, n * 4, stream));
      }
    }
    CHECK(sm90::backward_union_dkv(b, stream, g.workspace));
    CHECK(sm90::finish_union_gradients(b, g.workspace, stream));
  };
  const auto differ = [&](const void* a, const void* b, int64_t words, Failure kind) {
    count_differences<<<256, 256, 0, stream>>>(static_cast<const uint32_t*>(a),
                                               static_cast<const uint32_t*>(b), words, failures + kind);
  };
  const auto decode_both = [&](const Gradients& g) {
    const float2* const steps = static_cast<const float2*>(g.workspace);
    decode<<<512, 256, 0, stream>>>(g.dk_sum, steps, 1, dim, n, dk);
    decode<<<512, 256, 0, stream>>>(g.dv_sum, steps, 0, dim, n, dv);
  };

  // Runs, bit for bit, while the other stream takes multiprocessors and L2 away.
  run(first, false);
  CHECK(cudaMemcpyAsync(first_dq, backward.dq.data, q_words * 4, cudaMemcpyDeviceToDevice, stream));
  for (int i = 0; i < repeats; ++i) {
    const int64_t size = traffic_size >> (i % 5);
    fill<<<1 + i * 37 % 300, 256, 0, other>>>(traffic, static_cast<float>(i), size);
    run(again, false);
    differ(first.dk_sum, again.dk_sum, n, kRuns);
    differ(first.dv_sum, again.dv_sum, n, kRuns);
    differ(first.workspace, again.workspace, 3 * k_rows, kRuns);
    differ(first.dk.data, again.dk.data, n / 2, kRuns);
    differ(first.dv.data, again.dv.data, n / 2, kRuns);
    differ(first_dq, backward.dq.data, q_words, kRuns);
    if (i % 16 == 15) CHECK(cudaStreamSynchronize(other));
  }
  CHECK(cudaStreamSynchronize(stream));
  // The float sums do differ between runs, or this shows nothing.
  BackwardCall floats = backward;
  floats.dk_sum = again.dk_sum;
  floats.dv_sum = again.dv_sum;
  CHECK(cudaMemsetAsync(again.dk_sum, 0, n * 4, stream));
  CHECK(cudaMemsetAsync(again.dv_sum, 0, n * 4, stream));
  CHECK(sm90::backward_union_dkv(floats, stream));
  differ(backward.dk_sum, again.dk_sum, n, kFloatRuns);

  decode_both(first);
  compare_forms<<<512, 256, 0, stream>>>(dk, backward.dk_sum, static_cast<const T*>(first.dk.data), dim, n,
                                         failures);
  compare_forms<<<512, 256, 0, stream>>>(dv, backward.dv_sum, static_cast<const T*>(first.dv.data), dim, n,
                                         failures);
  run(again, true);
  const float2* const steps = static_cast<const float2*>(again.workspace);
  compare_base<<<512, 256, 0, stream>>>(again.dk_sum, steps, base, dk, 1, dim, n, failures);
  compare_base<<<512, 256, 0, stream>>>(again.dv_sum, steps, base, dv, 0, dim, n, failures);
  CHECK(cudaDeviceSynchronize());
  const std::vector<int> counts = to_host(failures, kFailures);
  std::printf(
      "  deterministic: %d runs, %d words differ (one float run: %d); not zero %d, not marked %d, conversion "
      "%d, on a base %d\n",
      repeats, counts[kRuns], counts[kFloatRuns], counts[kZeros], counts[kNonFinite], counts[kFinished],
      counts[kBase]);

  if (timed) {
    // Whole, the clearing of the sums included. The converting kernel of the other build is
    // common/delta.cu's.
    const auto timed_stream = [&](auto work) { return time_ms([&] { work(); }, stream); };
    const float whole = timed_stream([&] { run(again, false); });
    const float dq = timed_stream([&] { CHECK(sm90::backward_union_dq(backward, stream, again.workspace)); });
    BackwardCall b = backward;
    b.dk_sum = again.dk_sum;
    b.dv_sum = again.dv_sum;
    b.dk = again.dk;
    b.dv = again.dv;
    const float float_whole = timed_stream([&] {
      CHECK(sm90::backward_union_dq(b, stream));
      CHECK(cudaMemsetAsync(b.dk_sum, 0, n * 4, stream));
      CHECK(cudaMemsetAsync(b.dv_sum, 0, n * 4, stream));
      CHECK(sm90::backward_union_dkv(b, stream));
      CHECK(finish_gradients(call, b.dk_sum, b.dv_sum, b.dk, b.dv, stream));
    });
    std::printf("  dq, dkv, conversion: %.3f ms, deterministic %.3f ms (dq %.3f), ratio %.3f\n", float_whole,
                whole, dq, whole / float_whole);
  }
  for (void* p : owned) CHECK(cudaFree(p));
  CHECK(cudaStreamDestroy(stream));
  CHECK(cudaStreamDestroy(other));
  return counts[kRuns] + counts[kZeros] + counts[kNonFinite] + counts[kFinished] + counts[kBase] == 0;
}

template <typename T>
bool run_case(const Case& c) {
  std::vector<void*> owned;
  const auto keep = [&owned](auto* p) {
    owned.push_back(p);
    return p;
  };
  // Shapes and views.
  Call call;
  call.dtype = c.dtype;
  call.heads = c.heads;
  call.kv_heads = c.kv_heads;
  call.head_dim = call.v_dim = c.dim;
  call.batch = c.batch;
  call.tq = c.tq;
  call.tk = c.tk;
  call.causal = c.causal;
  call.budget = c.budget;
  call.sink = c.sink;
  call.recent = c.recent;
  call.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
  std::vector<int2> tiles;
  int sequences = c.batch;
  if (!c.documents.empty()) {
    std::vector<int> cu = {0};
    for (int n : c.documents) {
      for (int row = 0; row < n; row += kTileRows)
        tiles.push_back(int2{static_cast<int>(cu.size()) - 1, row});
      cu.push_back(cu.back() + n);
    }
    tiles.push_back(int2{-1, 0});
    call.tq = call.tk = cu.back();
    call.max_q = call.max_k = *std::max_element(c.documents.begin(), c.documents.end());
    call.batch = sequences = static_cast<int>(c.documents.size());
    call.cu_q = call.cu_k = keep(to_device(cu));
    call.tiles = keep(to_device(tiles));
    call.num_tiles = static_cast<int>(tiles.size());
  } else {
    call.max_q = call.tq;
    call.max_k = call.tk;
    call.num_tiles = call.batch * ((call.tq + 63) / 64);
  }
  const int batches = c.documents.empty() ? c.batch : 1;
  const int64_t q_rows = int64_t{batches} * call.tq;
  const int64_t k_rows = int64_t{batches} * call.tk;
  call.rows = c.documents.empty() ? RowLayout{int64_t{c.heads} * call.tq, call.tq} : RowLayout{0, call.tq};
  const auto contiguous = [&](int64_t tokens, int heads) {
    T* base = keep(device_array<T>(tokens * batches * heads * c.dim));
    if (c.heads_first) return View{base, tokens * heads * c.dim, c.dim, tokens * c.dim};
    return View{base, tokens * heads * c.dim, int64_t{heads} * c.dim, c.dim};
  };
  if (c.strided) {
    const int64_t token = int64_t{c.heads + 2 * c.kv_heads} * c.dim;
    T* base = keep(device_array<T>(q_rows * token));
    call.q = View{base, call.tq * token, token, c.dim};
    call.k = View{base + int64_t{c.heads} * c.dim, call.tq * token, token, c.dim};
    call.v = View{base + int64_t{c.heads + c.kv_heads} * c.dim, call.tq * token, token, c.dim};
  } else {
    call.q = contiguous(call.tq, c.heads);
    call.k = contiguous(call.tk, c.kv_heads);
    call.v = contiguous(call.tk, c.kv_heads);
  }
  const View out = contiguous(call.tq, c.heads);
  const View dq = contiguous(call.tq, c.heads);
  const View dout = contiguous(call.tq, c.heads);
  const auto generate = [&](const View& v, int tokens, int heads, uint32_t seed, float share, float length,
                            bool tied) {
    const int n = batches * heads * c.dim;
    make_data<T><<<(n + 127) / 128, 128>>>(v, batches, tokens, heads, c.dim, seed, share, length, tied);
    CHECK(cudaGetLastError());
  };
  const bool real = c.data == Data::kRealLike;
  const float q_noise = 0.35f * 0.35f;
  generate(call.q, call.tq, c.heads, 11, real ? 1.0f / (1.0f + q_noise) : 0.0f, 400.0f, false);
  generate(call.k, call.tk, c.kv_heads, 22, real ? 0.8f : 0.0f, 50.0f, c.data == Data::kTied);
  generate(call.v, call.tk, c.kv_heads, 33, 0.0f, 0.0f, false);
  generate(dout, call.tq, c.heads, 44, 0.0f, 0.0f, false);

  if (c.special) {
    const uint16_t infinity = c.dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
    const uint16_t nan = 0x7fff;
    CHECK(cudaMemcpy(static_cast<uint16_t*>(call.k.data) + 5 * call.k.token + 3, &infinity, 2,
                     cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(static_cast<uint16_t*>(call.q.data) + 700 * call.q.token + 1, &nan, 2,
                     cudaMemcpyHostToDevice));
  }

  // Selection.
  const int64_t row_values = int64_t{c.heads} * q_rows;
  const int64_t entries = int64_t{c.heads} * call.num_tiles;
  const int64_t words = bitmap_words(call);
  Selection selection;
  selection.threshold = keep(device_array<float>(row_values));
  selection.tie_index = keep(device_array<int32_t>(row_values));
  selection.bitmap = keep(device_array<uint32_t>(entries * words));
  int32_t* union_size = keep(device_array<int32_t>(entries));
  const int64_t ld = (int64_t{call.max_k} + 63) / 64 * 64;
  const int units = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(call.num_tiles, (int64_t{1} << 27) / (ld * 64))));
  float* slab = keep(device_array<float>(units * 64 * ld));
  for (int head = 0; head < c.heads; ++head) {
    for (int first = 0; first < call.num_tiles; first += units) {
      const unsigned n = static_cast<unsigned>(std::min(units, call.num_tiles - first));
      slab_scores<T><<<dim3(static_cast<unsigned>(ld / 64), n), 128>>>(call, head, first, slab, ld);
      slab_select<<<n * 64, 256>>>(call, head, first, slab, ld, selection, words);
      CHECK(cudaGetLastError());
    }
  }
  CHECK(count_union(call, selection.bitmap, union_size, nullptr));
  CHECK(cudaDeviceSynchronize());

  // Host's view of the tiles.
  const std::vector<int32_t> sizes = to_host(union_size, entries);
  struct HostTile {
    int sequence, q_begin, tq, tk, row0, rows, seen;
  };
  std::vector<HostTile> host(call.num_tiles);
  {
    int begin = 0;
    for (int i = 0; i < call.num_tiles; ++i) {
      HostTile& t = host[i];
      if (c.documents.empty()) {
        const int per = (call.tq + 63) / 64;
        t = HostTile{i / per, 0, call.tq, call.tk, i % per * 64, 0, 0};
      } else if (tiles[i].x < 0) {
        t = HostTile{-1, 0, 0, 0, 0, 0, 0};
      } else {
        begin = 0;
        for (int d = 0; d < tiles[i].x; ++d) begin += c.documents[d];
        t = HostTile{tiles[i].x, begin, c.documents[tiles[i].x], c.documents[tiles[i].x], tiles[i].y, 0, 0};
      }
      t.rows = std::max(0, std::min(kTileRows, t.tq - t.row0));
      t.seen = t.rows == 0 ? 0 : static_cast<int>(visible(t.row0 + t.rows - 1, t.tq, t.tk, c.causal).end);
    }
  }
  bool good = true;
  const auto fail = [&](const char* what, double value) {
    std::printf("  FAILED %s: %g\n", what, value);
    good = false;
  };
  double union_sum = 0;
  double seen_sum = 0;
  std::vector<double> shares;
  for (int64_t e = 0; e < entries; ++e) {
    const HostTile& t = host[e % call.num_tiles];
    union_sum += sizes[e];
    seen_sum += t.seen;
    if (t.seen > 0) shares.push_back(static_cast<double>(sizes[e]) / t.seen);
  }
  if (!c.timed) {
    const std::vector<uint32_t> bits = to_host(selection.bitmap, entries * words);
    for (int64_t e = 0; e < entries; ++e) {
      int n = 0;
      for (int64_t w = 0; w < words; ++w) n += __builtin_popcount(bits[e * words + w]);
      if (n != sizes[e]) fail("union size", n - sizes[e]);
    }
  }
  Regimes regimes{union_size, 2.0f};
  if (c.mixed) {
    std::sort(shares.begin(), shares.end());
    regimes.largest_share = static_cast<float>(shares[shares.size() / 2]);
  }
  const auto is_gathered = [&](int64_t e) {
    return host[e % call.num_tiles].rows > 0 &&
           sizes[e] <= regimes.largest_share * host[e % call.num_tiles].seen;
  };

  // The kernels; what they must not touch holds a sentinel.
  float* lse = keep(device_array<float>(row_values));
  float* delta = keep(device_array<float>(row_values));
  float* dk_sum = keep(device_array<float>(k_rows * c.kv_heads * c.dim));
  float* dv_sum = keep(device_array<float>(k_rows * c.kv_heads * c.dim));
  const int64_t sum_bytes = k_rows * c.kv_heads * c.dim * 4;
  constexpr uint16_t kSentinel = 0x3b3b;
  fill<<<512, 256>>>(static_cast<uint16_t*>(out.data), kSentinel, q_rows * c.heads * c.dim);
  fill<<<512, 256>>>(static_cast<uint16_t*>(dq.data), kSentinel, q_rows * c.heads * c.dim);
  fill<<<512, 256>>>(lse, 123.0f, row_values);
  ForwardCall forward{call, selection.threshold, selection.tie_index, selection.bitmap, regimes, out, lse};
  BackwardCall backward{};
  backward.call = call;
  backward.threshold = selection.threshold;
  backward.tie_index = selection.tie_index;
  backward.bitmap = selection.bitmap;
  backward.regimes = regimes;
  backward.lse = lse;
  backward.delta = delta;
  backward.dout = dout;
  backward.dq = dq;
  backward.dk_sum = dk_sum;
  backward.dv_sum = dv_sum;
  if (!sm90::supports_union(call)) fail("supports_union", 0);
  CHECK(sm90::forward_union(forward, nullptr));
  CHECK(cudaDeviceSynchronize());
  row_delta<T><<<static_cast<unsigned>((entries * 64 + 127) / 128), 128>>>(backward, out, delta);
  CHECK(cudaGetLastError());
  CHECK(sm90::backward_union_dq(backward, nullptr));
  CHECK(cudaDeviceSynchronize());
  CHECK(sm90::backward_union_dkv(backward, nullptr));
  CHECK(cudaDeviceSynchronize());

  // Samples.
  uint32_t random = 12345;
  const auto next = [&random](int n) {
    random = random * 1664525u + 1013904223u;
    return static_cast<int>((random >> 8) % static_cast<uint32_t>(n));
  };
  std::vector<Sample> row_samples;
  std::vector<Sample> key_samples;
  if (c.special) row_samples.push_back(Sample{0, 700 / kTileRows, 700, 0});
  for (int tries = 0; tries < 100000 && row_samples.size() < 96; ++tries) {
    const int head = next(c.heads);
    const int tile = next(call.num_tiles);
    if (!is_gathered(int64_t{head} * call.num_tiles + tile)) continue;
    row_samples.push_back(Sample{head, tile, host[tile].row0 + next(host[tile].rows), host[tile].sequence});
  }
  for (int tries = 0; tries < 100000 && key_samples.size() < 48; ++tries) {
    const int sequence = next(sequences);
    const int tk = c.documents.empty() ? call.tk : c.documents[sequence];
    if (tk > 0) key_samples.push_back(Sample{next(c.kv_heads), 0, next(tk), sequence});
  }
  const size_t nr = row_samples.size();
  const size_t nk = key_samples.size();
  const Sample* device_rows = keep(to_device(row_samples));
  const Sample* device_keys = keep(to_device(key_samples));
  double* row_scratch = keep(device_array<double>(nr * 2 * call.max_k));
  float* key_scratch = keep(device_array<float>(nk * 2 * (c.heads / c.kv_heads) * call.num_tiles * 64));
  double* ref_out = keep(device_array<double>(nr * c.dim));
  double* ref_lse = keep(device_array<double>(nr));
  double* ref_dq = keep(device_array<double>(nr * c.dim));
  double* ref_dq_size = keep(device_array<double>(nr * c.dim));
  double* ref_dk = keep(device_array<double>(nk * c.dim));
  double* ref_dv = keep(device_array<double>(nk * c.dim));
  reference_rows<T><<<static_cast<unsigned>(nr), 128>>>(backward, device_rows, row_scratch, ref_out, ref_lse,
                                                        ref_dq, ref_dq_size);
  CHECK(cudaGetLastError());
  reference_keys<T><<<static_cast<unsigned>(nk), 128>>>(backward, device_keys, key_scratch, ref_dk, ref_dv);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());

  const auto value = [](T x) {
    if constexpr (std::is_same_v<T, __half>) {
      return static_cast<double>(__half2float(x));
    } else {
      return static_cast<double>(__bfloat162float(x));
    }
  };
  // Largest error of a vector relative to the length of `size`: of the reference itself, or of the sum of its
  // terms' absolute values where they cancel (at least a tenth of the mean length).
  const auto compare = [&](const char* what, const std::vector<double>& reference,
                           const std::vector<double>& size, const std::vector<double>& got, double limit) {
    const size_t n = reference.size() / c.dim;
    double mean = 0;
    std::vector<double> length(n);
    for (size_t i = 0; i < n; ++i) {
      for (int x = 0; x < c.dim; ++x) length[i] += size[i * c.dim + x] * size[i * c.dim + x];
      length[i] = std::isnan(length[i]) ? 0.0 : std::sqrt(length[i]);
      mean += length[i] / static_cast<double>(n);
    }
    double worst = 0;
    double square = 0;
    for (size_t i = 0; i < n; ++i) {
      double error = 0;
      for (int x = 0; x < c.dim; ++x) {
        const double d = got[i * c.dim + x] - reference[i * c.dim + x];
        if (std::isnan(got[i * c.dim + x]) && std::isnan(reference[i * c.dim + x])) continue;
        error += d * d;
      }
      error = std::sqrt(error) / std::max(std::max(length[i], 0.1 * mean), 1e-30);
      if (length[i] == 0 && error == 0) continue;
      if (std::isnan(error)) error = 1e30;
      worst = std::max(worst, error);
      square += error * error / static_cast<double>(n);
    }
    std::printf("  %-4s rms %.1e worst %.1e", what, std::sqrt(square), worst);
    if (worst > limit) fail(what, worst);
  };
  const auto gather_rows = [&](const View& v) {
    const std::vector<T> all = to_host(static_cast<const T*>(v.data), q_rows * c.heads * c.dim);
    std::vector<double> got;
    for (const Sample& s : row_samples) {
      const int64_t b = c.documents.empty() ? s.sequence : 0;
      const T* row = all.data() + b * v.batch + (host[s.tile].q_begin + s.index) * v.token + s.head * v.head;
      for (int x = 0; x < c.dim; ++x) got.push_back(value(row[x]));
    }
    return got;
  };
  const auto gather_keys = [&](const float* sums) {
    std::vector<double> got;
    for (const Sample& s : key_samples) {
      int64_t token = s.index;
      if (c.documents.empty()) {
        token += int64_t{s.sequence} * call.tk;
      } else {
        for (int d = 0; d < s.sequence; ++d) token += c.documents[d];
      }
      const std::vector<float> row = to_host(sums + (token * c.kv_heads + s.head) * c.dim, c.dim);
      got.insert(got.end(), row.begin(), row.end());
    }
    return got;
  };
  std::printf("%s: union share %.3f, %zu rows, %zu keys\n", c.name, union_sum / std::max(seen_sum, 1.0), nr,
              nk);
  compare("out", to_host(ref_out, nr * c.dim), to_host(ref_out, nr * c.dim), gather_rows(out), 8e-3);
  if (!c.special) {
    compare("dq", to_host(ref_dq, nr * c.dim), to_host(ref_dq_size, nr * c.dim), gather_rows(dq), 2e-2);
    compare("dk", to_host(ref_dk, nk * c.dim), to_host(ref_dk, nk * c.dim), gather_keys(dk_sum), 1e-2);
    compare("dv", to_host(ref_dv, nk * c.dim), to_host(ref_dv, nk * c.dim), gather_keys(dv_sum), 1e-2);
  }
  float* fixed_dk = keep(device_array<float>(k_rows * c.kv_heads * c.dim));
  float* fixed_dv = keep(device_array<float>(k_rows * c.kv_heads * c.dim));
  if (!check_deterministic<T>(backward, c.repeats, c.timed, fixed_dk, fixed_dv)) fail("deterministic", 1);
  if (!c.special) {
    const auto same = [&](const char* what, const double* reference, const float* fixed) {
      compare(what, to_host(reference, nk * c.dim), to_host(reference, nk * c.dim), gather_keys(fixed), 1e-2);
    };
    same("dk'", ref_dk, fixed_dk);
    same("dv'", ref_dv, fixed_dv);
    // Apart from the order of additions and the steps both variants add the same numbers.
    const auto near = [&](const char* what, const float* sums, const float* fixed) {
      const std::vector<double> floats = gather_keys(sums);
      compare(what, floats, floats, gather_keys(fixed), 1e-4);
    };
    near("dk'-", dk_sum, fixed_dk);
    near("dv'-", dv_sum, fixed_dv);
  }
  {
    const std::vector<double> reference = to_host(ref_lse, nr);
    const std::vector<float> all = to_host(lse, row_values);
    double worst = 0;
    for (size_t i = 0; i < nr; ++i) {
      const Sample& s = row_samples[i];
      const int64_t b = c.documents.empty() ? s.sequence : 0;
      const double got = all[b * call.rows.batch + s.head * call.rows.head + host[s.tile].q_begin + s.index];
      if (got == reference[i] || (std::isnan(got) && std::isnan(reference[i])))
        continue;  // both -inf, both NaN
      worst = std::max(worst, std::isnan(got) ? 1e30 : std::abs(got - reference[i]));
    }
    std::printf("  lse %.1e\n", worst);
    if (worst > 1e-4) fail("lse", worst);
  }

  // Rows of the other regime are untouched, rows of this one are written.
  {
    const std::vector<uint16_t> o = to_host(static_cast<const uint16_t*>(out.data), q_rows * c.heads * c.dim);
    const std::vector<uint16_t> g = to_host(static_cast<const uint16_t*>(dq.data), q_rows * c.heads * c.dim);
    const std::vector<float> l = to_host(lse, row_values);
    int64_t wrong = 0;
    for (int64_t e = 0; e < entries; ++e) {
      const HostTile& t = host[e % call.num_tiles];
      const int64_t head = e / call.num_tiles;
      const int64_t b = c.documents.empty() ? t.sequence : 0;
      for (int r = 0; r < t.rows; ++r) {
        const int64_t token = t.q_begin + t.row0 + r;
        const int64_t at = b * out.batch + token * out.token + head * out.head;
        const bool written = l[b * call.rows.batch + head * call.rows.head + token] != 123.0f;
        int sentinels = 0;
        for (int x = 0; x < c.dim; ++x) sentinels += (o[at + x] == kSentinel) + (g[at + x] == kSentinel);
        wrong +=
            written != is_gathered(e) || (is_gathered(e) ? sentinels > c.dim / 4 : sentinels != 2 * c.dim);
      }
    }
    if (wrong > 0) fail("rows written or left alone", static_cast<double>(wrong));
  }

  // Kept pairs, counted on all rows. Forward: at a tiny scale exp(lse) is the number of kept keys. Backward:
  // with lse = 0 and dO = 1, dV of a key is the number of rows that keep it.
  if (!c.special) {
    ForwardCall counting = forward;
    counting.call.softmax_scale = 1e-12f;
    CHECK(sm90::forward_union(counting, nullptr));
    const std::vector<float> l = to_host(lse, row_values);
    double wrong = 0;
    double pairs = 0;
    for (int64_t e = 0; e < entries; ++e) {
      const HostTile& t = host[e % call.num_tiles];
      if (!is_gathered(e)) continue;
      const int64_t b = c.documents.empty() ? t.sequence : 0;
      for (int r = 0; r < t.rows; ++r) {
        const int64_t kept = budget(visible(t.row0 + r, t.tq, t.tk, c.causal).size(), c.budget);
        const float got =
            l[b * call.rows.batch + e / call.num_tiles * call.rows.head + t.q_begin + t.row0 + r];
        pairs += static_cast<double>(kept);
        wrong += kept == 0 ? got != -INFINITY
                           : std::abs(std::exp(static_cast<double>(got)) / kept - 1.0) * kept > 0.2;
      }
    }
    if (wrong > 0) fail("rows with a wrong number of kept keys", wrong);
    BackwardCall count_back = backward;
    count_back.call.softmax_scale = 1e-12f;
    CHECK(cudaMemset(lse, 0, row_values * 4));
    T one;
    if constexpr (std::is_same_v<T, __half>) {
      one = __float2half(1.0f);
    } else {
      one = __float2bfloat16(1.0f);
    }
    T* ones = keep(device_array<T>(c.dim));
    fill<<<1, 256>>>(ones, one, c.dim);
    count_back.dout = View{ones, 0, 0, 0};
    CHECK(cudaMemset(dv_sum, 0, sum_bytes));
    CHECK(sm90::backward_union_dkv(count_back, nullptr));
    const std::vector<float> v = to_host(dv_sum, k_rows * c.kv_heads * c.dim);
    double counted = 0;
    for (size_t i = 0; i < v.size(); i += c.dim) counted += v[i];
    if (counted != pairs) fail("kept pairs of the backward, off by", counted - pairs);
  }

  if (c.timed) {
    CHECK(sm90::forward_union(forward, nullptr));
    std::printf("  count %.3f ms",
                time_ms([&] { CHECK(count_union(call, selection.bitmap, union_size, nullptr)); }));
    std::printf("  forward %.3f ms", time_ms([&] { CHECK(sm90::forward_union(forward, nullptr)); }));
    std::printf("  dq %.3f ms", time_ms([&] { CHECK(sm90::backward_union_dq(backward, nullptr)); }));
    std::printf("  dkv %.3f ms\n", time_ms([&] { CHECK(sm90::backward_union_dkv(backward, nullptr)); }));
  }
  for (void* p : owned) CHECK(cudaFree(p));
  std::printf("  %s\n", good ? "ok" : "FAILED");
  std::fflush(stdout);
  return good;
}

bool run(const Case& c) {
  return c.dtype == DType::kFloat16 ? run_case<__half>(c) : run_case<__nv_bfloat16>(c);
}

Budget keep_ratio(double ratio) {
  Budget b;
  b.ratio = ratio;
  return b;
}
Budget keep_topk(int64_t topk) {
  Budget b;
  b.topk = topk;
  return b;
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = argc < 2;
  bool repeat = argc < 2;
  bool timed = argc < 2;
  bool timed_random = false;
  bool heads_first = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    quick |= word == "quick";
    repeat |= word == "repeat";
    timed |= word == "time";
    timed_random |= word == "time-random";
    heads_first |= word == "heads-first";
  }
  bool good = true;
  if (quick) {
    const DType half = DType::kFloat16;
    const std::vector<Case> cases = {
        {.name = "bf16 D128 GQA4 S1037 5%", .budget = keep_ratio(0.05)},
        {.name = "bf16 D128 GQA1 S1037 1%", .heads = 2, .kv_heads = 2, .budget = keep_ratio(0.01)},
        {.name = "fp16 D64 GQA1 S1037 tied, W = 50",
         .dtype = half,
         .dim = 64,
         .heads = 3,
         .kv_heads = 3,
         .budget = keep_topk(50),
         .data = Data::kTied},
        {.name = "bf16 D64 GQA4 packed 5%",
         .dim = 64,
         .budget = keep_ratio(0.05),
         .documents = {1, 64, 65, 500, 0, 130, 1037}},
        {.name = "bf16 D128 GQA4 packed, mixed regimes",
         .budget = keep_ratio(0.05),
         .data = Data::kRealLike,
         .mixed = true,
         .documents = {700, 1, 200, 64, 1500, 129}},
        {.name = "fp16 D128 full 300 x 1500, batch 2, sink 4, recent 8",
         .dtype = half,
         .batch = 2,
         .tq = 300,
         .tk = 1500,
         .causal = false,
         .budget = keep_topk(40),
         .sink = 4,
         .recent = 8},
        {.name = "bf16 D64 causal 300 x 1500, sink and recent fill W",
         .dim = 64,
         .tq = 300,
         .tk = 1500,
         .budget = keep_topk(12),
         .sink = 4,
         .recent = 8},
        {.name = "bf16 D128 causal 900 x 700, W = all", .tq = 900, .tk = 700, .budget = keep_ratio(1.0)},
        {.name = "bf16 D128 causal, strided, batch 2",
         .heads = 8,
         .kv_heads = 2,
         .batch = 2,
         .tq = 513,
         .tk = 513,
         .budget = keep_ratio(0.1),
         .strided = true},
        {.name = "fp16 D64 heads first, batch 3, 257 x 600",
         .dtype = half,
         .dim = 64,
         .heads = 4,
         .kv_heads = 2,
         .batch = 3,
         .tq = 257,
         .tk = 600,
         .budget = keep_ratio(0.03),
         .heads_first = true},
        {.name = "bf16 D128 GQA4 S5000 real-like, mixed",
         .heads = 8,
         .kv_heads = 2,
         .tq = 5000,
         .tk = 5000,
         .budget = keep_ratio(0.01),
         .data = Data::kRealLike,
         .mixed = true},
        {.name = "fp16 D128 GQA4 S4097 real-like 1%",
         .dtype = half,
         .heads = 4,
         .kv_heads = 1,
         .tq = 4097,
         .tk = 4097,
         .budget = keep_ratio(0.01),
         .data = Data::kRealLike},
    };
    for (const Case& c : cases) good &= run(c);
    good &= run({.name = "bf16 D128 an infinite key and a NaN query",
                 .heads = 16,
                 .kv_heads = 4,
                 .budget = keep_ratio(0.05),
                 .special = true});
    good &= run({.name = "fp16 D64 an infinite key and a NaN query",
                 .dtype = half,
                 .dim = 64,
                 .heads = 16,
                 .kv_heads = 4,
                 .budget = keep_ratio(0.05),
                 .special = true});
  }
  if (repeat) {
    good &= run({.name = "bf16 D128 GQA4 S8192 real-like 1%, 1000 times",
                 .heads = 8,
                 .kv_heads = 2,
                 .tq = 8192,
                 .tk = 8192,
                 .budget = keep_ratio(0.01),
                 .data = Data::kRealLike,
                 .repeats = 1000});
  }
  Case big{.name = "bf16 D128 H32 Hkv8 S32768 real-like 1%",
           .heads = 32,
           .kv_heads = 8,
           .tq = 32768,
           .tk = 32768,
           .budget = keep_ratio(0.01),
           .data = Data::kRealLike,
           .heads_first = heads_first,
           .timed = true,
           .repeats = 100};
  if (timed) {
    good &= run(big);
    Case wide = big;
    wide.name = "bf16 D128 H32 Hkv8 S32768 real-like 5%";
    wide.budget = keep_ratio(0.05);
    wide.repeats = 20;
    good &= run(wide);
    Case narrow = big;
    narrow.name = "bf16 D64 H32 Hkv8 S32768 real-like 1%";
    narrow.dim = 64;
    good &= run(narrow);
  }
  if (timed_random) {
    big.name = "bf16 D128 H32 Hkv8 S8192 random 1%";
    big.tq = big.tk = 8192;
    big.data = Data::kRandom;
    good &= run(big);
  }
  std::printf("%s\n", good ? "all ok" : "FAILED");
  return good ? 0 : 1;
}
