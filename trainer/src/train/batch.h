// Packed sequences as tensors for the model.
#pragma once

#include <cstdint>
#include <vector>

#include "data/packing.h"
#include "data/shards.h"
#include "model/model.h"

namespace topk_sft {

// One micro-batch: the pieces of the given sequences, one behind the other, each a document of its own.
// Positions restart in every piece; labels are shifted inside it, so nothing is predicted across a border.
// The tensors are on the CPU, in pinned memory if `device`, where they are going, is another.
PackedBatch make_batch(const TokenDataset& dataset, const PackedDataset& packed,
                       const std::vector<int64_t>& sequences, at::Device device);

}  // namespace topk_sft
