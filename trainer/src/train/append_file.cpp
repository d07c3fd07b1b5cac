#include "train/append_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "io/error.h"

namespace topk_sft {

AppendFile::AppendFile(std::string path, bool exclusive) : path_(std::move(path)) {
  fd_ = open(path_.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | (exclusive ? O_EXCL : 0), 0644);
  if (fd_ < 0) fail("{}: cannot be opened for writing: {}", path_, std::strerror(errno));
}

AppendFile::~AppendFile() {
  close(fd_);
}

void AppendFile::append(std::string_view bytes) {
  const off_t before = lseek(fd_, 0, SEEK_END);
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = write(fd_, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int error = n < 0 ? errno : ENOSPC;
      [[maybe_unused]] const int cut = ftruncate(fd_, before);
      fail("{}: cannot be written: {}", path_, std::strerror(error));
    }
    done += static_cast<size_t>(n);
  }
}

}  // namespace topk_sft
