// Opens and checks token shards.
#include "data/shards.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>

#include "io/error.h"

namespace topk_sft {

namespace {

uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

uint64_t hash_bytes(uint64_t hash, const void* data, size_t bytes) {
  const auto* p = static_cast<const char*>(data);
  hash = mix(hash ^ bytes);
  for (; bytes >= 8; p += 8, bytes -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    hash = mix(hash ^ word) + 0x9e3779b97f4a7c15;
  }
  uint64_t word = 0;
  std::memcpy(&word, p, bytes);
  return mix(hash ^ word);
}

// A metadata entry that repeats a count of the tensors.
void check_count(const SafetensorsFile& file, const char* key, int64_t actual) {
  const std::string& text = file.metadata_at(key);
  int64_t value = -1;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  if (result.ec != std::errc() || result.ptr != text.data() + text.size() || value != actual) {
    fail("{}: metadata {} is '{}' but the tensors hold {}", file.path(), key, printable(text, 40), actual);
  }
}

void check_format(const SafetensorsFile& file) {
  const auto entry = [&](const char* key) {
    const auto found = file.metadata().find(key);
    return found == file.metadata().end() ? std::string("nothing") : "'" + printable(found->second, 40) + "'";
  };
  if (entry("format") != "'topk-data'" || entry("version") != "'1'") {
    fail(
        "{}: not a token shard that this program reads: metadata format must be 'topk-data' and version '1', "
        "got {} "
        "and {}",
        file.path(), entry("format"), entry("version"));
  }
}

}  // namespace

TokenDataset::TokenDataset(const std::vector<std::string>& files, const ShardRequirements& requirements) {
  for (const std::string& path : files) add(path, requirements);
}

void TokenDataset::add(const std::string& path, const ShardRequirements& requirements) {
  auto owned = std::make_unique<SafetensorsFile>(path);
  const SafetensorsFile& file = *owned;
  check_format(file);
  const std::string& sha256 = file.metadata_at("tokenizer_sha256");
  if (sha256 != requirements.tokenizer_sha256) {
    fail(
        "{}: made with another tokenizer: its tokenizer.json had sha256 {}, but {} has {}; prepare the data "
        "again with "
        "the model's tokenizer",
        path, printable(sha256, 80), requirements.tokenizer_path, requirements.tokenizer_sha256);
  }
  const auto ids = file.view<int32_t>("input_ids");
  const auto mask = file.view<uint8_t>("loss_mask");
  const auto offsets = file.view<int64_t>("doc_offsets");
  const auto tokens = static_cast<int64_t>(ids.size());
  if (mask.size() != ids.size()) {
    fail("{}: loss_mask has {} entries for {} input_ids", path, mask.size(), ids.size());
  }
  if (offsets.empty() || offsets.front() != 0 || offsets.back() != tokens) {
    fail("{}: doc_offsets must go from 0 to the number of tokens, {}; it has {} entries from {} to {}", path,
         tokens, offsets.size(), offsets.empty() ? 0 : offsets.front(), offsets.empty() ? 0 : offsets.back());
  }
  for (size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] < offsets[i - 1]) {
      fail("{}: doc_offsets must rise, but entry {} is {} after {}", path, i, offsets[i], offsets[i - 1]);
    }
  }
  check_count(file, "num_documents", static_cast<int64_t>(offsets.size()) - 1);
  check_count(file, "num_tokens", tokens);
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= requirements.vocab_size) {
      fail("{}: input_ids[{}] is {}, but the model's vocabulary has {} entries", path, i, ids[i],
           requirements.vocab_size);
    }
    if (mask[i] > 1) fail("{}: loss_mask[{}] must be 0 or 1, got {}", path, i, mask[i]);
  }
  hash_ = hash_bytes(hash_, ids.data(), ids.size_bytes());
  hash_ = hash_bytes(hash_, mask.data(), mask.size_bytes());
  hash_ = hash_bytes(hash_, offsets.data(), offsets.size_bytes());
  documents_.reserve(documents_.size() + offsets.size() - 1);
  for (size_t i = 1; i < offsets.size(); ++i) {
    const auto begin = static_cast<size_t>(offsets[i - 1]);
    const auto length = static_cast<size_t>(offsets[i]) - begin;
    documents_.push_back({ids.subspan(begin, length), mask.subspan(begin, length)});
  }
  num_tokens_ += tokens;
  files_.push_back(std::move(owned));
}

std::string TokenDataset::fingerprint() const {
  return fmt::format("{:016x}", hash_);
}

std::vector<std::string> find_shards(const std::string& folder, const std::string& split) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<std::string> candidates;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (name.size() > 12 && name[0] != '.' && it->path().extension() == ".safetensors") {
      candidates.push_back(it->path().string());
    }
  }
  if (error) fail("{}: cannot list the folder of token shards: {}", folder, error.message());
  std::sort(candidates.begin(), candidates.end());
  std::vector<std::string> shards;
  for (const std::string& path : candidates) {
    const SafetensorsFile file(path);
    check_format(file);
    if (file.metadata_at("split") == split) shards.push_back(path);
  }
  return shards;
}

}  // namespace topk_sft
