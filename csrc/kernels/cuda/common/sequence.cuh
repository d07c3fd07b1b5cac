// Where a query tile lies, what its rows see and how its rows' selection is applied. Device side of the
// contract.
#pragma once

#include "../params.h"

namespace topk_attn::cuda {

struct Tile {
  int32_t batch;    // batch entry (packed: 0)
  int32_t q_begin;  // first query and key of the sequence in q and k (dense: 0)
  int32_t k_begin;
  int32_t tq;
  int32_t tk;
  int32_t row0;  // first row of the tile in its sequence
  int32_t rows;  // rows of the tile that exist; 0: nothing to do
};

// The sequence `index` with bad offsets read as an empty one (contract section 9).
__device__ inline Tile sequence_at(const Call& c, int index) {
  Tile t{index, 0, 0, c.tq, c.tk, 0, 0};
  if (c.cu_q == nullptr) return t;
  t.batch = 0;
  t.q_begin = c.cu_q[index];
  t.k_begin = c.cu_k[index];
  t.tq = c.cu_q[index + 1] - t.q_begin;
  t.tk = c.cu_k[index + 1] - t.k_begin;
  const bool good = t.q_begin >= 0 && t.k_begin >= 0 && t.tq >= 0 && t.tk >= 0 && t.tq <= c.max_q &&
                    t.tk <= c.max_k && t.q_begin <= c.tq - t.tq && t.k_begin <= c.tk - t.tk;
  if (!good) t.tq = t.tk = t.q_begin = t.k_begin = 0;
  return t;
}

// Tile `index` of [0, call.num_tiles).
__device__ inline Tile tile_at(const Call& c, int index) {
  if (c.tiles == nullptr) {
    const int per_sequence = (c.tq + kTileRows - 1) / kTileRows;
    Tile t = sequence_at(c, index / per_sequence);
    t.row0 = index % per_sequence * kTileRows;
    t.rows = min(kTileRows, t.tq - t.row0);
    return t;
  }
  const int2 entry = c.tiles[index];
  if (entry.x < 0) return Tile{};
  Tile t = sequence_at(c, entry.x);
  t.row0 = entry.y;
  t.rows = max(0, min(kTileRows, t.tq - t.row0));
  return t;
}

__device__ inline RowPlan row_plan(const Call& c, const Tile& t, int row) {
  return plan_row(visible(row, t.tq, t.tk, c.causal), c.budget, c.sink, c.recent);
}

// Keys [0, seen_end) are all that any of the tile's rows sees.
__device__ inline int seen_end(const Call& c, const Tile& t) {
  return t.rows == 0 ? 0 : static_cast<int>(visible(t.row0 + t.rows - 1, t.tq, t.tk, c.causal).end);
}

// Whether the tile is left to the gathered kernels. `entry` = head * num_tiles + tile.
__device__ inline bool gathered(const Regimes& r, int64_t entry, int seen) {
  return r.union_size != nullptr && r.union_size[entry] <= r.largest_share * seen;
}

__device__ inline int64_t row_index(const Call& c, const Tile& t, int head, int row) {
  return t.batch * c.rows.batch + head * c.rows.head + t.q_begin + row;
}

template <typename T>
__device__ inline T* row_pointer(const View& v, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(v.data) + batch * v.batch + token * v.token + head * v.head;
}

// A row's selection, made ready for the inner loop. Over keys [k0, k1) a row is `plain` when the one test
// !(score < bound) decides for every key that it sees; otherwise keeps() decides key by key.
struct RowFilter {
  float threshold;
  int32_t tie_index;
  int32_t seen;           // keys [0, seen) are visible
  int32_t sinks;          // keys [0, sinks) are always kept
  int32_t recents_begin;  // keys [recents_begin, seen) too

  __device__ bool keeps(float score, int j) const {
    return j < seen && (j < sinks || j >= recents_begin || admitted(score, int64_t{j}, threshold, tie_index));
  }
  // True iff neither always-kept keys, the edge of visibility nor the tie index touches [k0, k1), and the
  // threshold is an ordinary number (false for NaN and +inf).
  __device__ bool plain(int k0, int k1) const {
    return k1 <= seen && k0 >= sinks && k1 <= recents_begin && tie_index >= 0 &&
           threshold < __int_as_float(0x7f800000) && (tie_index < k0 || tie_index >= k1 - 1);
  }
  // For a plain range starting at k0: keys with !(score < bound) are kept (NaN scores too). Ties count while
  // tie_index lies at or beyond the range, otherwise the next float above the threshold is the bound.
  __device__ float bound(int k0) const {
    return tie_index >= k0 ? threshold : order_score(order_key(threshold) + 1);
  }
};

__device__ inline RowFilter row_filter(const Call& c, const Tile& t, int row, float threshold,
                                       int32_t tie_index) {
  const int32_t seen = static_cast<int32_t>(visible(row, t.tq, t.tk, c.causal).end);
  RowFilter f{threshold, tie_index, seen, 0, seen};
  if (c.sink > 0 || c.recent > 0) {  // the budget costs float64 arithmetic: only where it is needed
    const RowPlan plan = row_plan(c, t, row);
    f.sinks = static_cast<int32_t>(plan.sinks);
    f.recents_begin = static_cast<int32_t>(plan.seen.end - plan.recents);
  }
  return f;
}

}  // namespace topk_attn::cuda
