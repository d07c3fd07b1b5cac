// A file that only grows: each append is one write, handed to the system before the call returns.
#pragma once

#include <string>
#include <string_view>

namespace topk_sft {

class AppendFile {
 public:
  // Opens or creates. `exclusive`: the file must not exist yet. Throws Error.
  explicit AppendFile(std::string path, bool exclusive = false);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  // Throws Error (full disk, size limit). A record that could be written only in part is cut off again, so
  // that the file ends with a whole one.
  void append(std::string_view bytes);
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_;
};

}  // namespace topk_sft
