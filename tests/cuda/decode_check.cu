// Check program of the decode kernels, without torch. Exit status 0: all right.
//
//   decode_check [quick]    sets, outputs and caches against the host's
//   decode_check time       microseconds of calls and of their steps, the L2 cache flushed before each
//
// Small integers make every score exact in float32 in whatever order it is summed, and tie often; so the host
// knows each row's set, threshold and tie index, for float32 and for the tensor cores alike. Values outside
// the valid rows are NaN. Appended rows and everything else in the caches are compared byte for byte.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/decode/params.h"

using namespace topk_attn;
using cuda::decode::DecodeCall;

namespace {

int failures = 0;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

template <typename T>
T* to_device(const std::vector<T>& host) {
  T* device = nullptr;
  check(cudaMalloc(&device, std::max<size_t>(1, host.size()) * sizeof(T)), "allocation");
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  return device;
}

template <typename T>
std::vector<T> to_host(const T* device, size_t count) {
  std::vector<T> host(count);
  check(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost), "copy");
  return host;
}

struct Case {
  int heads, kv_heads, head_dim, v_dim, tq, appended, capacity, page;  // page 0: contiguous
  std::vector<int> lengths;                                            // negative or too long: bad
  std::vector<int> leftpad;
  Budget budget;
  int sink = 0, recent = 0;
  bool kv_group = false;
  bool lists = true;
  int largest = 2;  // of the integers in q and k
};

Budget topk(int64_t w) {
  Budget b;
  b.topk = w;
  return b;
}

// What the host expects of a row.
struct Expected {
  std::vector<int> kept;  // ascending
  float threshold = NAN;
  int tie_index = -1;
};

Expected select(const std::vector<float>& scores, const RowPlan& plan) {
  Expected e;
  std::vector<int> order;
  for (int64_t j = plan.contested().begin; j < plan.contested().end; ++j)
    order.push_back(static_cast<int>(j));
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
  order.resize(plan.contested_kept());
  if (!order.empty()) {
    e.threshold = scores[order.back()] == 0.0f ? 0.0f : scores[order.back()];
    e.tie_index = order.back();
  }
  e.kept = order;
  for (int64_t j = plan.seen.begin; j < plan.seen.end; ++j) {
    if (plan.always_kept(j)) e.kept.push_back(static_cast<int>(j));
  }
  std::sort(e.kept.begin(), e.kept.end());
  return e;
}

float value(float x) {
  return x;
}
float value(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
void run(const Case& k, DType dtype, const char* name) {
  std::mt19937 random(static_cast<unsigned>(k.capacity * 31 + k.tq));
  std::uniform_int_distribution<int> small(-k.largest, k.largest);
  std::normal_distribution<float> normal;
  const int batch = static_cast<int>(k.lengths.size());
  const int group = k.heads / k.kv_heads;
  const int page = k.page > 0 ? k.page : k.capacity;
  const int per_row = (k.capacity + page - 1) / page;
  const int pages = batch * per_row + (k.page > 0 ? 2 : 0);
  std::vector<int> table(batch * per_row);
  std::vector<int> shuffled(pages);
  for (int i = 0; i < pages; ++i) shuffled[i] = i;
  if (k.page > 0) std::shuffle(shuffled.begin(), shuffled.end(), random);
  std::copy_n(shuffled.begin(), table.size(), table.begin());
  const auto place = [&](int b, int j) { return int64_t{table[b * per_row + j / page]} * page + j % page; };

  const auto fill = [&](size_t count, auto&& make) {
    std::vector<T> v(count);
    for (T& x : v) x = T(make());
    return v;
  };
  const auto integer = [&] { return static_cast<float>(small(random)); };
  const auto gauss = [&] { return normal(random); };
  const auto nothing = [] { return NAN; };
  std::vector<T> q = fill(size_t(batch) * k.tq * k.heads * k.head_dim, integer);
  std::vector<T> new_k = fill(size_t(batch) * k.appended * k.kv_heads * k.head_dim, integer);
  std::vector<T> new_v = fill(size_t(batch) * k.appended * k.kv_heads * k.v_dim, gauss);
  std::vector<T> keys = fill(size_t(pages) * page * k.kv_heads * k.head_dim, nothing);
  std::vector<T> values = fill(size_t(pages) * page * k.kv_heads * k.v_dim, nothing);
  std::vector<int> total(batch, 0);  // valid keys; 0: empty or bad
  for (int b = 0; b < batch; ++b) {
    const int n = k.lengths[b] + k.appended;
    const int pad = k.leftpad.empty() ? 0 : k.leftpad[b];
    if (k.lengths[b] < 0 || n > k.capacity || pad < 0 || pad > n) continue;
    total[b] = n;
    for (int j = pad; j < k.lengths[b]; ++j) {
      for (int c = 0; c < k.kv_heads * k.head_dim; ++c)
        keys[place(b, j) * k.kv_heads * k.head_dim + c] = T(integer());
      for (int c = 0; c < k.kv_heads * k.v_dim; ++c)
        values[place(b, j) * k.kv_heads * k.v_dim + c] = T(gauss());
    }
  }
  std::vector<T> keys_after = keys, values_after = values;
  for (int b = 0; b < batch; ++b) {
    for (int t = 0; total[b] > 0 && t < k.appended; ++t) {
      const int64_t at = place(b, k.lengths[b] + t);
      const int64_t from = int64_t{b} * k.appended + t;
      std::copy_n(&new_k[from * k.kv_heads * k.head_dim], k.kv_heads * k.head_dim,
                  &keys_after[at * k.kv_heads * k.head_dim]);
      std::copy_n(&new_v[from * k.kv_heads * k.v_dim], k.kv_heads * k.v_dim,
                  &values_after[at * k.kv_heads * k.v_dim]);
    }
  }

  DecodeCall c;
  c.dtype = dtype;
  c.heads = k.heads;
  c.kv_heads = k.kv_heads;
  c.head_dim = k.head_dim;
  c.v_dim = k.v_dim;
  c.batch = batch;
  c.tq = k.tq;
  c.kv_group = k.kv_group && group > 1;
  c.budget = k.budget;
  c.sink = k.sink;
  c.recent = k.recent;
  c.softmax_scale = 0.05f;
  c.capacity = k.page > 0 ? per_row * page : k.capacity;
  c.kept_width = budget(c.capacity, k.budget);
  c.rows = RowLayout{int64_t{k.heads} * k.tq, k.tq};
  const auto view = [&](const void* data, int64_t rows, int64_t heads, int64_t dim) {
    return View{const_cast<void*>(data), rows * heads * dim, heads * dim, dim};
  };
  const size_t rows = size_t(batch) * k.heads * k.tq;
  T* const q_device = to_device(q);
  T* const keys_device = to_device(keys);
  T* const values_device = to_device(values);
  T* const new_k_device = to_device(new_k);
  T* const new_v_device = to_device(new_v);
  T* const out_device = to_device(std::vector<T>(rows * k.v_dim, T(NAN)));
  float* const lse_device = to_device(std::vector<float>(rows, 7.0f));
  float* const threshold_device = to_device(std::vector<float>(rows, 7.0f));
  int* const tie_device = to_device(std::vector<int>(rows, 7));
  int* const indices_device = to_device(std::vector<int>(rows * c.kept_width, 7));
  int* const slots_device = to_device(std::vector<int>(rows * c.kept_width, 7));
  int* const lengths_device = to_device(k.lengths);
  int* const leftpad_device = to_device(k.leftpad);
  int* const table_device = to_device(table);
  c.q = view(q_device, k.tq, k.heads, k.head_dim);
  c.out = view(out_device, k.tq, k.heads, k.v_dim);
  c.k = view(keys_device, page, k.kv_heads, k.head_dim);
  c.v = view(values_device, page, k.kv_heads, k.v_dim);
  c.new_k = view(new_k_device, k.appended, k.kv_heads, k.head_dim);
  c.new_v = view(new_v_device, k.appended, k.kv_heads, k.v_dim);
  c.appended = k.appended;
  c.lse = lse_device;
  c.threshold = threshold_device;
  c.tie_index = tie_device;
  if (k.lists) {
    c.indices = indices_device;
    c.slots = slots_device;
  }
  c.cache_seqlens = lengths_device;
  if (!k.leftpad.empty()) c.cache_leftpad = leftpad_device;
  c.slots_per_entry = page;
  if (k.page > 0) {
    c.block_table = table_device;
    c.max_pages = per_row;
    c.page_size = page;
    c.pages = pages;
  }
  int sms = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0), "device");
  const size_t bytes = cuda::decode::workspace_bytes(c, sms);
  void* workspace = nullptr;
  check(cudaMalloc(&workspace, bytes), "workspace");
  check(cudaMemset(workspace, 0xff, bytes), "workspace");
  const cuda::decode::Scratch scratch = cuda::decode::scratch_of(c, workspace, sms);
  check(cuda::decode::prepare(c, scratch, nullptr), "prepare");
  check(cuda::decode::run(c, scratch, sms, nullptr), "run");
  check(cudaDeviceSynchronize(), "the kernels");

  int bad = 0;
  const auto expect = [&](bool good, const char* what, int b, int h, int t) {
    if (good || ++bad > 5) return;
    std::printf("  %s: %s differs at sequence %d, head %d, token %d\n", name, what, b, h, t);
  };
  const auto same = [](const std::vector<T>& a, const T* b) {
    return std::memcmp(a.data(), b, a.size() * sizeof(T)) == 0;
  };
  expect(same(keys_after, to_host(keys_device, keys.size()).data()), "k_cache", -1, -1, -1);
  expect(same(values_after, to_host(values_device, values.size()).data()), "v_cache", -1, -1, -1);
  const std::vector<T> out = to_host(out_device, rows * k.v_dim);
  const std::vector<float> lse = to_host(lse_device, rows);
  const std::vector<float> threshold = to_host(threshold_device, rows);
  const std::vector<int> tie = to_host(tie_device, rows);
  const std::vector<int> indices = to_host(indices_device, rows * c.kept_width);
  const std::vector<int> slots = to_host(slots_device, rows * c.kept_width);
  const float tolerance = dtype == DType::kFloat32 ? 2e-5f : 1e-2f;
  for (int b = 0; b < batch; ++b) {
    const int pad = total[b] == 0 || k.leftpad.empty() ? 0 : k.leftpad[b];
    for (int t = 0; t < k.tq; ++t) {
      const RowPlan plan = plan_row(visible(t, k.tq, total[b], true, pad), k.budget, k.sink, k.recent);
      std::vector<std::vector<float>> scores(k.heads, std::vector<float>(total[b], 0.0f));
      for (int h = 0; h < k.heads; ++h) {
        for (int64_t j = plan.seen.begin; j < plan.seen.end; ++j) {
          float s = 0.0f;
          for (int i = 0; i < k.head_dim; ++i) {
            s += value(q[((int64_t{b} * k.tq + t) * k.heads + h) * k.head_dim + i]) *
                 value(keys_after[(place(b, static_cast<int>(j)) * k.kv_heads + h / group) * k.head_dim + i]);
          }
          scores[h][j] = s;
        }
      }
      for (int h = 0; h < k.heads; ++h) {
        std::vector<float> decisive = scores[h];
        for (int o = h / group * group; c.kv_group && o < (h / group + 1) * group; ++o) {
          for (int j = 0; j < total[b]; ++j) decisive[j] = std::max(decisive[j], scores[o][j]);
        }
        const Expected e = select(decisive, plan);
        const int64_t row = (int64_t{b} * k.heads + h) * k.tq + t;
        expect(threshold[row] == e.threshold || (std::isnan(threshold[row]) && std::isnan(e.threshold)),
               "threshold", b, h, t);
        expect(tie[row] == e.tie_index, "tie_index", b, h, t);
        for (int64_t i = 0; k.lists && i < c.kept_width; ++i) {
          const bool kept = i < static_cast<int64_t>(e.kept.size());
          expect(indices[row * c.kept_width + i] == (kept ? e.kept[i] : -1), "indices", b, h, t);
          expect(slots[row * c.kept_width + i] == (kept ? place(b, e.kept[i]) : -1), "slots", b, h, t);
        }
        double top = -INFINITY, mass = 0.0;
        std::vector<double> sum(k.v_dim, 0.0);
        for (int j : e.kept) top = std::max(top, double{scores[h][j]} * c.softmax_scale);
        for (int j : e.kept) {
          const double p = std::exp(double{scores[h][j]} * c.softmax_scale - top);
          mass += p;
          for (int i = 0; i < k.v_dim; ++i) {
            sum[i] += p * value(values_after[(place(b, j) * k.kv_heads + h / group) * k.v_dim + i]);
          }
        }
        const double want_lse = e.kept.empty() ? -INFINITY : top + std::log(mass);
        expect(e.kept.empty() ? std::isinf(lse[row]) && lse[row] < 0 : std::fabs(lse[row] - want_lse) < 1e-4,
               "lse", b, h, t);
        for (int i = 0; i < k.v_dim; ++i) {
          const double want = e.kept.empty() ? 0.0 : sum[i] / mass;
          const double got = value(out[((int64_t{b} * k.tq + t) * k.heads + h) * k.v_dim + i]);
          expect(std::fabs(got - want) <= tolerance * std::max(1.0, std::fabs(want)), "out", b, h, t);
        }
      }
    }
  }
  std::printf("%s: %s, %zu rows\n", name, bad == 0 ? "ok" : "FAILED", rows);
  failures += bad > 0;
  for (void* p :
       {static_cast<void*>(q_device), static_cast<void*>(keys_device), static_cast<void*>(values_device),
        static_cast<void*>(new_k_device), static_cast<void*>(new_v_device), static_cast<void*>(out_device),
        static_cast<void*>(lse_device), static_cast<void*>(threshold_device), static_cast<void*>(tie_device),
        static_cast<void*>(indices_device), static_cast<void*>(slots_device),
        static_cast<void*>(lengths_device), static_cast<void*>(leftpad_device),
        static_cast<void*>(table_device), workspace}) {
    check(cudaFree(p), "free");
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Times
// ---------------------------------------------------------------------------------------------------------------

// Normally distributed values, the same ones each time.
__global__ void fill_normal(__nv_bfloat16* data, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b9u + seed + static_cast<uint32_t>(i >> 32);
    uint32_t u[2];
    for (uint32_t& y : u) {
      x = (x ^ (x >> 16)) * 0x7feb352du;
      x = (x ^ (x >> 15)) * 0x846ca68bu;
      y = x ^= x >> 16;
    }
    const float radius = sqrtf(-2.0f * logf((static_cast<float>(u[0]) + 1.0f) * 2.3283064e-10f));
    data[i] = __float2bfloat16(radius * cospif(2.0f * static_cast<float>(u[1]) * 2.3283064e-10f));
  }
}

// Medians of a few runs of work(stream), each behind a flush.
class Clock {
 public:
  static constexpr size_t kFlushBytes = size_t{256} << 20;
  Clock() {
    check(cudaMalloc(&flush_, kFlushBytes), "allocation");
    check(cudaStreamCreate(&stream), "stream");
    check(cudaEventCreate(&begin_), "event");
    check(cudaEventCreate(&end_), "event");
  }
  template <typename Work>
  float median(int runs, const Work& work) {
    std::vector<float> times;
    for (int i = 0; i < runs; ++i) {
      check(cudaMemsetAsync(flush_, i, kFlushBytes, stream), "flush");
      check(cudaEventRecord(begin_, stream), "event");
      work();
      check(cudaEventRecord(end_, stream), "event");
      check(cudaStreamSynchronize(stream), "the kernels");
      float ms = 0.0f;
      check(cudaEventElapsedTime(&ms, begin_, end_), "event");
      times.push_back(ms * 1e3f);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }
  cudaStream_t stream = nullptr;

 private:
  void* flush_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

// One new token of each sequence, its cache full: the whole call, the call as a graph, and the steps.
void time_shape(Clock& clock, int batch, int n, const Budget& wanted) {
  namespace decode = cuda::decode;
  constexpr int kHeads = 32, kKvHeads = 8, kDim = 128;
  DecodeCall c;
  c.heads = kHeads;
  c.kv_heads = kKvHeads;
  c.head_dim = c.v_dim = kDim;
  c.batch = batch;
  c.tq = 1;
  c.budget = wanted;
  c.softmax_scale = 0.0884f;
  c.capacity = n;
  c.kept_width = budget(n, wanted);
  c.rows = RowLayout{kHeads, 1};
  const auto normal = [](int64_t count, uint32_t seed) {
    __nv_bfloat16* data = nullptr;
    check(cudaMalloc(&data, count * 2), "allocation");
    fill_normal<<<1024, 256>>>(data, count, seed);
    return data;
  };
  const int64_t row = int64_t{kKvHeads} * kDim;
  c.q = View{normal(int64_t{batch} * kHeads * kDim, 1), kHeads * kDim, kHeads * kDim, kDim};
  c.k = View{normal(batch * row * n, 2), row * n, row, kDim};
  c.v = View{normal(batch * row * n, 3), row * n, row, kDim};
  c.out = View{normal(int64_t{batch} * kHeads * kDim, 4), kHeads * kDim, kHeads * kDim, kDim};
  const size_t rows = size_t(batch) * kHeads;
  c.lse = to_device(std::vector<float>(rows));
  c.threshold = to_device(std::vector<float>(rows));
  c.tie_index = to_device(std::vector<int>(rows));
  c.cache_seqlens = to_device(std::vector<int>(batch, n));
  c.slots_per_entry = n;
  int sms = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0), "device");
  void* workspace = nullptr;
  check(cudaMalloc(&workspace, decode::workspace_bytes(c, sms)), "workspace");
  const decode::Scratch scratch = decode::scratch_of(c, workspace, sms);
  const cudaStream_t stream = clock.stream;
  const auto call = [&] { check(decode::run(c, scratch, sms, stream), "run"); };
  call();
  check(cudaStreamSynchronize(stream), "run");

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  call();
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&replay, graph, 0), "graph");
  const int runs = 21;
  const float whole = clock.median(runs, call);
  const float replayed = clock.median(runs, [&] { check(cudaGraphLaunch(replay, stream), "graph"); });
  std::printf("B%d n = %d, W = %lld: call %.1f, graph %.1f", batch, n, static_cast<long long>(c.kept_width),
              whole, replayed);
  if (scratch.bounds != nullptr) {
    const decode::Slab slab = decode::largest_slab(c);
    decode::Scratch again = scratch;
    again.only_flagged = true;
    decode::Scratch picked = scratch;
    picked.picked = true;
    int flagged = 0;
    check(cudaMemcpy(&flagged, scratch.any_flag, 4, cudaMemcpyDeviceToHost), "copy");
    const float sample =
        clock.median(runs, [&] { check(decode::sample(c, slab, scratch, stream), "sample"); });
    std::vector<int> counts(rows);
    const float scan = clock.median(runs, [&] {
      // Its lists grow from run to run, but for the counts.
      check(cudaMemsetAsync(scratch.counts, 0, rows * 4, stream), "counts");
      check(decode::scan(c, slab, scratch, sms, stream), "scan");
    });
    check(cudaMemcpy(counts.data(), scratch.counts, rows * 4, cudaMemcpyDeviceToHost), "copy");
    const float pick = clock.median(runs, [&] { check(decode::pick(c, slab, scratch, stream), "pick"); });
    const float rescan = clock.median(runs, [&] {
      check(decode::scan(c, slab, again, sms, stream), "second scan");
      check(decode::select(c, slab, again, stream), "select");
    });
    const float attend =
        clock.median(runs, [&] { check(decode::attend(c, slab, picked, stream), "attend"); });
    std::printf(
        "; alone: sample %.1f, scan %.1f, pick %.1f, repair %.1f, attend %.1f; %s, %d to %d candidates",
        sample, scan, pick, rescan, attend, flagged != 0 ? "FLAGGED" : "no flag",
        *std::min_element(counts.begin(), counts.end()), *std::max_element(counts.begin(), counts.end()));
  }
  std::printf("\n");
  check(cudaGraphExecDestroy(replay), "graph");
  check(cudaGraphDestroy(graph), "graph");
  for (const void* p : {c.q.data, c.k.data, c.v.data, c.out.data, static_cast<void*>(c.lse),
                        static_cast<void*>(c.threshold), static_cast<void*>(c.tie_index),
                        const_cast<void*>(static_cast<const void*>(c.cache_seqlens)), workspace}) {
    check(cudaFree(const_cast<void*>(p)), "free");
  }
}

int time_all() {
  Clock clock;
  Budget share;
  share.ratio = 0.01;
  for (const auto& [batch, n] : std::vector<std::pair<int, int>>{
           {8, 131072}, {1, 131072}, {32, 32768}, {1, 4096}, {1, 1024}, {1, 8192}, {1, 32768}}) {
    for (const Budget& wanted : {share, topk(2048)}) {
      if (budget(n, wanted) < n) time_shape(clock, batch, n, wanted);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "time") == 0) return time_all();
  const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  Budget share;
  share.ratio = 0.07;
  share.min_keys = 2;
  const std::vector<std::pair<const char*, Case>> cases = {
      {"decode", {8, 2, 64, 64, 1, 1, 300, 0, {13, 299, 0, 131}, {}, topk(17)}},
      {"decode, no lists",
       {8, 2, 128, 128, 1, 1, 300, 0, {13, 299, 0, 131}, {}, topk(17), 0, 0, false, false}},
      {"pages", {8, 2, 72, 40, 1, 1, 300, 16, {13, 299, 0, 131}, {}, share}},
      {"pages, no lists",
       {4, 4, 64, 64, 2, 2, 300, 7, {13, 298, 0, 131}, {2, 200, 0, 131}, share, 0, 0, false, false}},
      {"padding, sinks, recent keys",
       {6, 2, 64, 64, 3, 1, 200, 3, {60, 199, 31, 70}, {33, 0, 31, 69}, share, 3, 5}},
      {"chunk", {4, 2, 64, 64, 40, 40, 200, 16, {0, 111, 160}, {}, topk(9)}},
      {"groups", {8, 2, 64, 64, 2, 0, 200, 16, {77, 199}, {}, topk(9), 0, 0, true}},
      {"bad lengths", {4, 2, 64, 64, 1, 1, 64, 0, {64, -3, 20, 10}, {0, 0, 2, 30}, topk(5)}},
      {"everything kept", {4, 2, 64, 256, 1, 1, 900, 16, {899, 40}, {}, topk(1000)}},
      {"long", {4, 1, 64, 64, 1, 1, 9001, 16, {9000, 100}, {}, topk(90)}},
      {"long, many kept", {4, 1, 64, 64, 2, 2, 10000, 0, {9998, 8500}, {0, 100}, topk(3000), 40, 9}},
      {"long, equal scores",
       {4, 1, 64, 64, 1, 0, 9000, 16, {9000, 8200}, {}, topk(700), 0, 0, false, true, 0}},
      {"long, few ties", {4, 1, 64, 64, 1, 1, 9001, 16, {9000, 8300}, {}, topk(90), 0, 0, false, true, 60}},
      {"long, few ties, sinks, recent keys",
       {6, 2, 128, 128, 3, 2, 20000, 0, {19998, 9000}, {77, 0}, topk(900), 5, 37, false, true, 20}},
      {"long, 16 rows", {16, 1, 64, 64, 1, 0, 12000, 16, {12000, 3}, {}, topk(500), 1, 0, false, true, 60}},
      {"long, many recent keys",
       {4, 1, 64, 64, 2, 0, 30000, 0, {30000}, {}, topk(4800), 2, 4500, false, true, 60}},
      {"very long", {2, 1, 64, 64, 1, 0, 270001, 0, {270001}, {3}, topk(4000), 0, 0, false, true, 60}},
      {"short, half kept, no lists",
       {16, 4, 128, 128, 1, 0, 4096, 0, {4096}, {}, topk(2048), 0, 0, false, false, 20}},
      {"short, pages, no lists",
       {8, 1, 128, 64, 1, 1, 8192, 16, {8191, 5000, 7}, {0, 33, 0}, topk(80), 4, 9, false, false, 20}},
      {"short, wide V, no lists",
       {8, 4, 64, 128, 2, 2, 1000, 16, {990, 998, 1}, {}, topk(300), 0, 2, false, false, 20}},
      {"short, equal scores, no lists",
       {8, 2, 64, 64, 1, 0, 3000, 0, {3000, 2999}, {}, topk(700), 0, 0, false, false, 0}},
      {"short, always kept alone, no lists",
       {8, 2, 64, 64, 1, 0, 500, 0, {500, 3}, {}, topk(8), 3, 20, false, false, 20}},
  };
  for (const auto& [name, k] : cases) {
    run<__nv_bfloat16>(k, DType::kBFloat16, name);
    if (!quick || k.capacity < 1000) run<float>(k, DType::kFloat32, name);
  }
  std::printf("%d cases failed\n", failures);
  return failures == 0 ? 0 : 1;
}
