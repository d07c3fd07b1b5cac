// The decoder stages of tokenizer.json ("decoder"): tokens in, text out. Torch-free.
//
// A stage is a stream transformer. A token arrives as one or several push() calls and one end_token(); a
// stage that merges tokens (Fuse, ByteLevel) ends its only token at finish(). So decoding a whole sequence
// and decoding it token by token are the same computation, and text is passed on only when no later token can
// change it. Pieces are always whole UTF-8 characters.
//
// A DecoderChain is the description (immutable, shared); open() makes the stages of one stream.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "io/json.h"

namespace topk_sft {

class DecoderStage {
 public:
  virtual ~DecoderStage() = default;
  virtual void push(std::string_view piece) = 0;
  virtual void end_token() = 0;
  virtual void finish() = 0;  // end of the sequence; passed on to the next stage
};

class DecoderChain {
 public:
  // From the "decoder" value of tokenizer.json; null joins the tokens with spaces, as the tokenizers library
  // does. Supported: ByteLevel, Metaspace, ByteFallback, Fuse, Strip, Replace (of a string) and Sequence of
  // these. Another type, or ill-typed members, is an Error that opens with `where` and names the decoder.
  DecoderChain(const Json& decoder, const std::string& where);

  // Stages that append the decoded text to `out`, which must outlive them.
  std::unique_ptr<DecoderStage> open(std::string& out) const;

 private:
  using Factory = std::function<std::unique_ptr<DecoderStage>(std::unique_ptr<DecoderStage> next)>;
  void add(const Json& decoder, const std::string& where);

  std::vector<Factory> factories_;  // in the order in which tokens pass them
};

}  // namespace topk_sft
