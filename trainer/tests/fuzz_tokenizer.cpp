// Fuzzes tokenizer.json: whatever is accepted must also decode, whole and as a stream, to the same valid
// text.
#include <cstdlib>
#include <vector>

#include "fuzz.h"
#include "tokenizer/detokenizer.h"
#include "tokenizer/utf8.h"

int main(int argc, char** argv) {
  topk_fuzz::Fuzzer fuzzer;
  fuzzer.name = "tokenizer";
  fuzzer.iterations = 20000;
  fuzzer.seeds = {
      R"({"added_tokens":[{"id":3,"content":"<|im_end|>","special":true},{"id":4,"content":"東","special":false}],)"
      R"("model":{"type":"BPE","vocab":{"a":0,"Ġb":1,"æ":2},"merges":["a b"]},"decoder":{"type":"ByteLevel"}})",
      R"({"model":{"type":"BPE","byte_fallback":true,"vocab":{"▁a":0,"<0xE6>":1,"b":2,"<0x9D>":3}},)"
      R"("decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},)"
      R"({"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]}})",
      R"({"model":{"type":"Unigram","vocab":[["▁a",-1.5],["b",0],["▁",-3]]},)"
      R"("decoder":{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true}})",
      R"({"model":{"vocab":{"x":0,"y":1}},"decoder":null})"};
  fuzzer.target = [](const std::string& input) {
    const topk_sft::Detokenizer detokenizer = topk_sft::Detokenizer::parse(input, "tokenizer.json");
    const std::vector<int64_t> ids = {0, 1, 2, 3, 4, 1, 3, 0, -1, 2, 1, detokenizer.vocab_size() - 1};
    topk_sft::Detokenizer::Stream stream = detokenizer.stream(false);
    std::string text;
    for (const int64_t id : ids) {
      const std::string piece = stream.push(id);
      if (!topk_sft::is_utf8(piece)) std::abort();
      text += piece;
    }
    text += stream.finish();
    if (!topk_sft::is_utf8(text) || text != detokenizer.decode(ids, false)) std::abort();
  };
  fuzzer.mutate = [&](const std::string& seed, topk_fuzz::Random& random) {
    return random.below(4) == 0 ? topk_fuzz::mutate_bytes(seed, fuzzer.seeds, random)
                                : topk_fuzz::mutate_text(seed, fuzzer.seeds, random);
  };
  return topk_fuzz::run_fuzzer(fuzzer, argc, argv);
}
