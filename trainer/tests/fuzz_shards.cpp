// Fuzzes the reader of token shards, with the cutting and packing of what it accepts.
#include <cstring>

#include "data/packing.h"
#include "data/shards.h"
#include "fuzz.h"
#include "io/error.h"

namespace {

const std::string kSha(64, 'a');

// A shard of `lengths.size()` documents, as topk-data writes it.
std::string shard(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> offsets = {0};
  for (const int64_t length : lengths) offsets.push_back(offsets.back() + length);
  const auto tokens = static_cast<size_t>(offsets.back());
  std::vector<int32_t> ids(tokens);
  std::vector<uint8_t> mask(tokens);
  for (size_t i = 0; i < tokens; ++i) {
    ids[i] = static_cast<int32_t>(i * 7 % 100);
    mask[i] = i % 3 != 0;
  }
  const size_t a = offsets.size() * 8, b = a + tokens * 4, c = b + tokens;
  const auto text = [](size_t n) { return std::to_string(n); };
  std::string header =
      R"({"__metadata__":{"format":"topk-data","version":"1","tokenizer_sha256":")" + kSha +
      R"(","vocab_size":"100","num_documents":")" + text(lengths.size()) + R"(","num_tokens":")" +
      text(tokens) + R"(","split":"train"},"doc_offsets":{"dtype":"I64","shape":[)" + text(offsets.size()) +
      R"(],"data_offsets":[0,)" + text(a) + R"(]},"input_ids":{"dtype":"I32","shape":[)" + text(tokens) +
      R"(],"data_offsets":[)" + text(a) + "," + text(b) + R"(]},"loss_mask":{"dtype":"U8","shape":[)" +
      text(tokens) + R"(],"data_offsets":[)" + text(b) + "," + text(c) + "]}}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string out(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(out.data(), &length, 8);
  out += header;
  out.append(reinterpret_cast<const char*>(offsets.data()), offsets.size() * 8);
  out.append(reinterpret_cast<const char*>(ids.data()), ids.size() * 4);
  out.append(reinterpret_cast<const char*>(mask.data()), mask.size());
  return out;
}

const std::vector<std::string> kShards = {shard({5, 1, 12, 3}), shard({40}), shard({0, 2, 2}), shard({})};

// Changes the offsets, ids and mask behind an intact header.
std::string mutate_data(std::string bytes, topk_fuzz::Random& random) {
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  const size_t begin = 8 + header;
  if (begin >= bytes.size()) return bytes;
  for (uint64_t edits = random.below(3) + 1; edits > 0; --edits) {
    bytes[begin + random.below(bytes.size() - begin)] = static_cast<char>(random.next());
  }
  return bytes;
}

void read_shard(const std::string& bytes) {
  using namespace topk_sft;
  static topk_fuzz::MemoryFile file;
  const TokenDataset data({file.write(bytes)}, {"tokenizer.json", kSha, 100});
  for (const bool split : {false, true}) {
    const PackedDataset packed = pack_dataset(data, 8, split, true);
    int64_t targets = 0;
    for (size_t i = 0; i < packed.bins.size(); ++i) {
      if (packed.tokens({static_cast<int64_t>(i)}) > 8) throw std::logic_error("a bin is too full");
      targets += packed.targets({static_cast<int64_t>(i)});
    }
    if (targets != packed.plan.targets) throw std::logic_error("targets were lost in packing");
  }
}

}  // namespace

int main(int argc, char** argv) {
  topk_fuzz::Fuzzer fuzzer;
  fuzzer.name = "shards";
  fuzzer.seeds = kShards;
  fuzzer.target = read_shard;
  fuzzer.iterations = 10000;
  fuzzer.mutate = [](const std::string& seed, topk_fuzz::Random& random) {
    return random.below(2) == 0 ? mutate_data(seed, random) : topk_fuzz::mutate_bytes(seed, kShards, random);
  };
  return topk_fuzz::run_fuzzer(fuzzer, argc, argv);
}
