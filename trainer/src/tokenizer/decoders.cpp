#include "tokenizer/decoders.h"

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>

#include "io/error.h"
#include "tokenizer/utf8.h"

namespace topk_sft {
namespace {

using StagePtr = std::unique_ptr<DecoderStage>;

// The end of every chain: appends to the caller's string.
class Sink final : public DecoderStage {
 public:
  explicit Sink(std::string& out) : out_(out) {}
  void push(std::string_view piece) override { out_ += piece; }
  void end_token() override {}
  void finish() override {}

 private:
  std::string& out_;
};

class Stage : public DecoderStage {
 public:
  explicit Stage(StagePtr next) : next_(std::move(next)) {}

 protected:
  DecoderStage& next() { return *next_; }

 private:
  StagePtr next_;
};

// No decoder: tokens joined by spaces.
class Join final : public Stage {
 public:
  using Stage::Stage;
  void push(std::string_view piece) override {
    if (!first_ && at_start_) next().push(" ");
    at_start_ = false;
    next().push(piece);
  }
  void end_token() override {
    if (!first_ && at_start_) next().push(" ");  // an empty token
    at_start_ = true;
    first_ = false;
    next().end_token();
  }
  void finish() override { next().finish(); }

 private:
  bool first_ = true;
  bool at_start_ = true;
};

// Byte-level BPE writes each byte as one printable character: those that are printable in Latin-1 as
// themselves, the other 68 as U+0100 onwards, in ascending order.
const std::unordered_map<char32_t, uint8_t>& byte_of_char() {
  static const std::unordered_map<char32_t, uint8_t> map = [] {
    std::unordered_map<char32_t, uint8_t> result;
    char32_t other = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable =
          (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
      result[printable ? static_cast<char32_t>(byte) : other++] = static_cast<uint8_t>(byte);
    }
    return result;
  }();
  return map;
}

// Byte-level characters back to bytes, all tokens as one stream of bytes read as UTF-8. A token with a
// character outside the alphabet (an added token) stands for its own text.
class ByteLevel final : public Stage {
 public:
  using Stage::Stage;
  void push(std::string_view piece) override { token_ += piece; }
  void end_token() override {
    std::string bytes;
    for (size_t at = 0; at < token_.size();) {
      const auto found = byte_of_char().find(next_utf8(token_, at));
      if (found == byte_of_char().end()) {
        bytes = token_;
        break;
      }
      bytes += static_cast<char>(found->second);
    }
    token_.clear();
    std::string text;
    utf8_.push(bytes, text);
    if (!text.empty()) next().push(text);
  }
  void finish() override {
    std::string text;
    utf8_.finish(text);
    if (!text.empty()) next().push(text);
    next().end_token();
    next().finish();
  }

 private:
  std::string token_;
  LossyUtf8 utf8_;
};

// The marker of a space (U+2581 as a rule) becomes a space; in the first token it vanishes if one was put in
// front of the text when it was encoded.
class Metaspace final : public Stage {
 public:
  Metaspace(StagePtr next, char32_t marker, bool prepended)
      : Stage(std::move(next)), marker_(marker), drop_(prepended) {}
  void push(std::string_view piece) override {
    std::string text;
    for (size_t at = 0; at < piece.size();) {
      const size_t begin = at;
      if (next_utf8(piece, at) != marker_) {
        text += piece.substr(begin, at - begin);
      } else if (!drop_) {
        text += ' ';
      }
    }
    next().push(text);
  }
  void end_token() override {
    drop_ = false;
    next().end_token();
  }
  void finish() override { next().finish(); }

 private:
  char32_t marker_;
  bool drop_;
};

std::optional<uint8_t> hex_digit(char c) {
  if (c >= '0' && c <= '9') return static_cast<uint8_t>(c - '0');
  if (c >= 'a' && c <= 'f') return static_cast<uint8_t>(c - 'a' + 10);
  if (c >= 'A' && c <= 'F') return static_cast<uint8_t>(c - 'A' + 10);
  return std::nullopt;
}

// Tokens written <0xHH> are bytes. A run of them becomes text as a whole if it is UTF-8, else one U+FFFD a
// byte; so a run is held back until it ends.
class ByteFallback final : public Stage {
 public:
  using Stage::Stage;
  void push(std::string_view piece) override { token_ += piece; }
  void end_token() override {
    const std::optional<uint8_t> byte = byte_token();
    if (byte) {
      bytes_ += static_cast<char>(*byte);
    } else {
      flush();
      next().push(token_);
      next().end_token();
    }
    token_.clear();
  }
  void finish() override {
    flush();
    next().finish();
  }

 private:
  std::optional<uint8_t> byte_token() const {
    if (token_.size() != 6 || token_.compare(0, 3, "<0x") != 0 || token_[5] != '>') return std::nullopt;
    const auto high = hex_digit(token_[3]);
    const auto low = hex_digit(token_[4]);
    if (!high || !low) return std::nullopt;
    return static_cast<uint8_t>(*high << 4 | *low);
  }
  void flush() {
    if (bytes_.empty()) return;
    if (is_utf8(bytes_)) {
      next().push(bytes_);
      next().end_token();
    } else {
      std::string replacement;
      append_utf8(kReplacementChar, replacement);
      for (size_t i = 0; i < bytes_.size(); ++i) {
        next().push(replacement);
        next().end_token();
      }
    }
    bytes_.clear();
  }

  std::string token_;
  std::string bytes_;
};

// All tokens become one.
class Fuse final : public Stage {
 public:
  using Stage::Stage;
  void push(std::string_view piece) override { next().push(piece); }
  void end_token() override {}
  void finish() override {
    next().end_token();
    next().finish();
  }
};

// Takes up to `start` characters equal to `content` off the front of each token and up to `stop` off its end.
class Strip final : public Stage {
 public:
  Strip(StagePtr next, char32_t content, uint64_t start, uint64_t stop)
      : Stage(std::move(next)), content_(content), start_(start), stop_(stop), left_(start) {}
  void push(std::string_view piece) override {
    std::string text;
    for (size_t at = 0; at < piece.size();) {
      const size_t begin = at;
      const bool match = next_utf8(piece, at) == content_;
      const std::string_view character = piece.substr(begin, at - begin);
      if (match && left_ > 0) {
        --left_;
        continue;
      }
      left_ = 0;
      if (match) {
        ++held_;  // a candidate for the end; what exceeds `stop_` is certain to stay
        if (held_ > stop_) {
          text += character;
          --held_;
        }
        continue;
      }
      release(text);
      text += character;
    }
    if (!text.empty()) next().push(text);
  }
  void end_token() override {
    held_ = 0;
    left_ = start_;
    next().end_token();
  }
  void finish() override { next().finish(); }

 private:
  void release(std::string& text) {
    for (; held_ > 0; --held_) append_utf8(content_, text);
  }

  char32_t content_;
  uint64_t start_;
  uint64_t stop_;
  uint64_t left_;      // characters that may still be taken off the front of this token
  uint64_t held_ = 0;  // characters equal to content_ that are taken off if the token ends here
};

// Replaces every occurrence of `pattern` inside a token.
class Replace final : public Stage {
 public:
  Replace(StagePtr next, std::string pattern, std::string content)
      : Stage(std::move(next)), pattern_(std::move(pattern)), content_(std::move(content)) {}
  void push(std::string_view piece) override {
    pending_ += piece;
    std::string text;
    size_t done = 0;
    for (size_t found; (found = pending_.find(pattern_, done)) != std::string::npos;
         done = found + pattern_.size()) {
      text.append(pending_, done, found - done);
      text += content_;
    }
    // The longest end of what is left that may be the beginning of an occurrence stays behind.
    size_t keep = std::min(pattern_.size() - 1, pending_.size() - done);
    while (keep > 0 && pending_.compare(pending_.size() - keep, keep, pattern_, 0, keep) != 0) --keep;
    text.append(pending_, done, pending_.size() - keep - done);
    pending_.erase(0, pending_.size() - keep);
    if (!text.empty()) next().push(text);
  }
  void end_token() override {
    if (!pending_.empty()) next().push(pending_);
    pending_.clear();
    next().end_token();
  }
  void finish() override { next().finish(); }

 private:
  std::string pattern_;
  std::string content_;
  std::string pending_;
};

// ---------------------------------------------------------------------------------------------------------------
// Reading the description
// ---------------------------------------------------------------------------------------------------------------

const Json& member(const Json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end()) fail("{}: no key \"{}\"", where, key);
  return *found;
}

std::string string_member(const Json& object, const char* key, const std::string& where) {
  const Json& value = member(object, key, where);
  if (!value.is_string()) fail("{}.{}: must be a string, got {}", where, key, printable(value.dump()));
  return value.get<std::string>();
}

uint64_t count_member(const Json& object, const char* key, const std::string& where) {
  const Json& value = member(object, key, where);
  if (!value.is_number_unsigned()) {
    fail("{}.{}: must be a whole number of at least 0, got {}", where, key, printable(value.dump()));
  }
  return value.get<uint64_t>();
}

char32_t char_member(const Json& object, const char* key, const std::string& where) {
  const std::string text = string_member(object, key, where);
  size_t end = 0;
  const char32_t code = text.empty() ? 0 : next_utf8(text, end);
  if (text.empty() || end != text.size()) {
    fail("{}.{}: must be one character, got \"{}\"", where, key, printable(text));
  }
  return code;
}

// prepend_scheme "always", "first" or "never"; older files say add_prefix_space instead.
bool metaspace_prepends(const Json& decoder, const std::string& where) {
  if (const auto scheme = decoder.find("prepend_scheme"); scheme != decoder.end()) {
    if (*scheme == "always" || *scheme == "first") return true;
    if (*scheme == "never") return false;
    fail("{}.prepend_scheme: must be \"always\", \"first\" or \"never\", got {}", where,
         printable(scheme->dump()));
  }
  if (const auto add = decoder.find("add_prefix_space"); add != decoder.end()) {
    if (!add->is_boolean()) {
      fail("{}.add_prefix_space: must be true or false, got {}", where, printable(add->dump()));
    }
    return add->get<bool>();
  }
  return true;
}

}  // namespace

DecoderChain::DecoderChain(const Json& decoder, const std::string& where) {
  if (decoder.is_null()) {
    factories_.push_back([](StagePtr next) { return std::make_unique<Join>(std::move(next)); });
  } else {
    add(decoder, where);
  }
}

void DecoderChain::add(const Json& decoder, const std::string& where) {
  if (!decoder.is_object()) fail("{}: must be an object, got {}", where, printable(decoder.dump()));
  const std::string type = string_member(decoder, "type", where);
  if (type == "Sequence") {
    const Json& members = member(decoder, "decoders", where);
    if (!members.is_array()) {
      fail("{}.decoders: must be an array, got {}", where, printable(members.dump()));
    }
    for (size_t i = 0; i < members.size(); ++i) add(members[i], fmt::format("{}.decoders[{}]", where, i));
  } else if (type == "ByteLevel") {
    factories_.push_back([](StagePtr next) { return std::make_unique<ByteLevel>(std::move(next)); });
  } else if (type == "Metaspace") {
    const char32_t marker = char_member(decoder, "replacement", where);
    const bool prepended = metaspace_prepends(decoder, where);
    factories_.push_back(
        [=](StagePtr next) { return std::make_unique<Metaspace>(std::move(next), marker, prepended); });
  } else if (type == "ByteFallback") {
    factories_.push_back([](StagePtr next) { return std::make_unique<ByteFallback>(std::move(next)); });
  } else if (type == "Fuse") {
    factories_.push_back([](StagePtr next) { return std::make_unique<Fuse>(std::move(next)); });
  } else if (type == "Strip") {
    const char32_t content = char_member(decoder, "content", where);
    const uint64_t start = count_member(decoder, "start", where);
    const uint64_t stop = count_member(decoder, "stop", where);
    factories_.push_back(
        [=](StagePtr next) { return std::make_unique<Strip>(std::move(next), content, start, stop); });
  } else if (type == "Replace") {
    const Json& pattern = member(decoder, "pattern", where);
    if (!pattern.is_object() || !pattern.contains("String")) {
      fail("{}: Replace is supported for a pattern of kind \"String\" only, got {}", where,
           printable(pattern.dump()));
    }
    const std::string text = string_member(pattern, "String", where + ".pattern");
    if (text.empty()) fail("{}.pattern.String: must not be empty", where);
    const std::string content = string_member(decoder, "content", where);
    factories_.push_back(
        [=](StagePtr next) { return std::make_unique<Replace>(std::move(next), text, content); });
  } else {
    fail(
        "{}: decoder type \"{}\" is not supported; supported are ByteLevel, Metaspace, ByteFallback, Fuse, "
        "Strip, Replace and Sequence",
        where, printable(type));
  }
}

std::unique_ptr<DecoderStage> DecoderChain::open(std::string& out) const {
  StagePtr stage = std::make_unique<Sink>(out);
  for (auto factory = factories_.rbegin(); factory != factories_.rend(); ++factory) {
    stage = (*factory)(std::move(stage));
  }
  return stage;
}

}  // namespace topk_sft
