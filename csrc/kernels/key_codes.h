// Where the parts of a cache's key codes lie in their buffer, one flat array of bytes. What they mean:
// cuda/decode/codes.h. Plain arithmetic, for kernels, operators and symbolic sizes alike.
//
// A block is an entry of a contiguous cache (rows = its room) or a page (rows = its size). In this order,
// every part at a multiple of 16 bytes:
//   codes     (blocks, kv_heads, rows, width) int8; width: 64 or 128 channels
//   words     (blocks, kv_heads, rows) uint32
//   center    (kv_heads, width) float32
//   exponent  (kv_heads, width) int32
//   stats     kCodeStats int64
// So what belongs to a block is one piece of codes and one of words.
#pragma once

#include <cstdint>

namespace topk_attn {

inline constexpr int64_t kCodeStats = 8;
inline constexpr int64_t kMostCodeChannels = 128;

// Channels of a stored key; 0: there are no codes for this head dim.
constexpr int32_t codes_width(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= kMostCodeChannels ? 128 : 0;
}

// Byte offsets, and the size of all.
template <typename Int>
struct CodesLayout {
  Int words;
  Int center;
  Int exponent;
  Int stats;
  Int bytes;
};

template <typename Int>
CodesLayout<Int> codes_layout(const Int& blocks, const Int& rows, int64_t kv_heads, int64_t head_dim) {
  const int64_t width = codes_width(head_dim);
  const Int keys = blocks * rows * kv_heads;
  const Int words = keys * width;
  const Int center = words + (keys * 4 + 15) / 16 * 16;
  const Int exponent = center + kv_heads * width * 4;
  const Int stats = exponent + kv_heads * width * 4;
  return CodesLayout<Int>{words, center, exponent, stats, stats + kCodeStats * 8};
}

}  // namespace topk_attn
