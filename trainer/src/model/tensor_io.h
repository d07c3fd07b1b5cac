// Tensors out of and into safetensors files.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "io/safetensors.h"

namespace topk_sft {

DType storage_dtype(at::ScalarType dtype);  // Error for types that safetensors files of ours do not hold
at::ScalarType scalar_type(DType dtype);    // Error for types that torch does not have

// A copy on the CPU, in the stored dtype.
at::Tensor read_tensor(const SafetensorsFile& file, const TensorInfo& tensor);

void declare_tensor(SafetensorsWriter& writer, const std::string& name, const at::Tensor& tensor);
// From any device, any strides.
void write_tensor(SafetensorsWriter& writer, const std::string& name, const at::Tensor& tensor);

}  // namespace topk_sft
