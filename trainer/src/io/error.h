// The one error type of the trainer, and the two helpers that raise it.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace topk_sft {

// A fault in what the user gave (file, key, value) or in the machine (disk, memory). The message is one line
// that names the thing, what it was and what it must be; binaries print it after "<program>: error: ".
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws Error with a formatted message: fail("{}: expected {} tensors, found {}", path, want, got).
template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

// Text from a file made safe to print on one line: control bytes and bytes that are not ASCII as \xNN, cut
// after `limit` bytes.
std::string printable(const std::string& text, size_t limit = 200);

// The text up to its first line break: messages of the tensor library carry a stack trace behind it.
std::string first_line(const std::string& text);

}  // namespace topk_sft
