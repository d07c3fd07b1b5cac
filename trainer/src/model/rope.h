// Rotary position embedding: the inverse frequencies of each type, and the rotation of queries and keys.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "model/config.h"

namespace topk_sft {

struct RopeFrequencies {
  std::vector<float> inv_freq;     // (head_dim / 2), with transformers' float32 arithmetic
  double attention_scaling = 1.0;  // cos and sin are multiplied by it (yarn)
};

RopeFrequencies rope_frequencies(const RopeConfig& rope, int64_t head_dim);

// cos and sin of every position, each (..., head_dim) in `dtype`; computed in float32.
struct RopeTable {
  at::Tensor cos;
  at::Tensor sin;
};
// positions int64 (...); inv_freq float32 (head_dim / 2) on the same device.
RopeTable rope_table(const at::Tensor& positions, const at::Tensor& inv_freq, double attention_scaling,
                     at::ScalarType dtype);

// Rotates x (..., heads, head_dim) by a table of (..., head_dim): element d is paired with d + head_dim / 2.
at::Tensor apply_rope(const at::Tensor& x, const RopeTable& table);

}  // namespace topk_sft
