// Strict JSON over nlohmann's parser; the callback sees every key, which is where duplicates show.
#include "io/json.h"

#include <unordered_set>
#include <vector>

#include "io/atomic_file.h"
#include "io/error.h"

namespace topk_sft {
namespace {

// nlohmann's messages begin with "[json.exception.<kind>.<number>] ".
std::string without_prefix(const std::string& message) {
  const size_t end = message.find("] ");
  return printable(end == std::string::npos ? message : message.substr(end + 2), 300);
}

template <typename AnyJson>
AnyJson parse(std::string_view text, const std::string& where, size_t max_keys) {
  using Event = typename AnyJson::parse_event_t;
  std::vector<std::unordered_set<std::string>> open_objects;
  int depth = 0;
  const auto check = [&](int, Event event, AnyJson& parsed) {
    switch (event) {
      case Event::object_start:
      case Event::array_start:
        if (++depth > kMaxJsonDepth) fail("{}: JSON is nested deeper than {} levels", where, kMaxJsonDepth);
        if (event == Event::object_start) open_objects.emplace_back();
        break;
      case Event::object_end:
        open_objects.pop_back();
        [[fallthrough]];
      case Event::array_end:
        --depth;
        break;
      case Event::key: {
        const auto& key = parsed.template get_ref<const std::string&>();
        if (!open_objects.back().insert(key).second) {
          fail("{}: duplicate key \"{}\" in one JSON object", where, printable(key));
        }
        if (open_objects.back().size() > max_keys) {
          fail("{}: a JSON object has more than {} keys", where, max_keys);
        }
        break;
      }
      case Event::value:
        break;
    }
    return true;
  };
  try {
    return AnyJson::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::exception& error) {
    fail("{}: invalid JSON: {}", where, without_prefix(error.what()));
  }
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) {
  return parse<Json>(text, where, SIZE_MAX);
}

OrderedJson parse_ordered_json(std::string_view text, const std::string& where) {
  return parse<OrderedJson>(text, where, kMaxOrderedKeys);
}

Json read_json_file(const std::string& path) {
  return parse_json(read_file(path, kMaxJsonFileBytes), path);
}

OrderedJson read_ordered_json_file(const std::string& path) {
  return parse_ordered_json(read_file(path, kMaxJsonFileBytes), path);
}

}  // namespace topk_sft
