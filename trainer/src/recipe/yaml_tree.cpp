// Turns yaml-cpp's events into a bounded tree.
#include "recipe/yaml_tree.h"

#include <yaml-cpp/anchor.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <cstdio>
#include <sstream>

#include "io/error.h"

namespace topk_sft {

namespace {

[[noreturn]] void fail_at(const std::string& name, int line, int column, const std::string& what) {
  throw Error(name + ":" + std::to_string(line) + ":" + std::to_string(column) + ": " + what);
}

class TreeBuilder : public YAML::EventHandler {
 public:
  explicit TreeBuilder(const std::string& name) : name_(name) {}

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) refuse(mark, "a recipe is one YAML document; a second one starts here");
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    add(node(mark, "", anchor, YamlNode::Kind::kNull));
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    refuse(mark, "aliases (*name) are not allowed in a recipe; write the value out");
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    if (value.size() > kYamlMaxScalar) {
      refuse(mark, "a value of " + std::to_string(value.size()) + " bytes; at most " +
                       std::to_string(kYamlMaxScalar) + " are allowed");
    }
    YamlNode scalar = node(mark, tag, anchor, YamlNode::Kind::kScalar);
    scalar.text = value;
    scalar.quoted = tag == "!";
    add(std::move(scalar));
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(node(mark, tag, anchor, YamlNode::Kind::kSequence), mark);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(node(mark, tag, anchor, YamlNode::Kind::kMap), mark);
  }
  void OnMapEnd() override { close(); }

  YamlNode take() { return std::move(root_); }

 private:
  // An open map or sequence; a map holds a finished key until its value arrives.
  struct Open {
    YamlNode node;
    YamlNode key;
    bool has_key = false;
  };

  [[noreturn]] void refuse(const YAML::Mark& mark, const std::string& what) const {
    fail_at(name_, mark.line + 1, mark.column + 1, what);
  }

  YamlNode node(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, YamlNode::Kind kind) {
    if (anchor != YAML::NullAnchor) refuse(mark, "anchors (&name) are not allowed in a recipe");
    if (!tag.empty() && tag != "?" && tag != "!")
      refuse(mark, "tags (" + tag + ") are not allowed in a recipe");
    if (++nodes_ > kYamlMaxNodes) {
      refuse(mark, "too many values; a recipe holds at most " + std::to_string(kYamlMaxNodes));
    }
    YamlNode out;
    out.kind = kind;
    out.line = mark.line + 1;
    out.column = mark.column + 1;
    return out;
  }

  void open(YamlNode node, const YAML::Mark& mark) {
    if (stack_.size() >= kYamlMaxDepth) {
      refuse(mark, "nested deeper than " + std::to_string(kYamlMaxDepth) + " levels");
    }
    stack_.push_back({std::move(node), {}, false});
  }

  void close() {
    YamlNode done = std::move(stack_.back().node);
    stack_.pop_back();
    add(std::move(done));
  }

  void add(YamlNode node) {
    if (stack_.empty()) {
      root_ = std::move(node);
      return;
    }
    Open& top = stack_.back();
    if (top.node.kind == YamlNode::Kind::kSequence) {
      top.node.items.push_back(std::move(node));
    } else if (!top.has_key) {
      top.key = std::move(node);
      top.has_key = true;
    } else {
      top.node.members.emplace_back(std::move(top.key), std::move(node));
      top.has_key = false;
    }
  }

  const std::string& name_;
  std::vector<Open> stack_;
  YamlNode root_;
  size_t nodes_ = 0;
  int documents_ = 0;
};

// Bytes of the UTF-8 sequence at `p` (`left` bytes remain), or 0 if it is not one: overlong forms, surrogates
// and code points above U+10FFFF are not.
size_t utf8_length(const unsigned char* p, size_t left) {
  const unsigned char c = p[0];
  if (c < 0x80) return 1;
  const size_t n = c >= 0xc2 && c <= 0xdf ? 2 : (c & 0xf0) == 0xe0 ? 3 : c >= 0xf0 && c <= 0xf4 ? 4 : 0;
  if (n == 0 || n > left) return 0;
  for (size_t i = 1; i < n; ++i) {
    if ((p[i] & 0xc0) != 0x80) return 0;
  }
  if (c == 0xe0 && p[1] < 0xa0) return 0;
  if (c == 0xed && p[1] > 0x9f) return 0;
  if (c == 0xf0 && p[1] < 0x90) return 0;
  if (c == 0xf4 && p[1] > 0x8f) return 0;
  return n;
}

void check_text(const std::string& text, const std::string& name) {
  if (text.size() > kYamlMaxBytes) {
    throw Error(name + ": " + std::to_string(text.size()) + " bytes; a recipe has at most " +
                std::to_string(kYamlMaxBytes));
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  int line = 1;
  int column = 1;
  for (size_t i = 0; i < text.size();) {
    const unsigned char c = bytes[i];
    const size_t n = utf8_length(bytes + i, text.size() - i);
    char hex[8];
    std::snprintf(hex, sizeof hex, "0x%02x", c);
    if (n == 0) fail_at(name, line, column, std::string("not UTF-8 text (byte ") + hex + ")");
    if ((c < 0x20 && c != '\t' && c != '\n' && c != '\r') || c == 0x7f) {
      fail_at(name, line, column, std::string("control character ") + hex);
    }
    if (c == '\n') {
      ++line;
      column = 1;
    } else {
      ++column;
    }
    i += n;
  }
}

}  // namespace

std::string YamlNode::describe() const {
  switch (kind) {
    case Kind::kNull:
      return "null";
    case Kind::kSequence:
      return "a list";
    case Kind::kMap:
      return "a map";
    case Kind::kScalar:
      break;
  }
  const std::string shown = printable(text, 60);
  return quoted ? "the text \"" + shown + "\"" : "'" + shown + "'";
}

YamlNode parse_yaml(const std::string& text, const std::string& name) {
  check_text(text, name);
  TreeBuilder builder(name);
  try {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& e) {
    fail_at(name, e.mark.line + 1, e.mark.column + 1, "not valid YAML: " + e.msg);
  }
  return builder.take();
}

}  // namespace topk_sft
