// Token ids to text: every decoder against hand-worked cases, streaming against whole decoding, and a named
// error for every malformed tokenizer.json. Equality with the tokenizers library:
// tests/python/test_generate_*.
#include <random>

#include "scratch.h"
#include "tokenizer/detokenizer.h"
#include "tokenizer/utf8.h"

using namespace topk_sft;

namespace {

// A tokenizer.json with the given tokens (ids in order), decoder and special tokens behind them.
std::string tokenizer_json(const std::vector<std::string>& tokens, const Json& decoder,
                           const std::vector<std::string>& special = {}) {
  Json vocab = Json::object();
  for (size_t i = 0; i < tokens.size(); ++i) vocab[tokens[i]] = i;
  Json added = Json::array();
  for (size_t i = 0; i < special.size(); ++i) {
    added.push_back({{"id", tokens.size() + i}, {"content", special[i]}, {"special", true}});
  }
  return Json{{"added_tokens", added}, {"model", {{"type", "BPE"}, {"vocab", vocab}}}, {"decoder", decoder}}
      .dump();
}

std::string decode(const std::string& json, const std::vector<int64_t>& ids, bool skip = true) {
  return Detokenizer::parse(json, "t.json").decode(ids, skip);
}

// All tokens, in order.
std::string decode_all(const std::vector<std::string>& tokens, const Json& decoder) {
  std::vector<int64_t> ids;
  std::vector<std::string> distinct;
  for (const std::string& token : tokens) {
    const auto found = std::find(distinct.begin(), distinct.end(), token);
    ids.push_back(found - distinct.begin());
    if (found == distinct.end()) distinct.push_back(token);
  }
  return decode(tokenizer_json(distinct, decoder), ids);
}

const Json kByteLevel = {{"type", "ByteLevel"}};
const Json kMetaspace = {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", "always"}};
const Json kByteFallback = {{"type", "ByteFallback"}};
const Json kFuse = {{"type", "Fuse"}};
Json strip(int start, int stop, const char* content = " ") {
  return {{"type", "Strip"}, {"content", content}, {"start", start}, {"stop", stop}};
}
Json replace(const char* pattern, const char* content) {
  return {{"type", "Replace"}, {"pattern", {{"String", pattern}}}, {"content", content}};
}
Json sequence(const std::vector<Json>& decoders) {
  return {{"type", "Sequence"}, {"decoders", decoders}};
}
const Json kLlama2 = sequence({replace("▁", " "), kByteFallback, kFuse, strip(1, 0)});

}  // namespace

TEST_CASE("byte-level tokens are bytes") {
  CHECK(decode_all({"Hello", "Ġworld", "Ċ", "<s>"}, kByteLevel) == "Hello world\n<s>");
  CHECK(decode_all({"æ", "Ŀ", "±"}, kByteLevel) == "東");
  // A token outside the alphabet stands for itself, byte-level characters in it included.
  CHECK(decode_all({"Ġ東"}, kByteLevel) == "Ġ東");
  // Each maximal invalid run is one replacement: a lone continuation, an unfinished character before text,
  // one at the end.
  CHECK(decode_all({"Ģ", "a"}, kByteLevel) == "\uFFFDa");
  CHECK(decode_all({"æ", "Ŀ", "b"}, kByteLevel) == "\uFFFDb");
  CHECK(decode_all({"x", "æ", "Ŀ"}, kByteLevel) == "x\uFFFD");
}

TEST_CASE("sentencepiece-style decoders") {
  CHECK(decode_all({"▁Hello", "▁wor", "ld"}, kMetaspace) == "Hello world");
  CHECK(decode_all({"▁▁a", "▁▁b"}, kMetaspace) == "a  b");
  CHECK(decode_all({"▁a"}, {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", "never"}}) ==
        " a");
  CHECK(decode_all({"▁a"}, {{"type", "Metaspace"}, {"replacement", "_"}, {"add_prefix_space", false}}) ==
        "▁a");
  CHECK(decode_all({"▁Hi", "▁", "<0xE6>", "<0x9D>", "<0xB1>", "!"}, kLlama2) == "Hi 東!");
  // A run of bytes is text as a whole or not at all.
  CHECK(decode_all({"<0xE6>", "<0x9D>", "<0xB1>", "<0xE6>"}, kLlama2) == "\uFFFD\uFFFD\uFFFD\uFFFD");
  CHECK(decode_all({"<0xG0>", "<0x0>", "<0x41>"}, kByteFallback) == "<0xG0><0x0>A");
}

TEST_CASE("strip and replace") {
  CHECK(decode_all({"  a  ", " b"}, strip(1, 1)) == " a b");
  CHECK(decode_all({"  a  ", " b"}, sequence({kFuse, strip(9, 1)})) == "a   b");
  CHECK(decode_all({"a", " ", " "}, sequence({kFuse, strip(0, 1)})) == "a ");
  CHECK(decode_all({" ", "x"}, strip(1, 1)) == "x");
  CHECK(decode_all({"aab", "aa"}, replace("a", "xy")) == "xyxybxyxy");
  // Inside a fused token an occurrence may come in pieces; overlapping ones count once.
  CHECK(decode_all({"a", "b", "ab", "aab"}, sequence({kFuse, replace("aba", "-")})) == "-baab");
  CHECK(decode_all({"aa", "a"}, sequence({kFuse, replace("aa", "-")})) == "-a");
}

TEST_CASE("without a decoder tokens are joined by spaces") {
  CHECK(decode_all({"a", "b", "a"}, nullptr) == "a b a");
}

TEST_CASE("special, added and unknown ids") {
  const std::string json = tokenizer_json({"a", "Ġb"}, kByteLevel, {"<|end|>"});
  CHECK(decode(json, {0, 1, 2}) == "a b");
  CHECK(decode(json, {0, 2, 1}, false) == "a<|end|> b");
  CHECK(decode(json, {0, 99, -1, 1}) == "a b");
  const Detokenizer detokenizer = Detokenizer::parse(json, "t.json");
  CHECK(detokenizer.vocab_size() == 3);
  CHECK(detokenizer.token(1) == std::optional<std::string>("Ġb"));
  CHECK_FALSE(detokenizer.token(3));
  CHECK(detokenizer.is_special(2));
  CHECK_FALSE(detokenizer.is_special(0));
}

TEST_CASE("a stream gives the whole text in valid pieces") {
  std::vector<std::string> byte_tokens = {"Hello", "Ġ東"};
  for (char32_t code = 0xA1; code < 0x144; ++code) {
    std::string token;
    append_utf8(code, token);
    byte_tokens.push_back(token);
  }
  std::vector<std::string> fallback_tokens = {"▁Hello", "▁", " ", "x", "東", "  "};
  for (int byte = 0; byte < 256; ++byte) fallback_tokens.push_back(fmt::format("<0x{:02X}>", byte));
  const std::vector<std::string> files = {
      tokenizer_json(byte_tokens, kByteLevel, {"<end>"}), tokenizer_json(fallback_tokens, kLlama2, {"</s>"}),
      tokenizer_json(fallback_tokens, kMetaspace), tokenizer_json(fallback_tokens, nullptr),
      tokenizer_json(fallback_tokens, sequence({kFuse, replace("▁He", "o"), strip(1, 2)}))};
  std::mt19937 random(7);
  for (const std::string& json : files) {
    const Detokenizer detokenizer = Detokenizer::parse(json, "t.json");
    for (int round = 0; round < 300; ++round) {
      std::vector<int64_t> ids(random() % 40);
      for (int64_t& id : ids)
        id = static_cast<int64_t>(random() % static_cast<uint64_t>(detokenizer.vocab_size()));
      Detokenizer::Stream stream = detokenizer.stream(round % 2 == 0);
      std::string text;
      for (const int64_t id : ids) {
        const std::string piece = stream.push(id);
        REQUIRE(is_utf8(piece));
        text += piece;
        // What was given out stays: it opens the text of any longer sequence.
        const std::string whole = detokenizer.decode(ids, round % 2 == 0);
        REQUIRE(whole.compare(0, text.size(), text) == 0);
      }
      text += stream.finish();
      REQUIRE(text == detokenizer.decode(ids, round % 2 == 0));
    }
  }
}

TEST_CASE("a character is given out when it is complete") {
  const Detokenizer detokenizer =
      Detokenizer::parse(tokenizer_json({"æ", "Ŀ", "±", "a"}, kByteLevel), "t.json");
  Detokenizer::Stream stream = detokenizer.stream();
  CHECK(stream.push(3) == "a");
  CHECK(stream.push(0).empty());
  CHECK(stream.push(1).empty());
  CHECK(stream.push(2) == "東");
  CHECK(stream.finish().empty());
}

TEST_CASE("lossy UTF-8 marks maximal invalid parts") {
  const auto lossy = [](std::string_view bytes) {
    std::string out;
    LossyUtf8 reader;
    for (const char byte : bytes) reader.push({&byte, 1}, out);
    reader.finish(out);
    REQUIRE(is_utf8(out));
    return out;
  };
  CHECK(lossy("a\xC3\xA9") == "aé");
  CHECK(lossy("\xC0\xAF") == "\uFFFD\uFFFD");                      // overlong
  CHECK(lossy("\xED\xA0\x80") == "\uFFFD\uFFFD\uFFFD");            // surrogate
  CHECK(lossy("\xF4\x90\x80\x80") == "\uFFFD\uFFFD\uFFFD\uFFFD");  // above U+10FFFF
  CHECK(lossy("\xF0\x9F\x98\x80") == "😀");
  CHECK(lossy("\xF0\x9F\x98z") == "\uFFFDz");
  CHECK(lossy("\xF0\x9F\xE6\x9D\xB1") == "\uFFFD東");
  CHECK(lossy("\xF0\x9F\x98") == "\uFFFD");
  CHECK(lossy("\xFF\xFE") == "\uFFFD\uFFFD");
}

TEST_CASE("malformed tokenizer.json is refused by name") {
  const auto refused = [](const std::string& json, const std::string& part) {
    const std::string message = error_of([&] { Detokenizer::parse(json, "dir/tokenizer.json"); });
    INFO(message);
    CHECK(contains(message, "dir/tokenizer.json"));
    CHECK(contains(message, part));
  };
  const Json good = Json::parse(tokenizer_json({"a", "b"}, kByteLevel, {"<s>"}));
  const auto with = [&](const char* pointer, const Json& value) {
    Json changed = good;
    changed[Json::json_pointer(pointer)] = value;
    return changed.dump();
  };
  refused("", "");
  refused("[]", "JSON object");
  refused("{}", "no key \"model\"");
  refused(with("/model", 3), "must be an object");
  refused(with("/model", Json::object()), "no key \"vocab\"");
  refused(with("/model/type", "Morse"), "Morse");
  refused(with("/model/type", "Unigram"), "array of [token, score]");
  refused(with("/model/vocab", "x"), "vocab");
  refused(with("/model/vocab/a", -1), "a token id must be");
  refused(with("/model/vocab/a", 1.5), "a token id must be");
  refused(with("/model/vocab/a", 3000000000u), "a token id must be");
  refused(with("/model/vocab/a", 1), "id 1 belongs to two tokens");
  refused(with("/added_tokens", Json::object()), "must be an array");
  refused(with("/added_tokens/0/id", "x"), "added_tokens[0].id");
  refused(with("/added_tokens/0/content", 5), "content: must be a string");
  refused(with("/added_tokens/0/special", 1), "special: must be true or false");
  refused(with("/added_tokens/1", {{"id", 2}, {"content", "x"}, {"special", false}}), "two added tokens");
  refused(with("/decoder", 4), "decoder: must be an object");
  refused(with("/decoder/type", "CTC"), "decoder type \"CTC\" is not supported");
  refused(with("/decoder", sequence({kFuse, {{"type", "WordPiece"}}})),
          "decoders[1]: decoder type \"WordPiece\"");
  refused(with("/decoder", {{"type", "Sequence"}}), "no key \"decoders\"");
  refused(with("/decoder", {{"type", "Replace"}, {"pattern", {{"Regex", "a+"}}}, {"content", "b"}}),
          "Replace");
  refused(with("/decoder", replace("", "b")), "must not be empty");
  refused(with("/decoder", strip(-1, 0)), "start");
  refused(with("/decoder", strip(1, 0, "ab")), "one character");
  refused(with("/decoder", {{"type", "Metaspace"}, {"replacement", ""}}), "one character");
  refused(with("/decoder", {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "maybe"}}),
          "maybe");
  refused(R"({"model": {"vocab": {}}})", "vocabulary is empty");
  CHECK(contains(error_of([] { Detokenizer::load("/nonexistent"); }), "/nonexistent/tokenizer.json"));
}

TEST_CASE("other vocabularies: Unigram, no type") {
  CHECK(decode(R"({"model":{"type":"Unigram","vocab":[["▁a",-1.5],["b",0]]},"decoder":null})", {1, 0}) ==
        "b ▁a");
  CHECK(decode(R"({"model":{"vocab":{"x":4}}})", {4}) == "x");
  // An added token takes the place of a token of the model with its id.
  const char* json = R"({"model":{"vocab":{"x":0}},"added_tokens":[{"id":0,"content":"y","special":false}]})";
  CHECK(decode(json, {0}) == "y");
}
