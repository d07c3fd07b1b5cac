#include "train/batch.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace topk_sft {

PackedBatch make_batch(const TokenDataset& dataset, const PackedDataset& packed,
                       const std::vector<int64_t>& sequences, at::Device device) {
  std::vector<const Piece*> pieces;
  for (const int64_t sequence : sequences) {
    for (const int64_t piece : packed.bins[static_cast<size_t>(sequence)]) {
      pieces.push_back(&packed.plan.pieces[static_cast<size_t>(piece)]);
    }
  }
  const int64_t tokens = packed.tokens(sequences);
  PackedBatch batch;
  const auto vector = [&](int64_t size, at::ScalarType type) {
    return at::empty({size}, at::TensorOptions().dtype(type).pinned_memory(!device.is_cpu()));
  };
  batch.input_ids = vector(tokens, at::kLong);
  batch.position_ids = vector(tokens, at::kLong);
  batch.labels = vector(tokens, at::kLong);
  batch.cu_seqlens = vector(static_cast<int64_t>(pieces.size()) + 1, at::kInt);
  auto* ids = batch.input_ids.data_ptr<int64_t>();
  auto* positions = batch.position_ids.data_ptr<int64_t>();
  auto* labels = batch.labels.data_ptr<int64_t>();
  auto* cu_seqlens = batch.cu_seqlens.data_ptr<int32_t>();
  int64_t at = 0;
  *cu_seqlens++ = 0;
  for (const Piece* piece : pieces) {
    const Document& document = dataset.document(piece->document);
    for (int64_t i = 0; i < piece->length; ++i, ++at) {
      const auto token = static_cast<size_t>(piece->begin + i);
      ids[at] = document.ids[token];
      positions[at] = i;
      const bool target = piece->begin + i + 1 < piece->label_end && document.loss_mask[token + 1] != 0;
      labels[at] = target ? document.ids[token + 1] : kIgnoreLabel;
    }
    *cu_seqlens++ = static_cast<int32_t>(at);
    batch.max_seqlen = std::max(batch.max_seqlen, piece->length);
  }
  return batch;
}

}  // namespace topk_sft
