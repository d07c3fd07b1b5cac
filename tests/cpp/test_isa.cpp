// The CPU kernels of every instruction set this machine has, against one another: the same sets and encodings
// bit for bit, and nearly the same outputs and gradients. Only one of them runs in production on a given
// machine.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "catch_shim.h"
#include "cpu/table.h"
#include "params.h"

namespace topk_attn::cpu {
namespace generic {
extern const KernelTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
#endif
}  // namespace topk_attn::cpu

namespace {

using namespace topk_attn;

struct Isa {
  std::string name;
  const cpu::KernelTable* table;
  bool fused;  // scores are chains of fused multiply-adds
};

std::vector<Isa> available() {
  std::vector<Isa> found = {{"generic", &cpu::generic::kTable, false}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back({"avx2", &cpu::avx2::kTable, true});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
      found.push_back({"avx512", &cpu::avx512::kTable, true});
    }
  }
#endif
  return found;
}

void run_serial(const Executor&, int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  for (int64_t i = 0; i < tasks; ++i) body(context, i, 0);
}
const Executor kSerial{1, run_serial};

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Exact for the small multiples of 1/64 that the inputs are made of.
uint16_t to_float16(float x) {
  if (x == 0.0f) return 0;
  const int exponent = std::ilogb(x);
  const auto mantissa = static_cast<uint32_t>(std::ldexp(std::fabs(x), 10 - exponent)) & 0x3ffu;
  return static_cast<uint16_t>((x < 0 ? 0x8000u : 0u) | static_cast<uint32_t>(exponent + 15) << 10 |
                               mantissa);
}

// A tensor of `count` values in the storage of `dtype`.
std::vector<char> pack(DType dtype, const std::vector<float>& values) {
  const size_t size = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  std::vector<char> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    char* to = bytes.data() + i * size;
    if (dtype == DType::kFloat64) {
      const double x = values[i];
      std::memcpy(to, &x, size);
    } else if (dtype == DType::kFloat32) {
      std::memcpy(to, &values[i], size);
    } else {
      const uint16_t bits = dtype == DType::kBFloat16 ? to_bfloat16(values[i]) : to_float16(values[i]);
      std::memcpy(to, &bits, size);
    }
  }
  return bytes;
}

double value_at(DType dtype, const std::vector<char>& bytes, size_t i) {
  if (dtype == DType::kFloat64) {
    double x;
    std::memcpy(&x, bytes.data() + i * 8, 8);
    return x;
  }
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, bytes.data() + i * 4, 4);
    return x;
  }
  uint16_t half;
  std::memcpy(&half, bytes.data() + i * 2, 2);
  if (dtype == DType::kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = half >> 10 & 31;
  const double magnitude =
      exponent ? std::ldexp(1024 + (half & 1023), exponent - 25) : std::ldexp(half & 1023, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Values on a grid fine enough to be hard and coarse enough for float16; `integers`: every score is exact.
std::vector<float> draw(std::mt19937& random, size_t count, bool integers) {
  std::vector<float> values(count);
  for (auto& x : values) {
    x = integers ? static_cast<float>(static_cast<int>(random() % 5) - 2)
                 : static_cast<float>(static_cast<int>(random() % 257) - 128) / 64.0f;
  }
  return values;
}

struct Case {
  DType dtype;
  int64_t tq, tk, heads, kv_heads, dim, v_dim;
  bool kv_group = false;
  bool integers = false;
};

struct Output {
  std::vector<char> out, lse, threshold, dq, dk, dv;
  std::vector<int32_t> tie, kept;
};

int64_t acc_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}
DType acc_type(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}
int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

constexpr int64_t kTopk = 7;

Output run(const Isa& isa, const Case& c, uint32_t seed) {
  std::mt19937 random(seed);
  auto q = pack(c.dtype, draw(random, c.tq * c.heads * c.dim, c.integers));
  auto k = pack(c.dtype, draw(random, c.tk * c.kv_heads * c.dim, c.integers));
  auto v = pack(c.dtype, draw(random, c.tk * c.kv_heads * c.v_dim, false));
  auto dout = pack(c.dtype, draw(random, c.tq * c.heads * c.v_dim, false));
  const auto dense = [](std::vector<char>& x, int64_t heads, int64_t dim) {
    return View{x.data(), 0, heads * dim, dim};
  };
  const int64_t rows = c.heads * c.tq;
  Output o;
  o.out.resize(c.tq * c.heads * c.v_dim * size_of(c.dtype));
  o.lse.resize(rows * acc_size(c.dtype));
  o.threshold.resize(rows * acc_size(c.dtype));
  o.tie.resize(rows);
  o.kept.resize(rows * kTopk);
  std::vector<char> prob(rows * kTopk * acc_size(c.dtype));
  const Sequence sequence{0, 0, 0, c.tq, c.tk, 0};

  ForwardParams f;
  f.problem.dtype = c.dtype;
  f.problem.heads = c.heads;
  f.problem.kv_heads = c.kv_heads;
  f.problem.head_dim = c.dim;
  f.problem.v_dim = c.v_dim;
  f.problem.sequences = &sequence;
  f.problem.num_sequences = 1;
  f.problem.budget.topk = kTopk;
  f.problem.kv_group = c.kv_group;
  f.problem.sink = 1;
  f.problem.softmax_scale = 0.05;
  f.problem.rows = RowLayout{rows, c.tq};
  f.q = dense(q, c.heads, c.dim);
  f.k = dense(k, c.kv_heads, c.dim);
  f.v = dense(v, c.kv_heads, c.v_dim);
  f.out = dense(o.out, c.heads, c.v_dim);
  f.lse = o.lse.data();
  f.threshold = o.threshold.data();
  f.tie_index = o.tie.data();
  f.kept_index = o.kept.data();
  f.kept_prob = prob.data();
  f.kept_width = kTopk;
  f.pad_index = true;
  isa.table->forward[static_cast<int>(c.dtype)](f, kSerial);

  o.dq.resize(q.size());
  o.dk.resize(c.tk * c.kv_heads * c.dim * acc_size(c.dtype));
  o.dv.resize(c.tk * c.kv_heads * c.v_dim * acc_size(c.dtype));
  BackwardParams b;
  b.problem = f.problem;
  b.q = f.q;
  b.k = f.k;
  b.v = f.v;
  b.dout = dense(dout, c.heads, c.v_dim);
  b.dq = dense(o.dq, c.heads, c.dim);
  b.dk = dense(o.dk, c.kv_heads, c.dim);
  b.dv = dense(o.dv, c.kv_heads, c.v_dim);
  b.lse = o.lse.data();
  b.threshold = o.threshold.data();
  b.tie_index = o.tie.data();
  isa.table->backward[static_cast<int>(c.dtype)](b, kSerial);

  // Decode of the last token must give the training forward's row, bit for bit in the encoding.
  const Sequence last{0, 0, 0, 1, c.tk, 0};
  std::vector<char> out(c.heads * c.v_dim * size_of(c.dtype)), lse(c.heads * acc_size(c.dtype)),
      threshold(lse.size());
  std::vector<int32_t> tie(c.heads);
  CacheParams d;
  d.problem = f.problem;
  d.problem.sequences = &last;
  d.problem.rows = RowLayout{c.heads, 1};
  d.q = f.q;
  d.q.data = q.data() + (c.tq - 1) * c.heads * c.dim * size_of(c.dtype);
  d.k = f.k;
  d.v = f.v;
  d.out = dense(out, c.heads, c.v_dim);
  d.slots_per_entry = c.tk;
  d.lse = lse.data();
  d.threshold = threshold.data();
  d.tie_index = tie.data();
  isa.table->forward_kvcache[static_cast<int>(c.dtype)](d, kSerial);
  for (int64_t h = 0; h < c.heads; ++h) {
    const int64_t row = h * c.tq + c.tq - 1;
    REQUIRE(tie[h] == o.tie[row]);
    REQUIRE(std::memcmp(threshold.data() + h * acc_size(c.dtype),
                        o.threshold.data() + row * acc_size(c.dtype), acc_size(c.dtype)) == 0);
  }
  return o;
}

double largest_difference(DType dtype, const std::vector<char>& a, const std::vector<char>& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size() / size_of(dtype); ++i) {
    const double difference = std::fabs(value_at(dtype, a, i) - value_at(dtype, b, i));
    worst = difference > worst || std::isnan(difference) ? difference : worst;
  }
  return worst;
}

void compare(const Case& c, const Output& a, const Output& b) {
  CHECK(a.tie == b.tie);
  CHECK(a.kept == b.kept);
  CHECK(a.threshold == b.threshold);
  const double exact = c.dtype == DType::kFloat64 ? 1e-12 : 2e-5;
  const double stored = c.dtype == DType::kBFloat16 ? 2e-2 : c.dtype == DType::kFloat16 ? 2e-3 : exact;
  CHECK(largest_difference(acc_type(c.dtype), a.lse, b.lse) <= exact);
  CHECK(largest_difference(c.dtype, a.out, b.out) <= stored);
  CHECK(largest_difference(c.dtype, a.dq, b.dq) <= stored);
  CHECK(largest_difference(acc_type(c.dtype), a.dk, b.dk) <= exact);
  CHECK(largest_difference(acc_type(c.dtype), a.dv, b.dv) <= exact);
}

}  // namespace

TEST_CASE("every instruction set gives the same sets") {
  const auto isas = available();
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (bool kv_group : {false, true}) {
      for (bool integers : {false, true}) {
        const std::vector<Case> cases = {{dtype, 9, 50, 4, 2, 64, 32, kv_group, integers},
                                         {dtype, 40, 40, 2, 1, 16, 16, kv_group, integers},
                                         {dtype, 3, 700, 2, 2, 128, 16, kv_group, integers},
                                         {dtype, 25, 33, 8, 1, 256, 240, kv_group, integers},
                                         {dtype, 17, 90, 2, 1, 8, 24, kv_group, integers}};
        for (const Case& c : cases) {
          const Isa* first = nullptr;
          Output reference;
          for (const Isa& isa : isas) {
            // Without fused multiply-adds the last bits of a score differ, unless every score is exact.
            if (!isa.fused && !integers) continue;
            if (c.dim % isa.table->lanes != 0 || c.v_dim % isa.table->lanes != 0) continue;
            Output output = run(isa, c, 7);
            if (first == nullptr) {
              first = &isa;
              reference = std::move(output);
            } else {
              INFO(first->name << " and " << isa.name << ", dtype " << static_cast<int>(dtype) << ", D "
                               << c.dim);
              compare(c, reference, output);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("select_scores is the same on every instruction set") {
  std::mt19937 random(3);
  const int64_t rows = 20, n = 1111;
  std::vector<float> scores(rows * n);
  const float table[] = {0.0f, -0.0f, 1.0f, NAN, INFINITY, -INFINITY};
  for (auto& x : scores) {
    x = random() % 8 == 0 ? table[random() % 6]
                          : static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 8.0f;
  }
  const auto isas = available();
  for (int64_t topk : {1, 10, 100, 600, 1111, 2000}) {
    std::vector<float> reference_threshold;
    std::vector<int32_t> reference_tie, reference_indices;
    for (const Isa& isa : isas) {
      std::vector<float> threshold(rows);
      std::vector<int32_t> tie(rows), indices(rows * topk);
      SelectScoresParams p;
      p.scores = scores.data();
      p.row_stride = n;
      p.rows = rows;
      p.n = n;
      p.topk = topk;
      p.threshold = threshold.data();
      p.tie_index = tie.data();
      p.indices = indices.data();
      isa.table->select_scores[static_cast<int>(DType::kFloat32)](p, kSerial);
      if (reference_tie.empty()) {
        reference_threshold = threshold;
        reference_tie = tie;
        reference_indices = indices;
      } else {
        INFO(isa.name << ", topk " << topk);
        CHECK(tie == reference_tie);
        CHECK(indices == reference_indices);
        CHECK(std::memcmp(threshold.data(), reference_threshold.data(), rows * sizeof(float)) == 0);
      }
    }
  }
}
