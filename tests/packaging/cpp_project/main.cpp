// Attention over fixed inputs by the installed C++ functions. Prints the bits of the result, one 32-bit word
// a line, which must be those that Python gives.
#include <ATen/Functions.h>
#include <topk_attn/topk_attn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

int main() {
  const auto values = [](at::IntArrayRef shape, double step) {
    int64_t count = 1;
    for (const int64_t extent : shape) count *= extent;
    return at::arange(count, at::kFloat).mul(step).sin().reshape(shape);
  };
  const at::Tensor q = values({1, 9, 4, 16}, 0.37);
  const at::Tensor k = values({1, 9, 2, 16}, 0.73);
  const at::Tensor v = values({1, 9, 2, 16}, 1.31);

  topk_attn::Options options;
  options.topk = 3;
  const topk_attn::Attention result = topk_attn::topk_attn_func(q, k, v, options);
  if (topk_attn::budget(9, options) != 3) return 1;

  for (const at::Tensor& tensor : {result.out, result.lse}) {
    const at::Tensor flat = tensor.contiguous().flatten();
    for (int64_t i = 0; i < flat.numel(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, flat.const_data_ptr<float>() + i, sizeof bits);
      std::printf("%08x\n", bits);
    }
  }
  return 0;
}
