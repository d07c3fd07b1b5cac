// Strict JSON: nlohmann's parser, plus what it leaves open. Duplicate keys, nesting deeper than
// kMaxJsonDepth, numbers that overflow, bytes that are not UTF-8 and anything after the value are errors that
// name the file.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace topk_sft {

using Json = nlohmann::json;                 // keys sorted; any number of them
using OrderedJson = nlohmann::ordered_json;  // keys in the order of the file, for files that are written back

inline constexpr int kMaxJsonDepth = 64;
inline constexpr uint64_t kMaxJsonFileBytes = uint64_t{256} << 20;
inline constexpr size_t kMaxOrderedKeys = 10'000;  // of one ordered object: its look-up is linear

// Parses one JSON value. `where` (a file name) opens every error message. Throws Error.
Json parse_json(std::string_view text, const std::string& where);
OrderedJson parse_ordered_json(std::string_view text, const std::string& where);

// Reads and parses a file of at most kMaxJsonFileBytes. Throws Error.
Json read_json_file(const std::string& path);
OrderedJson read_ordered_json_file(const std::string& path);

}  // namespace topk_sft
