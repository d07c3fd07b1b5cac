// Token ids to text, from the tokenizer.json of a Hugging Face folder. Torch-free; nothing here encodes text.
//
// Gives what the tokenizers library's decode() gives: model vocabulary (BPE, Unigram, WordLevel, WordPiece)
// and added tokens, then the file's decoder. An id that the file does not know has no text, as there (models
// often have more embedding rows than the tokenizer has tokens).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>

#include "tokenizer/decoders.h"

namespace topk_sft {

class Detokenizer {
 public:
  // <hf_dir>/tokenizer.json. Throws Error.
  static Detokenizer load(const std::string& hf_dir);
  // The same from a file's text; `where` opens every message.
  static Detokenizer parse(std::string_view json, const std::string& where);

  // skip_special_tokens leaves out the added tokens that are marked special (BOS, EOS, <|im_end|>, ...).
  std::string decode(std::span<const int64_t> ids, bool skip_special_tokens = true) const;

  // The token as it stands in the file (byte-level characters and all); none if the id is unknown.
  std::optional<std::string> token(int64_t id) const;
  bool is_special(int64_t id) const;
  // Largest id plus one.
  int64_t vocab_size() const { return vocab_size_; }

  // One sequence, token by token. The pieces together are decode() of all ids, and each is valid UTF-8: a
  // character comes when its last byte is there, and text comes only when no later token can change it.
  class Stream {
   public:
    std::string push(int64_t id);  // text that became certain; often empty
    std::string finish();          // the rest

   private:
    friend class Detokenizer;
    Stream(const Detokenizer& owner, bool skip_special_tokens);
    const Detokenizer* owner_;
    bool skip_special_tokens_;
    std::unique_ptr<std::string> out_;  // on the heap: the stages refer to it
    std::unique_ptr<DecoderStage> stages_;
  };
  // The detokenizer must outlive the stream.
  Stream stream(bool skip_special_tokens = true) const { return {*this, skip_special_tokens}; }

 private:
  struct Token {
    std::string text;
    bool special = false;
  };

  Detokenizer(const Json& root, const std::string& where);
  void read_model(const Json& model, const std::string& where);
  void read_added_tokens(const Json& added, const std::string& where);
  void add_token(int64_t id, const std::string& text, const std::string& where);

  std::unordered_map<int64_t, Token> tokens_;
  int64_t vocab_size_ = 0;
  DecoderChain decoder_;
};

}  // namespace topk_sft
