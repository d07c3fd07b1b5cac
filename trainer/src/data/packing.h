// From documents to sequences: cutting documents to length, and packing the pieces into bins. Torch-free.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/shards.h"

namespace topk_sft {

// Tokens [begin, begin + length) of a document, trained on as one document of a packed sequence. Position t
// predicts token t + 1 if that token carries loss and lies before `label_end`.
struct Piece {
  int64_t document = 0;
  int64_t begin = 0;
  int64_t length = 0;
  int64_t label_end = 0;
  int64_t targets = 0;  // positions with a label
};

struct PiecePlan {
  std::vector<Piece> pieces;  // in the order of the documents, each with at least one target
  int64_t tokens = 0;         // of these pieces
  int64_t targets = 0;
  int64_t longest = 0;                   // length of the longest piece
  int64_t documents_without_target = 0;  // left out: nothing in them is to be predicted
  int64_t documents_cut = 0;             // longer than sequence_len
  int64_t tokens_truncated = 0;          // cut off (overflow "truncate")
  int64_t pieces_without_target = 0;     // parts of split documents left out (overflow "split")
};

// Cuts the documents into pieces of at most `sequence_len` tokens. `split`: a longer document becomes several
// pieces, and the last position of a piece predicts the first token of the next, so that each target is
// predicted exactly once; otherwise what is beyond sequence_len is dropped, targets included.
PiecePlan plan_pieces(const TokenDataset& dataset, int64_t sequence_len, bool split);

// Best fit decreasing: puts items of the given lengths (1 to `capacity`) into bins of `capacity`, longest
// first, each into the bin with the least room that still takes it. Deterministic; O(n log n). Bins are
// sorted by their smallest item, items inside a bin ascend.
std::vector<std::vector<int64_t>> pack_best_fit(const std::vector<int64_t>& lengths, int64_t capacity);

// The pieces of a dataset and the sequences made of them.
struct PackedDataset {
  PiecePlan plan;
  std::vector<std::vector<int64_t>> bins;  // indices into plan.pieces
  // Tokens and targets of some bins.
  int64_t tokens(const std::vector<int64_t>& chosen) const;
  int64_t targets(const std::vector<int64_t>& chosen) const;
};

// Cuts and packs; without `packing` each piece is a sequence of its own.
PackedDataset pack_dataset(const TokenDataset& dataset, int64_t sequence_len, bool split, bool packing);

}  // namespace topk_sft
