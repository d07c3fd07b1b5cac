// What the tests of data and training share: temporary folders, token shards, batches as plain vectors.
// Torch-free.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "data/packing.h"
#include "data/shards.h"

// A folder that is removed at the end of the scope.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// (ids, loss mask)
using ShardDocument = std::pair<std::vector<int32_t>, std::vector<uint8_t>>;

std::map<std::string, std::string> shard_metadata(int64_t documents, int64_t tokens,
                                                  const std::string& tokenizer_sha256);

// Writes one shard; `changed` overrides metadata entries.
void write_shard(const std::string& path, const std::vector<ShardDocument>& documents,
                 const std::string& tokenizer_sha256, const std::map<std::string, std::string>& changed = {});

struct BatchValues {
  std::vector<int64_t> input_ids, position_ids, labels, cu_seqlens;
  int64_t max_seqlen = 0;
};
BatchValues batch_values(const topk_sft::TokenDataset& data, const topk_sft::PackedDataset& packed,
                         const std::vector<int64_t>& sequences);

// The order of Sampler(8, 8, 1, true, 42) in its first epoch.
inline const std::vector<int64_t> kShuffleOfEight = {7, 2, 4, 5, 1, 0, 3, 6};
