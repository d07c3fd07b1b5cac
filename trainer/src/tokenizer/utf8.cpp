#include "tokenizer/utf8.h"

namespace topk_sft {
namespace {

// What follows a lead byte: how many bytes the character has, and the range of its second byte, which is what
// rules out overlong forms, surrogates and code points above 0x10FFFF.
struct Lead {
  size_t length;  // 0: cannot begin a character
  uint8_t low;
  uint8_t high;
};

Lead lead_of(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte < 0xF0) {
    const uint8_t low = byte == 0xE0 ? 0xA0 : 0x80;
    const uint8_t high = byte == 0xED ? 0x9F : 0xBF;
    return {3, low, high};
  }
  if (byte < 0xF5) {
    const uint8_t low = byte == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = byte == 0xF4 ? 0x8F : 0xBF;
    return {4, low, high};
  }
  return {0, 0, 0};
}

// True iff `byte` may stand at place `at` (>= 1) of a character that begins with `first`.
bool continues(uint8_t first, size_t at, uint8_t byte) {
  const Lead lead = lead_of(first);
  return at == 1 ? byte >= lead.low && byte <= lead.high : byte >= 0x80 && byte <= 0xBF;
}

}  // namespace

void append_utf8(char32_t code, std::string& out) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | (code >> 6));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | (code >> 12));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | (code >> 18));
    out += static_cast<char>(0x80 | ((code >> 12) & 0x3F));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

char32_t next_utf8(std::string_view text, size_t& at) {
  const auto byte = [&](size_t place) { return static_cast<uint8_t>(text[place]); };
  const uint8_t first = byte(at);
  const size_t length = lead_of(first).length;
  char32_t code = length == 1 ? first : first & (0xFF >> (length + 1));
  for (size_t i = 1; i < length; ++i) code = (code << 6) | (byte(at + i) & 0x3F);
  at += length;
  return code;
}

bool is_utf8(std::string_view bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const auto first = static_cast<uint8_t>(bytes[at]);
    const size_t length = lead_of(first).length;
    if (length == 0 || at + length > bytes.size()) return false;
    for (size_t i = 1; i < length; ++i) {
      if (!continues(first, i, static_cast<uint8_t>(bytes[at + i]))) return false;
    }
    at += length;
  }
  return true;
}

void LossyUtf8::push(std::string_view bytes, std::string& out) {
  for (const char c : bytes) {
    const auto byte = static_cast<uint8_t>(c);
    if (!pending_.empty()) {
      const auto first = static_cast<uint8_t>(pending_[0]);
      if (continues(first, pending_.size(), byte)) {
        pending_ += c;
        if (pending_.size() == lead_of(first).length) {
          out += pending_;
          pending_.clear();
        }
        continue;
      }
      append_utf8(kReplacementChar, out);
      pending_.clear();
    }
    const size_t length = lead_of(byte).length;
    if (length == 1) {
      out += c;
    } else if (length == 0) {
      append_utf8(kReplacementChar, out);
    } else {
      pending_ += c;
    }
  }
}

void LossyUtf8::finish(std::string& out) {
  if (!pending_.empty()) append_utf8(kReplacementChar, out);
  pending_.clear();
}

}  // namespace topk_sft
