// Checks the float32 path and the helpers without tensor cores on a GPU: tile lists, initial rows, scores,
// row selection, forward, delta, backward, gradient conversion, select_scores.
//
// Scores and selections are compared bit by bit with the contract's functions on the host; outputs and
// gradients with a float64 computation over the selected sets. Prints one line a failure and a summary; exits
// with 1 on a failure. Options: --quick leaves the long rows out; --time prints the time of select_rows() on
// slabs of 32,768 keys.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check_data.cuh"
#include "cuda/common/delta.h"
#include "cuda/common/schedule.h"
#include "cuda/common/select_scores.h"
#include "cuda/plain/plain.h"

namespace {

using namespace topk_attn;  // NOLINT: a test program
using cuda::Call;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int failures = 0;
int checks = 0;

void expect(bool good, const std::string& where, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 40) std::printf("FAIL %s: %s\n", where.c_str(), what.c_str());
}

void cuda_ok(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("CUDA error in %s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

// A device array with a guard of known bytes behind it.
template <typename T>
class Device {
 public:
  explicit Device(size_t n, int fill = 0xcc) : n_(n) {
    cuda_ok(cudaMalloc(&data_, n * sizeof(T) + kGuard), "cudaMalloc");
    cuda_ok(cudaMemset(data_, fill, n * sizeof(T) + kGuard), "cudaMemset");
    cuda_ok(cudaMemset(reinterpret_cast<char*>(data_) + n * sizeof(T), 0x5a, kGuard), "cudaMemset");
  }
  explicit Device(const std::vector<T>& v) : Device(v.size()) {
    cuda_ok(cudaMemcpy(data_, v.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~Device() { cudaFree(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  T* get() const { return data_; }
  std::vector<T> host(const std::string& where) const {
    cuda_ok(cudaDeviceSynchronize(), where.c_str());
    std::vector<T> v(n_);
    cuda_ok(cudaMemcpy(v.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), where.c_str());
    std::vector<unsigned char> guard(kGuard);
    cuda_ok(cudaMemcpy(guard.data(), reinterpret_cast<char*>(data_) + n_ * sizeof(T), kGuard,
                       cudaMemcpyDeviceToHost),
            where.c_str());
    expect(std::all_of(guard.begin(), guard.end(), [](unsigned char c) { return c == 0x5a; }), where,
           "wrote past the end of an array");
    return v;
  }

 private:
  static constexpr size_t kGuard = 256;
  T* data_ = nullptr;
  size_t n_;
};

bool same_bits(float a, float b) {
  uint32_t x, y;
  std::memcpy(&x, &a, 4);
  std::memcpy(&y, &b, 4);
  return x == y;
}

// ---------------------------------------------------------------------------------------------------------------
// The selection of one row, straight from the contract
// ---------------------------------------------------------------------------------------------------------------

struct Kept {
  float threshold = kNan;
  int32_t tie_index = -1;
  std::vector<int> keys;  // ascending
};

Kept select_reference(const std::vector<float>& scores, const RowPlan& plan) {
  Kept kept;
  std::vector<int> contested;
  for (int64_t j = plan.seen.begin; j < plan.seen.end; ++j) {
    if (plan.always_kept(j)) {
      kept.keys.push_back(static_cast<int>(j));
    } else {
      contested.push_back(static_cast<int>(j));
    }
  }
  const int64_t w = plan.contested_kept();
  const auto before = [&](int a, int b) {
    const int32_t x = order_key(scores[a]), y = order_key(scores[b]);
    return x != y ? x > y : a < b;
  };
  std::partial_sort(contested.begin(), contested.begin() + w, contested.end(), before);
  if (w > 0) {
    const int last = contested[w - 1];
    kept.threshold = order_score(order_key(scores[last]));
    kept.tie_index = last;
  }
  kept.keys.insert(kept.keys.end(), contested.begin(), contested.begin() + w);
  std::sort(kept.keys.begin(), kept.keys.end());
  return kept;
}

// ---------------------------------------------------------------------------------------------------------------
// Attention calls
// ---------------------------------------------------------------------------------------------------------------

enum class Data { kRandom, kTies, kSpecial };

struct Case {
  int heads = 2, kv_heads = 1, head_dim = 16, v_dim = 16;
  int batch = 1, tq = 64, tk = 64;  // dense
  std::vector<int> cu_q, cu_k;      // packed if not empty
  int max_q = 0, max_k = 0;         // packed
  bool causal = true, kv_group = false;
  Budget budget;
  int sink = 0, recent = 0;
  Data data = Data::kRandom;
  int pad = 0;         // extra channels between rows
  bool passes = true;  // forward and backward too
  bool dlse = true;
  std::string name() const {
    char text[256];
    std::snprintf(
        text, sizeof text,
        "H%d/%d D%d/%d B%d Tq%d Tk%d docs%d causal%d group%d topk%lld ratio%g sink%d recent%d data%d pad%d",
        heads, kv_heads, head_dim, v_dim, batch, tq, tk, static_cast<int>(cu_q.size()), causal, kv_group,
        static_cast<long long>(budget.topk), budget.ratio, sink, recent, static_cast<int>(data), pad);
    return text;
  }
};

// A (tokens, heads, dim) tensor whose rows are dim + pad apart.
struct Tensor {
  int heads, dim, pad;
  int64_t tokens;
  std::vector<float> values;
  Tensor(int64_t t, int h, int d, int p)
      : heads(h), dim(d), pad(p), tokens(t), values(t * h * (d + p), 0.0f) {}
  float* row(int64_t t, int h) { return values.data() + (t * heads + h) * (dim + pad); }
  View view(void* data, int64_t tokens_per_batch) const {
    const int64_t token = int64_t{heads} * (dim + pad);
    return View{data, token * tokens_per_batch, token, dim + pad};
  }
};

struct Document {
  int index, q, k, tq, tk;  // q, k: first token of the flattened tensors
};

std::vector<Document> documents_of(const Case& c) {
  std::vector<Document> list;
  if (c.cu_q.empty()) {
    for (int b = 0; b < c.batch; ++b) list.push_back({b, b * c.tq, b * c.tk, c.tq, c.tk});
    return list;
  }
  int most_q = 0, most_k = 0;
  for (int b = 0; b < c.batch; ++b) {
    const int q = c.cu_q[b], k = c.cu_k[b], q_end = c.cu_q[b + 1], k_end = c.cu_k[b + 1];
    most_q = std::max(most_q, q);
    most_k = std::max(most_k, k);
    const bool good = q >= most_q && k >= most_k && q_end >= q && k_end >= k && q_end <= c.tq &&
                      k_end <= c.tk && q_end - q <= c.max_q && k_end - k <= c.max_k;
    if (good) list.push_back({b, q, k, q_end - q, k_end - k});
  }
  return list;
}

class Attention {
 public:
  Attention(const Case& c, unsigned seed)
      : c_(c),
        name_(c.name()),
        packed_(!c.cu_q.empty()),
        tokens_q_(int64_t{packed_ ? 1 : c.batch} * c.tq),
        tokens_k_(int64_t{packed_ ? 1 : c.batch} * c.tk),
        rows_(tokens_q_ * c.heads),
        documents_(documents_of(c)),
        q_(tokens_q_, c.heads, c.head_dim, c.pad),
        k_(tokens_k_, c.kv_heads, c.head_dim, c.pad),
        v_(tokens_k_, c.kv_heads, c.v_dim, c.pad),
        dout_(tokens_q_, c.heads, c.v_dim, c.pad) {
    fill(seed);
  }

  void run() {
    Device<float> q(q_.values), k(k_.values), v(v_.values), dout(dout_.values);
    Device<int32_t> cu_q(c_.cu_q), cu_k(c_.cu_k);
    Call call;
    call.dtype = DType::kFloat32;
    call.heads = c_.heads;
    call.kv_heads = c_.kv_heads;
    call.head_dim = c_.head_dim;
    call.v_dim = c_.v_dim;
    call.batch = c_.batch;
    call.tq = c_.tq;
    call.tk = c_.tk;
    call.max_q = packed_ ? c_.max_q : c_.tq;
    call.max_k = packed_ ? c_.max_k : c_.tk;
    call.cu_q = packed_ ? cu_q.get() : nullptr;
    call.cu_k = packed_ ? cu_k.get() : nullptr;
    call.causal = c_.causal;
    call.kv_group = c_.kv_group;
    call.budget = c_.budget;
    call.sink = c_.sink;
    call.recent = c_.recent;
    call.softmax_scale = scale_ = static_cast<float>(1.0 / std::sqrt(static_cast<double>(c_.head_dim)));
    call.rows = RowLayout{int64_t{c_.heads} * c_.tq, c_.tq};
    call.q = q_.view(q.get(), c_.tq);
    call.k = k_.view(k.get(), c_.tk);
    call.v = v_.view(v.get(), c_.tk);
    call.num_tiles = packed_ ? (c_.tq + 63) / 64 + c_.batch : c_.batch * ((c_.tq + 63) / 64);
    Device<int2> tiles(call.num_tiles);
    const int num_key_tiles = (c_.tk + 63) / 64 + c_.batch;
    Device<int2> key_tiles(num_key_tiles);
    if (packed_) {
      cuda_ok(cuda::make_tiles(call, tiles.get(), nullptr), "make_tiles");
      cuda_ok(cuda::make_key_tiles(call, key_tiles.get(), num_key_tiles, nullptr), "make_key_tiles");
      call.tiles = tiles.get();
      check_tiles(tiles.host(name_), false);
      check_tiles(key_tiles.host(name_), true);
    }

    Device<float> out(rows_ * c_.v_dim), lse(rows_), threshold(rows_), delta(rows_);
    Device<int32_t> tie_index(rows_);
    const View out_view{out.get(), int64_t{c_.tq} * c_.heads * c_.v_dim, int64_t{c_.heads} * c_.v_dim,
                        c_.v_dim};
    cuda_ok(cuda::init_rows(call, out_view, lse.get(), threshold.get(), tie_index.get(), nullptr),
            "init_rows");
    check_initial(out.host(name_), lse.host(name_), threshold.host(name_), tie_index.host(name_));

    const int64_t words = cuda::bitmap_words(call);
    Device<uint32_t> bitmap(words * c_.heads * call.num_tiles, 0);
    const int64_t width = budget(call.max_k, c_.budget);
    Device<int32_t> indices(rows_ * width, 0xff);
    cuda::Selection selection{threshold.get(), tie_index.get(), bitmap.get(), indices.get(), width};
    reference_scores();
    select(call, selection);
    reference_selection();
    check_selection(call, threshold.host(name_), tie_index.host(name_), bitmap.host(name_),
                    indices.host(name_), width, words);
    if (!c_.passes) return;

    cuda::ForwardCall forward;
    forward.call = call;
    forward.threshold = threshold.get();
    forward.tie_index = tie_index.get();
    forward.bitmap = bitmap.get();
    forward.out = out_view;
    forward.lse = lse.get();
    cuda_ok(cuda::plain::forward(forward, nullptr), "forward");
    const std::vector<float> out_host = out.host(name_), lse_host = lse.host(name_);
    forward.bitmap = nullptr;
    cuda_ok(cuda::plain::forward(forward, nullptr), "forward");
    expect_same(out_host, out.host(name_), "out with and without bitmap");
    expect_same(lse_host, lse.host(name_), "lse with and without bitmap");

    std::vector<float> dlse_host(rows_);
    std::mt19937 generator(7);
    for (float& x : dlse_host) x = std::normal_distribution<float>()(generator);
    Device<float> dlse(dlse_host);
    const View dout_view = dout_.view(dout.get(), c_.tq);
    cuda_ok(cuda::delta(call, out_view, dout_view, c_.dlse ? dlse.get() : nullptr, lse.get(), delta.get(),
                        nullptr),
            "delta");
    Device<float> dq(rows_ * c_.head_dim), dk(tokens_k_ * c_.kv_heads * c_.head_dim),
        dv(tokens_k_ * c_.kv_heads * c_.v_dim);
    cuda::BackwardCall backward;
    backward.call = call;
    backward.threshold = threshold.get();
    backward.tie_index = tie_index.get();
    backward.bitmap = bitmap.get();
    backward.lse = lse.get();
    backward.delta = delta.get();
    backward.dout = dout_view;
    backward.dq =
        View{dq.get(), int64_t{c_.tq} * c_.heads * c_.head_dim, int64_t{c_.heads} * c_.head_dim, c_.head_dim};
    backward.dk = View{dk.get(), int64_t{c_.tk} * c_.kv_heads * c_.head_dim,
                       int64_t{c_.kv_heads} * c_.head_dim, c_.head_dim};
    backward.dv =
        View{dv.get(), int64_t{c_.tk} * c_.kv_heads * c_.v_dim, int64_t{c_.kv_heads} * c_.v_dim, c_.v_dim};
    cuda_ok(cuda::plain::backward(backward, key_tiles.get(), num_key_tiles, nullptr), "backward");
    const std::vector<float> dq_host = dq.host(name_), dk_host = dk.host(name_), dv_host = dv.host(name_);
    backward.bitmap = nullptr;
    cuda_ok(cuda::plain::backward(backward, key_tiles.get(), num_key_tiles, nullptr), "backward");
    expect_same(dq_host, dq.host(name_), "dq with and without bitmap");
    expect_same(dk_host, dk.host(name_), "dk with and without bitmap");
    expect_same(dv_host, dv.host(name_), "dv with and without bitmap");
    check_passes(out_host, lse_host, delta.host(name_), dlse_host, dq_host, dk_host, dv_host);
  }

 private:
  int64_t row(const Document& d, int h, int i) const {
    const int64_t b = packed_ ? 0 : d.index;
    return b * c_.heads * c_.tq + int64_t{h} * c_.tq + (d.q - b * c_.tq) + i;
  }

  void fill(unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (Tensor* t : {&q_, &k_, &v_, &dout_}) {
      for (float& x : t->values) x = normal(generator);
    }
    if (c_.data == Data::kTies) {
      // Few distinct, exactly computed scores; many keys are equal.
      for (Tensor* t : {&q_, &k_}) {
        for (float& x : t->values) x = static_cast<float>(static_cast<int>(generator() % 3) - 1);
      }
      for (int64_t t = 1; t < tokens_k_; t += 2) {
        for (int h = 0; h < c_.kv_heads; ++h) std::copy_n(k_.row(t - 1, h), c_.head_dim, k_.row(t, h));
      }
    }
    if (c_.data == Data::kSpecial) {
      for (int64_t t = 0; t < tokens_q_; ++t) {
        for (int h = 0; h < c_.heads; ++h) q_.row(t, h)[0] = 1.0f;
      }
      // The first keys score -inf: early rows see nothing else. One key in 50 scores +inf or NaN.
      for (int64_t t = 0; t < tokens_k_; ++t) {
        for (int h = 0; h < c_.kv_heads; ++h) {
          float* const key = k_.row(t, h);
          if (t < 20 || t % 7 == 0) key[0] = -kInf;
          if (t > 40 && t % 50 == 0) key[0] = h % 2 == 0 ? kInf : kNan;
        }
      }
      if (tokens_q_ > 30) q_.row(30, 0)[c_.head_dim - 1] = kNan;
    }
  }

  void reference_scores() {
    scores_.resize(documents_.size());
    for (size_t n = 0; n < documents_.size(); ++n) {
      const Document& d = documents_[n];
      scores_[n].resize(size_t(c_.heads) * d.tq * d.tk);
      for (int h = 0; h < c_.heads; ++h) {
        for (int i = 0; i < d.tq; ++i) {
          const float* const a = q_.row(d.q + i, h);
          for (int j = 0; j < d.tk; ++j) {
            const float* const b = k_.row(d.k + j, h / (c_.heads / c_.kv_heads));
            float s = 0.0f;
            for (int x = 0; x < c_.head_dim; ++x) s = std::fmaf(a[x], b[x], s);
            scores_[n][(size_t(h) * d.tq + i) * d.tk + j] = s;
          }
        }
      }
    }
  }

  // In two slabs, so that the second one starts inside the call.
  void select(const Call& call, const cuda::Selection& selection) {
    const int64_t units = cuda::num_units(call);
    const int group = c_.kv_group ? c_.heads / c_.kv_heads : 1;
    const int64_t half = units / group / 2 * group;
    const int64_t ld = (int64_t{call.max_k} + 3) / 4 * 4;
    for (const auto& [first, count] : {std::pair{int64_t{0}, half}, std::pair{half, units - half + group}}) {
      if (count <= 0 || ld == 0) continue;
      Device<float> slab(count * 64 * ld, 0xff);  // NaN where nothing is written
      cuda_ok(cuda::plain::scores(call, first, count, slab.get(), ld, nullptr), "scores");
      check_scores(call, first, std::min(count, units - first), slab.host(name_), ld);
      cuda_ok(cuda::select_rows(call, cuda::ScoreSlab{slab.get(), ld, first, count}, selection, nullptr),
              "select_rows");
      cuda_ok(cudaDeviceSynchronize(), "select_rows");
    }
  }

  // (document, first row) of a tile; document -1: unused.
  std::pair<int, int> tile_at(int tile) const {
    for (size_t n = 0; n < documents_.size(); ++n) {
      const int own = (documents_[n].tq + 63) / 64;
      if (tile < own) return {static_cast<int>(n), tile * 64};
      tile -= own;
    }
    return {-1, 0};
  }

  void check_scores(const Call& call, int64_t first, int64_t count, const std::vector<float>& slab,
                    int64_t ld) {
    int wrong = 0;
    for (int64_t u = 0; u < count; ++u) {
      const cuda::Unit unit = cuda::unit_at(call, first + u);
      const auto [n, row0] = tile_at(unit.tile);
      if (n < 0) continue;
      const Document& d = documents_[n];
      const int rows = std::min(64, d.tq - row0);
      const int64_t seen = visible(row0 + rows - 1, d.tq, d.tk, c_.causal).end;
      for (int r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < seen; ++j) {
          const float got = slab[(u * 64 + r) * ld + j];
          const float want = scores_[n][(size_t(unit.head) * d.tq + row0 + r) * d.tk + j];
          wrong += !(same_bits(got, want) || (std::isnan(got) && std::isnan(want)));
        }
      }
    }
    expect(wrong == 0, name_, std::to_string(wrong) + " scores differ from the chain of fused multiply-adds");
  }

  void reference_selection() {
    kept_.assign(documents_.size(), {});
    const int group = c_.kv_group ? c_.heads / c_.kv_heads : 1;
    for (size_t n = 0; n < documents_.size(); ++n) {
      const Document& d = documents_[n];
      for (int h = 0; h < c_.heads; ++h) {
        for (int i = 0; i < d.tq; ++i) {
          std::vector<float> row(d.tk);
          for (int j = 0; j < d.tk; ++j) {
            int32_t best = std::numeric_limits<int32_t>::min();
            for (int g = h / group * group; g < (h / group + 1) * group; ++g) {
              best = std::max(best, order_key(scores_[n][(size_t(g) * d.tq + i) * d.tk + j]));
            }
            row[j] = order_score(best);
          }
          kept_[n].push_back(select_reference(
              row, plan_row(visible(i, d.tq, d.tk, c_.causal), c_.budget, c_.sink, c_.recent)));
        }
      }
    }
  }

  const Kept& kept(size_t n, int h, int i) const { return kept_[n][size_t(h) * documents_[n].tq + i]; }

  void check_tiles(const std::vector<int2>& tiles, bool keys) {
    size_t at = 0;
    bool good = true;
    for (const Document& d : documents_) {
      for (int i = 0; i < (keys ? d.tk : d.tq); i += 64, ++at) {
        good = good && at < tiles.size() && tiles[at].x == d.index && tiles[at].y == i;
      }
    }
    for (; at < tiles.size(); ++at) good = good && tiles[at].x == -1;
    expect(good, name_, keys ? "key tiles" : "query tiles");
  }

  void check_initial(const std::vector<float>& out, const std::vector<float>& lse,
                     const std::vector<float>& threshold, const std::vector<int32_t>& tie_index) {
    bool good = true;
    for (float x : out) good = good && same_bits(x, 0.0f);
    for (float x : lse) good = good && x == -kInf;
    for (float x : threshold) good = good && std::isnan(x);
    for (int32_t x : tie_index) good = good && x == -1;
    expect(good, name_, "init_rows");
  }

  void check_selection(const Call& call, const std::vector<float>& threshold,
                       const std::vector<int32_t>& tie_index, const std::vector<uint32_t>& bitmap,
                       const std::vector<int32_t>& indices, int64_t width, int64_t words) {
    int wrong_threshold = 0, wrong_tie = 0, wrong_indices = 0, wrong_gap = 0;
    std::vector<uint32_t> bits(bitmap.size(), 0);
    std::vector<bool> covered(rows_, false);
    int tile0 = 0;
    for (size_t n = 0; n < documents_.size(); ++n) {
      const Document& d = documents_[n];
      for (int h = 0; h < c_.heads; ++h) {
        for (int i = 0; i < d.tq; ++i) {
          const int64_t at = row(d, h, i);
          const Kept& want = kept(n, h, i);
          covered[at] = true;
          wrong_threshold += !same_bits(threshold[at], want.threshold);
          wrong_tie += tie_index[at] != want.tie_index;
          for (int64_t x = 0; x < width; ++x) {
            wrong_indices += indices[at * width + x] != (x < int64_t(want.keys.size()) ? want.keys[x] : -1);
          }
          for (int j : want.keys) {
            bits[(int64_t{h} * call.num_tiles + tile0 + i / 64) * words + j / 32] |= 1u << (j % 32);
          }
        }
      }
      tile0 += (d.tq + 63) / 64;
    }
    for (int64_t at = 0; at < rows_; ++at) {
      if (!covered[at]) wrong_gap += !std::isnan(threshold[at]) || tie_index[at] != -1;
    }
    expect(wrong_threshold == 0, name_, std::to_string(wrong_threshold) + " thresholds");
    expect(wrong_tie == 0, name_, std::to_string(wrong_tie) + " tie indices");
    expect(wrong_indices == 0, name_, std::to_string(wrong_indices) + " kept indices");
    expect(wrong_gap == 0, name_, std::to_string(wrong_gap) + " rows outside the documents were written");
    expect(bits == bitmap, name_, "bitmap");
  }

  void expect_same(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
    expect(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0, name_, what);
  }

  // Item i belongs to row i / dim of `untouched`, whose items must be exactly zero.
  void expect_close(const std::vector<float>& got, const std::vector<double>& want, double tolerance,
                    const std::string& what, const std::vector<bool>& untouched = {}, int dim = 1) {
    double largest = 1.0;
    for (double x : want) {
      if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
    }
    double worst = 0.0;
    int wrong = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      if (std::isnan(want[i]) || std::isinf(want[i])) {
        wrong += std::isnan(want[i]) ? !std::isnan(got[i]) : got[i] != static_cast<float>(want[i]);
      } else if (!untouched.empty() && untouched[i / dim]) {
        wrong += got[i] != 0.0f;
      } else if (!std::isfinite(got[i])) {
        ++wrong;
      } else {
        worst = std::max(worst, std::abs(got[i] - want[i]) / largest);
      }
    }
    char text[160];
    std::snprintf(text, sizeof text, "%s: error %.2e of %.0e, %d special values", what.c_str(), worst,
                  tolerance, wrong);
    expect(wrong == 0 && worst <= tolerance, name_, text);
  }

  void check_passes(const std::vector<float>& out, const std::vector<float>& lse,
                    const std::vector<float>& delta, const std::vector<float>& dlse,
                    const std::vector<float>& dq, const std::vector<float>& dk,
                    const std::vector<float>& dv) {
    const int group = c_.heads / c_.kv_heads;
    std::vector<double> out_want(out.size(), 0.0), lse_want(lse.size(), -INFINITY), dq_want(dq.size(), 0.0),
        dk_want(dk.size(), 0.0), dv_want(dv.size(), 0.0), delta_want(delta.size(), 0.0);
    std::vector<bool> covered(rows_, false);
    std::vector<bool> idle_queries(rows_, true);  // that keep nothing, or only -inf
    std::vector<bool> idle_keys(tokens_k_ * c_.kv_heads, true);
    for (size_t n = 0; n < documents_.size(); ++n) {
      const Document& d = documents_[n];
      for (int h = 0; h < c_.heads; ++h) {
        for (int i = 0; i < d.tq; ++i) {
          const int64_t at = row(d, h, i);
          covered[at] = true;
          const std::vector<int>& keys = kept(n, h, i).keys;
          const int64_t q_row = int64_t{d.q + i} * c_.heads + h;
          const float* const query = q_.row(d.q + i, h);
          const float* const dout = dout_.row(d.q + i, h);
          std::vector<double> p(keys.size());
          double largest = -INFINITY, total = 0.0;
          bool nan = false;
          for (size_t x = 0; x < keys.size(); ++x) {
            const float* const key = k_.row(d.k + keys[x], h / group);
            double s = 0.0;
            for (int e = 0; e < c_.head_dim; ++e) s += double(query[e]) * key[e];
            p[x] = s * scale_;
            nan = nan || std::isnan(p[x]) || p[x] == INFINITY;
            largest = std::max(largest, p[x]);
          }
          double* const o = &out_want[q_row * c_.v_dim];
          double own_delta = c_.dlse ? -double(dlse[at]) : 0.0;
          if (nan) {
            lse_want[at] = NAN;
            std::fill(p.begin(), p.end(), NAN);
          } else if (largest == -INFINITY) {
            std::fill(p.begin(), p.end(), 0.0);
          } else {
            for (double& x : p) total += x = std::exp(x - largest);
            for (double& x : p) x /= total;
            lse_want[at] = largest + std::log(total);
          }
          for (size_t x = 0; x < keys.size(); ++x) {
            for (int e = 0; e < c_.v_dim; ++e) o[e] += p[x] * v_.row(d.k + keys[x], h / group)[e];
          }
          for (int e = 0; e < c_.v_dim; ++e) own_delta += o[e] * dout[e];
          delta_want[at] = own_delta;
          idle_queries[q_row] = lse_want[at] == -INFINITY;
          for (size_t x = 0; x < keys.size(); ++x) {
            const float* const key = k_.row(d.k + keys[x], h / group);
            const float* const value = v_.row(d.k + keys[x], h / group);
            const int64_t k_row = int64_t{d.k + keys[x]} * c_.kv_heads + h / group;
            idle_keys[k_row] = false;
            double dp = 0.0;
            for (int e = 0; e < c_.v_dim; ++e) {
              dp += double(dout[e]) * value[e];
              dv_want[k_row * c_.v_dim + e] += p[x] * dout[e];
            }
            const double ds = p[x] * (dp - own_delta) * scale_;
            if (ds == 0.0) continue;  // zero times an infinite channel adds nothing
            for (int e = 0; e < c_.head_dim; ++e) {
              dq_want[q_row * c_.head_dim + e] += ds * key[e];
              dk_want[k_row * c_.head_dim + e] += ds * query[e];
            }
          }
        }
      }
    }
    std::vector<float> delta_rows = delta;
    for (int64_t at = 0; at < rows_; ++at) {
      if (!covered[at]) delta_rows[at] = 0.0f;
    }
    expect_close(out, out_want, 1e-5, "out", idle_queries, c_.v_dim);
    expect_close(lse, lse_want, 1e-5, "lse");
    expect_close(delta_rows, delta_want, 1e-4, "delta");
    expect_close(dq, dq_want, 1e-4, "dq", idle_queries, c_.head_dim);
    expect_close(dk, dk_want, 1e-4, "dk", idle_keys, c_.head_dim);
    expect_close(dv, dv_want, 1e-4, "dv", idle_keys, c_.v_dim);
  }

  Case c_;
  std::string name_;
  bool packed_;
  int64_t tokens_q_, tokens_k_, rows_;
  std::vector<Document> documents_;
  Tensor q_, k_, v_, dout_;
  float scale_ = 1.0f;
  std::vector<std::vector<float>> scores_;  // per document (H, Tq, Tk)
  std::vector<std::vector<Kept>> kept_;     // per document (H, Tq)
};

Budget of_topk(int64_t topk) {
  return Budget{topk, 0.0, 1, kNoLimit};
}
Budget of_ratio(double ratio, int64_t min_keys = 1) {
  return Budget{0, ratio, min_keys, kNoLimit};
}

void check_attention(bool quick) {
  unsigned seed = 1;
  const auto run = [&](const Case& c) { Attention(c, ++seed).run(); };

  for (int s = 1; s <= 130; s += quick && s > 8 ? 13 : 1) {
    Case c;
    c.tq = c.tk = s;
    c.head_dim = c.v_dim = 8;
    c.data = s % 2 == 0 ? Data::kTies : Data::kRandom;
    c.budget = s % 3 == 0 ? of_ratio(0.1) : of_topk(1 + s % 5);
    run(c);
  }
  const std::vector<std::pair<int, int>> shapes =
      quick ? std::vector<std::pair<int, int>>{{40, 70}}
            : std::vector<std::pair<int, int>>{{100, 100}, {40, 150}, {150, 90}};
  for (const auto& [tq, tk] : shapes) {
    for (const bool causal : {true, false}) {
      for (const bool kv_group : {false, true}) {
        for (const Data data : {Data::kRandom, Data::kTies, Data::kSpecial}) {
          Case c;
          c.heads = 4;
          c.kv_heads = 2;
          c.batch = 2;
          c.tq = tq;
          c.tk = tk;
          c.causal = causal;
          c.kv_group = kv_group;
          c.data = data;
          for (const Budget& b : {of_topk(1), of_topk(17), of_ratio(0.3), of_ratio(1.0), of_topk(1000)}) {
            c.budget = b;
            c.sink = c.recent = 0;
            run(c);
            c.sink = 3;
            c.recent = 9;
            run(c);
          }
        }
      }
    }
  }
  for (const auto& [d, dv] :
       std::vector<std::pair<int, int>>{{64, 64}, {40, 72}, {128, 64}, {72, 136}, {256, 256}, {200, 8}}) {
    Case c;
    c.head_dim = d;
    c.v_dim = dv;
    c.tq = c.tk = 77;
    c.pad = 4;
    c.budget = of_topk(9);
    c.dlse = false;
    run(c);
    c.kv_group = true;
    run(c);
  }
  // Empty documents, one of one token, gaps are not possible with good offsets.
  Case packed;
  packed.heads = 4;
  packed.kv_heads = 2;
  packed.batch = 7;
  packed.cu_q = {0, 0, 70, 71, 71, 110, 110, 140};
  packed.cu_k = {0, 5, 75, 76, 120, 120, 120, 220};
  packed.tq = 150;  // rows behind the last document
  packed.tk = 230;
  packed.max_q = 70;
  packed.max_k = 100;
  for (const bool kv_group : {false, true}) {
    for (const bool causal : {true, false}) {
      packed.kv_group = kv_group;
      packed.causal = causal;
      packed.budget = of_ratio(0.2, 2);
      packed.sink = kv_group ? 2 : 0;
      run(packed);
    }
  }
  // Bad offsets: too long, descending, beyond the total, below an earlier one.
  packed.max_q = 60;
  run(packed);
  packed.max_q = 70;
  packed.cu_q = {0, 40, 30, 60, 60, 1000, 100, 140};
  run(packed);
  packed.cu_q = {0, 10, 20, 30, 40, 50, 60, 140};
  packed.cu_k = {0, -5, 20, 90, 80, 85, 120, 1 << 30};
  run(packed);
  // Very many documents.
  Case many;
  many.batch = 3000;
  many.heads = many.kv_heads = 1;
  many.head_dim = many.v_dim = 8;
  many.cu_q.assign(1, 0);
  many.cu_k.assign(1, 0);
  for (int i = 0; i < many.batch; ++i) {
    many.cu_q.push_back(many.cu_q.back() + (i * 7 + 3) % 5 / 2);
    many.cu_k.push_back(many.cu_k.back() + (i * 5 + 1) % 7 / 2);
  }
  many.tq = many.cu_q.back();
  many.tk = many.cu_k.back();
  many.max_q = many.max_k = 3;
  many.budget = of_topk(2);
  run(many);
  if (quick) return;
  // Rows longer than the candidates' room: sampled, radix select, everything; all with ties too.
  for (const int tk : {2049, 5003}) {
    for (const Data data : {Data::kRandom, Data::kTies}) {
      for (const bool kv_group : {false, true}) {
        for (const Budget& b : {of_topk(1), of_ratio(0.01), of_topk(300), of_ratio(0.4), of_ratio(1.0)}) {
          Case c;
          c.tq = 66;
          c.tk = tk;
          c.head_dim = c.v_dim = 8;
          c.data = data;
          c.kv_group = kv_group;
          c.sink = data == Data::kTies ? 5 : 0;
          c.recent = c.sink * 20;
          c.budget = b;
          c.passes = b.topk == 300;
          run(c);
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// select_scores, delta and finish_gradients in every dtype
// ---------------------------------------------------------------------------------------------------------------

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, float>    ? DType::kFloat32
         : std::is_same_v<T, __half> ? DType::kFloat16
                                     : DType::kBFloat16;
}

template <typename T>
void check_select_scores(int n, int64_t topk, int kind, bool with_lengths, int stride_extra) {
  const int rows = 5;
  const int64_t stride = n + stride_extra;
  std::mt19937 generator(n * 31 + static_cast<int>(topk) + kind);
  std::normal_distribution<float> normal;
  std::vector<T> scores(rows * stride + 1);
  for (int64_t i = 0; i < int64_t(scores.size()); ++i) {
    float x = normal(generator);
    if (kind == 1) x = static_cast<float>(static_cast<int>(generator() % 3) - 1);
    if (kind == 2) x = generator() % 2 == 0 ? 0.0f : -0.0f;
    if (kind == 3) {
      const unsigned r = generator() % 40;
      x = r == 0 ? kNan : r == 1 ? kInf : r < 8 ? -kInf : x;
    }
    if (kind == 4) x = static_cast<float>(i % stride);              // ascending
    if (kind == 5) x = i % stride % 512 < 4 ? 5.0f + x : x * 0.1f;  // what a sample may hit or miss
    scores[i] = static_cast<T>(x);
  }
  std::vector<int32_t> lengths = {n / 2, 0, -3, n + 10, 1};
  Device<T> scores_device(scores);
  Device<int32_t> lengths_device(lengths);
  Device<float> threshold(rows);
  Device<int32_t> tie_index(rows), indices(rows * topk);
  SelectScoresParams params;
  params.dtype = dtype_of<T>();
  params.scores = scores_device.get();
  params.row_stride = stride;
  params.rows = rows;
  params.n = n;
  params.topk = topk;
  params.lengths = with_lengths ? lengths_device.get() : nullptr;
  params.threshold = threshold.get();
  params.tie_index = tie_index.get();
  params.indices = indices.get();
  char name[128];
  std::snprintf(name, sizeof name, "select_scores dtype%d n%d topk%lld kind%d lengths%d",
                static_cast<int>(params.dtype), n, static_cast<long long>(topk), kind, with_lengths);
  cuda_ok(cuda::select_scores(params, nullptr), name);
  const std::vector<float> got_threshold = threshold.host(name);
  const std::vector<int32_t> got_tie = tie_index.host(name), got_indices = indices.host(name);
  int wrong = 0, wrong_indices = 0;
  for (int r = 0; r < rows; ++r) {
    const int length = with_lengths ? std::clamp(lengths[r], 0, n) : n;
    std::vector<float> row(length);
    for (int j = 0; j < length; ++j) row[j] = static_cast<float>(scores[r * stride + j]);
    const Kept want = select_reference(row, plan_row(Span{0, length}, of_topk(topk), 0, 0));
    wrong += !same_bits(got_threshold[r], want.threshold) || got_tie[r] != want.tie_index;
    for (int64_t x = 0; x < topk; ++x) {
      wrong_indices += got_indices[r * topk + x] != (x < int64_t(want.keys.size()) ? want.keys[x] : -1);
    }
  }
  expect(wrong == 0, name, std::to_string(wrong) + " encodings");
  expect(wrong_indices == 0, name, std::to_string(wrong_indices) + " indices");
}

void check_select_scores_all(bool quick) {
  std::vector<int> sizes = {1, 2, 65, 2048, 2049};
  if (!quick) sizes.insert(sizes.end(), {3, 4, 5, 31, 33, 127, 130, 1023, 2047, 2052, 5001, 33001, 70002});
  for (const int n : sizes) {
    const bool large = n > 10000;  // the host's sorting takes most of the time
    for (int kind = 0; kind < 6; ++kind) {
      std::vector<int64_t> counts = {1, n / 100 + 1, n / 2 + 1, int64_t{n} + 3};
      if (!large) counts.insert(counts.end(), {7, n});
      for (const int64_t topk : counts) {
        check_select_scores<float>(n, topk, kind, (n + kind) % 2 == 0, n % 3);
        if (kind == 4 || (large && kind > 0)) continue;
        check_select_scores<__nv_bfloat16>(n, topk, kind, kind == 1, n % 5);
        check_select_scores<__half>(n, topk, kind, kind == 2, 0);
      }
    }
  }
}

template <typename T>
void check_helpers(int v_dim, int offset) {
  const int heads = 3, tq = 37, batch = 2;
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  std::vector<T> out(batch * tq * heads * v_dim),
      dout(heads * v_dim + offset);  // dout is the same for every token
  for (T& x : out) x = static_cast<T>(normal(generator));
  for (T& x : dout) x = static_cast<T>(normal(generator));
  std::vector<float> dlse(batch * heads * tq);
  for (float& x : dlse) x = normal(generator);
  Device<T> out_device(out), dout_device(dout);
  Device<float> dlse_device(dlse), delta(dlse.size());
  Call call;
  call.dtype = dtype_of<T>();
  call.heads = heads;
  call.kv_heads = heads;
  call.head_dim = call.v_dim = v_dim;
  call.batch = batch;
  call.tq = call.tk = call.max_q = call.max_k = tq;
  call.rows = RowLayout{heads * tq, tq};
  const View out_view{out_device.get(), int64_t{tq} * heads * v_dim, int64_t{heads} * v_dim, v_dim};
  const View dout_view{dout_device.get() + offset, 0, 0, v_dim};
  const std::string name =
      "delta dtype" + std::to_string(static_cast<int>(call.dtype)) + " Dv" + std::to_string(v_dim);
  cuda_ok(cuda::delta(call, out_view, dout_view, dlse_device.get(), nullptr, delta.get(), nullptr),
          name.c_str());
  const std::vector<float> got = delta.host(name);
  double worst = 0.0;
  for (int b = 0; b < batch; ++b) {
    for (int t = 0; t < tq; ++t) {
      for (int h = 0; h < heads; ++h) {
        const int row = (b * heads + h) * tq + t;
        double want = -dlse[row];
        for (int e = 0; e < v_dim; ++e) {
          want += double(static_cast<float>(out[((b * tq + t) * heads + h) * v_dim + e])) *
                  static_cast<float>(dout[offset + h * v_dim + e]);
        }
        worst = std::max(worst, std::abs(got[row] - want));
      }
    }
  }
  expect(worst < 1e-4, name, "error " + std::to_string(worst));

  // Sums to the dtype, into a view with gaps.
  const int64_t rows = int64_t{batch} * tq * heads;
  std::vector<float> sums(rows * v_dim);
  for (float& x : sums) x = normal(generator);
  const int pitch = v_dim + offset;
  Device<float> sums_device(sums);
  Device<T> dk(rows * pitch + offset), dv(rows * v_dim);
  const View dk_view{dk.get() + offset, int64_t{tq} * heads * pitch, int64_t{heads} * pitch, pitch};
  const View dv_view{dv.get(), int64_t{tq} * heads * v_dim, int64_t{heads} * v_dim, v_dim};
  cuda_ok(cuda::finish_gradients(call, sums_device.get(), sums_device.get(), dk_view, dv_view, nullptr),
          name.c_str());
  const std::vector<T> got_dk = dk.host(name), got_dv = dv.host(name);
  int wrong = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int e = 0; e < v_dim; ++e) {
      const float want = static_cast<float>(static_cast<T>(sums[r * v_dim + e]));
      wrong += !same_bits(static_cast<float>(got_dk[offset + r * pitch + e]), want);
      wrong += !same_bits(static_cast<float>(got_dv[r * v_dim + e]), want);
    }
  }
  expect(wrong == 0, name, std::to_string(wrong) + " converted sums");
}

// ---------------------------------------------------------------------------------------------------------------
// Time
// ---------------------------------------------------------------------------------------------------------------

void time_select_rows() {
  const int s = 32768, slab_tiles = 4;
  Device<float> slab(int64_t{slab_tiles} * 64 * s);
  cuda::fill_normal<<<1024, 256>>>(slab.get(), static_cast<size_t>(slab_tiles) * 64 * s, 1);
  Call call;
  call.heads = call.kv_heads = 1;
  call.batch = 1;
  call.tq = call.tk = call.max_q = call.max_k = s;
  call.num_tiles = s / 64;
  call.rows = RowLayout{s, s};
  Device<float> threshold(s);
  Device<int32_t> tie_index(s);
  Device<uint32_t> bitmap(cuda::bitmap_words(call) * call.num_tiles, 0);
  cudaEvent_t start, stop;
  cuda_ok(cudaEventCreate(&start), "event");
  cuda_ok(cudaEventCreate(&stop), "event");
  for (const int64_t w : {int64_t{1}, int64_t{328}, int64_t{2048}, int64_t{8192}, int64_t{s}}) {
    call.budget = of_topk(w);
    const cuda::Selection selection{threshold.get(), tie_index.get(), bitmap.get(), nullptr, 0};
    // Tiles at the end and in the middle of the sequence: the longest rows and the average ones.
    for (const int first : {call.num_tiles - slab_tiles, call.num_tiles / 2}) {
      const int repeats = 20;
      for (int i = -2; i < repeats; ++i) {
        if (i == 0) cuda_ok(cudaEventRecord(start), "event");
        cuda_ok(
            cuda::select_rows(call, cuda::ScoreSlab{slab.get(), s, first, slab_tiles}, selection, nullptr),
            "time");
      }
      cuda_ok(cudaEventRecord(stop), "event");
      cuda_ok(cudaEventSynchronize(stop), "event");
      float ms = 0.0f;
      cuda_ok(cudaEventElapsedTime(&ms, start, stop), "event");
      const double rows = double{slab_tiles} * 64 * repeats, keys = first * 64.0 + slab_tiles * 32;
      std::printf(
          "select_rows W %lld, %.0f keys a row: %.2f ns a row, %.0f GB/s of scores, %.1f ms for 32 x 32768 "
          "rows\n",
          static_cast<long long>(w), keys, ms * 1e6 / rows, rows * keys * 4 / (ms * 1e6),
          ms / rows * 32 * 32768);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false, time = false;
  for (int i = 1; i < argc; ++i) {
    quick = quick || std::strcmp(argv[i], "--quick") == 0;
    time = time || std::strcmp(argv[i], "--time") == 0;
  }
  const auto stage = [](const char* name) {
    std::printf("%s: %d checks so far, %d failed\n", name, checks, failures);
    std::fflush(stdout);
  };
  check_helpers<float>(64, 0);
  check_helpers<float>(136, 1);
  check_helpers<__nv_bfloat16>(128, 0);
  check_helpers<__nv_bfloat16>(72, 3);
  check_helpers<__half>(256, 8);
  check_helpers<__half>(8, 1);
  stage("delta, finish_gradients");
  check_select_scores_all(quick);
  stage("select_scores");
  check_attention(quick);
  stage("attention");
  if (time) time_select_rows();
  std::printf("%s: %d of %d checks failed\n", failures == 0 ? "ok" : "FAILED", failures, checks);
  return failures == 0 ? 0 : 1;
}
