// Check of the exact selection inside marked keys (csrc/kernels/cuda/sm90/settle.h) on an sm_90a GPU.
//
//   settle_check [quick] [time] [time5]
//
// quick: small shapes with every feature (dtypes, head dims, GQA, packed documents, strided views, ties,
// infinities and NaNs, rows whose lower bound is too high, useless upper bounds, tiles that are not settled,
// marks beyond what is needed, bitmap and bounds in place). time, time5: S = 32,768 at 32 heads, real-like
// data, 1 % and 5 %. Without arguments: quick and time. Everything a call may write is compared, bit for bit,
// with a brute force: a slab of mma.sync scores and one radix selection per row. Exit status 0 iff all agree.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/common/union_size.h"
#include "cuda/sm90/settle.h"
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

// ---------------------------------------------------------------------------------------------------------------
// Bounds, marks and what must come out, on the device
// ---------------------------------------------------------------------------------------------------------------

// What may be wrong with the bounds of a row.
enum Trouble { kTooHigh = 1, kBadUpper = 2, kNaNLower = 4 };

// Row bounds from the scores of two ranks, one beyond W and one before it; some of them spoilt.
__global__ void make_bounds(const float* deep, const float* shallow, int64_t count, int trouble, float* lower,
                            float* upper) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint32_t h = hash32(static_cast<uint32_t>(i) * 2 + 1);
  lower[i] = (trouble & kTooHigh) && h % 512 == 0 ? shallow[i] : deep[i];
  if ((trouble & kNaNLower) && h % 1024 == 1) lower[i] = nanf("");
  upper[i] = shallow[i];
  if ((trouble & kBadUpper) && h / 1024 % 4 == 0) {
    const float bad[4] = {nanf(""), INFINITY, lower[i], lower[i] + 1000.0f};
    upper[i] = bad[h / 4096 % 4];
  }
}

// One block per row of the slab: the marks of the row, and whether its certificate holds. About one key in 64
// is marked without need where `extra`.
__global__ void __launch_bounds__(256)
    slab_mark(Call call, int head, int first, const float* slab, int64_t ld, const float* lower, bool extra,
              uint32_t* marks, int64_t words, unsigned long long* unproven) {
  const int index = first + blockIdx.x / 64;
  const Tile tile = tile_at(call, index);
  const int r = blockIdx.x % 64;
  if (r >= tile.rows) return;
  const RowPlan plan = row_plan(call, tile, tile.row0 + r);
  const float bound = lower[row_index(call, tile, head, tile.row0 + r)];
  const float* s = slab + int64_t{blockIdx.x} * ld;
  const int64_t entry = int64_t{head} * call.num_tiles + index;
  int count = 0;
  for (int j = threadIdx.x; j < (plan.seen.end + 31) / 32 * 32; j += 256) {
    const bool reaches = j < plan.seen.end && bound == bound && !(s[j] < bound);
    const bool more = extra && j < plan.seen.end && hash32(j * 64 + r) % 4096 == 0;
    count += reaches;
    const uint32_t word = __ballot_sync(~0u, reaches || more);
    if (threadIdx.x % 32 == 0 && word != 0) atomicOr(marks + entry * words + j / 32, word);
  }
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, count);
  __syncthreads();
  if (threadIdx.x == 0 && total < plan.kept) atomicOr(unproven + entry, 1ull << r);
}

// ends[entry] = what the tile's rows see.
__global__ void tile_ends(Call call, int64_t entries, int32_t* ends) {
  const int64_t entry = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (entry >= entries) return;
  ends[entry] = seen_end(call, tile_at(call, static_cast<int>(entry % call.num_tiles)));
}

struct Errors {
  int threshold, tie_index, unsettled, bitmap, untouched;
  int head, tile, row;  // of some error
};

// What must come out, and what the memory held before.
struct Expected {
  const float* threshold;
  const int32_t* tie_index;
  const uint32_t* bitmap;
  const unsigned long long* unproven;
  const float* old_threshold;
  const int32_t* old_tie_index;
  const uint32_t* old_bitmap;
  const uint32_t* marks;
};
constexpr uint64_t kOldUnsettled = 0x5555555555555555ull;

// One block of 64 threads per entry.
__global__ void compare(sm90::SettleCall p, Expected e, int64_t words, Errors* errors) {
  const Call& call = p.call;
  const int64_t entry = blockIdx.x;
  const int head = static_cast<int>(entry / call.num_tiles);
  const Tile tile = tile_at(call, static_cast<int>(entry % call.num_tiles));
  const bool settled =
      tile.rows > 0 && gathered(Regimes{p.mark_count, p.largest_share}, entry, seen_end(call, tile));
  const auto wrong = [&](int& kind) {
    atomicAdd(&kind, 1);
    errors->head = head;
    errors->tile = static_cast<int>(entry % call.num_tiles);
    errors->row = static_cast<int>(threadIdx.x);
  };
  const unsigned long long unproven = e.unproven[entry];
  if (threadIdx.x == 0 && p.unsettled[entry] != (settled ? unproven : kOldUnsettled)) {
    wrong(errors->unsettled);
  }
  if (static_cast<int>(threadIdx.x) < tile.rows) {
    const int64_t at = row_index(call, tile, head, tile.row0 + static_cast<int>(threadIdx.x));
    const bool written = settled && !(unproven >> threadIdx.x & 1);
    const float* threshold = written ? e.threshold : e.old_threshold;
    const int32_t* tie_index = written ? e.tie_index : e.old_tie_index;
    const bool same = __float_as_int(p.out.threshold[at]) == __float_as_int(threshold[at]) ||
                      (written && isnan(p.out.threshold[at]) && isnan(threshold[at]));
    if (!same) wrong(written ? errors->threshold : errors->untouched);
    if (p.out.tie_index[at] != tie_index[at]) wrong(written ? errors->tie_index : errors->untouched);
  }
  if (p.out.bitmap == nullptr) return;
  const uint32_t* bitmap = !settled ? e.old_bitmap : unproven != 0 ? e.marks : e.bitmap;
  for (int64_t w = threadIdx.x; w < words; w += 64) {
    if (p.out.bitmap[entry * words + w] != bitmap[entry * words + w]) {
      wrong(settled ? errors->bitmap : errors->untouched);
    }
  }
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
  Data data = Data::kRandom;
  int trouble = 0;
  bool upper = true;      // upper bounds are given
  bool extra = false;     // marks beyond what is needed
  bool in_place = false;  // bitmap over marks, bounds in threshold and tie_index
  bool no_bitmap = false;
  bool mixed = false;    // only about half of the tiles are settled
  bool strided = false;  // q and k are slices of one tensor (B, T, H + 2 Hkv, D)
  bool special = false;  // a key with an infinite channel, a NaN query
  double deep = 1.3;     // ranks of the bounds, in W
  double shallow = 0.75;
  std::vector<int> documents = {};
  bool timed = false;
};

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
Budget scaled(Budget b, double factor) {
  if (b.topk > 0) b.topk = std::max<int64_t>(1, std::llround(static_cast<double>(b.topk) * factor));
  b.ratio = std::min(1.0, b.ratio * factor);
  b.min_keys = std::max<int64_t>(1, std::llround(static_cast<double>(b.min_keys) * factor));
  return b;
}

class Memory {
 public:
  ~Memory() {
    for (void* p : owned_) cudaFree(p);
  }
  template <typename T>
  T* array(size_t n) {
    T* p = nullptr;
    CHECK(cudaMalloc(&p, std::max<size_t>(n, 1) * sizeof(T)));
    CHECK(cudaMemset(p, 0, std::max<size_t>(n, 1) * sizeof(T)));
    owned_.push_back(p);
    return p;
  }
  template <typename T>
  T* copy(const T* from, size_t n) {
    T* p = array<T>(n);
    CHECK(cudaMemcpy(p, from, n * sizeof(T), cudaMemcpyDefault));
    return p;
  }

 private:
  std::vector<void*> owned_;
};

template <typename Function>
float median_ms(Function run) {
  cudaEvent_t a;
  cudaEvent_t b;
  CHECK(cudaEventCreate(&a));
  CHECK(cudaEventCreate(&b));
  std::vector<float> values;
  run();
  for (int i = 0; i < 9; ++i) {
    CHECK(cudaEventRecord(a));
    run();
    CHECK(cudaEventRecord(b));
    CHECK(cudaEventSynchronize(b));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, a, b));
    values.push_back(ms);
  }
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

template <typename T>
bool run_case(const Case& c) {
  Memory memory;
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
  if (!c.documents.empty()) {
    std::vector<int2> tiles;
    std::vector<int> cu = {0};
    for (int n : c.documents) {
      for (int row = 0; row < n; row += kTileRows) {
        tiles.push_back(int2{static_cast<int>(cu.size()) - 1, row});
      }
      cu.push_back(cu.back() + n);
    }
    tiles.push_back(int2{-1, 0});
    call.tq = call.tk = cu.back();
    call.max_q = call.max_k = *std::max_element(c.documents.begin(), c.documents.end());
    call.batch = static_cast<int>(c.documents.size());
    call.cu_q = call.cu_k = memory.copy(cu.data(), cu.size());
    call.tiles = memory.copy(tiles.data(), tiles.size());
    call.num_tiles = static_cast<int>(tiles.size());
  } else {
    call.max_q = call.tq;
    call.max_k = call.tk;
    call.num_tiles = call.batch * ((call.tq + 63) / 64);
  }
  const int batches = c.documents.empty() ? c.batch : 1;
  call.rows = c.documents.empty() ? RowLayout{int64_t{c.heads} * call.tq, call.tq} : RowLayout{0, call.tq};
  if (c.strided) {
    const int64_t token = int64_t{c.heads + 2 * c.kv_heads} * c.dim;
    T* base = memory.array<T>(int64_t{batches} * call.tq * token);
    call.q = View{base, call.tq * token, token, c.dim};
    call.k = View{base + int64_t{c.heads} * c.dim, call.tq * token, token, c.dim};
  } else {
    const auto contiguous = [&](int64_t tokens, int heads) {
      T* base = memory.array<T>(tokens * batches * heads * c.dim);
      return View{base, tokens * heads * c.dim, int64_t{heads} * c.dim, c.dim};
    };
    call.q = contiguous(call.tq, c.heads);
    call.k = contiguous(call.tk, c.kv_heads);
  }
  const auto generate = [&](const View& v, int tokens, int heads, uint32_t seed, float share, float length,
                            bool tied) {
    const int n = batches * heads * c.dim;
    make_data<T><<<(n + 127) / 128, 128>>>(v, batches, tokens, heads, c.dim, seed, share, length, tied);
    CHECK(cudaGetLastError());
  };
  const bool real = c.data == Data::kRealLike;
  generate(call.q, call.tq, c.heads, 11, real ? 1.0f / (1.0f + 0.35f * 0.35f) : 0.0f, 400.0f, false);
  generate(call.k, call.tk, c.kv_heads, 22, real ? 0.8f : 0.0f, 50.0f, c.data == Data::kTied);
  if (c.special) {
    const uint16_t infinity = c.dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
    const uint16_t nan = 0x7fff;
    CHECK(cudaMemcpy(static_cast<uint16_t*>(call.k.data) + 5 * call.k.token + 3, &infinity, 2,
                     cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(static_cast<uint16_t*>(call.q.data) + 700 * call.q.token + 1, &nan, 2,
                     cudaMemcpyHostToDevice));
  }

  // The exact selection and those of the two ranks that become bounds.
  const int64_t row_values = int64_t{c.heads} * batches * call.tq;
  const int64_t entries = int64_t{c.heads} * call.num_tiles;
  const int64_t words = bitmap_words(call);
  const auto selection = [&] {
    Selection s;
    s.threshold = memory.array<float>(row_values);
    s.tie_index = memory.array<int32_t>(row_values);
    s.bitmap = memory.array<uint32_t>(entries * words);
    return s;
  };
  const Selection exact = selection();
  const Selection deep = selection();
  const Selection shallow = selection();
  Call deep_call = call;
  Call shallow_call = call;
  deep_call.budget = scaled(c.budget, c.deep);
  shallow_call.budget = scaled(c.budget, c.shallow);
  float* lower = memory.array<float>(row_values);
  float* upper = memory.array<float>(row_values);
  uint32_t* marks = memory.array<uint32_t>(entries * words);
  auto* unproven = memory.array<unsigned long long>(entries);
  const int64_t ld = (int64_t{call.max_k} + 63) / 64 * 64;
  const int units = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(call.num_tiles, (int64_t{1} << 27) / (ld * 64))));
  float* slab = memory.array<float>(units * 64 * ld);
  const auto each_slab = [&](auto&& body) {
    for (int head = 0; head < c.heads; ++head) {
      for (int first = 0; first < call.num_tiles; first += units) {
        const auto n = static_cast<unsigned>(std::min(units, call.num_tiles - first));
        slab_scores<T><<<dim3(static_cast<unsigned>(ld / 64), n), 128>>>(call, head, first, slab, ld);
        body(head, first, n);
        CHECK(cudaGetLastError());
      }
    }
  };
  each_slab([&](int head, int first, unsigned n) {
    slab_select<<<n * 64, 256>>>(call, head, first, slab, ld, exact, words);
    slab_select<<<n * 64, 256>>>(deep_call, head, first, slab, ld, deep, words);
    slab_select<<<n * 64, 256>>>(shallow_call, head, first, slab, ld, shallow, words);
  });
  make_bounds<<<static_cast<unsigned>((row_values + 255) / 256), 256>>>(deep.threshold, shallow.threshold,
                                                                        row_values, c.trouble, lower, upper);
  each_slab([&](int head, int first, unsigned n) {
    slab_mark<<<n * 64, 256>>>(call, head, first, slab, ld, lower, c.extra, marks, words, unproven);
  });
  int32_t* mark_count = memory.array<int32_t>(entries);
  int32_t* union_size = memory.array<int32_t>(entries);
  CHECK(count_union(call, marks, mark_count, nullptr));
  CHECK(count_union(call, exact.bitmap, union_size, nullptr));
  int32_t* ends = memory.array<int32_t>(entries);
  tile_ends<<<static_cast<unsigned>((entries + 255) / 256), 256>>>(call, entries, ends);
  CHECK(cudaDeviceSynchronize());
  const auto to_host = [&](const int32_t* p) {
    std::vector<int32_t> v(entries);
    CHECK(cudaMemcpy(v.data(), p, entries * 4, cudaMemcpyDeviceToHost));
    return v;
  };
  const std::vector<int32_t> marked = to_host(mark_count);
  const std::vector<int32_t> kept = to_host(union_size);
  const std::vector<int32_t> seen = to_host(ends);

  // The call. What it must not touch holds a pattern.
  sm90::SettleCall p;
  p.call = call;
  p.marks = marks;
  p.mark_count = mark_count;
  p.largest_share = 2.0f;
  if (c.mixed) {
    std::vector<double> shares;
    for (int64_t e = 0; e < entries; ++e) {
      if (seen[e] > 0) shares.push_back(static_cast<double>(marked[e]) / seen[e]);
    }
    std::sort(shares.begin(), shares.end());
    p.largest_share = static_cast<float>(shares[shares.size() / 2]);
  }
  p.lower = lower;
  p.upper = c.upper ? upper : nullptr;
  p.out.threshold = memory.copy(lower, row_values);
  p.out.tie_index = memory.copy(reinterpret_cast<const int32_t*>(upper), row_values);
  p.out.bitmap = nullptr;
  p.unsettled = memory.array<uint64_t>(entries);
  CHECK(cudaMemset(p.unsettled, 0x55, entries * 8));
  const uint32_t* old_bitmap = memory.copy(marks, entries * words);
  if (c.in_place) {
    p.lower = p.out.threshold;
    if (c.upper) p.upper = reinterpret_cast<const float*>(p.out.tie_index);
    p.out.bitmap = marks;
  } else if (!c.no_bitmap) {
    p.out.bitmap = memory.array<uint32_t>(entries * words);
    CHECK(cudaMemset(p.out.bitmap, 0x33, entries * words * 4));
    old_bitmap = memory.copy(p.out.bitmap, entries * words);
  }
  const Expected expected{exact.threshold,
                          exact.tie_index,
                          exact.bitmap,
                          unproven,
                          memory.copy(lower, row_values),
                          memory.copy(reinterpret_cast<const int32_t*>(upper), row_values),
                          old_bitmap,
                          memory.copy(marks, entries * words)};
  bool good = sm90::supports_settle(call);
  if (!good) std::printf("  FAILED: not supported\n");
  CHECK(sm90::settle(p, nullptr));
  Errors* errors = memory.array<Errors>(1);
  compare<<<static_cast<unsigned>(entries), 64>>>(p, expected, words, errors);
  CHECK(cudaGetLastError());
  Errors found{};
  CHECK(cudaMemcpy(&found, errors, sizeof found, cudaMemcpyDeviceToHost));

  double mark_sum = 0;
  double kept_sum = 0;
  double seen_sum = 0;
  for (int64_t e = 0; e < entries; ++e) {
    mark_sum += marked[e];
    kept_sum += kept[e];
    seen_sum += seen[e];
  }
  std::vector<unsigned long long> rows(entries);
  CHECK(cudaMemcpy(rows.data(), unproven, entries * 8, cudaMemcpyDeviceToHost));
  int64_t refused = 0;
  for (const unsigned long long r : rows) refused += __builtin_popcountll(r);
  std::printf("%s: marked %.4f, kept %.4f of what is seen, %lld rows not provable\n", c.name,
              mark_sum / std::max(seen_sum, 1.0), kept_sum / std::max(seen_sum, 1.0),
              static_cast<long long>(refused));
  if (found.threshold + found.tie_index + found.unsettled + found.bitmap + found.untouched > 0) {
    good = false;
    std::printf(
        "  FAILED: %d thresholds, %d tie indices, %d unsettled, %d bitmap words, %d that should be left "
        "alone; one of them at head %d, tile %d, row or word %d\n",
        found.threshold, found.tie_index, found.unsettled, found.bitmap, found.untouched, found.head,
        found.tile, found.row);
  }
  if (c.timed && good) {
    std::printf("  settle %.3f ms", median_ms([&] { CHECK(sm90::settle(p, nullptr)); }));
    sm90::SettleCall less = p;
    less.out.bitmap = nullptr;
    std::printf(", without bitmap %.3f ms", median_ms([&] { CHECK(sm90::settle(less, nullptr)); }));
    less = p;
    less.upper = nullptr;
    std::printf(", without upper bounds %.3f ms\n", median_ms([&] { CHECK(sm90::settle(less, nullptr)); }));
  }
  std::printf("  %s\n", good ? "ok" : "FAILED");
  std::fflush(stdout);
  return good;
}

bool run(const Case& c) {
  return c.dtype == DType::kFloat16 ? run_case<__half>(c) : run_case<__nv_bfloat16>(c);
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = argc < 2;
  bool time_1 = argc < 2;
  bool time_5 = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    quick |= word == "quick";
    time_1 |= word == "time";
    time_5 |= word == "time5";
  }
  bool good = true;
  if (quick) {
    const DType half = DType::kFloat16;
    const int all = kTooHigh | kBadUpper | kNaNLower;
    const std::vector<Case> cases = {
        {.name = "bf16 D128 GQA4 S1037 5%", .budget = keep_ratio(0.05)},
        {.name = "bf16 D128 GQA1 S1037 1%, no upper bounds",
         .heads = 2,
         .kv_heads = 2,
         .budget = keep_ratio(0.01),
         .upper = false},
        {.name = "bf16 D128 GQA4 S5000 W = 300, bad bounds, extra marks, in place",
         .tq = 5000,
         .tk = 5000,
         .budget = keep_topk(300),
         .trouble = all,
         .extra = true,
         .in_place = true},
        {.name = "fp16 D64 GQA1 S3001 tied, W = 50, bad bounds",
         .dtype = half,
         .dim = 64,
         .heads = 3,
         .kv_heads = 3,
         .tq = 3001,
         .tk = 3001,
         .budget = keep_topk(50),
         .data = Data::kTied,
         .trouble = all},
        {.name = "bf16 D128 S5000 tied, 30 %, in place",
         .heads = 2,
         .tq = 5000,
         .tk = 5000,
         .budget = keep_ratio(0.3),
         .data = Data::kTied,
         .in_place = true},
        {.name = "bf16 D64 GQA4 packed 5%",
         .dim = 64,
         .budget = keep_ratio(0.05),
         .trouble = kTooHigh,
         .documents = {1, 64, 65, 500, 0, 130, 1037}},
        {.name = "bf16 D128 GQA4 packed, half of the tiles, in place",
         .budget = keep_ratio(0.05),
         .data = Data::kRealLike,
         .trouble = kTooHigh,
         .in_place = true,
         .mixed = true,
         .documents = {700, 1, 200, 64, 1500, 129}},
        {.name = "fp16 D128 full 300 x 1500, batch 2",
         .dtype = half,
         .batch = 2,
         .tq = 300,
         .tk = 1500,
         .causal = false,
         .budget = keep_topk(40),
         .extra = true},
        {.name = "bf16 D64 causal 300 x 1500, no bitmap",
         .dim = 64,
         .tq = 300,
         .tk = 1500,
         .budget = keep_topk(12),
         .trouble = all,
         .no_bitmap = true},
        {.name = "bf16 D128 causal 900 x 700, W = all", .tq = 900, .tk = 700, .budget = keep_ratio(1.0)},
        {.name = "bf16 D128 causal, strided, batch 2",
         .heads = 8,
         .kv_heads = 2,
         .batch = 2,
         .tq = 513,
         .tk = 513,
         .budget = keep_ratio(0.1),
         .trouble = kTooHigh,
         .strided = true},
        {.name = "fp16 D64 S4097 real-like 1%, half of the tiles",
         .dtype = half,
         .dim = 64,
         .heads = 8,
         .kv_heads = 2,
         .tq = 4097,
         .tk = 4097,
         .budget = keep_ratio(0.01),
         .data = Data::kRealLike,
         .trouble = kTooHigh,
         .mixed = true},
        {.name = "bf16 D128 infinite key, NaN query",
         .heads = 16,
         .kv_heads = 4,
         .budget = keep_ratio(0.05),
         .in_place = true,
         .special = true},
        {.name = "fp16 D64 infinite key, NaN query, bad bounds",
         .dtype = half,
         .dim = 64,
         .heads = 16,
         .kv_heads = 4,
         .budget = keep_ratio(0.05),
         .trouble = all,
         .special = true},
    };
    for (const Case& c : cases) good &= run(c);
  }
  Case big{.name = "bf16 D128 H32 Hkv8 S32768 real-like 1%",
           .heads = 32,
           .kv_heads = 8,
           .tq = 32768,
           .tk = 32768,
           .budget = keep_ratio(0.01),
           .data = Data::kRealLike,
           .timed = true};
  if (time_1) {
    good &= run(big);
    Case narrow = big;
    narrow.name = "bf16 D64 H32 Hkv8 S32768 real-like 1%, rows that are not provable";
    narrow.dim = 64;
    narrow.trouble = kTooHigh;
    good &= run(narrow);
  }
  if (time_5) {
    big.name = "bf16 D128 H32 Hkv8 S32768 real-like 5%";
    big.budget = keep_ratio(0.05);
    big.deep = 1.2;
    big.shallow = 0.83;
    good &= run(big);
  }
  std::printf("%s\n", good ? "all ok" : "FAILED");
  return good ? 0 : 1;
}
