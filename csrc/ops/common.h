// From checked torch arguments to the kernels' plain structs, whatever the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "checks.h"
#include "params.h"

namespace topk_attn {

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat16;
  }
}

// A (B, T, heads, channels) or packed (T, heads, channels) tensor.
inline View view_of(const Tensor& t) {
  const bool packed = t.dim() == 3;
  return View{t.data_ptr(), packed ? 0 : t.stride(0), t.stride(-3), t.stride(-2)};
}

// (B, H, Tq) or (H, total_q), with `extra` appended.
inline std::vector<int64_t> row_sizes(const Shape& shape, std::optional<int64_t> extra = std::nullopt) {
  std::vector<int64_t> sizes;
  if (!shape.packed) sizes.push_back(shape.batch.expect_int());
  sizes.push_back(shape.heads);
  sizes.push_back(shape.tq.expect_int());
  if (extra.has_value()) sizes.push_back(*extra);
  return sizes;
}

// A tensor that the forward made and the caller hands back to the backward, on q's device.
inline void check_state(const Tensor& t, const char* name, const Tensor& q, at::ScalarType dtype,
                        const std::vector<int64_t>& sizes) {
  TORCH_CHECK(t.device() == q.device(), "topk_attn: ", name, " is on ", t.device(), ", but q is on ",
              q.device(), ": they must be on one device");
  TORCH_CHECK(t.scalar_type() == dtype && t.sizes() == at::IntArrayRef(sizes), "topk_attn: ", name,
              " must be as the forward returned it, ", dtype, " of sizes ", at::IntArrayRef(sizes), ", got ",
              t.scalar_type(), " of sizes ", t.sizes());
}

}  // namespace topk_attn
