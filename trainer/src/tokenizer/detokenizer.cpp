#include "tokenizer/detokenizer.h"

#include <unordered_set>
#include <utility>

#include "io/atomic_file.h"
#include "io/error.h"

namespace topk_sft {
namespace {

constexpr int64_t kMaxId = INT32_MAX;  // ids are stored as int32 in token shards

const Json& member(const Json& object, const char* key, const std::string& where) {
  if (!object.is_object()) fail("{}: must be an object, got {}", where, printable(object.dump(), 60));
  const auto found = object.find(key);
  if (found == object.end()) fail("{}: no key \"{}\"", where, key);
  return *found;
}

int64_t id_value(const Json& value, const std::string& where) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > static_cast<uint64_t>(kMaxId)) {
    fail("{}: a token id must be a whole number from 0 to {}, got {}", where, kMaxId,
         printable(value.dump(), 60));
  }
  return value.get<int64_t>();
}

const Json kNull;

const Json& decoder_of(const Json& root) {
  const auto found = root.find("decoder");
  return found == root.end() ? kNull : *found;
}

}  // namespace

Detokenizer Detokenizer::load(const std::string& hf_dir) {
  const std::string path = hf_dir + "/tokenizer.json";
  return parse(read_file(path, kMaxJsonFileBytes), path);
}

Detokenizer Detokenizer::parse(std::string_view json, const std::string& where) {
  const Json root = parse_json(json, where);
  if (!root.is_object()) fail("{}: must be a JSON object, as the tokenizers library writes it", where);
  return {root, where};
}

Detokenizer::Detokenizer(const Json& root, const std::string& where)
    : decoder_(decoder_of(root), where + ": decoder") {
  read_model(member(root, "model", where), where + ": model");
  if (const auto added = root.find("added_tokens"); added != root.end()) {
    read_added_tokens(*added, where + ": added_tokens");
  }
  if (tokens_.empty()) fail("{}: the vocabulary is empty", where);
}

void Detokenizer::read_model(const Json& model, const std::string& where) {
  const Json& vocab = member(model, "vocab", where);
  // Older files leave "type" out; the shape of the vocabulary says what is needed here.
  if (const auto type = model.find("type"); type != model.end()) {
    const bool known = *type == "BPE" || *type == "Unigram" || *type == "WordLevel" || *type == "WordPiece";
    if (!known) {
      fail("{}: type must be BPE, Unigram, WordLevel or WordPiece, got {}", where,
           printable(type->dump(), 60));
    }
    if ((*type == "Unigram") != vocab.is_array()) {
      fail("{}.vocab: must be {}", where, *type == "Unigram" ? "an array of [token, score]" : "an object");
    }
  }
  tokens_.reserve(vocab.size());
  if (vocab.is_object()) {
    for (const auto& [text, id] : vocab.items()) {
      add_token(id_value(id, where + ".vocab: \"" + printable(text, 60) + "\""), text, where + ".vocab");
    }
  } else if (vocab.is_array()) {
    for (size_t i = 0; i < vocab.size(); ++i) {
      const Json& entry = vocab[i];
      if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_number()) {
        fail("{}.vocab[{}]: must be [token, score], got {}", where, i, printable(entry.dump(), 60));
      }
      add_token(static_cast<int64_t>(i), entry[0].get<std::string>(), where + ".vocab");
    }
  } else {
    fail("{}.vocab: must be an object or an array, got {}", where, printable(vocab.dump(), 60));
  }
}

void Detokenizer::add_token(int64_t id, const std::string& text, const std::string& where) {
  if (!tokens_.emplace(id, Token{text, false}).second) {
    fail("{}: the id {} belongs to two tokens", where, id);
  }
  vocab_size_ = std::max(vocab_size_, id + 1);
}

void Detokenizer::read_added_tokens(const Json& added, const std::string& where) {
  if (added.is_null()) return;
  if (!added.is_array()) fail("{}: must be an array, got {}", where, printable(added.dump(), 60));
  std::unordered_set<int64_t> seen;
  std::unordered_set<std::string> special;
  for (size_t i = 0; i < added.size(); ++i) {
    const std::string at = fmt::format("{}[{}]", where, i);
    const int64_t id = id_value(member(added[i], "id", at), at + ".id");
    const Json& content = member(added[i], "content", at);
    if (!content.is_string()) fail("{}.content: must be a string, got {}", at, printable(content.dump(), 60));
    const Json& flag = member(added[i], "special", at);
    if (!flag.is_boolean()) fail("{}.special: must be true or false, got {}", at, printable(flag.dump(), 60));
    if (!seen.insert(id).second) fail("{}: the id {} belongs to two added tokens", at, id);
    // An added token may repeat a token of the model, and takes its place.
    tokens_[id].text = content.get<std::string>();
    if (flag.get<bool>()) special.insert(tokens_[id].text);
    vocab_size_ = std::max(vocab_size_, id + 1);
  }
  for (auto& [id, token] : tokens_) token.special = special.count(token.text) > 0;
}

std::optional<std::string> Detokenizer::token(int64_t id) const {
  const auto found = tokens_.find(id);
  if (found == tokens_.end()) return std::nullopt;
  return found->second.text;
}

bool Detokenizer::is_special(int64_t id) const {
  const auto found = tokens_.find(id);
  return found != tokens_.end() && found->second.special;
}

std::string Detokenizer::decode(std::span<const int64_t> ids, bool skip_special_tokens) const {
  Stream stream = this->stream(skip_special_tokens);
  std::string text;
  for (const int64_t id : ids) text += stream.push(id);
  return text + stream.finish();
}

Detokenizer::Stream::Stream(const Detokenizer& owner, bool skip_special_tokens)
    : owner_(&owner),
      skip_special_tokens_(skip_special_tokens),
      out_(std::make_unique<std::string>()),
      stages_(owner.decoder_.open(*out_)) {}

std::string Detokenizer::Stream::push(int64_t id) {
  const auto found = owner_->tokens_.find(id);
  if (found == owner_->tokens_.end() || (skip_special_tokens_ && found->second.special)) return {};
  stages_->push(found->second.text);
  stages_->end_token();
  return std::exchange(*out_, {});
}

std::string Detokenizer::Stream::finish() {
  stages_->finish();
  return std::exchange(*out_, {});
}

}  // namespace topk_sft
