// Write beside, fsync, rename, fsync the folder.
#include "io/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "io/error.h"

namespace topk_sft {
namespace fs = std::filesystem;
namespace {

std::string reason(int error) {
  return std::generic_category().message(error);
}

// "<parent>/.<name>.tmp-<pid>-<n>": hidden, on the target's file system, unlike any other writer's.
std::string temporary_name(const fs::path& target) {
  static std::atomic<unsigned> counter{0};
  const std::string name = fmt::format(".{}.tmp-{}-{}", target.filename().string(), getpid(), counter++);
  return (target.parent_path() / name).string();
}

std::string parent_folder(const std::string& path) {
  const std::string parent = fs::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

}  // namespace

void fsync_path(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("{}: cannot be opened for fsync: {}", path, reason(errno));
  const int rc = fsync(fd);
  const int error = errno;
  close(fd);
  if (rc != 0) fail("{}: fsync failed: {}", path, reason(error));
}

std::string read_file(const std::string& path, uint64_t max_bytes) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("{}: cannot be opened: {}", path, reason(errno));
  std::string content;
  struct stat info {};
  int error = fstat(fd, &info) == 0 ? 0 : errno;
  const bool regular = error == 0 && S_ISREG(info.st_mode);
  const auto size = static_cast<uint64_t>(info.st_size);
  if (regular && size <= max_bytes) {
    content.resize(size);
    size_t done = 0;
    while (done < size) {
      const ssize_t got = read(fd, content.data() + done, size - done);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) {
        error = got < 0 ? errno : EIO;
        break;
      }
      done += static_cast<size_t>(got);
    }
  }
  close(fd);
  if (error != 0) fail("{}: cannot be read: {}", path, reason(error));
  if (!regular) fail("{}: is not a regular file", path);
  if (size > max_bytes) fail("{}: has {} bytes, more than the {} allowed", path, size, max_bytes);
  return content;
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)), temporary_(temporary_name(path_)) {
  fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) fail("{}: cannot be created: {}", path_, reason(errno));
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) close(fd_);
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, size_t bytes) {
  const char* next = static_cast<const char*>(data);
  size_t left = bytes;
  while (left > 0) {
    const ssize_t put = ::write(fd_, next, left);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      fail("{}: cannot be written after {} bytes: {}", path_, bytes_written_, reason(put < 0 ? errno : EIO));
    }
    next += put;
    left -= static_cast<size_t>(put);
    bytes_written_ += static_cast<uint64_t>(put);
  }
}

void AtomicFile::commit() {
  if (fsync(fd_) != 0) fail("{}: fsync failed: {}", path_, reason(errno));
  const int fd = fd_;
  fd_ = -1;
  if (close(fd) != 0) fail("{}: cannot be closed: {}", path_, reason(errno));
  if (rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail("{}: cannot be replaced by the new file: {}", path_, reason(errno));
  }
  temporary_.clear();
  fsync_path(parent_folder(path_));
}

void write_file_atomic(const std::string& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

AtomicFolder::AtomicFolder(std::string target, bool replace) : target_(std::move(target)), replace_(replace) {
  while (target_.size() > 1 && target_.back() == '/') target_.pop_back();
  std::error_code error;
  const bool exists = fs::exists(fs::symlink_status(target_, error));
  if (exists && !fs::is_directory(target_, error)) fail("{}: exists and is not a folder", target_);
  if (exists && !replace_ && !fs::is_empty(target_, error)) {
    fail("{}: exists and is not empty; choose another folder or remove it", target_);
  }
  fs::create_directories(parent_folder(target_), error);
  if (error) fail("{}: cannot be created: {}", parent_folder(target_), error.message());
  temporary_ = temporary_name(target_);
  if (mkdir(temporary_.c_str(), 0777) != 0) {
    const int reason_code = errno;
    temporary_.clear();
    fail("{}: cannot be created: {}", target_, reason(reason_code));
  }
}

AtomicFolder::~AtomicFolder() {
  std::error_code ignored;
  if (!committed_ && !temporary_.empty()) fs::remove_all(temporary_, ignored);
}

void AtomicFolder::commit() {
  std::error_code error;
  for (const auto& entry : fs::recursive_directory_iterator(temporary_)) fsync_path(entry.path().string());
  fsync_path(temporary_);
  // rename() replaces nothing or an empty folder; a filled one is exchanged, so that one of the two is always
  // there.
  const bool filled = fs::exists(target_, error) && !fs::is_empty(target_, error);
  if (filled && !replace_) fail("{}: was filled by someone else meanwhile", target_);
  const int rc = filled ? renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE)
                        : rename(temporary_.c_str(), target_.c_str());
  if (rc != 0) fail("{}: cannot be put in place: {}", target_, reason(errno));
  committed_ = true;
  fsync_path(parent_folder(target_));
  if (filled) fs::remove_all(temporary_, error);
}

}  // namespace topk_sft
