// Reading and writing safetensors: 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
// data_offsets}, "__metadata__": {string: string}}, then the tensors' bytes, row-major and little-endian.
//
// Nothing of the header is believed before it is checked: its length, strict JSON, known dtypes, shapes whose
// product fits, offsets that lie inside the file, match the shape, neither overlap nor leave holes. Every
// fault is an Error that names the file and the tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "io/atomic_file.h"
#include "io/error.h"

namespace topk_sft {

enum class DType : uint8_t { kBool, kU8, kI8, kU16, kI16, kF16, kBF16, kU32, kI32, kF32, kU64, kI64, kF64 };

const char* dtype_name(DType dtype);  // the header's name: "BOOL", "U8", ..., "F64"
size_t dtype_size(DType dtype);       // bytes of one element

template <typename T>
constexpr DType dtype_of();  // int32_t -> kI32 and so on
template <>
constexpr DType dtype_of<uint8_t>() {
  return DType::kU8;
}
template <>
constexpr DType dtype_of<int32_t>() {
  return DType::kI32;
}
template <>
constexpr DType dtype_of<int64_t>() {
  return DType::kI64;
}
template <>
constexpr DType dtype_of<float>() {
  return DType::kF32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::kF64;
}

struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // [] is a scalar
  uint64_t begin = 0;          // bytes [begin, end) of the data part, which follows the header
  uint64_t end = 0;
  int64_t numel() const;
};

std::string shape_string(const std::vector<int64_t>& shape);  // "[2, 3]"

inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

// What the header says, checked against the number of data bytes that follow it; in order of offset.
struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
};
SafetensorsHeader parse_safetensors_header(std::string_view json, uint64_t data_bytes,
                                           const std::string& where);

// One memory-mapped file. Spans stay valid as long as the object lives.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(std::string path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const std::vector<TensorInfo>& tensors() const { return header_.tensors; }  // in order of offset
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  const TensorInfo* find(const std::string& name) const;  // nullptr when absent
  const TensorInfo& at(const std::string& name) const;    // Error when absent
  const std::string& metadata_at(const std::string& key) const;

  // The tensor's bytes in the mapping; not necessarily aligned to its dtype.
  std::span<const std::byte> bytes(const TensorInfo& tensor) const;

  // A 1-d tensor of exactly this dtype, in place. Error on another dtype, rank or a misaligned offset.
  template <typename T>
  std::span<const T> view(const std::string& name) const {
    const TensorInfo& tensor = at(name);
    check_vector(tensor, dtype_of<T>(), alignof(T));
    return {reinterpret_cast<const T*>(bytes(tensor).data()), static_cast<size_t>(tensor.numel())};
  }

 private:
  void check_vector(const TensorInfo& tensor, DType dtype, size_t alignment) const;

  std::string path_;
  const std::byte* map_ = nullptr;
  uint64_t map_bytes_ = 0;
  uint64_t data_offset_ = 0;
  SafetensorsHeader header_;
  std::unordered_map<std::string, size_t> by_name_;
};

// Writes one file, atomically and without holding the tensors: declare all, then give the bytes of each in
// the order declared, then commit. The header is padded with spaces to a multiple of 8.
class SafetensorsWriter {
 public:
  explicit SafetensorsWriter(std::string path, std::map<std::string, std::string> metadata = {});
  void declare(const std::string& name, DType dtype, const std::vector<int64_t>& shape);
  // The whole tensor, or a part of it when called repeatedly; its name must be the next one declared.
  void write(const std::string& name, const void* data, size_t bytes);
  void commit();

 private:
  void write_header();

  std::string path_;
  std::map<std::string, std::string> metadata_;
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, size_t> by_name_;
  std::unique_ptr<AtomicFile> file_;  // open once the header is written
  size_t current_ = 0;                // tensor being written
  uint64_t current_bytes_ = 0;        // bytes of it already written
};

// The weights of a Hugging Face folder: model.safetensors, or the shards that model.safetensors.index.json
// names. The index is checked against the shards: every tensor is where it says, none is left out.
class SafetensorsFolder {
 public:
  explicit SafetensorsFolder(const std::string& folder);

  struct Entry {
    const SafetensorsFile* file;
    const TensorInfo* tensor;
  };
  const std::vector<Entry>& entries() const { return entries_; }  // shard by shard, in order of offset
  const Entry* find(const std::string& name) const;

 private:
  void add_file(const std::string& path);

  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::vector<Entry> entries_;
  std::unordered_map<std::string, size_t> by_name_;
};

}  // namespace topk_sft
