// What the kernels over gathered unions share: the walk over a tile's kept keys, the gather of their rows,
// and the selection filters of the tile's rows.
//
// The keys of a tile's union are taken 64 at a time, in ascending order: a chunk. Entry e of the union is the
// e-th set bit of the tile's bitmap. Chunk c is gathered while chunk c - 1 is multiplied.
#pragma once

#include <limits>

#include "../common/sequence.cuh"
#include "hopper.cuh"

namespace topk_attn::cuda::sm90 {

inline constexpr int kChunkKeys = 64;
inline constexpr int kNoKey = 0x7fffffff;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kLargest = std::numeric_limits<float>::max();

// ---------------------------------------------------------------------------------------------------------------
// Shared-memory access by address
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int load_shared_int(uint32_t address) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ float load_shared_float(uint32_t address) {
  return __int_as_float(load_shared_int(address));
}
__device__ __forceinline__ int2 load_shared_int2(uint32_t address) {
  int2 x;
  asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ int4 load_shared_int4(uint32_t address) {
  int4 x;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_int(uint32_t address, int x) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared_int4(uint32_t address, int4 x) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_shared_int2(uint32_t address, int x, int y) {
  asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store_shared_float2(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// True in one lane of the warp, always the same one.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(elected));
  return elected != 0;
}

// ---------------------------------------------------------------------------------------------------------------
// Work
// ---------------------------------------------------------------------------------------------------------------

// The (head, tile) of a thread block. One KV head after the other, so that its K, V and sums stay in L2;
// inside it the tiles with the longest rows first, and the heads of the group side by side.
struct Work {
  int head;
  int kv_head;
  int tile;
};

__device__ inline Work work_of(const Call& c, unsigned block) {
  const int group = c.heads / c.kv_heads;
  const unsigned per_kv_head = static_cast<unsigned>(group) * c.num_tiles;
  const int kv_head = static_cast<int>(block / per_kv_head);
  const int rest = static_cast<int>(block % per_kv_head);
  return Work{kv_head * group + rest % group, kv_head, c.num_tiles - 1 - rest / group};
}

// ---------------------------------------------------------------------------------------------------------------
// Keys of the union
// ---------------------------------------------------------------------------------------------------------------

// Expands a bitmap, or the OR of two, into ascending key indices in a ring in shared memory. All four warps
// of a warpgroup hold the same state and expand a quarter each, 64 words (2,048 keys) at a time; the caller's
// barriers make entries visible: what ensure() adds may be read after the next barrier of the warpgroup.
// `kGroups` warpgroups with rings of their own share a bitmap by taking pairs of words in turn.
//
// Chunk c may be read as long as no warp has called ensure() for chunk c + 3 or later: the ring holds three
// chunks that are alive and one refill.
template <int kGroups>
class KeyStream {
 public:
  static constexpr int kWords = 64;
  static constexpr int kEntries = 35 * kChunkKeys;
  static constexpr int kBytes = kEntries * 4;
  static_assert(kEntries >= 3 * kChunkKeys - 1 + kWords * 32);

  // `bits` (and `more`, unless null) cover the keys [0, seen).
  __device__ KeyStream(uint32_t ring, const uint32_t* bits, const uint32_t* more, int seen, int group,
                       int warp, int lane)
      : ring_(ring), bits_(bits), more_(more), words_((seen + 31) / 32), warp_(warp), lane_(lane) {
    word_ = (lane * kGroups + group) * 2;
    ahead_ = load();
  }

  // Entries known so far: the size of the union once the bitmap is exhausted.
  __device__ int filled() const { return filled_; }

  // Expands until at least `entries` entries are known or the bitmap is exhausted.
  __device__ void ensure(int entries) {
    while (filled_ < entries && first_ < words_) refill();
  }

  // Shared address of the indices of the first chunk, and of the chunk after the one at `chunk`. A chunk lies
  // in one piece.
  __device__ uint32_t first_chunk() const { return ring_; }
  __device__ uint32_t chunk_after(uint32_t chunk) const {
    const uint32_t next = chunk + kChunkKeys * 4;
    return next == ring_ + kBytes ? ring_ : next;
  }

 private:
  __device__ uint2 load() const {
    uint2 w{0, 0};
    // Bitmaps are padded to multiples of 4 words, and zero beyond what the tile sees.
    if (word_ < words_) {
      w = __ldg(reinterpret_cast<const uint2*>(bits_ + word_));
      if (more_ != nullptr) {
        const uint2 x = __ldg(reinterpret_cast<const uint2*>(more_ + word_));
        w.x |= x.x;
        w.y |= x.y;
      }
    }
    return w;
  }

  __device__ void refill() {
    const uint2 w = ahead_;
    const int word = word_;
    first_ += kWords * kGroups;
    word_ += kWords * kGroups;
    ahead_ = load();
    const int low = __popc(w.x);
    const int own = low + __popc(w.y);
    int upto = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int x = __shfl_up_sync(~0u, upto, step);
      if (lane_ >= step) upto += x;
    }
    const int total = __shfl_sync(~0u, upto, 31);
    // This warp's quarter: 16 bits of each lane's words, written from the highest bit down.
    uint32_t rest = warp_ < 2 ? w.x : w.y;
    int end = slot_ + upto - own + (warp_ < 2 ? 0 : low);
    if (warp_ % 2 == 0) {
      rest &= 0xffff;
      end += __popc(rest);
    } else {
      end += __popc(rest);
      rest &= 0xffff0000;
    }
    const int key = (word + warp_ / 2) * 32;
    uint32_t address = ring_ + end * 4;
    if (slot_ + total <= kEntries) {
      while (rest != 0) {
        const int bit = 31 - __clz(rest);
        rest ^= 1u << bit;
        address -= 4;
        store_shared_int(address, key + bit);
      }
    } else {
      const uint32_t ring_end = ring_ + kBytes;
      while (rest != 0) {
        const int bit = 31 - __clz(rest);
        rest ^= 1u << bit;
        address -= 4;
        store_shared_int(address < ring_end ? address : address - kBytes, key + bit);
      }
    }
    filled_ += total;
    slot_ += total;
    slot_ -= slot_ >= kEntries ? kEntries : 0;
  }

  uint32_t ring_;
  const uint32_t* bits_;
  const uint32_t* more_;
  int words_;
  int warp_;
  int lane_;
  int word_;       // this lane's next pair of words
  uint2 ahead_;    // their bits
  int first_ = 0;  // first word of the next refill
  int filled_ = 0;
  int slot_ = 0;  // where entry `filled_` goes
};

// 16 bytes from global to shared memory, zeros if !valid; the memory system may fetch the rest of a 256-byte
// row.
template <int kDim>
__device__ __forceinline__ void copy_piece(uint32_t shared, const void* global, bool valid) {
  if constexpr (kDim == 128) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    copy16(shared, global, valid);
  }
}

// Byte size of a block of `kRows` rows of a 16-bit tensor in shared memory (layout: hopper.cuh).
template <int kDim, int kRows = kChunkKeys>
inline constexpr int kBlockBytes = kDim* kRows * 2;

// A tensor that rows are copied from: row `token` begins at base + token * stride (bytes).
struct Rows {
  const char* base;
  uint32_t stride;
  __device__ const char* at(uint32_t token) const { return base + uint64_t{token} * stride; }
};

__device__ inline Rows rows_of(const View& view, int64_t batch, int64_t token, int64_t head) {
  const View bytes{view.data, view.batch * 2, view.token * 2, view.head * 2};
  return Rows{row_pointer<const char>(bytes, batch, token, head), static_cast<uint32_t>(view.token * 2)};
}

// This thread's part in gathering chunks: which 16-byte piece of which rows. Each of the four warps of a
// warpgroup brings 16 rows, a lane the same piece of kRows consecutive rows, so that it reads its keys as
// vectors.
template <int kDim>
struct GatherLane {
  static constexpr int kPieces = kDim / 8;
  static constexpr int kRows = 16 * kPieces / 32;
  int first_row;
  int piece;
  uint32_t offset;  // of the lane's first piece in a block

  __device__ GatherLane(int warp, int lane)
      : first_row(warp * 16 + lane / kPieces * kRows),
        piece(lane % kPieces),
        offset(piece / 8 * (kChunkKeys * 128) + swizzle128(first_row, piece % 8)) {}

  // The tensor as this lane sees it. The address is made opaque: the compiler would otherwise add its parts
  // anew for every row, here the address of a row is one multiplication and addition.
  __device__ Rows shifted(const Rows& rows) const {
    const char* base = rows.base + piece * 16;
    asm volatile("" : "+l"(base));
    return Rows{base, rows.stride};
  }

  // Gathers the rows `keys[0, count)` of each (shifted) tensor into blocks of 64 rows, one after the other at
  // `shared`; zeros beyond count.
  template <int kTensors>
  __device__ __forceinline__ void gather(uint32_t shared, const Rows (&tensors)[kTensors], uint32_t keys,
                                         int count) const {
    const uint32_t to = shared + offset;
    uint32_t key[kRows];
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
      const int4 x = load_shared_int4(keys + (first_row + i) * 4);
      key[i] = x.x;
      key[i + 1] = x.y;
      key[i + 2] = x.z;
      key[i + 3] = x.w;
    }
    // Row i of the lane: the swizzle is an exclusive or, since kRows divides first_row.
    const auto piece_of = [to](int i) { return (to ^ (i << 4)) + i * 128; };
    if (count >= kChunkKeys) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int x = 0; x < kTensors; ++x) {
          copy_piece<kDim>(piece_of(i) + x * kBlockBytes<kDim>, tensors[x].at(key[i]), true);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool valid = first_row + i < count;
#pragma unroll
        for (int x = 0; x < kTensors; ++x) {
          copy_piece<kDim>(piece_of(i) + x * kBlockBytes<kDim>, tensors[x].at(valid ? key[i] : 0), valid);
        }
      }
    }
  }
};

// Copies `rows` consecutive rows from `first` on into blocks of 64 rows at `shared`, zeros from `rows` to
// kRows.
template <int kDim, int kRows>
__device__ __forceinline__ void copy_rows(uint32_t shared, const Rows& tensor, int rows, int thread,
                                          int threads) {
  constexpr int kPieces = kDim / 8;
  for (int i = thread; i < kRows * kPieces; i += threads) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const bool valid = row < rows;
    const uint32_t block = shared + row / 64 * kBlockBytes<kDim> + piece / 8 * (64 * 128);
    copy_piece<kDim>(block + swizzle128(row % 64, piece % 8), tensor.at(valid ? row : 0) + piece * 16, valid);
  }
}

// Two rows of a tensor as A operand in registers (the layout of mma.m16n8k16), zeros where a row does not
// exist.
template <int kDim>
__device__ __forceinline__ void load_operand_rows(uint32_t (&a)[kDim / 4], const char* upper,
                                                  bool upper_exists, const char* lower, bool lower_exists,
                                                  int column_pair) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = (k * 16 + half * 8 + column_pair * 2) * 2;
      a[4 * k + 2 * half] = upper_exists ? __ldg(reinterpret_cast<const uint32_t*>(upper + at)) : 0;
      a[4 * k + 2 * half + 1] = lower_exists ? __ldg(reinterpret_cast<const uint32_t*>(lower + at)) : 0;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Selection filters of the tile's rows
// ---------------------------------------------------------------------------------------------------------------

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// A row as the inner loops need it, 32 bytes in shared memory. Where no always-kept key interferes (a
// `contested` range) and the threshold is an ordinary number, key j is kept iff j < seen and
// !(score < (j <= tie_index ? threshold : above)); otherwise RowFilter::keeps decides.
struct RowState {
  float threshold;
  float above;  // the next score above the threshold
  int32_t tie_index;
  int32_t seen;
  int32_t sinks;
  int32_t recents_begin;
  float lse;    // log2 units; +inf where the row's probabilities are all zero (backward)
  float delta;  // (backward)
};
inline constexpr int kRowBytes = 32;
static_assert(sizeof(RowState) == kRowBytes);

__device__ inline void store_row(uint32_t address, const RowState& r) {
  store_shared_int4(address, int4{__float_as_int(r.threshold), __float_as_int(r.above), r.tie_index, r.seen});
  store_shared_int4(address + 16,
                    int4{r.sinks, r.recents_begin, __float_as_int(r.lse), __float_as_int(r.delta)});
}

__device__ inline RowState row_state(const Call& c, const Tile& t, int row, float threshold,
                                     int32_t tie_index) {
  const RowFilter f = row_filter(c, t, row, threshold, tie_index);
  return RowState{
      threshold, order_score(order_key(threshold) + 1), tie_index, f.seen, f.sinks, f.recents_begin, 0.0f,
      0.0f};
}

// A row that does not exist. It keeps nothing, and makes no range special.
__device__ inline RowState absent_row() {
  return RowState{kLargest, kLargest, 0, 0, 0, 0, kInfinity, 0.0f};
}

__device__ __forceinline__ float lse_log2(float lse) {
  return lse == -kInfinity ? -lse : lse * kLog2e;
}

// What is common to some rows: in the keys [begin, end) every one of them is contested and has an ordinary
// threshold, the keys [0, seen) are visible to all of them.
struct Contested {
  int begin = 0;
  int end = kNoKey;
  int seen = kNoKey;

  __device__ void add_row(uint32_t address) {
    const int4 a = load_shared_int4(address);
    const int2 b = load_shared_int2(address + 16);
    const bool ordinary = a.z >= 0 && __int_as_float(a.x) < kInfinity;
    begin = max(begin, b.x);
    end = ordinary ? min(end, b.y < a.w ? b.y : kNoKey) : 0;
    seen = min(seen, a.w);
  }
  __device__ void reduce_over_warp() {
    begin = __reduce_max_sync(~0u, begin);
    end = __reduce_min_sync(~0u, end);
    seen = __reduce_min_sync(~0u, seen);
  }
  __device__ bool holds(int first, int last) const { return first >= begin && last < end; }
};

__device__ __forceinline__ RowFilter load_filter(uint32_t address) {
  const int4 a = load_shared_int4(address);
  const int2 b = load_shared_int2(address + 16);
  return RowFilter{__int_as_float(a.x), a.z, a.w, b.x, b.y};
}

// How a chunk is filtered for the two rows of a thread (upper, lower: shared addresses of their states).
// Everything that does not need the scores is done by the constructor, while their product runs.
class ChunkFilter {
 public:
  // `chunk`: shared address of the chunk's indices, `count` of them valid.
  __device__ ChunkFilter(uint32_t upper, uint32_t lower, const Contested& contested, uint32_t chunk,
                         int count) {
    const int first = load_shared_int(chunk);
    const int last = load_shared_int(chunk + (count - 1) * 4);
    const int4 u = load_shared_int4(upper);
    const int4 l = load_shared_int4(lower);
    const bool tie_inside = __any_sync(~0u, (u.z >= first && u.z < last) || (l.z >= first && l.z < last));
    const bool edge = count < kChunkKeys || last >= contested.seen;
    path_ = !contested.holds(first, last) ? Path::kAny
            : edge                        ? Path::kEdge
            : tie_inside                  ? Path::kTie
                                          : Path::kPlain;
    upper_bound_ = __int_as_float(u.z >= first ? u.x : u.y);
    lower_bound_ = __int_as_float(l.z >= first ? l.x : l.y);
  }

  // Scores in the layout of a 64 x 64 product: dropped ones become -inf.
  __device__ __forceinline__ void drop(float (&s)[32], uint32_t upper, uint32_t lower, uint32_t chunk,
                                       int count, int column_pair) const {
    if (path_ == Path::kPlain) {
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] = s[i] < (i & 2 ? lower_bound_ : upper_bound_) ? -kInfinity : s[i];
    } else if (path_ == Path::kTie) {
      drop_contested<false>(s, upper, lower, chunk, count, column_pair);
    } else if (path_ == Path::kEdge) {
      drop_contested<true>(s, upper, lower, chunk, count, column_pair);
    } else {
      const RowFilter u = load_filter(upper);
      const RowFilter l = load_filter(lower);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int entry = 8 * j + 2 * column_pair + e;
          const int key = entry < count ? load_shared_int(chunk + entry * 4) : kNoKey;
          float& a = s[4 * j + e];
          float& b = s[4 * j + 2 + e];
          a = u.keeps(a, key) ? a : -kInfinity;
          b = l.keeps(b, key) ? b : -kInfinity;
        }
      }
    }
  }

 private:
  // kPlain: one bound per row. kTie: a row's tie index lies inside. kEdge: some row does not see all keys, or
  // the chunk is not full. kAny: always-kept keys or special thresholds.
  enum class Path { kPlain, kTie, kEdge, kAny };

  template <bool kEdges>
  __device__ __forceinline__ static void drop_contested(float (&s)[32], uint32_t upper, uint32_t lower,
                                                        uint32_t chunk, int count, int column_pair) {
    const int4 u = load_shared_int4(upper);
    const int4 l = load_shared_int4(lower);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int2 keys = load_shared_int2(chunk + (8 * j + 2 * column_pair) * 4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int key = e == 0 ? keys.x : keys.y;
        if (kEdges && 8 * j + 2 * column_pair + e >= count) key = kNoKey;
        float& a = s[4 * j + e];
        float& b = s[4 * j + 2 + e];
        const bool drop_a = a < __int_as_float(key <= u.z ? u.x : u.y) || (kEdges && key >= u.w);
        const bool drop_b = b < __int_as_float(key <= l.z ? l.x : l.y) || (kEdges && key >= l.w);
        a = drop_a ? -kInfinity : a;
        b = drop_b ? -kInfinity : b;
      }
    }
  }

  Path path_;
  float upper_bound_;
  float lower_bound_;
};

}  // namespace topk_attn::cuda::sm90
