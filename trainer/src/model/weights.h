// The parameters of a model: their names and shapes, reading them from a Hugging Face folder, drawing them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "io/safetensors.h"
#include "model/model.h"

namespace topk_sft {

struct ParameterSpec {
  std::string name;  // Hugging Face name
  std::vector<int64_t> shape;
};

// All parameters in a fixed order: embedding, layers, final norm, lm_head (left out when tied).
std::vector<ParameterSpec> parameter_specs(const ModelConfig& config);

// Reads one parameter of the folder in `dtype`, on the CPU. Error when it is missing, has another shape, is
// not floating point, or holds NaN or infinity (in the file or after the conversion).
at::Tensor read_parameter(const SafetensorsFolder& folder, const ParameterSpec& spec, at::ScalarType dtype);

// Error when the folder lacks a parameter or has a tensor that is none. A tied model may hold lm_head.weight
// if it equals the embedding; the rotary buffers that old exports carry are ignored.
void check_names(const SafetensorsFolder& folder, const std::vector<ParameterSpec>& specs,
                 const ModelConfig& config, const std::string& where);

// One parameter as transformers initialises it, on the CPU. Pieces of it are drawn from generators of their
// own, so that all cores share the work and their number changes nothing.
at::Tensor draw_parameter(const ParameterSpec& spec, const ModelConfig& config, uint64_t seed);

}  // namespace topk_sft
