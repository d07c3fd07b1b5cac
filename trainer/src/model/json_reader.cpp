// JsonReader: every look-up checks type and range before it returns.
#include "model/json_reader.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "io/error.h"

namespace topk_sft {
namespace {

// A whole number in [low, high]; nullopt otherwise. 8.0 is not a whole number: transformers would refuse it
// too.
std::optional<int64_t> whole(const Json& value, int64_t low, int64_t high) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
    return std::nullopt;
  const auto number = value.get<int64_t>();
  return number >= low && number <= high ? std::optional(number) : std::nullopt;
}

}  // namespace

JsonReader::JsonReader(const Json& json, std::string where, std::string prefix)
    : json_(json), where_(std::move(where)), prefix_(std::move(prefix)) {
  if (!json_.is_object()) {
    std::string name = prefix_.empty() ? "the file" : prefix_.substr(0, prefix_.size() - 1);
    fail("{}: {} must be a JSON object, got {}", where_, name, json_.type_name());
  }
}

bool JsonReader::present(const char* key) const {
  return json_.contains(key);
}
bool JsonReader::has(const char* key) const {
  return json_.contains(key) && !json_[key].is_null();
}
const Json& JsonReader::raw(const char* key) const {
  return json_.at(key);
}

std::optional<int64_t> JsonReader::integer(const char* key, int64_t low, int64_t high) const {
  if (!has(key)) return std::nullopt;
  const auto number = whole(json_[key], low, high);
  if (!number) bad(key, fmt::format("a whole number from {} to {}", low, high));
  return number;
}

std::optional<double> JsonReader::number(const char* key, double above, double at_most) const {
  if (!has(key)) return std::nullopt;
  const Json& value = json_[key];
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (!(number > above && number <= at_most) || !std::isfinite(number)) {
    bad(key, std::isinf(at_most) ? fmt::format("a number above {}", above)
                                 : fmt::format("a number above {} and at most {}", above, at_most));
  }
  return number;
}

std::optional<bool> JsonReader::boolean(const char* key) const {
  if (!has(key)) return std::nullopt;
  if (!json_[key].is_boolean()) bad(key, "true or false");
  return json_[key].get<bool>();
}

std::optional<std::string> JsonReader::string(const char* key) const {
  if (!has(key)) return std::nullopt;
  if (!json_[key].is_string()) bad(key, "a string");
  return json_[key].get<std::string>();
}

std::optional<std::vector<int64_t>> JsonReader::integers(const char* key, int64_t low, int64_t high) const {
  if (!has(key)) return std::nullopt;
  std::vector<int64_t> numbers;
  const Json& value = json_[key];
  for (size_t i = 0; value.is_array() && i < value.size(); ++i) {
    if (const auto number = whole(value[i], low, high)) numbers.push_back(*number);
  }
  if (!value.is_array() || numbers.size() != value.size()) {
    bad(key, fmt::format("a list of whole numbers from {} to {}", low, high));
  }
  return numbers;
}

int64_t JsonReader::required_integer(const char* key, int64_t low, int64_t high) const {
  const auto value = integer(key, low, high);
  if (!value) missing(key);
  return *value;
}

double JsonReader::required_number(const char* key, double above, double at_most) const {
  const auto value = number(key, above, at_most);
  if (!value) missing(key);
  return *value;
}

void JsonReader::only(std::initializer_list<const char*> known) const {
  for (const auto& [key, unused] : json_.items()) {
    if (std::none_of(known.begin(), known.end(), [&](const char* name) { return key == name; })) {
      fail("{}: unknown key {}{}; known are {}", where_, prefix_, printable(key), fmt::join(known, ", "));
    }
  }
}

void JsonReader::bad(const char* key, const std::string& must) const {
  fail("{}: {}{} is {}: it must be {}", where_, prefix_, key, printable(json_.at(key).dump(), 80), must);
}

void JsonReader::missing(const char* key) const {
  fail("{}: lacks the key {}{}", where_, prefix_, key);
}

}  // namespace topk_sft
