// Inverse frequencies of the RoPE types, with transformers' arithmetic: powers and blends in float32, the
// correction range of yarn in float64. Where transformers divides a number by a tensor, torch multiplies the
// number by the reciprocal; so does this, to get the same bits.
#include "model/rope.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sin.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace topk_sft {
namespace {

constexpr float kTwoPi = static_cast<float>(2.0 * std::numbers::pi);

// theta^(2i / head_dim), i < head_dim / 2; torch's own power, whose bits differ from the C library's.
std::vector<float> theta_powers(double theta, int64_t head_dim) {
  const at::Tensor exponents = at::arange(0, head_dim, 2, at::kFloat).div(static_cast<double>(head_dim));
  const at::Tensor powers = at::pow(theta, exponents);
  return {powers.const_data_ptr<float>(), powers.const_data_ptr<float>() + powers.numel()};
}

// Long wavelengths are stretched by `factor`, short ones kept, those between blended.
void scale_llama3(const RopeConfig& rope, std::vector<float>& inv_freq) {
  const auto length = static_cast<double>(rope.original_max_position);
  const auto longest_kept = static_cast<float>(length / rope.high_freq_factor);
  const auto shortest_stretched = static_cast<float>(length / rope.low_freq_factor);
  const auto factor = static_cast<float>(rope.factor);
  for (float& frequency : inv_freq) {
    const float wavelength = (1.0f / frequency) * kTwoPi;
    if (wavelength < longest_kept) continue;
    if (wavelength > shortest_stretched) {
      frequency /= factor;
      continue;
    }
    const float turns = (1.0f / wavelength) * static_cast<float>(length);
    const float smooth = (turns - static_cast<float>(rope.low_freq_factor)) /
                         static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
    frequency = (1.0f - smooth) * frequency / factor + smooth * frequency;
  }
}

// Yarn: dims that turn often keep their frequency, dims that turn rarely are interpolated, a ramp in between.
void scale_yarn(const RopeConfig& rope, int64_t head_dim, const std::vector<float>& powers,
                std::vector<float>& inv_freq) {
  const auto dim = static_cast<double>(head_dim);
  const auto correction_dim = [&](double rotations) {
    const double length = static_cast<double>(rope.original_max_position);
    return dim * std::log(length / (rotations * 2.0 * std::numbers::pi)) / (2.0 * std::log(rope.theta));
  };
  double low = correction_dim(rope.beta_fast);
  double high = correction_dim(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f, 1.0f);
    const float keep = 1.0f - ramp;
    const float interpolated = 1.0f / (static_cast<float>(rope.factor) * powers[i]);
    inv_freq[i] = interpolated * (1.0f - keep) + inv_freq[i] * keep;
  }
}

double yarn_attention_scaling(const RopeConfig& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  const auto scale = [&](double mscale) {
    return rope.factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(rope.factor) + 1.0;
  };
  if (rope.mscale.value_or(0.0) != 0.0 && rope.mscale_all_dim.value_or(0.0) != 0.0) {
    return scale(*rope.mscale) / scale(*rope.mscale_all_dim);
  }
  return scale(1.0);
}

}  // namespace

RopeFrequencies rope_frequencies(const RopeConfig& rope, int64_t head_dim) {
  const std::vector<float> powers = theta_powers(rope.theta, head_dim);
  RopeFrequencies out;
  for (const float power : powers) out.inv_freq.push_back(1.0f / power);
  switch (rope.type) {
    case RopeType::kDefault:
      break;
    case RopeType::kLinear:
      for (float& frequency : out.inv_freq) frequency /= static_cast<float>(rope.factor);
      break;
    case RopeType::kLlama3:
      scale_llama3(rope, out.inv_freq);
      break;
    case RopeType::kYarn:
      scale_yarn(rope, head_dim, powers, out.inv_freq);
      out.attention_scaling = yarn_attention_scaling(rope);
      break;
  }
  return out;
}

RopeTable rope_table(const at::Tensor& positions, const at::Tensor& inv_freq, double attention_scaling,
                     at::ScalarType dtype) {
  const at::Tensor half = positions.unsqueeze(-1).to(at::kFloat) * inv_freq;
  const at::Tensor angles = at::cat({half, half}, -1);
  return {(at::cos(angles) * attention_scaling).to(dtype), (at::sin(angles) * attention_scaling).to(dtype)};
}

at::Tensor apply_rope(const at::Tensor& x, const RopeTable& table) {
  const int64_t half = x.size(-1) / 2;
  const at::Tensor turned = at::cat({at::neg(x.narrow(-1, half, half)), x.narrow(-1, 0, half)}, -1);
  return x * table.cos.unsqueeze(-2) + turned * table.sin.unsqueeze(-2);
}

}  // namespace topk_sft
