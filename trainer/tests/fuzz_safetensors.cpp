// Fuzzes the safetensors reader: weights and token shards, with broken headers, lengths and data.
#include <cstring>

#include "fuzz.h"
#include "io/safetensors.h"

namespace {

// A whole file from the header's text and the data.
std::string file_of(const std::string& header, const std::string& data) {
  const uint64_t size = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &size, 8);
  return file + header + data;
}

const std::vector<std::string> kHeaders = {
    R"({"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
    R"("b.weight":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"c":{"dtype":"I64","shape":[],"data_offsets":[32,40]}})",
    R"({"__metadata__":{"format":"topk-data","version":"1","num_documents":"2"},)"
    R"("input_ids":{"dtype":"I32","shape":[6],"data_offsets":[24,48]},"loss_mask":{"dtype":"U8","shape":[6],"data_offsets":[48,54]},)"
    R"("doc_offsets":{"dtype":"I64","shape":[3],"data_offsets":[0,24]}}  )",
    R"({})",
    R"({"empty":{"dtype":"F16","shape":[0,5],"data_offsets":[0,0]},"x":{"dtype":"BOOL","shape":[1,1,2],"data_offsets":[0,2]}})"};
const size_t kDataBytes[] = {40, 54, 0, 2};

void read_everything(const std::string& path) {
  const topk_sft::SafetensorsFile file(path);
  volatile unsigned sum = 0;
  for (const topk_sft::TensorInfo& tensor : file.tensors()) {
    for (const std::byte byte : file.bytes(tensor)) sum = sum + static_cast<unsigned>(byte);
  }
  if (file.metadata().contains("format") && file.metadata_at("format") == "topk-data") {
    for (const int32_t id : file.view<int32_t>("input_ids")) sum = sum + static_cast<unsigned>(id);
    for (const int64_t offset : file.view<int64_t>("doc_offsets")) sum = sum + static_cast<unsigned>(offset);
    for (const uint8_t mask : file.view<uint8_t>("loss_mask")) sum = sum + mask;
  }
}

}  // namespace

int main(int argc, char** argv) {
  topk_fuzz::MemoryFile file;
  topk_fuzz::Fuzzer fuzzer;
  fuzzer.name = "safetensors";
  for (size_t i = 0; i < kHeaders.size(); ++i) {
    std::string header = kHeaders[i];
    header.resize((header.size() + 7) / 8 * 8, ' ');
    fuzzer.seeds.push_back(file_of(header, std::string(kDataBytes[i], '\1')));
  }
  fuzzer.target = [&](const std::string& input) { read_everything(file.write(input)); };
  fuzzer.mutate = [&](const std::string& seed, topk_fuzz::Random& random) -> std::string {
    switch (random.below(4)) {
      case 0:
        return topk_fuzz::mutate_bytes(seed, fuzzer.seeds, random);
      case 1: {  // a lying length
        std::string input = seed;
        const uint64_t lies[] = {0,
                                 1,
                                 seed.size(),
                                 seed.size() - 8,
                                 seed.size() - 7,
                                 UINT64_MAX,
                                 uint64_t{1} << 63,
                                 topk_sft::kMaxSafetensorsHeaderBytes,
                                 random.next(),
                                 random.below(2 * seed.size())};
        std::memcpy(input.data(), &lies[random.below(std::size(lies))], 8);
        return input;
      }
      default: {  // a broken header with a true length, so that the checks behind the length are reached
        const size_t which = random.below(kHeaders.size());
        const size_t data = random.below(3) == 0 ? random.below(100) : kDataBytes[which];
        return file_of(topk_fuzz::mutate_text(kHeaders[which], kHeaders, random), std::string(data, '\2'));
      }
    }
  };
  return topk_fuzz::run_fuzzer(fuzzer, argc, argv);
}
