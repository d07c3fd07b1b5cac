// UTF-8: one code point at a time, and the lossy reading of bytes that need not be text. Torch-free.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace topk_sft {

inline constexpr char32_t kReplacementChar = 0xFFFD;

// Appends a code point (not a surrogate, at most 0x10FFFF) to `out`.
void append_utf8(char32_t code, std::string& out);

// Code point that starts at `text[at]`, which advances behind it. `text` must be valid UTF-8.
char32_t next_utf8(std::string_view text, size_t& at);

bool is_utf8(std::string_view bytes);

// Turns a stream of bytes into text: each maximal run of bytes that cannot be part of a character becomes one
// U+FFFD (the Unicode standard's "substitution of maximal subparts"), and a character is given out only when
// its last byte is there.
class LossyUtf8 {
 public:
  void push(std::string_view bytes, std::string& out);
  void finish(std::string& out);  // an unfinished character at the end becomes U+FFFD

 private:
  std::string pending_;  // a proper beginning of one character
};

}  // namespace topk_sft
