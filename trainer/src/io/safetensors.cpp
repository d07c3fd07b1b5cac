// The header's checks, the mapped reader and the streaming writer.
#include "io/safetensors.h"

#include <fcntl.h>
#include <fmt/ranges.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <tuple>

#include "io/json.h"

namespace topk_sft {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is read in place");

struct DTypeRow {
  DType dtype;
  const char* name;
  size_t size;
};
constexpr std::array<DTypeRow, 13> kDTypes = {{{DType::kBool, "BOOL", 1},
                                               {DType::kU8, "U8", 1},
                                               {DType::kI8, "I8", 1},
                                               {DType::kU16, "U16", 2},
                                               {DType::kI16, "I16", 2},
                                               {DType::kF16, "F16", 2},
                                               {DType::kBF16, "BF16", 2},
                                               {DType::kU32, "U32", 4},
                                               {DType::kI32, "I32", 4},
                                               {DType::kF32, "F32", 4},
                                               {DType::kU64, "U64", 8},
                                               {DType::kI64, "I64", 8},
                                               {DType::kF64, "F64", 8}}};

const DTypeRow& row(DType dtype) {
  return kDTypes[static_cast<size_t>(dtype)];
}

// A JSON number that is a whole number in [0, 2^63).
int64_t whole_number(const Json& json, const std::string& what) {
  if (!json.is_number_unsigned() || json.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    fail("{} must be a whole number from 0 to 2^63 - 1, got {}", what, printable(json.dump(), 60));
  }
  return json.get<int64_t>();
}

// Bytes of a tensor of this shape; Error when the product leaves int64.
uint64_t checked_bytes(DType dtype, const std::vector<int64_t>& shape, const std::string& what) {
  auto bytes = static_cast<int64_t>(dtype_size(dtype));
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) {
      fail("{} has shape {}, which is more than 2^63 bytes", what, shape_string(shape));
    }
  }
  return static_cast<uint64_t>(bytes);
}

TensorInfo parse_tensor(const std::string& name, const Json& json, uint64_t data_bytes,
                        const std::string& where) {
  const std::string what = fmt::format("{}: tensor \"{}\"", where, printable(name));
  if (!json.is_object()) fail("{} must be an object, got {}", what, json.type_name());
  for (const auto& [key, value] : json.items()) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      fail("{} has the unknown key \"{}\"; expected dtype, shape, data_offsets", what, printable(key));
    }
  }
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!json.contains(key)) fail("{} lacks \"{}\"", what, key);
  }

  TensorInfo tensor;
  tensor.name = name;
  const Json& dtype = json["dtype"];
  const auto known = std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DTypeRow& candidate) {
    return dtype.is_string() && dtype.get_ref<const std::string&>() == candidate.name;
  });
  if (known == kDTypes.end()) {
    fail("{} has dtype {}; supported are BOOL, U8-U64, I8-I64, F16, BF16, F32, F64", what,
         printable(dtype.dump(), 60));
  }
  tensor.dtype = known->dtype;

  const Json& shape = json["shape"];
  if (!shape.is_array() || shape.size() > 16) fail("{}: shape must be an array of at most 16 sizes", what);
  for (const Json& size : shape) tensor.shape.push_back(whole_number(size, what + ": a size in shape"));

  const Json& offsets = json["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2) fail("{}: data_offsets must be [begin, end]", what);
  tensor.begin = static_cast<uint64_t>(whole_number(offsets[0], what + ": data_offsets[0]"));
  tensor.end = static_cast<uint64_t>(whole_number(offsets[1], what + ": data_offsets[1]"));
  if (tensor.begin > tensor.end || tensor.end > data_bytes) {
    fail("{} has data_offsets [{}, {}], which must rise and lie inside the {} data bytes of the file", what,
         tensor.begin, tensor.end, data_bytes);
  }
  const uint64_t bytes = checked_bytes(tensor.dtype, tensor.shape, what);
  if (bytes != tensor.end - tensor.begin) {
    fail("{}: {} {} needs {} bytes, but its data_offsets span {}", what, dtype_name(tensor.dtype),
         shape_string(tensor.shape), bytes, tensor.end - tensor.begin);
  }
  return tensor;
}

}  // namespace

const char* dtype_name(DType dtype) {
  return row(dtype).name;
}
size_t dtype_size(DType dtype) {
  return row(dtype).size;
}

int64_t TensorInfo::numel() const {
  return static_cast<int64_t>((end - begin) / dtype_size(dtype));  // equals the shape's product, checked
}

std::string shape_string(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

SafetensorsHeader parse_safetensors_header(std::string_view text, uint64_t data_bytes,
                                           const std::string& where) {
  const Json json = parse_json(text, where + ": header");
  if (!json.is_object()) fail("{}: the header must be a JSON object, got {}", where, json.type_name());

  SafetensorsHeader header;
  for (const auto& [name, value] : json.items()) {
    if (name != "__metadata__") {
      header.tensors.push_back(parse_tensor(name, value, data_bytes, where));
      continue;
    }
    if (!value.is_object()) fail("{}: __metadata__ must be an object of strings", where);
    for (const auto& [key, entry] : value.items()) {
      if (!entry.is_string()) {
        fail("{}: __metadata__ \"{}\" must be a string, got {}", where, printable(key), entry.type_name());
      }
      header.metadata[key] = entry.get<std::string>();
    }
  }

  const auto place = [](const TensorInfo& t) { return std::tie(t.begin, t.end, t.name); };
  std::sort(header.tensors.begin(), header.tensors.end(),
            [&](const TensorInfo& a, const TensorInfo& b) { return place(a) < place(b); });
  uint64_t end = 0;
  for (const TensorInfo& tensor : header.tensors) {
    if (tensor.begin != end) {
      fail("{}: tensor \"{}\" begins at byte {}, but the one before it ends at {}: {}", where,
           printable(tensor.name), tensor.begin, end,
           tensor.begin < end ? "they overlap" : "there is a hole");
    }
    end = tensor.end;
  }
  if (end != data_bytes) {
    fail("{}: the tensors end at data byte {}, but the file has {}", where, end, data_bytes);
  }
  return header;
}

// ---------------------------------------------------------------------------------------------------------------
// Reader
// ---------------------------------------------------------------------------------------------------------------

SafetensorsFile::SafetensorsFile(std::string path) : path_(std::move(path)) {
  const auto reason = [] { return std::generic_category().message(errno); };
  const int fd = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("{}: cannot be opened: {}", path_, reason());
  struct stat info {};
  const bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  map_bytes_ = regular ? static_cast<uint64_t>(info.st_size) : 0;
  void* map = map_bytes_ >= 8 ? mmap(nullptr, map_bytes_, PROT_READ, MAP_PRIVATE, fd, 0) : nullptr;
  const std::string map_error = map == MAP_FAILED ? reason() : "";
  close(fd);
  if (!regular) fail("{}: is not a regular file", path_);
  if (map_bytes_ < 8) fail("{}: has {} bytes, too few for a safetensors file", path_, map_bytes_);
  if (map == MAP_FAILED) fail("{}: cannot be mapped: {}", path_, map_error);
  map_ = static_cast<const std::byte*>(map);

  try {
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, map_, 8);
    if (header_bytes > kMaxSafetensorsHeaderBytes || header_bytes > map_bytes_ - 8) {
      fail(
          "{}: claims a header of {} bytes; the file has {} bytes and a header may have {}: not a "
          "safetensors "
          "file, or truncated",
          path_, header_bytes, map_bytes_, kMaxSafetensorsHeaderBytes);
    }
    data_offset_ = 8 + header_bytes;
    const std::string_view text(reinterpret_cast<const char*>(map_) + 8, header_bytes);
    if (text.empty() || text.front() != '{') fail("{}: the header must begin with '{{'", path_);
    header_ = parse_safetensors_header(text, map_bytes_ - data_offset_, path_);
    for (size_t i = 0; i < header_.tensors.size(); ++i) by_name_[header_.tensors[i].name] = i;
  } catch (...) {
    munmap(const_cast<std::byte*>(map_), map_bytes_);
    throw;
  }
}

SafetensorsFile::~SafetensorsFile() {
  munmap(const_cast<std::byte*>(map_), map_bytes_);
}

const TensorInfo* SafetensorsFile::find(const std::string& name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &header_.tensors[found->second];
}

const TensorInfo& SafetensorsFile::at(const std::string& name) const {
  const TensorInfo* tensor = find(name);
  if (tensor == nullptr) fail("{}: has no tensor \"{}\"", path_, name);
  return *tensor;
}

const std::string& SafetensorsFile::metadata_at(const std::string& key) const {
  const auto found = header_.metadata.find(key);
  if (found == header_.metadata.end()) fail("{}: has no metadata \"{}\"", path_, key);
  return found->second;
}

std::span<const std::byte> SafetensorsFile::bytes(const TensorInfo& tensor) const {
  return {map_ + data_offset_ + tensor.begin, static_cast<size_t>(tensor.end - tensor.begin)};
}

void SafetensorsFile::check_vector(const TensorInfo& tensor, DType dtype, size_t alignment) const {
  if (tensor.dtype != dtype || tensor.shape.size() != 1) {
    fail("{}: tensor \"{}\" must be {} with one dimension, got {} {}", path_, printable(tensor.name),
         dtype_name(dtype), dtype_name(tensor.dtype), shape_string(tensor.shape));
  }
  if ((data_offset_ + tensor.begin) % alignment != 0) {
    fail("{}: tensor \"{}\" begins at byte {} of the file, which must be a multiple of {}", path_,
         printable(tensor.name), data_offset_ + tensor.begin, alignment);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Writer
// ---------------------------------------------------------------------------------------------------------------

SafetensorsWriter::SafetensorsWriter(std::string path, std::map<std::string, std::string> metadata)
    : path_(std::move(path)), metadata_(std::move(metadata)) {}

void SafetensorsWriter::declare(const std::string& name, DType dtype, const std::vector<int64_t>& shape) {
  const std::string what = fmt::format("{}: tensor \"{}\"", path_, name);
  if (file_) fail("{} was declared after writing began", what);
  if (name == "__metadata__" || !by_name_.emplace(name, tensors_.size()).second) {
    fail("{} was declared twice or has a reserved name", what);
  }
  const uint64_t begin = tensors_.empty() ? 0 : tensors_.back().end;
  tensors_.push_back({name, dtype, shape, begin, begin + checked_bytes(dtype, shape, what)});
}

void SafetensorsWriter::write_header() {
  std::string text = "{";
  // Entries are joined by hand: one ordered object of many tensors would search its keys one by one.
  const auto append = [&](const std::string& key, const OrderedJson& value) {
    if (text.size() > 1) text += ',';
    text += OrderedJson(key).dump() + ':' + value.dump();
  };
  if (!metadata_.empty()) append("__metadata__", OrderedJson(metadata_));
  for (const TensorInfo& tensor : tensors_) {
    append(tensor.name, {{"dtype", dtype_name(tensor.dtype)},
                         {"shape", tensor.shape},
                         {"data_offsets", {tensor.begin, tensor.end}}});
  }
  text += '}';
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (text.size() > kMaxSafetensorsHeaderBytes)
    fail("{}: the header would have {} bytes", path_, text.size());
  const uint64_t size = text.size();
  file_ = std::make_unique<AtomicFile>(path_);
  file_->write(&size, 8);
  file_->write(text);
}

void SafetensorsWriter::write(const std::string& name, const void* data, size_t bytes) {
  if (!file_) write_header();
  // Tensors without elements need no bytes: step over them.
  while (current_ < tensors_.size() && current_bytes_ == tensors_[current_].end - tensors_[current_].begin &&
         tensors_[current_].name != name) {
    ++current_;
    current_bytes_ = 0;
  }
  if (current_ == tensors_.size() || tensors_[current_].name != name) {
    fail("{}: tensor \"{}\" was written out of order", path_, name);
  }
  const uint64_t room = tensors_[current_].end - tensors_[current_].begin - current_bytes_;
  if (bytes > room) fail("{}: tensor \"{}\" was given {} bytes too many", path_, name, bytes - room);
  file_->write(data, bytes);
  current_bytes_ += bytes;
}

void SafetensorsWriter::commit() {
  if (!file_) write_header();
  for (; current_ < tensors_.size(); ++current_, current_bytes_ = 0) {
    const uint64_t needed = tensors_[current_].end - tensors_[current_].begin;
    if (current_bytes_ != needed) {
      fail("{}: tensor \"{}\" was given {} of its {} bytes", path_, tensors_[current_].name, current_bytes_,
           needed);
    }
  }
  file_->commit();
}

}  // namespace topk_sft
