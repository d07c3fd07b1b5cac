// Last step of the fused selection, by the warp that swept the rows: among the candidates of its 32 rows the
// score of the key that makes W, its index, and the bits of the kept keys.
//
// A radix select whose digits adapt: a row's open range of values is cut into 64 bins (a multiplication, so
// that the bins fill the range exactly). One read of the log counts, one marks what lies above the bin that
// holds the threshold and moves that bin to a short list, which is sorted by rank. A row whose list overflows
// takes another round within the bin; where all of the bin's scores are equal the rounds go over the key
// indices. Cost: two reads of the log, twelve instructions a candidate, whatever W is; the rounds end for any
// data.
#pragma once

#include "select_params.cuh"

namespace topk_attn::cuda::portable {

inline constexpr int kPickBins = 64;
inline constexpr int kPickList = 32;  // entries of a row's list
inline constexpr int kPickBytes = kWarpRows * (kPickBins * 4 + kPickList * 8);

// A row's search, read by every lane that holds one of its candidates. Two 16-byte words.
struct alignas(16) PickRow {
  int32_t low;  // open range of values; low > high: nothing is open
  int32_t high;
  float scale;    // bins per value
  int32_t bin;    // the one that holds the threshold; negative: none
  int32_t least;  // smallest and largest value in that bin
  int32_t most;
  int32_t equal;  // the score, if values are indices; see `by_index`
  int32_t by_index;
};

// Of one warp, in shared memory.
struct PickShared {
  uint32_t* bins;  // row x kPickBins: bin b of row r at r * kPickBins + (b ^ r)
  uint2* list;     // row x kPickList: (order key, key index)
  PickRow* rows;
  int32_t* listed;  // per row
};

__device__ __forceinline__ int pick_bin(const PickRow& r, int32_t value) {
  const uint32_t distance = static_cast<uint32_t>(value) - static_cast<uint32_t>(r.low);
  return min(__float2int_rz(__uint2float_rz(distance) * r.scale), kPickBins - 1);
}

// Bins for [low, high]: nothing but the order of the bins matters, so the rounding of `scale` is free.
__device__ __forceinline__ float pick_scale(int32_t low, int32_t high) {
  const uint32_t width = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
  return kPickBins / (static_cast<float>(width) + 1.0f);
}

// Calls body(row, PickRow, value, order key, key) for every candidate whose value lies in its row's open
// range.
template <typename Body>
__device__ __forceinline__ void for_open(const uint2* log, int count, const PickRow* rows, const Body& body) {
  constexpr int kTogether = 8;  // loads in flight: the log has left for memory
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < count; first += 32 * kTogether) {
    uint2 entry[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const int i = first + 32 * u + lane;
      entry[u] = i < count ? __ldcg(log + i) : make_uint2(0, 0);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (first + 32 * u + lane >= count) continue;
      const int row = entry[u].y >> kKeyBits;
      const int32_t key = entry[u].y & ((1u << kKeyBits) - 1);
      const PickRow r = rows[row];
      const int32_t order = order_key(__uint_as_float(entry[u].x));
      int32_t value = order;
      bool open = true;
      if (r.by_index != 0) {
        open = order == r.equal;
        value = ~key;  // the smallest index is the greatest
      }
      if (open && value >= r.low && value <= r.high) body(row, r, value, order, key);
    }
  }
}

// Settles the rows of a warp; lane r calls it with row r's W (negative: no such row, or nothing to settle)
// and the range that its threshold is expected in. `words` (null: not wanted) is the bitmap of their tile.
// Returns the rows that the candidates do not decide: fewer than W of them. Lane r gets its row's result.
struct Picked {
  uint32_t unsettled;
  int32_t threshold;  // order key
  int32_t tie_index;
};
__device__ inline Picked pick_rows(const uint2* log, int count, int kept, float lo, float hint,
                                   const PickShared& ws, uint32_t* words) {
  const int lane = threadIdx.x % 32;
  Picked result{0, INT32_MAX, -1};
  int rank = kept;  // among the open ones
  // The first round's bins cover the bracket; candidates above it fall into the last bin.
  const int32_t low = order_key(lo);
  const int32_t hint_key = order_key(hint);
  PickRow mine{low, INT32_MAX, pick_scale(low, hint_key > low ? hint_key : INT32_MAX), -1, 0, 0, 0, 0};
  bool open = kept > 0;
  if (!open) {
    mine.low = 1;
    mine.high = 0;
  }
  while (__any_sync(~0u, open)) {
    mine.bin = -1;
    mine.least = INT32_MAX;
    mine.most = INT32_MIN;
    ws.rows[lane] = mine;
    ws.listed[lane] = 0;
    auto* const zero = reinterpret_cast<uint4*>(ws.bins);
#pragma unroll
    for (int i = 0; i < kWarpRows * kPickBins / 4 / 32; ++i) zero[32 * i + lane] = make_uint4(0, 0, 0, 0);
    __syncwarp();
    for_open(log, count, ws.rows, [&](int row, const PickRow& r, int32_t value, int32_t, int32_t) {
      atomicAdd(&ws.bins[row * kPickBins + (pick_bin(r, value) ^ row)], 1u);
    });
    __syncwarp();
    // The bin of the threshold, from the greatest down.
    int size = 0;
    if (open) {
      int above = 0;
      int bin = kPickBins;
      do {
        above += size;
        --bin;
        size = static_cast<int>(ws.bins[lane * kPickBins + (bin ^ lane)]);
      } while (above + size < rank && bin > 0);
      if (above + size < rank) {  // only in the first round: not enough candidates
        result.unsettled = 1;
        open = false;
        ws.rows[lane].low = 1;
        ws.rows[lane].high = 0;
      } else {
        rank -= above;
        ws.rows[lane].bin = bin;
      }
    }
    __syncwarp();
    for_open(log, count, ws.rows, [&](int row, const PickRow& r, int32_t value, int32_t order, int32_t key) {
      const int bin = pick_bin(r, value);
      if (bin > r.bin && words != nullptr) atomicOr(words + key / 32, 1u << (key % 32));
      if (bin == r.bin) {
        atomicMin(&ws.rows[row].least, value);
        atomicMax(&ws.rows[row].most, value);
        const int at = atomicAdd(&ws.listed[row], 1);
        if (at < kPickList) {
          ws.list[row * kPickList + at] =
              make_uint2(static_cast<uint32_t>(order), static_cast<uint32_t>(key));
        }
      }
    });
    __syncwarp();
    // Short lists are sorted by rank, the warp together.
    const bool listed = open && size <= kPickList;
    for (uint32_t left = __ballot_sync(~0u, listed); left != 0; left &= left - 1) {
      const int row = __ffs(static_cast<int>(left)) - 1;
      const int entries = __shfl_sync(~0u, size, row);
      const int wanted = __shfl_sync(~0u, rank, row);
      const uint2 entry = lane < entries ? ws.list[row * kPickList + lane] : make_uint2(0x80000000u, 0u);
      const int32_t order = static_cast<int32_t>(entry.x);
      const int32_t key = static_cast<int32_t>(entry.y);
      int before = 0;
      for (int i = 0; i < entries; ++i) {
        const int32_t other = __shfl_sync(~0u, order, i);
        const int32_t other_key = __shfl_sync(~0u, key, i);
        before += other > order || (other == order && other_key < key);
      }
      const bool take = lane < entries && before < wanted;
      if (take && words != nullptr) atomicOr(words + key / 32, 1u << (key % 32));
      const uint32_t last = __ballot_sync(~0u, take && before == wanted - 1);
      const int source = __ffs(static_cast<int>(last)) - 1;
      const int32_t threshold = __shfl_sync(~0u, order, source);
      const int32_t tie = __shfl_sync(~0u, key, source);
      if (lane == row) {
        result.threshold = threshold;
        result.tie_index = tie;
      }
    }
    // Another round for the others.
    if (listed) {
      open = false;
      mine.low = 1;
      mine.high = 0;
    } else if (open) {
      const PickRow r = ws.rows[lane];
      mine.low = r.least;
      mine.high = r.most;
      if (r.by_index == 0 && r.least == r.most) {  // equal scores: by index
        mine.equal = r.least;
        mine.by_index = 1;
        mine.low = INT32_MIN;
        mine.high = -1;
      }
      mine.scale = pick_scale(mine.low, mine.high);
    }
    __syncwarp();
  }
  result.unsettled = __ballot_sync(~0u, result.unsettled != 0);
  return result;
}

}  // namespace topk_attn::cuda::portable
