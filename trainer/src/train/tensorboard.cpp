#include "train/tensorboard.h"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <filesystem>

#include "io/error.h"

namespace topk_sft {

namespace {

// Protobuf wire format: fields of Event { double wall_time = 1; int64 step = 2; string file_version = 3;
// Summary summary = 5; } and Summary { repeated Value value = 1; }, Value { string tag = 1; float
// simple_value = 2; }.
enum WireType { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

template <typename T>
std::string little_endian(T value) {
  std::string out;
  for (size_t i = 0; i < sizeof(T); ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
  return out;
}

std::string varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  return out + static_cast<char>(value);
}

std::string tag(int field, WireType type) {
  return varint(static_cast<uint64_t>(field) << 3 | type);
}
std::string fixed64(int field, double v) {
  return tag(field, kFixed64) + little_endian(std::bit_cast<uint64_t>(v));
}
std::string fixed32(int field, float v) {
  return tag(field, kFixed32) + little_endian(std::bit_cast<uint32_t>(v));
}
std::string integer(int field, uint64_t v) {
  return tag(field, kVarint) + varint(v);
}
std::string bytes(int field, const std::string& v) {
  return tag(field, kBytes) + varint(v.size()) + v;
}

double now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::string new_file_name(const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) fail("{}: cannot be made: {}", folder, error.message());
  char host[256] = "localhost";
  gethostname(host, sizeof host - 1);
  return fmt::format("{}/events.out.tfevents.{:.0f}.{}.{}", folder, now(), host, getpid());
}

}  // namespace

uint32_t crc32c(const std::string& bytes) {
  static const auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0x82f63b78 ^ c >> 1 : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = 0xffffffff;
  for (const unsigned char byte : bytes) crc = table[(crc ^ byte) & 0xff] ^ crc >> 8;
  return ~crc;
}

uint32_t masked_crc32c(const std::string& bytes) {
  const uint32_t crc = crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xa282ead8;
}

TensorBoardWriter::TensorBoardWriter(const std::string& folder)
    : file_(new_file_name(folder), /*exclusive=*/true) {
  record(fixed64(1, now()) + bytes(3, "brain.Event:2"));
}

void TensorBoardWriter::scalars(int64_t step, const std::vector<std::pair<std::string, double>>& values) {
  std::string summary;
  for (const auto& [name, value] : values) {
    summary += bytes(1, bytes(1, name) + fixed32(2, static_cast<float>(value)));
  }
  record(fixed64(1, now()) + integer(2, static_cast<uint64_t>(step)) + bytes(5, summary));
}

void TensorBoardWriter::record(const std::string& event) {
  const std::string length = little_endian(static_cast<uint64_t>(event.size()));
  file_.append(length + little_endian(masked_crc32c(length)) + event + little_endian(masked_crc32c(event)));
}

}  // namespace topk_sft
