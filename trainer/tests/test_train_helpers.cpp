#include <ATen/core/Tensor.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "io/error.h"
#include "io/safetensors.h"
#include "train/batch.h"
#include "train_helpers.h"

using namespace topk_sft;

TempDir::TempDir() {
  std::string pattern = (std::filesystem::temp_directory_path() / "topk-sft-test-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) fail("{}: cannot be made", pattern);
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

std::map<std::string, std::string> shard_metadata(int64_t documents, int64_t tokens,
                                                  const std::string& tokenizer_sha256) {
  return {{"format", "topk-data"},
          {"version", "1"},
          {"tokenizer_sha256", tokenizer_sha256},
          {"vocab_size", "100"},
          {"num_documents", std::to_string(documents)},
          {"num_tokens", std::to_string(tokens)},
          {"split", "train"}};
}

void write_shard(const std::string& path, const std::vector<ShardDocument>& documents,
                 const std::string& tokenizer_sha256, const std::map<std::string, std::string>& changed) {
  std::vector<int32_t> ids;
  std::vector<uint8_t> mask;
  std::vector<int64_t> offsets = {0};
  for (const auto& [document_ids, document_mask] : documents) {
    ids.insert(ids.end(), document_ids.begin(), document_ids.end());
    mask.insert(mask.end(), document_mask.begin(), document_mask.end());
    offsets.push_back(static_cast<int64_t>(ids.size()));
  }
  const auto tokens = static_cast<int64_t>(ids.size());
  auto metadata = shard_metadata(static_cast<int64_t>(documents.size()), tokens, tokenizer_sha256);
  for (const auto& [key, value] : changed) metadata[key] = value;
  SafetensorsWriter writer(path, metadata);
  writer.declare("doc_offsets", DType::kI64, {static_cast<int64_t>(offsets.size())});
  writer.declare("input_ids", DType::kI32, {tokens});
  writer.declare("loss_mask", DType::kU8, {tokens});
  writer.write("doc_offsets", offsets.data(), offsets.size() * sizeof(int64_t));
  writer.write("input_ids", ids.data(), ids.size() * sizeof(int32_t));
  writer.write("loss_mask", mask.data(), mask.size());
  writer.commit();
}

namespace {

std::vector<int64_t> values(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.to(at::kLong).contiguous();
  return {wide.data_ptr<int64_t>(), wide.data_ptr<int64_t>() + wide.numel()};
}

}  // namespace

BatchValues batch_values(const TokenDataset& data, const PackedDataset& packed,
                         const std::vector<int64_t>& sequences) {
  const PackedBatch batch = make_batch(data, packed, sequences, at::kCPU);
  return {values(batch.input_ids), values(batch.position_ids), values(batch.labels), values(batch.cu_seqlens),
          batch.max_seqlen};
}
