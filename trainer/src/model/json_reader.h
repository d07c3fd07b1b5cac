// Typed look-ups in a JSON object with errors that name the file, the key, its value and what it must be. A
// key that is null counts as absent, as it does for transformers.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "io/json.h"

namespace topk_sft {

class JsonReader {
 public:
  // `json` must be an object; `where` opens every message, `prefix` precedes every key ("rope_parameters.").
  JsonReader(const Json& json, std::string where, std::string prefix = "");

  bool has(const char* key) const;         // present and not null
  bool present(const char* key) const;     // present, maybe null
  const Json& raw(const char* key) const;  // has() must be true
  std::optional<int64_t> integer(const char* key, int64_t low, int64_t high) const;
  std::optional<double> number(const char* key, double above, double at_most) const;  // (above, at_most]
  std::optional<bool> boolean(const char* key) const;
  std::optional<std::string> string(const char* key) const;
  std::optional<std::vector<int64_t>> integers(const char* key, int64_t low, int64_t high) const;

  int64_t required_integer(const char* key, int64_t low, int64_t high) const;
  double required_number(const char* key, double above, double at_most) const;

  // Error when the object has a key outside `known`.
  void only(std::initializer_list<const char*> known) const;
  // "config.json: num_heads is -1: it must be ..."
  [[noreturn]] void bad(const char* key, const std::string& must) const;
  [[noreturn]] void missing(const char* key) const;

 private:
  const Json& json_;
  std::string where_;
  std::string prefix_;
};

}  // namespace topk_sft
