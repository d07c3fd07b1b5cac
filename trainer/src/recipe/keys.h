// The table of recipe keys: the one place that names them. Parsing, --help-recipe, docs/recipes.md and the
// comparison of a checkpoint's recipe with the current one are all made from it.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "recipe/recipe.h"

namespace topk_sft {

// Where a key's value lives, by type.
template <typename T>
using Accessor = T& (*)(Recipe&);
using Field = std::variant<Accessor<bool>, Accessor<int64_t>, Accessor<double>, Accessor<std::string>,
                           Accessor<std::optional<int64_t>>, Accessor<std::optional<double>>,
                           Accessor<std::vector<int64_t>>, Accessor<std::vector<double>>,
                           Accessor<std::vector<std::string>>>;

// Allowed numbers. Integers are compared as doubles, which is exact below 2^53.
struct Range {
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
  bool min_open = false;  // min itself is not allowed
  bool max_open = false;
};

// What resuming a checkpoint requires of a key.
enum class OnResume {
  kMustMatch,  // another value would continue another run: refused
  kMayChange,  // changes the rest of the run, by the user's will: printed
  kFree,       // does not touch the result
};

struct Key {
  const char* section;
  const char* name;
  Field field;
  OnResume on_resume;
  const char* doc;
  Range range = {};
  std::vector<const char*> choices = {};                                 // for strings and lists of strings
  std::vector<const char*> synonyms = {};                                // other names for the key
  std::vector<std::pair<const char*, const char*>> value_synonyms = {};  // other words for a choice
  bool required = false;

  std::string full_name() const { return std::string(section) + "." + name; }
};

// All keys, grouped by section in the order of the file.
const std::vector<Key>& recipe_keys();
// (section, what it holds), in order.
const std::vector<std::pair<const char*, const char*>>& recipe_sections();
// The key of that canonical "section.name"; nullptr if there is none.
const Key* find_key(const std::string& full_name);

// "integer", "number", "true or false", "text", "list of integers", ...
std::string type_text(const Key& key);
// "> 0", "0 to 1", "one of a, b"; empty if anything goes.
std::string range_text(const Key& key);
// The key's value in `recipe`, as YAML ("null" when it is not set).
std::string value_text(const Key& key, const Recipe& recipe);

}  // namespace topk_sft
