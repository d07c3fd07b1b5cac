// Dtype maps, and copies between mapped bytes and tensors.
#include "model/tensor_io.h"

#include <ATen/ops/empty.h>

#include <cstring>

#include "io/error.h"

namespace topk_sft {

DType storage_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    case at::kDouble:
      return DType::kF64;
    case at::kInt:
      return DType::kI32;
    case at::kLong:
      return DType::kI64;
    case at::kByte:
      return DType::kU8;
    case at::kBool:
      return DType::kBool;
    default:
      fail("tensors of type {} cannot be stored", c10::toString(dtype));
  }
}

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return at::kFloat;
    case DType::kBF16:
      return at::kBFloat16;
    case DType::kF16:
      return at::kHalf;
    case DType::kF64:
      return at::kDouble;
    case DType::kI8:
      return at::kChar;
    case DType::kI16:
      return at::kShort;
    case DType::kI32:
      return at::kInt;
    case DType::kI64:
      return at::kLong;
    case DType::kU8:
      return at::kByte;
    case DType::kBool:
      return at::kBool;
    default:
      fail("tensors of type {} cannot be read", dtype_name(dtype));
  }
}

at::Tensor read_tensor(const SafetensorsFile& file, const TensorInfo& tensor) {
  // A copy: bytes in the file need not be aligned, and the mapping goes away.
  at::Tensor out = at::empty(tensor.shape, scalar_type(tensor.dtype));
  const auto bytes = file.bytes(tensor);
  if (!bytes.empty()) std::memcpy(out.mutable_data_ptr(), bytes.data(), bytes.size());
  return out;
}

void declare_tensor(SafetensorsWriter& writer, const std::string& name, const at::Tensor& tensor) {
  writer.declare(name, storage_dtype(tensor.scalar_type()), tensor.sizes().vec());
}

void write_tensor(SafetensorsWriter& writer, const std::string& name, const at::Tensor& tensor) {
  const at::Tensor host = tensor.detach().to(at::kCPU).contiguous();
  writer.write(name, host.const_data_ptr(), host.nbytes());
}

}  // namespace topk_sft
