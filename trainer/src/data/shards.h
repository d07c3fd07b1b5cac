// Token shards: documents one behind the other in safetensors files, as `topk-data` writes them. Torch-free.
//
// A shard holds input_ids int32 (N), loss_mask uint8 (N; 1: the token is a target that carries loss),
// doc_offsets int64 (documents + 1, from 0 to N), and metadata that says which tokenizer and which split it
// is. Everything is checked when it is opened; a fault is an Error that names the file.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "io/safetensors.h"

namespace topk_sft {

struct Document {
  std::span<const int32_t> ids;
  std::span<const uint8_t> loss_mask;
};

// What the shards must agree with.
struct ShardRequirements {
  std::string tokenizer_path;    // the model's tokenizer.json, for messages
  std::string tokenizer_sha256;  // of that file
  int64_t vocab_size = 0;        // of the model: every id is below it
};

// The documents of several shards, in order. Memory-mapped: opening reads them once, to check them.
class TokenDataset {
 public:
  TokenDataset() = default;
  TokenDataset(const std::vector<std::string>& files, const ShardRequirements& requirements);

  int64_t num_documents() const { return static_cast<int64_t>(documents_.size()); }
  int64_t num_tokens() const { return num_tokens_; }
  const Document& document(int64_t index) const { return documents_[static_cast<size_t>(index)]; }
  // 16 hex digits that change with any token, mask or bound: a resumed run must see the same data.
  std::string fingerprint() const;

 private:
  void add(const std::string& path, const ShardRequirements& requirements);

  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::vector<Document> documents_;
  int64_t num_tokens_ = 0;
  uint64_t hash_ = 0x9e3779b97f4a7c15;
};

// The shards of `folder` (NAME-NNNNN.safetensors) whose metadata names `split`, sorted by name; may be empty.
std::vector<std::string> find_shards(const std::string& folder, const std::string& split);

}  // namespace topk_sft
