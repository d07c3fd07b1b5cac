// A small, bounded view of one YAML document: maps, sequences and scalars with their positions.
//
// yaml-cpp reads the syntax; this keeps what a recipe may contain and refuses the rest by position: anchors,
// aliases, tags, several documents, text that is not UTF-8, and anything larger or deeper than a recipe can
// be. Torch-free.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace topk_sft {

struct YamlNode {
  enum class Kind { kNull, kScalar, kSequence, kMap };
  Kind kind = Kind::kNull;
  int line = 0;  // from 1
  int column = 0;
  std::string text;             // scalar: its value
  bool quoted = false;          // scalar: written in quotes or as a block, so text and never a number
  std::vector<YamlNode> items;  // sequence
  std::vector<std::pair<YamlNode, YamlNode>> members;  // map, in file order

  // "map", "list", "null", or the scalar itself, for messages.
  std::string describe() const;
};

inline constexpr size_t kYamlMaxBytes = 1 << 20;
inline constexpr size_t kYamlMaxScalar = 1 << 14;
inline constexpr size_t kYamlMaxNodes = 1 << 14;
inline constexpr size_t kYamlMaxDepth = 16;

// Parses one document; an empty text gives kNull. `name` is the file in messages.
// Throws Error "name:line:column: what is wrong".
YamlNode parse_yaml(const std::string& text, const std::string& name);

}  // namespace topk_sft
