// From YAML text and overrides to a checked Recipe.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <set>

#include "io/atomic_file.h"
#include "io/error.h"
#include "recipe/keys.h"
#include "recipe/nearest.h"
#include "recipe/recipe.h"
#include "recipe/yaml_tree.h"

namespace topk_sft {

namespace {

// Where a value came from, for messages: "recipe.yaml:3:5" or "override 'optim.lr=1'".
using Origin = std::string;

struct Parser {
  const std::string& name;
  ParsedRecipe out;
  std::map<std::string, Origin> origins;  // full key name -> where its value was given

  void read_document(const YamlNode& root);
  void apply_override(const std::string& text);
  void check();

 private:
  Origin at(const YamlNode& node) const {
    return name + ":" + std::to_string(node.line) + ":" + std::to_string(node.column);
  }
  Origin origin(const std::string& full_name) const {
    const auto found = origins.find(full_name);
    return found == origins.end() ? name : found->second;
  }
  const Key& resolve(const std::string& section, const std::string& written, const Origin& where);
  void set(const Key& key, const YamlNode& value, const Origin& where);
  void note(const Origin& where, const std::string& text) { out.notes.push_back(where + ": " + text); }
};

const char* indefinite(const std::string& type) {
  return type.find_first_of("aeiou") == 0 ? "an " : "a ";
}

[[noreturn]] void wrong_type(const Key& key, const YamlNode& value, const Origin& where) {
  std::string expected = type_text(key);
  if (expected == "true or false" || expected == "text") {
    // reads well as it is
  } else {
    expected = indefinite(expected) + expected;
  }
  throw Error(where + ": " + key.full_name() + " must be " + expected + ", got " + value.describe());
}

[[noreturn]] void out_of_range(const Key& key, const std::string& value, const Origin& where) {
  throw Error(where + ": " + key.full_name() + " must be " + range_text(key) + ", got " + value);
}

void check_range(const Key& key, double value, const std::string& text, const Origin& where) {
  const Range& r = key.range;
  const bool low = r.min_open ? value > r.min : value >= r.min;
  const bool high = r.max_open ? value < r.max : value <= r.max;
  if (!low || !high) out_of_range(key, text, where);
}

bool parse_int(const std::string& text, int64_t* out) {
  const char* begin = text.data() + (text.size() > 1 && text[0] == '+' && text[1] != '-' ? 1 : 0);
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(begin, end, *out);
  return begin != end && result.ec == std::errc() && result.ptr == end;
}

bool parse_double(const std::string& text, double* out) {
  const char* begin = text.data() + (text.size() > 1 && text[0] == '+' && text[1] != '-' ? 1 : 0);
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(begin, end, *out);
  // Words such as "inf" and "nan" are no settings.
  return begin != end && result.ec == std::errc() && result.ptr == end && std::isfinite(*out);
}

// Writes a YAML value into the field of a key; one overload per type of field.
struct Setter {
  Recipe& recipe;
  const Key& key;
  const YamlNode& value;
  const Origin& where;

  int64_t integer(const YamlNode& node) const {
    int64_t parsed = 0;
    if (node.kind != YamlNode::Kind::kScalar || node.quoted || !parse_int(node.text, &parsed)) {
      wrong_type(key, node, where);
    }
    check_range(key, static_cast<double>(parsed), node.text, where);
    return parsed;
  }
  double number(const YamlNode& node) const {
    double parsed = 0;
    if (node.kind != YamlNode::Kind::kScalar || node.quoted || !parse_double(node.text, &parsed)) {
      wrong_type(key, node, where);
    }
    check_range(key, parsed, node.text, where);
    return parsed;
  }
  std::string text(const YamlNode& node) const {
    if (node.kind != YamlNode::Kind::kScalar) wrong_type(key, node, where);
    for (const unsigned char c : node.text) {
      if (c < 0x20 || c == 0x7f) {
        throw Error(where + ": " + key.full_name() + " must be one line of text without control characters");
      }
    }
    if (key.choices.empty()) return node.text;
    for (const auto& [other, choice] : key.value_synonyms) {
      if (node.text == other) return choice;
    }
    for (const char* choice : key.choices) {
      if (node.text == choice) return choice;
    }
    const std::vector<std::string> choices(key.choices.begin(), key.choices.end());
    throw Error(where + ": " + key.full_name() + " must be " + range_text(key) + ", got " + node.describe() +
                "; did you mean '" + nearest_name(node.text, choices) + "'?");
  }
  bool null() const { return value.kind == YamlNode::Kind::kNull; }

  void operator()(Accessor<bool> field) const {
    if (value.kind != YamlNode::Kind::kScalar || value.quoted ||
        (value.text != "true" && value.text != "false")) {
      wrong_type(key, value, where);
    }
    field(recipe) = value.text == "true";
  }
  void operator()(Accessor<int64_t> field) const { field(recipe) = integer(value); }
  void operator()(Accessor<double> field) const { field(recipe) = number(value); }
  void operator()(Accessor<std::string> field) const {
    if (null() && key.choices.empty()) {
      field(recipe).clear();  // not set
    } else {
      field(recipe) = text(value);
    }
  }
  void operator()(Accessor<std::optional<int64_t>> field) const {
    field(recipe) = null() ? std::nullopt : std::optional(integer(value));
  }
  void operator()(Accessor<std::optional<double>> field) const {
    field(recipe) = null() ? std::nullopt : std::optional(number(value));
  }
  void operator()(Accessor<std::vector<int64_t>> field) const {
    list(field(recipe), [&](const YamlNode& n) { return integer(n); });
  }
  void operator()(Accessor<std::vector<double>> field) const {
    list(field(recipe), [&](const YamlNode& n) { return number(n); });
  }
  void operator()(Accessor<std::vector<std::string>> field) const {
    list(field(recipe), [&](const YamlNode& n) { return text(n); });
  }

  // A list, null (the empty list), or one element written without brackets.
  template <typename T, typename Read>
  void list(std::vector<T>& out, Read read) const {
    out.clear();
    if (value.kind == YamlNode::Kind::kSequence) {
      for (const YamlNode& item : value.items) add(out, read(item));
    } else if (!null()) {
      add(out, read(value));
    }
  }
  template <typename T>
  void add(std::vector<T>& out, T element) const {
    if (std::find(out.begin(), out.end(), element) != out.end()) {
      throw Error(fmt::format("{}: {} names {} twice", where, key.full_name(), element));
    }
    out.push_back(std::move(element));
  }
};

bool is_section(const std::string& name) {
  for (const auto& [section, doc] : recipe_sections()) {
    if (name == section) return true;
  }
  return false;
}

bool has_name(const Key& key, const std::string& name) {
  if (name == key.name) return true;
  return std::any_of(key.synonyms.begin(), key.synonyms.end(), [&](const char* s) { return name == s; });
}

// The key of that name or synonym in `section`; in any section if `section` is empty; nullptr if there is
// none.
const Key* lookup(const std::string& section, const std::string& name) {
  for (const Key& key : recipe_keys()) {
    if ((section.empty() || section == key.section) && has_name(key, name)) return &key;
  }
  return nullptr;
}

std::string nearest_key(const std::string& section, const std::string& name) {
  // Inside the section when something there is close, anywhere otherwise.
  std::vector<std::string> here, all;
  for (const Key& key : recipe_keys()) {
    all.push_back(key.name);
    if (section == key.section) here.push_back(key.name);
  }
  const std::string close = nearest_name(name, here);
  const std::string any = nearest_name(name, all);
  const bool inside = !close.empty() && edit_distance(name.substr(0, 128), close) <=
                                            edit_distance(name.substr(0, 128), any) + 2;
  const Key* key = inside ? lookup(section, close) : lookup("", any);
  return key->full_name();
}

const Key& Parser::resolve(const std::string& section, const std::string& written, const Origin& where) {
  const Key* key = lookup(section, written);
  const std::string shown = printable(written, 80);
  if (key == nullptr) {
    if (const Key* elsewhere = lookup("", written)) {
      throw Error(where + ": '" + shown + "' does not belong to section '" + section + "'; did you mean '" +
                  elsewhere->full_name() + "'?");
    }
    throw Error(where + ": unknown key '" + section + "." + shown + "'; did you mean '" +
                nearest_key(section, written) + "'?");
  }
  if (written != key->name) note(where, "'" + written + "' is read as " + key->full_name());
  return *key;
}

void Parser::set(const Key& key, const YamlNode& value, const Origin& where) {
  std::visit(Setter{out.recipe, key, value, where}, key.field);
  origins[key.full_name()] = where;
}

void Parser::read_document(const YamlNode& root) {
  if (root.kind == YamlNode::Kind::kNull) return;  // everything may come from overrides
  if (root.kind != YamlNode::Kind::kMap) {
    throw Error(at(root) + ": a recipe is a map of sections (model, data, ...), got " + root.describe());
  }
  std::map<std::string, Origin> sections;
  for (const auto& [section_node, body] : root.members) {
    if (section_node.kind != YamlNode::Kind::kScalar) {
      throw Error(at(section_node) + ": a section's name must be text, got " + section_node.describe());
    }
    const std::string& section = section_node.text;
    const std::string shown = printable(section, 80);
    if (!is_section(section)) {
      if (const Key* key = lookup("", section)) {
        throw Error(at(section_node) + ": '" + shown + "' does not stand at the top level; did you mean '" +
                    key->full_name() + "' (in section '" + key->section + "')?");
      }
      std::vector<std::string> names;
      for (const auto& [known, doc] : recipe_sections()) names.push_back(known);
      throw Error(at(section_node) + ": unknown section '" + shown + "'; did you mean '" +
                  nearest_name(section, names) + "'?");
    }
    if (const auto [first, added] = sections.emplace(section, at(section_node)); !added) {
      throw Error(at(section_node) + ": section '" + section + "' is given twice, first at " + first->second);
    }
    if (body.kind == YamlNode::Kind::kNull) continue;
    if (body.kind != YamlNode::Kind::kMap) {
      throw Error(at(body) + ": section '" + section + "' must be a map of keys, got " + body.describe());
    }
    for (const auto& [key_node, value] : body.members) {
      if (key_node.kind != YamlNode::Kind::kScalar) {
        throw Error(at(key_node) + ": a key must be text, got " + key_node.describe());
      }
      const Key& key = resolve(section, key_node.text, at(key_node));
      if (const auto first = origins.find(key.full_name()); first != origins.end()) {
        throw Error(at(key_node) + ": " + key.full_name() + " is given twice, first at " + first->second);
      }
      // An empty value has no place of its own: name its key.
      set(key, value, value.kind == YamlNode::Kind::kNull ? at(key_node) : at(value));
    }
  }
}

void Parser::apply_override(const std::string& text) {
  const Origin where = "override '" + printable(text, 120) + "'";
  const size_t equals = text.find('=');
  if (equals == std::string::npos) throw Error(where + ": must be section.key=value");
  const std::string full_name = text.substr(0, equals);
  const std::string value = text.substr(equals + 1);
  const size_t dot = full_name.find('.');
  const std::string section = full_name.substr(0, dot);
  if (dot == std::string::npos) {
    const Key* key = lookup("", full_name);
    throw Error(where + ": must be section.key=value; did you mean '" +
                (key != nullptr ? key->full_name() : nearest_key("", full_name)) + "'?");
  }
  if (!is_section(section)) {
    std::vector<std::string> names;
    for (const auto& [known, doc] : recipe_sections()) names.push_back(known);
    throw Error(where + ": unknown section '" + printable(section, 80) + "'; did you mean '" +
                nearest_name(section, names) + "'?");
  }
  const Key& key = resolve(section, full_name.substr(dot + 1), where);
  YamlNode node;
  if (std::holds_alternative<Accessor<std::string>>(key.field) && !value.empty() &&
      value.find_first_of("\"'[{") != 0 && value != "null" && value != "~") {
    node.kind = YamlNode::Kind::kScalar;  // a path is taken as it is, whatever YAML would make of it
    node.text = value;
  } else {
    node = parse_yaml(value, where);
  }
  set(key, node, where);
}

void Parser::check() {
  Recipe& r = out.recipe;
  for (const Key& key : recipe_keys()) {
    if (key.required && value_text(key, r) == "null") {
      throw Error(origin(key.full_name()) + ": " + key.full_name() + " is required");
    }
  }
  const auto both = [&](const char* a, const char* b) {
    throw Error(origin(b) + ": only one of " + a + " and " + b + " may be given");
  };
  // model
  const std::string& device = r.model.device;
  int64_t index = 0;
  const bool cuda_index = device.rfind("cuda:", 0) == 0 && parse_int(device.substr(5), &index) &&
                          index >= 0 && index < 128 && device[5] != '+';
  if (device != "cpu" && device != "cuda" && !cuda_index) {
    throw Error(origin("model.device") + ": model.device must be cpu, cuda or cuda:N, got '" +
                printable(device, 60) + "'");
  }
  if (r.model.dtype == "auto") r.model.dtype = device == "cpu" ? "float32" : "bfloat16";
  if (r.model.adapter == "lora") {
    if (r.model.lora_dropout != 0) {
      throw Error(origin("model.lora_dropout") +
                  ": model.lora_dropout must be 0, adapters train without dropout; got " +
                  value_text(*find_key("model.lora_dropout"), r));
    }
    const std::vector<std::string>& targets = r.model.lora_target_modules;
    if (targets.empty()) {
      throw Error(origin("model.lora_target_modules") + ": model.lora_target_modules must not be empty");
    }
    for (const std::string& target : targets) {
      if (std::count(targets.begin(), targets.end(), target) > 1) {
        throw Error(origin("model.lora_target_modules") + ": model.lora_target_modules names " + target +
                    " twice");
      }
    }
  } else {
    for (const char* key :
         {"model.lora_r", "model.lora_alpha", "model.lora_dropout", "model.lora_target_modules"}) {
      if (origins.count(key)) {
        note(origins[key], std::string(key) + " has no effect: model.adapter is none");
      }
    }
  }
  // data
  const bool by_folder = !r.data.dataset_prepared_path.empty();
  if (by_folder && !r.data.train_files.empty()) both("data.dataset_prepared_path", "data.train_files");
  if (by_folder && !r.data.eval_files.empty()) both("data.dataset_prepared_path", "data.eval_files");
  if (!by_folder && r.data.train_files.empty()) {
    throw Error(origin("data.dataset_prepared_path") +
                ": data.dataset_prepared_path (or data.train_files) is required");
  }
  for (const char* split : {"data.train_split", "data.eval_split"}) {
    if (value_text(*find_key(split), r) == "null")
      throw Error(origin(split) + ": " + split + " must not be empty");
  }
  // attention
  const AttentionSection& a = r.attention;
  if (a.topk && a.ratio) both("attention.topk", "attention.ratio");
  if (r.uses_topk() && !a.topk && !a.ratio) {
    throw Error(
        origin("attention.mode") +
        ": top-k attention needs attention.topk (keys kept) or attention.ratio (share of the visible keys)");
  }
  if (a.max_keys && *a.max_keys < a.min_keys) {
    throw Error(origin("attention.max_keys") + ": attention.max_keys (" + std::to_string(*a.max_keys) +
                ") must be at least attention.min_keys (" + std::to_string(a.min_keys) + ")");
  }
  // Evaluation at other ratios and probes look at these too.
  if (!r.uses_topk() && r.train.eval_ratios.empty() && r.logging.probe_steps == 0) {
    for (const auto& [full_name, where] : origins) {
      if (full_name.rfind("attention.", 0) == 0 && full_name != "attention.mode") {
        note(where, full_name + " has no effect: nothing in this run uses top-k attention");
      }
    }
  }
  // optim
  if (r.optim.warmup_steps && r.optim.warmup_ratio) both("optim.warmup_steps", "optim.warmup_ratio");
  if (r.optim.decay_steps && r.optim.decay_ratio) both("optim.decay_steps", "optim.decay_ratio");
  for (const char* key : {"optim.decay_steps", "optim.decay_ratio", "optim.decay_shape"}) {
    if (r.optim.lr_scheduler != "wsd" && origins.count(key)) {
      note(origins[key], std::string(key) + " has no effect: optim.lr_scheduler is " + r.optim.lr_scheduler);
    }
  }
  if (r.optim.lr_scheduler == "constant" && origins.count("optim.min_lr_ratio")) {
    note(origins["optim.min_lr_ratio"], "optim.min_lr_ratio has no effect: optim.lr_scheduler is constant");
  }
  // train
  if (r.train.sample_steps > 0 && r.train.sample_prompts.empty()) {
    throw Error(origin("train.sample_steps") + ": train.sample_steps needs train.sample_prompts");
  }
  if (!r.train.gradient_checkpointing && origins.count("train.recompute")) {
    note(origins["train.recompute"], "train.recompute has no effect: train.gradient_checkpointing is false");
  }
  if (r.train.offload_activations && (!r.train.gradient_checkpointing || device == "cpu")) {
    throw Error(origin("train.offload_activations") + ": train.offload_activations needs " +
                (device == "cpu" ? "a GPU (model.device is cpu)" : "train.gradient_checkpointing"));
  }
  if (r.train.max_steps && origins.count("train.num_epochs")) {
    note(origins["train.num_epochs"], "train.num_epochs has no effect: train.max_steps is given");
  }
}

}  // namespace

bool Recipe::uses_topk() const {
  const auto& evals = train.eval_attention;
  return attention.mode == "topk" || std::find(evals.begin(), evals.end(), "topk") != evals.end();
}

std::vector<std::string> Recipe::eval_modes() const {
  return train.eval_attention.empty() ? std::vector<std::string>{attention.mode} : train.eval_attention;
}

ParsedRecipe parse_recipe(const std::string& text, const std::string& name,
                          const std::vector<std::string>& overrides) {
  Parser parser{name, {}, {}};
  parser.read_document(parse_yaml(text, name));
  for (const std::string& override_text : overrides) parser.apply_override(override_text);
  parser.check();
  return std::move(parser.out);
}

ParsedRecipe load_recipe(const std::string& path, const std::vector<std::string>& overrides) {
  return parse_recipe(read_file(path, kYamlMaxBytes), path, overrides);
}

}  // namespace topk_sft
