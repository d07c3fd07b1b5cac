#include "cuda_bits.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace topk_attn::bits {
namespace {

// The problem: one sequence, two heads of one KV head. Every key is a permutation of one vector's channels
// and a query is one number in all channels, so that all scores of a row are equal but for rounding.
constexpr int64_t kLength = 256;  // queries, and keys
constexpr int64_t kHeads = 2;
constexpr int64_t kKept = 64;  // of each row
constexpr double kScale = 1.0 / 4096;

thread_local const cuda::Wish* forced_wish = nullptr;

class Forced {
 public:
  explicit Forced(const cuda::Wish& wish) : before_(forced_wish) { forced_wish = &wish; }
  ~Forced() { forced_wish = before_; }
  Forced(const Forced&) = delete;
  Forced& operator=(const Forced&) = delete;

 private:
  const cuda::Wish* before_;
};

void check(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess,
              "topk_attn: measuring the bits of scores failed: ", cudaGetErrorString(error));
}

class Random {
 public:
  uint32_t below(uint32_t n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((state_ >> 33) % n);
  }

 private:
  uint64_t state_ = 12345;
};

// To and from the device without torch's copies, which a sync debug mode would refuse.
Tensor to_device(const std::vector<float>& values, at::IntArrayRef sizes, const at::TensorOptions& options) {
  const Tensor t = at::empty(sizes, options);
  std::vector<uint16_t> encoded(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    encoded[i] = t.scalar_type() == at::kBFloat16 ? c10::BFloat16(values[i]).x : c10::Half(values[i]).x;
  }
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  check(cudaMemcpyAsync(t.data_ptr(), encoded.data(), encoded.size() * 2, cudaMemcpyHostToDevice, stream));
  check(cudaStreamSynchronize(stream));  // before `encoded` goes
  return t;
}

template <typename T>
std::vector<T> to_host(const Tensor& t) {
  std::vector<T> values(t.numel());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  check(cudaMemcpyAsync(values.data(), t.data_ptr(), t.nbytes(), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  return values;
}

std::vector<float> floats_of(const Tensor& t) {
  const std::vector<uint16_t> encoded = to_host<uint16_t>(t);
  std::vector<float> values(encoded.size());
  for (size_t i = 0; i < encoded.size(); ++i) {
    values[i] = t.scalar_type() == at::kBFloat16
                    ? static_cast<float>(c10::BFloat16(encoded[i], c10::BFloat16::from_bits()))
                    : static_cast<float>(c10::Half(encoded[i], c10::Half::from_bits()));
  }
  return values;
}

// Which keys each row keeps: kHeads x kLength x kLength.
using Sets = std::vector<uint8_t>;

size_t at(int64_t head, int64_t row, int64_t key) {
  return static_cast<size_t>((head * kLength + row) * kLength + key);
}

struct Problem {
  int64_t dim;
  std::vector<float> keys;  // key x channel
  float largest = 0.0f;     // magnitude in keys
  Tensor q, k, v;           // v: key j has 2^(j / dim) in channel j % dim and zeros elsewhere
  Tensor dout;              // row i of head h has 2^(i / dim + h * blocks) in channel i % dim
  Tensor no_dout, dlse;     // for dQ: the gradient of lse alone

  int64_t blocks() const { return (kLength + dim - 1) / dim; }

  Problem(int64_t head_dim, const at::TensorOptions& options) : dim(head_dim) {
    Random random;
    std::vector<float> base(dim);
    for (float& x : base) {
      const float magnitude =
          std::ldexp(1.0f + 0.125f * random.below(8), static_cast<int>(random.below(13)) - 6);
      x = random.below(2) == 0 ? magnitude : -magnitude;
      largest = std::max(largest, magnitude);
    }
    for (int64_t j = 0; j < kLength; ++j) {
      for (int64_t i = dim - 1; i > 0; --i)
        std::swap(base[i], base[random.below(static_cast<uint32_t>(i + 1))]);
      keys.insert(keys.end(), base.begin(), base.end());
    }
    std::vector<float> queries(kLength * kHeads * dim), values(kLength * dim),
        gradients(kLength * kHeads * dim);
    for (int64_t i = 0; i < kLength; ++i) {
      values[i * dim + i % dim] = std::ldexp(1.0f, static_cast<int>(i / dim));
      for (int64_t h = 0; h < kHeads; ++h) {
        float* const row = &queries[(i * kHeads + h) * dim];
        std::fill(row, row + dim, 1.0f + 0.0625f * ((5 * i + 3 * h) % 16));
        gradients[(i * kHeads + h) * dim + i % dim] =
            std::ldexp(1.0f, static_cast<int>(i / dim + h * blocks()));
      }
    }
    q = to_device(queries, {1, kLength, kHeads, dim}, options);
    k = to_device(keys, {1, kLength, 1, dim}, options);
    v = to_device(values, {1, kLength, 1, dim}, options);
    dout = to_device(gradients, {1, kLength, kHeads, dim}, options);
    no_dout = at::zeros(q.sizes(), options);
    dlse = at::zeros({1, kHeads, kLength}, options.dtype(at::kFloat)).fill_(1024.0);
  }
};

// The sets by index lists, and the encoding that belongs to them.
struct Reference {
  Sets sets;
  std::vector<uint32_t> threshold;
  std::vector<int32_t> tie_index;
};

Reference reference_of(const Problem& p) {
  const auto [threshold, tie_index, indices] = cuda_ops::select(p.q, p.k, {}, {}, {}, {}, false, kKept, {}, 1,
                                                                {}, "head", 0, 0, /*return_indices=*/true);
  Reference r{Sets(kHeads * kLength * kLength), to_host<uint32_t>(threshold), to_host<int32_t>(tie_index)};
  const std::vector<int32_t> lists = to_host<int32_t>(indices);
  for (size_t i = 0; i < lists.size(); ++i) {
    if (lists[i] >= 0) r.sets[i / kKept * kLength + lists[i]] = 1;
  }
  return r;
}

// Sums of distinct powers of two over 64, each power standing for one member.
bool members(float value, int64_t count, uint32_t& bits) {
  const float scaled = value * kKept;
  bits = static_cast<uint32_t>(std::lround(scaled));
  return std::isfinite(scaled) && scaled == static_cast<float>(bits) && bits < (1u << count);
}

bool forward_agrees(const Problem& p, const Sets& sets, const Tensor& out) {
  const std::vector<float> values = floats_of(out);
  for (int64_t i = 0; i < kLength; ++i) {
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t channel = 0; channel < p.dim; ++channel) {
        uint32_t bits = 0;
        if (!members(values[(i * kHeads + h) * p.dim + channel], p.blocks(), bits)) return false;
        for (int64_t block = 0; block < p.blocks(); ++block) {
          if ((bits >> block & 1) != sets[at(h, i, block * p.dim + channel)]) return false;
        }
      }
    }
  }
  return true;
}

bool key_gradients_agree(const Problem& p, const Sets& sets, const Tensor& dv) {
  const std::vector<float> values = floats_of(dv);
  for (int64_t j = 0; j < kLength; ++j) {
    for (int64_t channel = 0; channel < p.dim; ++channel) {
      uint32_t bits = 0;
      if (!members(values[j * p.dim + channel], kHeads * p.blocks(), bits)) return false;
      for (int64_t h = 0; h < kHeads; ++h) {
        for (int64_t block = 0; block < p.blocks(); ++block) {
          if ((bits >> (block + h * p.blocks()) & 1) != sets[at(h, block * p.dim + channel, j)]) return false;
        }
      }
    }
  }
  return true;
}

// With dS = 1024 P = 16, dQ is 16 kScale times the sum of the kept keys. Another key in one's place changes
// some channel by about the largest magnitude in them; rounding stays far below a sixteenth of that.
bool query_gradients_agree(const Problem& p, const Sets& sets, const Tensor& dq) {
  const std::vector<float> values = floats_of(dq);
  const double unit = 1024.0 / kKept * kScale;
  for (int64_t i = 0; i < kLength; ++i) {
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t channel = 0; channel < p.dim; ++channel) {
        double sum = 0.0;
        for (int64_t j = 0; j < kLength; ++j) sum += sets[at(h, i, j)] ? p.keys[j * p.dim + channel] : 0.0f;
        const double error = std::abs(values[(i * kHeads + h) * p.dim + channel] - sum * unit);
        if (!(error <= unit * p.largest / 16)) return false;
      }
    }
  }
  return true;
}

bool measure(cuda::Build build, at::ScalarType dtype, int64_t dim, bool corrupt) {
  const auto options = at::TensorOptions().dtype(dtype).device(at::kCUDA);
  cuda::Wish wish;
  wish.build = cuda::name_of(build);
  const Forced outer(wish);
  const Problem p(dim, options);
  Reference r = reference_of(p);
  if (corrupt) r.sets[at(1, 100, 200)] ^= 1;
  const std::vector<float> shares =
      build == cuda::Build::kSm90 ? std::vector<float>{0.0f, 1.0f} : std::vector<float>{-1.0f};
  for (const float share : shares) {
    wish.largest_share = share;
    const auto [threshold, tie_index, none] =
        cuda_ops::select(p.q, p.k, {}, {}, {}, {}, false, kKept, {}, 1, {}, "head", 0, 0, false);
    if (to_host<uint32_t>(threshold) != r.threshold || to_host<int32_t>(tie_index) != r.tie_index)
      return false;
    const auto [out, lse, forward_threshold, forward_tie, kept, prob] = cuda_ops::fwd(
        p.q, p.k, p.v, {}, {}, {}, {}, false, kKept, {}, 1, {}, "head", 0, 0, kScale, false, "tiles");
    if (!forward_agrees(p, r.sets, out)) return false;
    const auto gradients = [&, &out = out, &lse = lse, &threshold = forward_threshold, &tie = forward_tie,
                            &kept = kept, &prob = prob](const Tensor& dout, const OptTensor& dlse) {
      return cuda_ops::bwd(dout, dlse, p.q, p.k, p.v, out, lse, threshold, tie, kept, prob, {}, {}, {}, {},
                           false, kKept, {}, 1, {}, "head", 0, 0, kScale, false);
    };
    if (!key_gradients_agree(p, r.sets, std::get<2>(gradients(p.dout, {})))) return false;
    if (!query_gradients_agree(p, r.sets, std::get<0>(gradients(p.no_dout, p.dlse)))) return false;
  }
  return true;
}

struct Verdicts {
  std::mutex mutex;
  std::map<std::tuple<int, int, int, int64_t>, bool> known;  // device, build, dtype, dim
  std::string corrupt;
};
Verdicts& verdicts() {
  static Verdicts instance;
  return instance;
}

}  // namespace

const cuda::Wish* forced() {
  return forced_wish;
}

Verdict of(cuda::Build build, at::ScalarType dtype, int64_t head_dim) {
  const int64_t dim = head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
  const auto key = std::make_tuple(static_cast<int>(c10::cuda::current_device()), static_cast<int>(build),
                                   static_cast<int>(dtype), dim);
  const std::lock_guard<std::mutex> lock(verdicts().mutex);
  auto found = verdicts().known.find(key);
  if (found == verdicts().known.end()) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(at::cuda::getCurrentCUDAStream(), &status));
    if (status != cudaStreamCaptureStatusNone) return Verdict::kUnknown;
    const bool agree = measure(build, dtype, dim, verdicts().corrupt == cuda::name_of(build));
    found = verdicts().known.emplace(key, agree).first;
  }
  return found->second ? Verdict::kAgree : Verdict::kDisagree;
}

void reset(const std::string& corrupt) {
  const std::lock_guard<std::mutex> lock(verdicts().mutex);
  verdicts().known.clear();
  verdicts().corrupt = corrupt;
}

}  // namespace topk_attn::bits
