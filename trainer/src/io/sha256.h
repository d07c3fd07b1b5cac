// SHA-256 (FIPS 180-4) of bytes and of files, as 64 lower-case hex digits.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace topk_sft {

class Sha256 {
 public:
  void update(const void* data, size_t bytes);
  std::string hex_digest();  // ends the message: call once

 private:
  void block(const uint8_t* bytes);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> buffer_{};
  size_t buffered_ = 0;
  uint64_t total_bytes_ = 0;
};

std::string sha256(std::string_view bytes);

// Reads the file in pieces. Throws Error when it cannot be read.
std::string sha256_file(const std::string& path);

}  // namespace topk_sft
