// Checks and times the masked dense kernels of sm_90a without torch.
//
//   masked_check forward|backward|all [time|small]
//
// Each case makes random q, k, v, dout, selects exactly by brute force from tensor-core scores of its own
// (mma.sync, the contract's order of accumulation), runs the kernels and compares every row and key with a
// float64 reference that uses the same kept sets. With `time` it then prints times for random data on 32
// heads; `small` leaves out the larger cases (for compute-sanitizer). Exits with 1 if anything fails.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/sm90/masked.h"
#include "masked_reference.cuh"

namespace {

using namespace topk_attn;        // NOLINT: a test program
using namespace topk_attn::cuda;  // NOLINT

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* device_array(size_t n, int byte = 0) {
  void* p = nullptr;
  check(cudaMalloc(&p, std::max<size_t>(n, 1) * sizeof(T)), "cudaMalloc");
  check(cudaMemset(p, byte, std::max<size_t>(n, 1) * sizeof(T)), "cudaMemset");
  return static_cast<T*>(p);
}

template <typename T>
std::vector<T> to_host(const T* p, size_t n) {
  std::vector<T> v(n);
  check(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost), "copy to host");
  return v;
}

// ---------------------------------------------------------------------------------------------------------------
// Cases
// ---------------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  DType dtype;
  int dim, heads, kv_heads;
  std::vector<int> tq, tk;  // per sequence; dense: all equal
  bool packed, causal;
  int topk;  // 0: everything
  int sink = 0, recent = 0;
  bool mixed = false;       // every third tile is left to the gathered regime
  bool poison = false;      // packed: the second document is NaN throughout
  bool sums = false;        // float32 dK, dV
  bool integers = false;    // small integers: many ties
  bool bad_values = false;  // a NaN and an infinity in V, a NaN query, an infinite key; forward only
};

template <typename T>
__global__ void round_values(T* x, size_t n) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    x[i] = T(rintf(float(x[i]) * 0.6f));
  }
}

// Sums of squares of difference and reference, and the worst row.
struct Error {
  double difference = 0, reference = 0, worst = 0;
  int64_t rows = 0, bad = 0;
  void add_row(const double* want, const double* got, int n, double floor) {
    double a = 0, b = 0;
    for (int i = 0; i < n; ++i) {
      if (std::isfinite(want[i]) != std::isfinite(got[i])) ++bad;
      if (!std::isfinite(want[i]) || !std::isfinite(got[i])) continue;
      a += (want[i] - got[i]) * (want[i] - got[i]);
      b += want[i] * want[i];
    }
    difference += a;
    reference += b;
    worst = std::max(worst, std::sqrt(a) / (std::sqrt(b) + floor));
    ++rows;
  }
  double relative() const { return std::sqrt(difference / std::max(reference, 1e-30)); }
};

template <typename T>
bool run_case(const Case& x, bool backward) {
  const int docs = static_cast<int>(x.tq.size());
  const int H = x.heads, G = x.kv_heads, D = x.dim;
  std::vector<int> cu_q(1, 0), cu_k(1, 0);
  std::vector<int2> tiles;
  std::vector<int> first_tile;
  for (int b = 0; b < docs; ++b) {
    cu_q.push_back(cu_q.back() + x.tq[b]);
    cu_k.push_back(cu_k.back() + x.tk[b]);
    first_tile.push_back(static_cast<int>(tiles.size()));
    for (int r = 0; r < x.tq[b]; r += kTileRows) tiles.push_back(make_int2(b, r));
  }
  const int total_q = cu_q.back(), total_k = cu_k.back();
  if (x.packed) tiles.push_back(make_int2(-1, 0));
  const int pad = 64;  // strides larger than the rows need
  const int64_t q_token = H * D + pad, k_token = G * D + pad;
  const size_t q_size = total_q * q_token, k_size = total_k * k_token;
  T* q = device_array<T>(q_size);
  T* k = device_array<T>(k_size);
  T* v = device_array<T>(k_size);
  T* go = device_array<T>(q_size);
  T* out = device_array<T>(q_size, 0x11);
  fill_normal<<<256, 256>>>(q, q_size, 1);
  fill_normal<<<256, 256>>>(k, k_size, 2);
  fill_normal<<<256, 256>>>(v, k_size, 3);
  fill_normal<<<256, 256>>>(go, q_size, 4);
  if (x.integers) {
    round_values<<<256, 256>>>(q, q_size);
    round_values<<<256, 256>>>(k, k_size);
  }
  if (x.poison) {
    for (T* p : {k, v})
      check(cudaMemset(p + cu_k[1] * k_token, 0xff, x.tk[1] * k_token * sizeof(T)), "poison");
    for (T* p : {q, go})
      check(cudaMemset(p + cu_q[1] * q_token, 0xff, x.tq[1] * q_token * sizeof(T)), "poison");
  }
  if (x.bad_values) {
    for (int y = 0; y < D; ++y) {
      check(cudaMemset(v + 37 * k_token + y, 0xff, sizeof(T)), "NaN value");
      check(cudaMemset(q + 150 * q_token + y, 0xff, sizeof(T)), "NaN query");
    }
    const T infinity(INFINITY);
    check(cudaMemcpy(v + 201 * k_token + 3, &infinity, sizeof(T), cudaMemcpyHostToDevice), "infinite value");
    check(cudaMemcpy(k + 90 * k_token + 5, &infinity, sizeof(T), cudaMemcpyHostToDevice), "infinite key");
    backward = false;
  }
  Call c;
  c.dtype = x.dtype;
  c.heads = H;
  c.kv_heads = G;
  c.head_dim = c.v_dim = D;
  c.batch = docs;
  c.tq = x.packed ? total_q : x.tq[0];
  c.tk = x.packed ? total_k : x.tk[0];
  c.max_q = *std::max_element(x.tq.begin(), x.tq.end());
  c.max_k = *std::max_element(x.tk.begin(), x.tk.end());
  int* d_cu_q = device_array<int>(docs + 1);
  int* d_cu_k = device_array<int>(docs + 1);
  int2* d_tiles = device_array<int2>(tiles.size());
  check(cudaMemcpy(d_cu_q, cu_q.data(), (docs + 1) * 4, cudaMemcpyHostToDevice), "cu_q");
  check(cudaMemcpy(d_cu_k, cu_k.data(), (docs + 1) * 4, cudaMemcpyHostToDevice), "cu_k");
  check(cudaMemcpy(d_tiles, tiles.data(), tiles.size() * 8, cudaMemcpyHostToDevice), "tiles");
  c.num_tiles = static_cast<int>(tiles.size());
  if (x.packed) {
    c.cu_q = d_cu_q;
    c.cu_k = d_cu_k;
    c.tiles = d_tiles;
  }
  c.causal = x.causal;
  if (x.topk > 0) {
    c.budget.topk = x.topk;
  } else {
    c.budget.ratio = 1.0;
  }
  c.sink = x.sink;
  c.recent = x.recent;
  c.softmax_scale = 1.0f / std::sqrt(static_cast<float>(D));
  c.rows = x.packed ? RowLayout{0, total_q} : RowLayout{int64_t{H} * c.tq, c.tq};
  const auto q_view = [&](T* p) { return View{p, x.packed ? 0 : c.tq * q_token, q_token, D}; };
  const auto k_view = [&](T* p) { return View{p, x.packed ? 0 : c.tk * k_token, k_token, D}; };
  c.q = q_view(q);
  c.k = k_view(k);
  c.v = k_view(v);
  if (!sm90::supports_masked(c)) {
    std::printf("FAILED %s: not supported\n", x.name);
    return false;
  }

  const int64_t rows = int64_t{H} * total_q, words = bitmap_words(c);
  float* threshold = device_array<float>(rows);
  int32_t* tie = device_array<int32_t>(rows);
  float* lse = device_array<float>(rows, 0x11);
  float* delta = device_array<float>(rows);
  uint32_t* bitmap = device_array<uint32_t>(int64_t{H} * c.num_tiles * words);
  int* wrong = device_array<int>(1);
  std::vector<int32_t> skip(int64_t{H} * c.num_tiles, 0), unions(skip.size(), 1 << 30);
  for (size_t i = 0; i < skip.size(); ++i) {
    if (x.mixed && i % 3 == 0) {
      skip[i] = 1;
      unions[i] = 0;
    }
  }
  int32_t* d_skip = device_array<int32_t>(skip.size());
  int32_t* d_unions = device_array<int32_t>(skip.size());
  check(cudaMemcpy(d_skip, skip.data(), skip.size() * 4, cudaMemcpyHostToDevice), "skip");
  check(cudaMemcpy(d_unions, unions.data(), skip.size() * 4, cudaMemcpyHostToDevice), "unions");

  struct Reference {
    std::vector<double> out, lse, dq, dk, dv;
  };
  std::vector<Reference> references;
  for (int b = 0; b < docs; ++b) {
    const int tq = x.tq[b], tk = x.tk[b];
    const size_t pairs = size_t(H) * tq * tk;
    Doc d{c, Tile{x.packed ? 0 : b, x.packed ? cu_q[b] : 0, x.packed ? cu_k[b] : 0, tq, tk, 0, 0},
          first_tile[b]};
    float* slab = device_array<float>(pairs);
    uint8_t* keep = device_array<uint8_t>(pairs);
    double* p = device_array<double>(pairs);
    double* ds = device_array<double>(pairs);
    double* r_out = device_array<double>(size_t(H) * tq * D);
    double* r_lse = device_array<double>(size_t(H) * tq);
    double* r_dq = device_array<double>(size_t(H) * tq * D);
    double* r_dk = device_array<double>(size_t(G) * tk * D);
    double* r_dv = device_array<double>(size_t(G) * tk * D);
    if (pairs > 0) {
      score_slab<T><<<dim3((tk + 7) / 8, (tq + 15) / 16, H), 32>>>(d, slab);
      select_rows<<<dim3(tq, H), 128>>>(d, slab, threshold, tie, keep, bitmap, words, wrong);
      reference_rows<T><<<dim3(tq, H), 128>>>(d, keep, q_view(go), p, ds, r_out, r_lse, delta);
      if (backward) {
        reference_dq<T><<<dim3(tq, H), D>>>(d, ds, r_dq);
        reference_dkv<T><<<dim3(tk, G), D>>>(d, p, ds, d_skip, q_view(go), r_dk, r_dv);
      }
      check(cudaDeviceSynchronize(), "reference");
    }
    references.push_back({to_host(r_out, size_t(H) * tq * D), to_host(r_lse, size_t(H) * tq),
                          to_host(r_dq, size_t(H) * tq * D), to_host(r_dk, size_t(G) * tk * D),
                          to_host(r_dv, size_t(G) * tk * D)});
    for (void* a : {(void*)slab, (void*)keep, (void*)p, (void*)ds, (void*)r_out, (void*)r_lse, (void*)r_dq,
                    (void*)r_dk, (void*)r_dv}) {
      cudaFree(a);
    }
  }
  const int miscounted = to_host(wrong, 1)[0];

  ForwardCall f;
  f.call = c;
  f.threshold = threshold;
  f.tie_index = tie;
  f.bitmap = bitmap;
  if (x.mixed) f.regimes = Regimes{d_unions, 0.5f};
  f.out = q_view(out);
  f.lse = lse;
  check(sm90::forward_masked(f, nullptr), "forward_masked");
  check(cudaDeviceSynchronize(), "forward");

  T* dq = device_array<T>(q_size, 0x11);
  T* dk = device_array<T>(k_size, 0x11);
  T* dv = device_array<T>(k_size, 0x11);
  float* dk_sum = device_array<float>(size_t(total_k) * G * D, 0x11);
  float* dv_sum = device_array<float>(size_t(total_k) * G * D, 0x11);
  bool stable = true;
  if (backward) {
    BackwardCall w;
    w.call = c;
    w.threshold = threshold;
    w.tie_index = tie;
    w.bitmap = bitmap;
    w.regimes = f.regimes;
    w.lse = lse;
    w.delta = delta;
    w.dout = q_view(go);
    w.dq = q_view(dq);
    w.dk = k_view(dk);
    w.dv = k_view(dv);
    if (x.sums) {
      w.dk_sum = dk_sum;
      w.dv_sum = dv_sum;
    }
    const size_t bytes = sm90::backward_masked_workspace(c);
    uint8_t* workspace = device_array<uint8_t>(bytes, 0x77);
    check(sm90::backward_masked(w, workspace, bytes, nullptr, false), "backward_masked");
    check(cudaDeviceSynchronize(), "backward");
    std::vector<T> seen;
    for (int repeat = 0; repeat < 3; ++repeat) {
      check(sm90::backward_masked(w, workspace, bytes, nullptr, true), "backward_masked");
      check(cudaDeviceSynchronize(), "deterministic backward");
      const std::vector<T> now = to_host(dq, q_size);
      if (repeat > 0) stable &= std::memcmp(now.data(), seen.data(), q_size * sizeof(T)) == 0;
      seen = now;
    }
    cudaFree(workspace);
  }

  const std::vector<T> h_out = to_host(out, q_size), h_dq = to_host(dq, q_size), h_dk = to_host(dk, k_size),
                       h_dv = to_host(dv, k_size);
  const std::vector<float> h_lse = to_host(lse, rows), h_dk_sum = to_host(dk_sum, size_t(total_k) * G * D),
                           h_dv_sum = to_host(dv_sum, size_t(total_k) * G * D);
  Error e_out, e_lse, e_dq, e_dk, e_dv;
  int64_t touched = 0;
  std::vector<double> got(D);
  for (int b = 0; b < docs; ++b) {
    if (x.poison && b == 1) continue;
    const Reference& r = references[b];
    for (int h = 0; h < H; ++h) {
      for (int i = 0; i < x.tq[b]; ++i) {
        const int64_t at = (cu_q[b] + i) * q_token + h * D, row = int64_t{h} * x.tq[b] + i;
        if (skip[int64_t{h} * c.num_tiles + first_tile[b] + i / kTileRows]) {
          uint16_t bits[2];
          std::memcpy(&bits[0], &h_out[at], 2);
          std::memcpy(&bits[1], &h_dq[at], 2);
          touched += bits[0] != 0x1111 || bits[1] != 0x1111;
          continue;
        }
        for (int y = 0; y < D; ++y) got[y] = float(h_out[at + y]);
        e_out.add_row(&r.out[row * D], got.data(), D, 1e-3);
        const int64_t row_at =
            x.packed ? int64_t{h} * total_q + cu_q[b] + i : (int64_t{b} * H + h) * x.tq[b] + i;
        double want = r.lse[row], have = h_lse[row_at];
        if (std::isinf(want) && want == have) want = have = 0;
        e_lse.add_row(&want, &have, 1, 1.0);
        if (!backward) continue;
        for (int y = 0; y < D; ++y) got[y] = float(h_dq[at + y]);
        e_dq.add_row(&r.dq[row * D], got.data(), D, 0.1);
      }
    }
    if (!backward) continue;
    for (int h = 0; h < G; ++h) {
      for (int j = 0; j < x.tk[b]; ++j) {
        const int64_t at = (cu_k[b] + j) * k_token + h * D, row = int64_t{h} * x.tk[b] + j;
        const int64_t sum_at = (int64_t{cu_k[b] + j} * G + h) * D;
        for (int y = 0; y < D; ++y) got[y] = x.sums ? h_dk_sum[sum_at + y] : float(h_dk[at + y]);
        e_dk.add_row(&r.dk[row * D], got.data(), D, 0.1);
        for (int y = 0; y < D; ++y) got[y] = x.sums ? h_dv_sum[sum_at + y] : float(h_dv[at + y]);
        e_dv.add_row(&r.dv[row * D], got.data(), D, 0.1);
      }
    }
  }
  bool good = miscounted == 0 && touched == 0 && stable;
  for (const Error* e : {&e_out, &e_lse, &e_dq, &e_dk, &e_dv}) {
    good &= e->bad == 0 && e->relative() < 6e-3 && e->worst < 3e-2;
  }
  std::printf("%s %-34s out %.1e (%.1e) lse %.0e dq %.1e (%.1e) dk %.1e (%.1e) dv %.1e (%.1e)%s",
              good ? "ok    " : "FAILED", x.name, e_out.relative(), e_out.worst, e_lse.worst, e_dq.relative(),
              e_dq.worst, e_dk.relative(), e_dk.worst, e_dv.relative(), e_dv.worst,
              stable ? "" : " NOT STABLE");
  if (!good) {
    std::printf(" miscounted %d touched %lld not finite %lld %lld %lld %lld %lld", miscounted,
                (long long)touched, (long long)e_out.bad, (long long)e_lse.bad, (long long)e_dq.bad,
                (long long)e_dk.bad, (long long)e_dv.bad);
  }
  std::printf("\n");
  std::fflush(stdout);
  for (void* a : {(void*)q,      (void*)k,       (void*)v,         (void*)go,       (void*)out, (void*)d_cu_q,
                  (void*)d_cu_k, (void*)d_tiles, (void*)threshold, (void*)tie,      (void*)lse, (void*)delta,
                  (void*)bitmap, (void*)wrong,   (void*)d_skip,    (void*)d_unions, (void*)dq,  (void*)dk,
                  (void*)dv,     (void*)dk_sum,  (void*)dv_sum}) {
    cudaFree(a);
  }
  return good;
}

// ---------------------------------------------------------------------------------------------------------------
// Times
// ---------------------------------------------------------------------------------------------------------------

// Thresholds of random normal data for `topk` of the row's keys, good enough for timing.
template <typename T>
__global__ void guess_thresholds(Call c, float* threshold, int32_t* tie_index) {
  const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (row >= int64_t{c.heads} * c.tq) return;
  const int h = static_cast<int>(row / c.tq), i = static_cast<int>(row % c.tq);
  const T* q = row_pointer<T>(c.q, 0, i, h);
  float square = 0;
  for (int x = 0; x < c.head_dim; ++x) square += float(q[x]) * float(q[x]);
  const double n = i + 1;
  const double share = c.budget.topk > 0 ? c.budget.topk / n : 1.0;
  threshold[row] = share >= 1 ? -1e30f : static_cast<float>(sqrtf(square) * normcdfinv(1 - share));
  tie_index[row] = hash32(static_cast<uint32_t>(row)) % (i + 1);
}

template <typename Run>
float median_ms(Run run, int repeats) {
  cudaEvent_t a, b;
  cudaEventCreate(&a);
  cudaEventCreate(&b);
  std::vector<float> times;
  run();
  for (int i = 0; i < repeats; ++i) {
    cudaEventRecord(a);
    run();
    cudaEventRecord(b);
    cudaEventSynchronize(b);
    float ms = 0;
    cudaEventElapsedTime(&ms, a, b);
    times.push_back(ms);
  }
  check(cudaGetLastError(), "timing");
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <typename T>
void time_size(int S, int D, int topk, bool forward, bool backward) {
  const int H = 32, G = 8;
  const size_t q_size = size_t(S) * H * D, k_size = size_t(S) * G * D;
  T* q = device_array<T>(q_size);
  T* k = device_array<T>(k_size);
  T* v = device_array<T>(k_size);
  T* go = device_array<T>(q_size);
  T* out = device_array<T>(q_size);
  T* dq = device_array<T>(q_size);
  T* dk = device_array<T>(k_size);
  T* dv = device_array<T>(k_size);
  fill_normal<<<1024, 256>>>(q, q_size, 1);
  fill_normal<<<1024, 256>>>(k, k_size, 2);
  fill_normal<<<1024, 256>>>(v, k_size, 3);
  fill_normal<<<1024, 256>>>(go, q_size, 4);
  Call c;
  c.heads = H;
  c.kv_heads = G;
  c.head_dim = c.v_dim = D;
  c.batch = 1;
  c.tq = c.tk = c.max_q = c.max_k = S;
  c.num_tiles = (S + kTileRows - 1) / kTileRows;
  c.budget.topk = topk;
  if (topk == 0) c.budget.ratio = 1;
  c.softmax_scale = 1.0f / std::sqrt(static_cast<float>(D));
  c.rows = RowLayout{int64_t{H} * S, S};
  c.q = View{q, 0, H * D, D};
  c.k = View{k, 0, G * D, D};
  c.v = View{v, 0, G * D, D};
  const int64_t rows = int64_t{H} * S;
  float* threshold = device_array<float>(rows);
  int32_t* tie = device_array<int32_t>(rows);
  float* lse = device_array<float>(rows);
  float* delta = device_array<float>(rows);
  const size_t bitmap_size = size_t(H) * c.num_tiles * bitmap_words(c);
  uint32_t* bitmap = device_array<uint32_t>(bitmap_size, 0xff);
  guess_thresholds<T><<<(rows + 255) / 256, 256>>>(c, threshold, tie);
  check(cudaDeviceSynchronize(), "data");
  const ForwardCall f{c, threshold, tie, bitmap, Regimes{}, View{out, 0, H * D, D}, lse};
  const auto run_forward = [&] { check(sm90::forward_masked(f, nullptr), "forward_masked"); };
  const double product = 2.0 * D * H * (double(S) * (S + 1) / 2);
  const int repeats = S >= 65536 ? 3 : 7;
  run_forward();
  if (forward) {
    const float ms = median_ms(run_forward, repeats);
    std::printf("S %6d D %3d W %5d forward %8.3f ms %4.0f TFLOP/s\n", S, D, topk, ms,
                2 * product / ms * 1e-9);
  }
  if (backward) {
    BackwardCall w;
    w.call = c;
    w.threshold = threshold;
    w.tie_index = tie;
    w.bitmap = bitmap;
    w.lse = lse;
    w.delta = delta;
    w.dout = View{go, 0, H * D, D};
    w.dq = View{dq, 0, H * D, D};
    w.dk = View{dk, 0, G * D, D};
    w.dv = View{dv, 0, G * D, D};
    const size_t bytes = sm90::backward_masked_workspace(c);
    uint8_t* workspace = device_array<uint8_t>(bytes);
    for (const bool deterministic : {false, true}) {
      const float ms = median_ms(
          [&] {
            check(sm90::backward_masked(w, workspace, bytes, nullptr, deterministic), "backward_masked");
          },
          repeats);
      std::printf("S %6d D %3d W %5d backward%s %8.3f ms %4.0f TFLOP/s of 5 products\n", S, D, topk,
                  deterministic ? " (deterministic)" : "", ms, 5 * product / ms * 1e-9);
    }
    cudaFree(workspace);
  }
  std::fflush(stdout);
  for (void* a : {(void*)q, (void*)k, (void*)v, (void*)go, (void*)out, (void*)dq, (void*)dk, (void*)dv,
                  (void*)threshold, (void*)tie, (void*)lse, (void*)delta, (void*)bitmap}) {
    cudaFree(a);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  const bool backward = what != "forward";
  const bool timed = argc > 2 && std::string(argv[2]) == "time";
  const bool small = argc > 2 && std::string(argv[2]) == "small";
  const DType b = DType::kBFloat16, h = DType::kFloat16;
  const std::vector<Case> cases = {
      {"bf16 D128 causal W 10", b, 128, 4, 1, {1037}, {1037}, false, true, 10},
      {"bf16 D64 causal W 10", b, 64, 4, 1, {1037}, {1037}, false, true, 10},
      {"fp16 D128 all", h, 128, 2, 2, {517}, {517}, false, true, 0},
      {"fp16 D64 not causal W 50, MHA x3", h, 64, 3, 3, {300}, {651}, false, false, 50},
      {"bf16 D128 batch 3, Tq < Tk, G 3", b, 128, 3, 1, {200, 200, 200}, {333, 333, 333}, false, true, 20},
      {"bf16 D64 batch 2, Tq > Tk", b, 64, 4, 2, {333, 333}, {200, 200}, false, true, 20},
      {"bf16 D128 packed", b, 128, 4, 2, {70, 1, 300, 129, 500}, {70, 1, 300, 129, 500}, true, true, 9},
      {"fp16 D64 packed, MHA, Tq != Tk",
       h,
       64,
       3,
       3,
       {70, 10, 300, 0, 64},
       {170, 5, 300, 7, 1},
       true,
       true,
       9},
      {"bf16 D128 packed, NaN neighbour",
       b,
       128,
       4,
       4,
       {100, 90, 200},
       {100, 90, 200},
       true,
       true,
       9,
       0,
       0,
       false,
       true},
      {"bf16 D64 packed, NaN neighbour",
       b,
       64,
       4,
       1,
       {100, 90, 200},
       {100, 90, 200},
       true,
       false,
       0,
       0,
       0,
       false,
       true},
      {"bf16 D128 sink 4, recent 9", b, 128, 4, 2, {700}, {700}, false, true, 20, 4, 9},
      {"bf16 D64 sink 30 (W 20)", b, 64, 4, 2, {400}, {400}, false, true, 20, 30, 0},
      {"bf16 D128 mixed regimes, sums", b, 128, 4, 2, {900}, {900}, false, true, 20, 0, 0, true, false, true},
      {"bf16 D128 ties", b, 128, 4, 2, {640}, {640}, false, true, 40, 0, 0, false, false, false, true},
      {"fp16 D64 ties, clustered",
       h,
       64,
       4,
       2,
       {640},
       {640},
       false,
       true,
       3,
       0,
       0,
       false,
       false,
       false,
       true},
      {"bf16 D128 non-finite values",
       b,
       128,
       4,
       1,
       {400},
       {400},
       false,
       true,
       10,
       0,
       0,
       false,
       false,
       false,
       false,
       true},
      {"fp16 D64 non-finite values",
       h,
       64,
       3,
       1,
       {400},
       {400},
       false,
       true,
       10,
       0,
       0,
       false,
       false,
       false,
       false,
       true},
      {"bf16 D128 1 row", b, 128, 2, 1, {1}, {129}, false, true, 5},
  };
  bool good = true;
  for (const Case& x : cases) {
    if (small && std::accumulate(x.tk.begin(), x.tk.end(), 0) > 450) continue;
    good &= x.dtype == h ? run_case<__half>(x, backward) : run_case<__nv_bfloat16>(x, backward);
  }
  if (timed) {
    const bool forward = what != "backward";
    for (const int S : {8192, 16384, 32768}) time_size<__nv_bfloat16>(S, 128, S / 100, forward, backward);
    time_size<__nv_bfloat16>(32768, 128, 0, forward, backward);
    time_size<__nv_bfloat16>(32768, 128, 2048, forward, backward);
    time_size<__nv_bfloat16>(32768, 64, 328, forward, backward);
    time_size<__nv_bfloat16>(131072, 128, 1311, forward, backward);
  }
  std::printf(good ? "all good\n" : "FAILED\n");
  return good ? 0 : 1;
}
