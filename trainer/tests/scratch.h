// Helpers of the tests: a folder that goes away, and the message of an expected Error.
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <string>

#include "catch_shim.h"
#include "io/error.h"

struct ScratchFolder {
  ScratchFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "topk_test_XXXXXX").string();
    path = mkdtemp(pattern.data());
  }
  ~ScratchFolder() { std::filesystem::remove_all(path); }
  std::string operator/(const std::string& name) const { return (path / name).string(); }
  std::filesystem::path path;
};

// What `action` throws, which must be a topk_sft::Error with a one-line message.
template <typename Action>
std::string error_of(const Action& action) {
  try {
    action();
  } catch (const topk_sft::Error& error) {
    const std::string message = error.what();
    CHECK(message.find('\n') == std::string::npos);
    return message;
  }
  FAIL("no error was raised");
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}
