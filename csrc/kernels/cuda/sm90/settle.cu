// Exact selection inside the marked keys of a query tile, a small superset of what its rows keep: one thread
// block per (head, tile), one warpgroup.
//
// - count: the scores of the marked keys, gathered from L2 in chunks of 64, are dealt to 32 bins a row,
//   between `lower` and `upper`, and counted (settle_rows.cuh). The row's W-th key lies in one of the bins.
// - narrow, only where the bins in question hold too many keys for shared memory (ties, bad bounds): they are
//   divided by 32 again, at last by key index.
// - collect: the scores once more. Keys above a row's bin are kept for certain, those in the bin become
//   candidates in shared memory.
// - pick: the rank-th candidate of each row by (score, index).
//
// A row is proven by the first count: every key that is not marked scores below `lower`.
//
// Cost: 2 x marked keys x 2 D bytes gathered, from L2, and about 33 instructions a score, which bound it
// together with their latency. Independent of W; no scores leave the multiprocessor.
#include "settle.h"

#include "settle_rows.cuh"
#include "union_common.cuh"

namespace topk_attn::cuda::sm90 {
namespace {

template <int kDim>
struct SettleMemory {
  static constexpr int kRing = 2 * kBlockBytes<kDim>;
  static constexpr int kRows = kRing + KeyStream<1>::kBytes;
  static constexpr int kPool = kRows + static_cast<int>(sizeof(SettleRows) + 15) / 16 * 16;
  // Room for candidates with four blocks on a multiprocessor, and with three.
  static constexpr int kFew = (57344 - kPool) / 8;
  static constexpr int kMany = (76800 - kPool) / 8;
  static_assert(kTileRows * kCountStride * 4 <= kFew * 8);
};

// This thread's part of a tile.
template <int kDim>
struct TileThread {
  uint32_t shared;
  const uint32_t* marks;
  int seen;
  int upper;  // this thread's rows: upper, upper + 8
  int column_pair;
  int least_seen;  // keys [0, least_seen) are visible to all rows of the warp
  GatherLane<kDim> lanes;
  Rows keys[1];
  uint32_t query[kDim / 4];
};

// Calls body(scores, chunk, c, count) for every chunk c of the marked keys: `count` keys, whose indices lie
// at `chunk`. All threads are past a barrier that follows the body of chunk c - 1.
template <typename T, int kDim, typename Body>
__device__ __forceinline__ void for_each_chunk(const TileThread<kDim>& t, Body&& body) {
  constexpr int kStage = kBlockBytes<kDim>;
  const uint32_t shared = t.shared;
  __syncthreads();  // the last sweep's keys are read
  KeyStream<1> keys(shared + SettleMemory<kDim>::kRing, t.marks, nullptr, t.seen, 0, threadIdx.x / 32,
                    threadIdx.x % 32);
  keys.ensure(2 * kChunkKeys);
  __syncthreads();
  t.lanes.gather(shared, t.keys, keys.first_chunk(), keys.filled());
  copy_commit();
  uint32_t chunk = keys.first_chunk();
  for (int c = 0; c == 0 || keys.filled() > c * kChunkKeys; ++c) {
    copy_wait<0>();
    fence_async_proxy();
    __syncthreads();
    if (keys.filled() == 0) break;
    const int count = min(kChunkKeys, keys.filled() - c * kChunkKeys);
    const uint32_t next_chunk = keys.chunk_after(chunk);
    if (keys.filled() > (c + 1) * kChunkKeys) {
      t.lanes.gather(shared + (c + 1) % 2 * kStage, t.keys, next_chunk, keys.filled() - (c + 1) * kChunkKeys);
    }
    copy_commit();

    float s[32];
    const uint64_t k = k_major(shared + c % 2 * kStage);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      wgmma<T>(s, t.query[4 * i], t.query[4 * i + 1], t.query[4 * i + 2], t.query[4 * i + 3],
               k + k_step(i, kChunkKeys), i > 0);
    }
    wgmma_commit();
    keys.ensure((c + 3) * kChunkKeys);
    wgmma_wait<0>();
    body(s, chunk, c, count);
    chunk = next_chunk;
  }
}

// Index of the key of score i (0..31) of a thread, kNoKey beyond the chunk's end.
template <int kDim>
__device__ __forceinline__ int key_of_score(const TileThread<kDim>& t, uint32_t chunk, int count, int i) {
  const int entry = 8 * (i / 4) + 2 * t.column_pair + (i & 1);
  return entry < count ? load_shared_int(chunk + entry * 4) : kNoKey;
}

// Whether some row of the warp does not see all 64 keys of a chunk, or the chunk is not full.
template <int kDim>
__device__ __forceinline__ bool at_edge(const TileThread<kDim>& t, uint32_t chunk, int count) {
  return count < kChunkKeys || load_shared_int(chunk + (kChunkKeys - 1) * 4) >= t.least_seen;
}

__device__ __forceinline__ uint32_t one_hot(uint32_t position) {
  return __funnelshift_l(0u, 1u, position);  // uses the low five bits
}

__device__ inline void clear_counts(int32_t* counts) {
  for (int i = threadIdx.x; i < kTileRows * kCountStride; i += blockDim.x) counts[i] = 0;
}

// ---------------------------------------------------------------------------------------------------------------
// Counting
// ---------------------------------------------------------------------------------------------------------------

// Per row, the visible marked keys with a score >= lower, by bin.
template <typename T, int kDim>
__device__ __forceinline__ void count_scores(const TileThread<kDim>& t, const SettleRows& rows,
                                             int32_t* counts) {
  float lower[2];
  int seen[2];
  BinScale scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = t.upper + 8 * half;
    lower[half] = rows.lower[row];
    seen[half] = rows.seen[row];
    scale[half] = BinScale{rows.gain[row], rows.offset[row]};
  }
  BinCounter counters[2];
  counters[0].clear();
  counters[1].clear();
  int pending = 0;  // chunks since the last flush
  for_each_chunk<T>(t, [&](const float(&s)[32], uint32_t chunk, int, int count) {
    uint32_t x[BinCounter::kAtOnce];
    if (!at_edge(t, chunk, count)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int k = 0; k < 16; ++k) {
          const float score = s[k / 2 * 4 + half * 2 + k % 2];
          x[k] = score < lower[half] ? 0u : one_hot(scale[half].position(score));
        }
        counters[half].add(x);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int k = 0; k < 16; ++k) {
          const int i = k / 2 * 4 + half * 2 + k % 2;
          const bool counts = key_of_score(t, chunk, count, i) < seen[half] && !(s[i] < lower[half]);
          x[k] = counts ? one_hot(scale[half].position(s[i])) : 0u;
        }
        counters[half].add(x);
      }
    }
    if (++pending == BinCounter::kChunks) {
      flush_counters(counters, counts, t.upper, t.column_pair);
      pending = 0;
    }
  });
  flush_counters(counters, counts, t.upper, t.column_pair);
}

__device__ __forceinline__ bool in_question(int32_t key, int index, int32_t low, int32_t high, int32_t tie) {
  const int32_t item = tie == kNoTie ? key : ~index;
  return (tie == kNoTie || key == tie) && item >= low && item <= high;
}

// Width of a bin is 2^shift items.
__device__ __forceinline__ int shift_of(int32_t low, int32_t high) {
  return max(0, 27 - __clz(static_cast<int>(static_cast<uint32_t>(high) - static_cast<uint32_t>(low))));
}

// Per row, the keys in question, by bin of equal width in items.
template <typename T, int kDim>
__device__ __forceinline__ void count_items(const TileThread<kDim>& t, const SettleRows& rows,
                                            int32_t* counts) {
  BinCounter counters[2];
  counters[0].clear();
  counters[1].clear();
  int pending = 0;
  for_each_chunk<T>(t, [&](const float(&s)[32], uint32_t chunk, int, int count) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = t.upper + 8 * half;
      const int32_t low = rows.low[row];
      const int32_t high = rows.high[row];
      const int32_t tie = rows.tie[row];
      const int seen = rows.seen[row];
      const int shift = shift_of(low, high);
      uint32_t x[BinCounter::kAtOnce];
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const int i = k / 2 * 4 + half * 2 + k % 2;
        const int index = key_of_score(t, chunk, count, i);
        const int32_t key = order_key(s[i]);
        const uint32_t offset =
            static_cast<uint32_t>(tie == kNoTie ? key : ~index) - static_cast<uint32_t>(low);
        x[k] = index < seen && in_question(key, index, low, high, tie) ? one_hot(offset >> shift) : 0u;
      }
      counters[half].add(x);
    }
    if (++pending == BinCounter::kChunks) {
      flush_counters(counters, counts, t.upper, t.column_pair);
      pending = 0;
    }
  });
  flush_counters(counters, counts, t.upper, t.column_pair);
}

// Divides what is in question by 32 in every row that has more keys there than its share of the capacity. All
// threads.
template <typename T, int kDim>
__device__ __forceinline__ void narrow_rows(const TileThread<kDim>& t, SettleRows& rows, int32_t* counts,
                                            int capacity) {
  clear_counts(counts);
  const int row = threadIdx.x;
  const bool wide = row < kTileRows && rows.inside[row] > min(capacity / kTileRows, kRowCandidates);
  if (wide && rows.tie[row] == kNoTie && rows.low[row] == rows.high[row]) {
    rows.tie[row] = rows.low[row];
    rows.low[row] = ~(rows.seen[row] - 1);
    rows.high[row] = ~0;
  }
  count_items<T>(t, rows, counts);
  __syncthreads();
  if (wide) {
    int before = 0;
    int inside = 0;
    const int bin = find_bin(counts + row * kCountStride, rows.kept[row] - rows.above[row], before, inside);
    const uint32_t low = static_cast<uint32_t>(rows.low[row]);
    const int shift = shift_of(rows.low[row], rows.high[row]);
    const uint32_t end = static_cast<uint32_t>(bin + 1) << shift;  // 0: 2^32
    const uint32_t range = static_cast<uint32_t>(rows.high[row]) - low;
    rows.above[row] += before;
    rows.inside[row] = inside;
    rows.low[row] = static_cast<int32_t>(low + (static_cast<uint32_t>(bin) << shift));
    rows.high[row] = static_cast<int32_t>(low + min(range, end - 1));
  }
  __syncthreads();
}

// ---------------------------------------------------------------------------------------------------------------
// Candidates and the tight bitmap
// ---------------------------------------------------------------------------------------------------------------

// Value i of 32, i known at run time only.
__device__ __forceinline__ float select_value(const float (&s)[32], int i) {
  float x[16];
#pragma unroll
  for (int k = 0; k < 16; ++k) x[k] = i & 1 ? s[2 * k + 1] : s[2 * k];
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = i & 2 ? x[2 * k + 1] : x[2 * k];
#pragma unroll
  for (int k = 0; k < 4; ++k) x[k] = i & 4 ? x[2 * k + 1] : x[2 * k];
#pragma unroll
  for (int k = 0; k < 2; ++k) x[k] = i & 8 ? x[2 * k + 1] : x[2 * k];
  return i & 16 ? x[1] : x[0];
}

// A candidate: greater ones come first in the contract's order.
__device__ __forceinline__ int64_t candidate(int32_t key, int index) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(key)) << 32 |
                              static_cast<uint32_t>(~index));
}

// Clears the marks of keys that no row keeps for certain, one chunk behind the sweep. Threads 0..63 hold a
// key each.
class MarkCleaner {
 public:
  // `bitmap` null: nothing to do.
  __device__ MarkCleaner(uint32_t* bitmap, SettleRows& rows) : bitmap_(bitmap), rows_(rows) {
    if (threadIdx.x < 8) rows.hits[threadIdx.x / 2][threadIdx.x % 2] = 0;
  }
  // After the barrier that follows chunk c - 1. `kept`: this thread's columns of chunk c that are kept by
  // one of its rows, bit 8 * (j % 4) + e of word j / 4 for column 8 * j + 2 * column_pair + e.
  __device__ __forceinline__ void next(uint32_t chunk, int c, int count, const uint32_t (&kept)[2],
                                       int column_pair) {
    if (bitmap_ == nullptr) return;
    clear(c - 1);
    const int thread = static_cast<int>(threadIdx.x);
    key_ = thread < count ? load_shared_int(chunk + thread * 4) : -1;
    if (thread < 2) rows_.hits[(c + 2) % 4][thread] = 0;
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const uint32_t bits = __reduce_or_sync(~0u, kept[word] << (2 * column_pair));
      if (thread % 32 == 0 && bits != 0) atomicOr(&rows_.hits[c % 4][word], bits);
    }
    last_ = c;
  }
  // After the barrier that follows the last chunk.
  __device__ void finish() {
    if (bitmap_ != nullptr) clear(last_);
  }

 private:
  __device__ __forceinline__ void clear(int c) {
    if (key_ < 0) return;
    const bool hit = rows_.hits[c % 4][threadIdx.x / 32] >> (threadIdx.x % 32) & 1u;
    if (!hit) atomicAnd(bitmap_ + key_ / 32, ~(1u << (key_ % 32)));
  }
  uint32_t* bitmap_;
  SettleRows& rows_;
  int key_ = -1;
  int last_ = 0;
};

// Collects the keys in question and clears the marks of all keys that are not kept for certain. kPlain: float
// comparisons tell them.
template <typename T, int kDim, bool kPlain>
__device__ __forceinline__ void collect(const TileThread<kDim>& t, SettleRows& rows, int64_t* pool,
                                        uint32_t* bitmap) {
  MarkCleaner cleaner(bitmap, rows);
  float low[2];   // a score in question is >= low
  float high[2];  // and < high; beyond it, it is kept
  int seen[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = t.upper + 8 * half;
    const bool sought = rows.inside[row] > 0;
    seen[half] = rows.seen[row];
    low[half] = sought ? order_score(rows.low[row]) : kInfinity;
    high[half] = sought ? order_score(rows.high[row] + 1) : kInfinity;
  }
  for_each_chunk<T>(t, [&](const float(&s)[32], uint32_t chunk, int c, int count) {
    uint32_t found = 0;  // bit i: score i is in question
    uint32_t kept[2] = {0, 0};
    if (kPlain && !at_edge(t, chunk, count)) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int half = i / 2 % 2;
        const bool keep = !(s[i] < high[half]);
        if (s[i] >= low[half] && !keep) found |= 1u << i;
        if (keep) kept[i / 16] |= 1u << (8 * (i / 4 % 4) + i % 2);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int half = i / 2 % 2;
        const int row = t.upper + 8 * half;
        const int index = key_of_score(t, chunk, count, i);
        bool keep = false;
        bool question = false;
        if constexpr (kPlain) {
          keep = !(s[i] < high[half]);
          question = s[i] >= low[half] && !keep;
        } else {
          const int32_t key = order_key(s[i]);
          const int32_t tie = rows.tie[row];
          question = in_question(key, index, rows.low[row], rows.high[row], tie);
          keep =
              rows.inside[row] > 0 &&
              (tie == kNoTie ? key > rows.high[row] : key > tie || (key == tie && ~index > rows.high[row]));
        }
        if (question && index < seen[half]) found |= 1u << i;
        if (keep && index < seen[half]) kept[i / 16] |= 1u << (8 * (i / 4 % 4) + i % 2);
      }
    }
    while (found != 0) {
      const int i = __ffs(static_cast<int>(found)) - 1;
      found &= found - 1;
      const int row = t.upper + 8 * (i / 2 % 2);
      const int slot = rows.begin[row] + atomicAdd(&rows.filled[row], 1);
      const int32_t key = order_key(select_value(s, i));
      pool[slot] = candidate(key, key_of_score(t, chunk, count, i));
    }
    __syncwarp();
    cleaner.next(chunk, c, count, kept, t.column_pair);
  });
  __syncthreads();
  cleaner.finish();
}

// The rank-th candidate of every row, by eight threads each: a row has a few candidates.
__device__ inline void pick_rows(const SettleRows& rows, const int64_t* pool, const Call& call,
                                 const Tile& tile, int head, const Selection& out, uint32_t* bitmap) {
  constexpr int kTogether = 8;
  const int own = threadIdx.x % kTogether;
  for (int row = threadIdx.x / kTogether; row < tile.rows; row += 128 / kTogether) {
    const int inside = rows.inside[row];
    const int rank = rows.kept[row] - rows.above[row];
    const int64_t* const candidates = pool + rows.begin[row];
    const int64_t at = row_index(call, tile, head, tile.row0 + row);
    for (int mine = own; mine < inside; mine += kTogether) {
      const int64_t value = candidates[mine];
      int before = 0;
#pragma unroll 4
      for (int i = 0; i < inside; ++i) before += candidates[i] > value;
      if (before >= rank) continue;
      const int index = ~static_cast<int>(value);
      if (bitmap != nullptr) atomicOr(bitmap + index / 32, 1u << (index % 32));
      if (before == rank - 1) {
        out.threshold[at] = order_score(static_cast<int32_t>(value >> 32));
        out.tie_index[at] = index;
      }
    }
    if (rows.kept[row] == 0 && own == 0) {
      out.threshold[at] = kNaN;
      out.tie_index[at] = -1;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------------------------

template <typename T, int kDim>
__global__ void __launch_bounds__(128, 4)
    settle_kernel(const __grid_constant__ SettleCall p, int64_t words, int capacity) {
  using Memory = SettleMemory<kDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const Call& call = p.call;
  const Work work = work_of(call, blockIdx.x);
  const Tile tile = tile_at(call, work.tile);
  if (tile.rows == 0) return;
  const int64_t entry = int64_t{work.head} * call.num_tiles + work.tile;
  const int seen = seen_end(call, tile);
  if (!gathered(Regimes{p.mark_count, p.largest_share}, entry, seen)) return;

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int upper = warp * 16 + lane / 4;
  const uint32_t* const marks = p.marks + entry * words;
  for (int i = thread * 32; i < (seen + 31) / 32; i += 128 * 32) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(marks + i));
  }
  const GatherLane<kDim> lanes(warp, lane);
  TileThread<kDim> t{shared_address(memory),
                     marks,
                     seen,
                     upper,
                     lane % 4,
                     0,
                     lanes,
                     {lanes.shifted(rows_of(call.k, tile.batch, tile.k_begin, work.kv_head))},
                     {}};
  auto& rows = *reinterpret_cast<SettleRows*>(memory + Memory::kRows);
  auto* const counts = reinterpret_cast<int32_t*>(memory + Memory::kPool);
  auto* const pool = reinterpret_cast<int64_t*>(memory + Memory::kPool);
  if (thread < kTileRows) {
    float lower_bound = kInfinity;
    float upper_bound = kInfinity;
    int visible_keys = 0;
    int kept = 0;
    if (thread < tile.rows) {
      const int64_t at = row_index(call, tile, work.head, tile.row0 + thread);
      lower_bound = p.lower[at];
      if (p.upper != nullptr) upper_bound = p.upper[at];
      const RowPlan plan = row_plan(call, tile, tile.row0 + thread);
      visible_keys = static_cast<int>(plan.seen.end);
      kept = static_cast<int>(plan.kept);
    }
    const BinScale scale = bin_scale(lower_bound, upper_bound);
    rows.seen[thread] = visible_keys;
    rows.kept[thread] = kept;
    rows.lower[thread] = lower_bound;
    rows.gain[thread] = scale.gain;
    rows.offset[thread] = scale.offset;
    rows.tie[thread] = kNoTie;
  }
  uint32_t* const bitmap = p.out.bitmap == nullptr ? nullptr : p.out.bitmap + entry * words;
  if (bitmap != nullptr && bitmap != marks) {
    for (int64_t i = thread; i < words / 4; i += 128) {
      reinterpret_cast<uint4*>(bitmap)[i] = __ldg(reinterpret_cast<const uint4*>(marks) + i);
    }
  }
  clear_counts(counts);
  __syncthreads();
  const Rows queries = rows_of(call.q, tile.batch, tile.q_begin + tile.row0, work.head);
  load_operand_rows<kDim>(t.query, queries.at(upper), upper < tile.rows, queries.at(upper + 8),
                          upper + 8 < tile.rows, t.column_pair);
  t.least_seen = __reduce_min_sync(~0u, min(rows.seen[upper], rows.seen[upper + 8]));

  count_scores<T>(t, rows, counts);
  place_rows(rows, counts);
  plan_candidates(rows, capacity);
  while (rows.fits == 0) {
    narrow_rows<T>(t, rows, counts, capacity);
    plan_candidates(rows, capacity);
  }
  const uint64_t unproven = uint64_t{rows.unproven[1]} << 32 | rows.unproven[0];
  uint32_t* const tight = unproven == 0 ? bitmap : nullptr;
  if (rows.plain != 0) {
    collect<T, kDim, true>(t, rows, pool, tight);
  } else {
    collect<T, kDim, false>(t, rows, pool, tight);
  }
  __syncthreads();
  pick_rows(rows, pool, call, tile, work.head, p.out, tight);
  if (thread == 0) p.unsettled[entry] = unproven;
}

template <typename T, int kDim>
cudaError_t launch(const SettleCall& p, cudaStream_t stream) {
  using Memory = SettleMemory<kDim>;
  // A bin holds about a hundredth of W keys. Where that is much, room for them saves the narrowing.
  const bool many = kDim == 128 && budget(p.call.max_k, p.call.budget) > 1000;
  const int capacity = many ? Memory::kMany : Memory::kFew;
  const int bytes = Memory::kPool + capacity * 8;
  const auto kernel = settle_kernel<T, kDim>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(p.call.heads) * p.call.num_tiles;
  kernel<<<blocks, 128, bytes, stream>>>(p, bitmap_words(p.call), capacity);
  return cudaGetLastError();
}

}  // namespace

bool supports_settle(const Call& call) {
  const auto narrow = [](const View& v) { return v.token >= 0 && v.token < (int64_t{1} << 31); };
  return (call.dtype == DType::kBFloat16 || call.dtype == DType::kFloat16) &&
         (call.head_dim == 64 || call.head_dim == 128) && call.kv_heads > 0 &&
         call.heads % call.kv_heads == 0 && !call.kv_group && call.sink == 0 && call.recent == 0 &&
         narrow(call.q) && narrow(call.k) && int64_t{call.heads} * call.num_tiles < (int64_t{1} << 31);
}

cudaError_t settle(const SettleCall& p, cudaStream_t stream) {
  const Call& call = p.call;
  if (!supports_settle(call) || p.out.indices != nullptr) return cudaErrorNotSupported;
  if (call.heads == 0 || call.num_tiles == 0) return cudaSuccess;
  const bool wide = call.head_dim == 128;
  if (call.dtype == DType::kFloat16) {
    return wide ? launch<__half, 128>(p, stream) : launch<__half, 64>(p, stream);
  }
  return wide ? launch<__nv_bfloat16, 128>(p, stream) : launch<__nv_bfloat16, 64>(p, stream);
}

}  // namespace topk_attn::cuda::sm90
