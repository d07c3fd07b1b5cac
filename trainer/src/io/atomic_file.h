// Files and folders that appear whole or not at all: written beside the target, fsynced, renamed over it, and
// the folder that holds them fsynced. An error or an early exit from scope leaves the target as it was and
// removes the temporary. A full disk is an Error like any other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace topk_sft {

// A file being written. Nothing shows at `path` before commit() returns.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();  // removes the temporary unless committed
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  uint64_t bytes_written() const { return bytes_written_; }
  void commit();

 private:
  std::string path_;
  std::string temporary_;
  int fd_ = -1;
  uint64_t bytes_written_ = 0;
};

// Writes `bytes` to `path`, replacing what was there in one step.
void write_file_atomic(const std::string& path, std::string_view bytes);

// A folder being filled. Files go into path() (a hidden sibling of the target); commit() fsyncs them and
// renames the folder to `target`.
class AtomicFolder {
 public:
  // An existing, non-empty `target` is an Error unless `replace`, which exchanges the two folders in one step
  // and then deletes the old one.
  explicit AtomicFolder(std::string target, bool replace = false);
  ~AtomicFolder();  // removes the temporary folder unless committed
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;

  const std::string& path() const { return temporary_; }
  void commit();

 private:
  std::string target_;
  std::string temporary_;
  bool replace_;
  bool committed_ = false;
};

// fsync of a file or folder by name. Throws Error.
void fsync_path(const std::string& path);

// The whole content of a regular file. Throws Error (also when it is larger than `max_bytes`).
std::string read_file(const std::string& path, uint64_t max_bytes = UINT64_MAX);

}  // namespace topk_sft
