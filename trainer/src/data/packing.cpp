// Cutting documents to length and best-fit-decreasing packing.
#include "data/packing.h"

#include <algorithm>
#include <numeric>
#include <set>

namespace topk_sft {

PiecePlan plan_pieces(const TokenDataset& dataset, int64_t sequence_len, bool split) {
  PiecePlan plan;
  for (int64_t d = 0; d < dataset.num_documents(); ++d) {
    const Document& document = dataset.document(d);
    const auto length = static_cast<int64_t>(document.ids.size());
    const int64_t used = split ? length : std::min(length, sequence_len);
    plan.documents_cut += length > sequence_len;
    plan.tokens_truncated += length - used;
    bool any = false;
    int64_t empty = 0;
    for (int64_t begin = 0; begin < used; begin += sequence_len) {
      Piece piece{d, begin, std::min(sequence_len, used - begin), used, 0};
      for (int64_t t = begin; t < begin + piece.length && t + 1 < piece.label_end; ++t) {
        piece.targets += document.loss_mask[static_cast<size_t>(t + 1)];
      }
      if (piece.targets == 0) {
        ++empty;
        continue;
      }
      any = true;
      plan.tokens += piece.length;
      plan.targets += piece.targets;
      plan.longest = std::max(plan.longest, piece.length);
      plan.pieces.push_back(piece);
    }
    if (any) {
      plan.pieces_without_target += empty;
    } else {
      ++plan.documents_without_target;
    }
  }
  return plan;
}

std::vector<std::vector<int64_t>> pack_best_fit(const std::vector<int64_t>& lengths, int64_t capacity) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  const auto length = [&](int64_t i) { return lengths[static_cast<size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
  std::vector<std::vector<int64_t>> bins;
  std::set<std::pair<int64_t, size_t>>
      open;  // (room left, bin): the first that fits is the best fit, oldest of equals
  for (const int64_t item : order) {
    const auto best = open.lower_bound({length(item), 0});
    size_t bin = bins.size();
    int64_t room = capacity;
    if (best == open.end()) {
      bins.emplace_back();
    } else {
      room = best->first;
      bin = best->second;
      open.erase(best);
    }
    bins[bin].push_back(item);
    room -= length(item);
    if (room > 0) open.emplace(room, bin);
  }
  for (auto& bin : bins) std::sort(bin.begin(), bin.end());
  std::sort(bins.begin(), bins.end());
  return bins;
}

int64_t PackedDataset::tokens(const std::vector<int64_t>& chosen) const {
  int64_t sum = 0;
  for (const int64_t bin : chosen) {
    for (const int64_t piece : bins[static_cast<size_t>(bin)])
      sum += plan.pieces[static_cast<size_t>(piece)].length;
  }
  return sum;
}

int64_t PackedDataset::targets(const std::vector<int64_t>& chosen) const {
  int64_t sum = 0;
  for (const int64_t bin : chosen) {
    for (const int64_t piece : bins[static_cast<size_t>(bin)])
      sum += plan.pieces[static_cast<size_t>(piece)].targets;
  }
  return sum;
}

PackedDataset pack_dataset(const TokenDataset& dataset, int64_t sequence_len, bool split, bool packing) {
  PackedDataset packed;
  packed.plan = plan_pieces(dataset, sequence_len, split);
  std::vector<int64_t> lengths;
  for (const Piece& piece : packed.plan.pieces) lengths.push_back(piece.length);
  if (packing) {
    packed.bins = pack_best_fit(lengths, sequence_len);
  } else {
    for (size_t i = 0; i < lengths.size(); ++i) packed.bins.push_back({static_cast<int64_t>(i)});
  }
  return packed;
}

}  // namespace topk_sft
