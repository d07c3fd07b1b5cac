// The reference of all recipe keys, made from the table: terminal text, Markdown, and a recipe written out.
#include <fmt/format.h>

#include "recipe/keys.h"
#include "recipe/recipe.h"

namespace topk_sft {

namespace {

std::string synonyms_text(const Key& key) {
  std::string out;
  for (const char* synonym : key.synonyms) out += std::string(out.empty() ? "" : ", ") + synonym;
  return out;
}

std::string default_text(const Key& key) {
  return key.required ? "required" : value_text(key, Recipe{});
}

// Breaks `text` at spaces into lines of at most `width` bytes, each after `indent` spaces.
std::string wrapped(const std::string& text, size_t indent, size_t width) {
  std::string out, line;
  size_t begin = 0;
  while (begin < text.size()) {
    size_t end = text.find(' ', begin);
    if (end == std::string::npos) end = text.size();
    const std::string word = text.substr(begin, end - begin);
    if (!line.empty() && line.size() + 1 + word.size() > width) {
      out += std::string(indent, ' ') + line + "\n";
      line.clear();
    }
    line += (line.empty() ? "" : " ") + word;
    begin = end + 1;
  }
  return out + std::string(indent, ' ') + line + "\n";
}

}  // namespace

std::string recipe_to_yaml(const Recipe& recipe) {
  std::string out;
  for (const auto& [section, doc] : recipe_sections()) {
    out += std::string(section) + ":\n";
    for (const Key& key : recipe_keys()) {
      if (std::string(key.section) != section) continue;
      out += fmt::format("  {}: {}\n", key.name, value_text(key, recipe));
    }
  }
  return out;
}

std::string recipe_help() {
  std::string out =
      "A recipe is a YAML file of sections; every key below stands in its section:\n"
      "  section:\n"
      "    key: value\n"
      "and `section.key=value` on the command line overrides it. Paths are relative to the current folder.\n";
  for (const auto& [section, doc] : recipe_sections()) {
    out += fmt::format("\n{}: {}\n", section, doc);
    for (const Key& key : recipe_keys()) {
      if (std::string(key.section) != section) continue;
      out += fmt::format("  {}  ({}; default {})\n", key.name,
                         key.choices.empty() ? type_text(key) : range_text(key), default_text(key));
      const std::string range = key.choices.empty() ? range_text(key) : "";
      const std::string synonyms = synonyms_text(key);
      out += wrapped(std::string(key.doc) + (range.empty() ? "" : " [" + range + "]") +
                         (synonyms.empty() ? "" : " Also read as: " + synonyms + "."),
                     6, 100);
    }
  }
  return out;
}

std::string recipe_markdown() {
  std::string out =
      "# Recipe keys\n\n"
      "Every key that `topk-sft` knows. This page is the output of `topk-sft --help-recipe=markdown`.\n\n"
      "A recipe is a YAML file with these sections. A key that is not listed here, stands in another "
      "section, is\n"
      "given twice or has a value of another type or range is an error that names file, line, column and the "
      "nearest\n"
      "valid name. `section.key=value` on the command line overrides the file. Paths are relative to the "
      "current\n"
      "folder. Names in the last column are read as the key, with a note.\n";
  for (const auto& [section, doc] : recipe_sections()) {
    out += fmt::format(
        "\n## {}\n\n{}\n\n| key | type | default | range | meaning | also read as "
        "|\n|---|---|---|---|---|---|\n",
        section, doc);
    for (const Key& key : recipe_keys()) {
      if (std::string(key.section) != section) continue;
      out += fmt::format("| `{}` | {} | {} | {} | {} | {} |\n", key.name, type_text(key),
                         key.required ? "required" : "`" + default_text(key) + "`", range_text(key), key.doc,
                         synonyms_text(key));
    }
  }
  return out;
}

}  // namespace topk_sft
