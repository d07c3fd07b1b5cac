// One row's exact top-w by a team of thread blocks, and its ascending list: reading, gathering, listing, and
// the shape of the launch. A kernel of kLongThreads or kShortThreads threads a block calls select_long_row()
// for row blockIdx.x / team_size() and is started by launch_long().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "select_long.cuh"

namespace topk_attn::cuda::longrow {

inline constexpr int kLongThreads = 512;    // of a block
inline constexpr int kShortThreads = 128;   // where rows are short
inline constexpr int kShortRow = 2048;      // scores
inline constexpr int kCandidates = 8192;    // of a block
inline constexpr int kBitmapWords = 4096;   // columns of a block / 32
inline constexpr int kLeastSampleLog = 11;  // keys of a sample
inline constexpr int kLeastSegment = 4096;  // scores that are worth a block of a team
inline constexpr int kStep = 8;             // scores that a thread has in hand, as many as it has under way
inline constexpr float kFill = 0.85f;  // share of a block's room that may be expected to fill; teams: less,
inline constexpr float kTeamFill = 0.5f;  // since what passes may cluster in one block's part

// ---------------------------------------------------------------------------------------------------------------
// Rows: read as 16-byte vectors at aligned addresses. Vector v holds columns v * kPer - shift and on.
// ---------------------------------------------------------------------------------------------------------------

template <typename T>
struct Row {
  static constexpr int kPer = 16 / sizeof(T);
  const T* data;
  int shift;
  int n;

  __device__ Row(const T* data_, int n_)
      : data(data_), shift(static_cast<int>(reinterpret_cast<uintptr_t>(data_) % 16 / sizeof(T))), n(n_) {}
  __device__ int vectors() const { return (shift + n + kPer - 1) / kPer; }

  __device__ static int key(uint32_t bits) {
    if constexpr (std::is_same_v<T, float>) {
      return order_key(__uint_as_float(bits));
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return order_key(__uint_as_float(bits << 16));
    } else {
      return order_key(__half2float(__ushort_as_half(static_cast<uint16_t>(bits))));
    }
  }
  __device__ uint32_t bits(int column) const {
    if constexpr (sizeof(T) == 4) {
      return __ldcg(reinterpret_cast<const uint32_t*>(data) + column);
    } else {
      return __ldcg(reinterpret_cast<const uint16_t*>(data) + column);
    }
  }
  __device__ int key_at(int column) const { return key(bits(column)); }

  // Columns of vector v that exist, as bits.
  __device__ uint32_t valid(int v) const {
    const int column = v * kPer - shift;
    uint32_t mask = (1u << kPer) - 1;
    if (column < 0) mask &= mask << -column;
    if (column + kPer > n) mask &= mask >> min(column + kPer - n, kPer);
    return mask;
  }
  __device__ uint4 vector(int v) const {
    const int column = v * kPer - shift;
    if (column >= 0 && column + kPer <= n) return __ldcg(reinterpret_cast<const uint4*>(data + column));
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      if (column + e >= 0 && column + e < n) {
        words[e * sizeof(T) / 4] |= bits(column + e) << (e * sizeof(T) % 4 * 8);
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
  __device__ static int key_in(const uint4& v, int e) {
    const int i = e * static_cast<int>(sizeof(T)) / 4;
    const uint32_t word = i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
    if constexpr (sizeof(T) == 4) return key(word);
    return key(e % 2 == 0 ? word & 0xffffu : word >> 16);
  }
};

// A block's part of a row.
struct Segment {
  int first;  // vectors
  int last;
  int origin;  // column of the first bit of its bitmap
};

// Calls body(vector, v, valid) for 16 scores a thread at a time, lanes side by side; the warps stay together:
// outside the segment `valid` is 0.
template <int kThreads, typename T, typename Body>
__device__ void for_each_vector(const Row<T>& row, int first, int last, const Body& body) {
  constexpr int kAhead = kStep / Row<T>::kPer;
  if (first >= last) return;
  uint4 next[kAhead];
  const auto load = [&](int base) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      next[u] = row.vector(min(base + u * kThreads + static_cast<int>(threadIdx.x), last - 1));
    }
  };
  load(first);
#pragma unroll 1
  for (int base = first; base < last; base += kThreads * kAhead) {
    uint4 v[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) v[u] = next[u];
    if (base + kThreads * kAhead < last) load(base + kThreads * kAhead);
    body(v, base + static_cast<int>(threadIdx.x));
  }
}

// Gathers the lanes' kPer bits of a vector to words of 32 columns; the first lane of each word stores it.
template <int kPer>
__device__ __forceinline__ void store_bits(uint32_t bits, int local, int words, uint32_t* bitmap) {
  constexpr int kLanes = 32 / kPer;
  uint32_t word = bits << (threadIdx.x % kLanes * kPer);
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) word |= __shfl_xor_sync(~0u, word, step);
  const int at = local / kLanes;
  if (threadIdx.x % kLanes == 0 && at < words) bitmap[at] = word;
}

// Moves the keys of the segment inside [lo, hi] to `candidates`, as far as these reach, and counts them and
// those above; with `marks` the bits of those above are set and all others cleared.
template <int kThreads, typename T>
__device__ void gather(const Row<T>& row, const Segment& segment, int lo, int hi, Candidate* candidates,
                       int capacity, uint32_t* bitmap, int words, bool marks, Workspace& ws) {
  constexpr int kPer = Row<T>::kPer;
  constexpr int kAhead = kStep / kPer;
  __syncthreads();
  if (threadIdx.x == 0) ws.count = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  int over = 0;
  for_each_vector<kThreads>(row, segment.first, segment.last, [&](const uint4(&v)[kAhead], int at) {
    uint32_t inside = 0;
    uint32_t above = 0;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      uint32_t in = 0;
      uint32_t up = 0;
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const int key = Row<T>::key_in(v[u], e);
        if (key >= lo) in |= 1u << e;
        if (key > hi) up |= 1u << e;
      }
      const int vector = at + u * kThreads;
      const uint32_t valid = vector < segment.last ? row.valid(vector) : 0;
      up &= valid;
      in &= valid & ~up;
      inside |= in << (kPer * u);
      above |= up << (kPer * u);
      if (marks) store_bits<kPer>(up, vector - segment.first, words, bitmap);
    }
    over += __popc(above);
    if (__any_sync(~0u, inside != 0)) {
      const int own = __popc(inside);
      const int through = warp_scan(own);
      int base = 0;
      if (lane == 31) base = atomicAdd(&ws.count, through);
      int to = __shfl_sync(~0u, base, 31) + through - own;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          if (inside >> (kPer * u + e) & 1u) {
            if (to < capacity) {
              candidates[to] = Candidate{Row<T>::key_in(v[u], e), (at + u * kThreads) * kPer - row.shift + e};
            }
            ++to;
          }
        }
      }
    }
  });
  over = block_sum<kThreads>(over, ws);
  if (threadIdx.x == 0) ws.over = over;
  __syncthreads();
}

// What a row's selection leaves behind for its list.
struct Kept {
  Result result;
  bool listed;  // all kept keys at or below the bracket are candidates, those above are marked
};

template <int kThreads, typename T>
__device__ Kept select_row(const Row<T>& row, const Segment& segment, int w, Team& team,
                           Candidate* candidates, int capacity, uint32_t* bitmap, int words, bool mapped) {
  Workspace& ws = *team.ws;
  const int longest = (row.vectors() + team.size - 1) / team.size * Row<T>::kPer + 8 * Row<T>::kPer;
  Bracket bracket{kLowest, INT_MAX, INT_MAX, longest <= capacity};
  if (!bracket.usable) {
    const float room = (team.size == 1 ? kFill : kTeamFill) * static_cast<float>(capacity * team.size);
    bracket = find_bracket<kThreads>(team, reinterpret_cast<int*>(candidates), w, row.n, room, true,
                                     kLeastSampleLog, [&](int column) { return row.key_at(column); });
  }
  if (bracket.usable) {
    const bool marks = mapped && bracket.hi < INT_MAX;
    gather<kThreads>(row, segment, bracket.lo, bracket.hi, candidates, capacity, bitmap, words, marks, ws);
    team_sync(team.size);
    int over = 0;
    int inside = 0;
    bool fits = true;
#pragma unroll 1
    for (int block = 0; block < team.size; ++block) {
      const int count = *peer(&ws.count, block);
      fits &= count <= capacity;
      inside += count;
      over += *peer(&ws.over, block);
    }
    if (fits && over < w && w <= over + inside) {
      const Search search{bracket.lo, bracket.hi, w - over, inside, bracket.likely};
      const Result result = settle_candidates<kThreads>(search, team, candidates, ws.count,
                                                        [](const Candidate& c) { return c.key; });
      return Kept{result, marks || bracket.hi == INT_MAX};
    }
    team_sync(team.size);  // the counts have been read
  }

  // The radix select that reads the row itself.
  const auto digit = [&](Search& search, const auto& key_of) {
    narrow<kThreads>(search, team, team.size, [&](const auto& add) {
      for_each_vector<kThreads>(row, segment.first, segment.last, [&](const auto& v, int at) {
#pragma unroll
        for (int u = 0; u < kStep / Row<T>::kPer; ++u) {
          const int vector = at + u * kThreads;
          const uint32_t valid = vector < segment.last ? row.valid(vector) : 0;
#pragma unroll
          for (int e = 0; e < Row<T>::kPer; ++e) {
            if (valid >> e & 1u) add(key_of(Row<T>::key_in(v[u], e), vector * Row<T>::kPer - row.shift + e));
          }
        }
      });
    });
  };
  Search search{kLowest, INT_MAX, w, row.n, INT_MAX};
#pragma unroll 1
  while (!search.done() && search.equal > capacity) digit(search, [](int key, int) { return key; });
  if (search.equal <= capacity) {
    gather<kThreads>(row, segment, search.lo, search.hi, candidates, capacity, bitmap, words, mapped, ws);
    const Result result = settle_candidates<kThreads>(search, team, candidates, ws.count,
                                                      [](const Candidate& c) { return c.key; });
    return Kept{result, mapped};
  }
  // Too many keys equal to the threshold: the same select over their complemented columns.
  Search tie{~(row.n - 1), -1, search.rank, search.equal, -1};
  while (!tie.done()) {
    digit(tie, [&](int key, int column) { return key == search.lo ? ~column : INT_MIN; });
  }
  return Kept{Result{search.lo, ~tie.lo}, false};
}

// ---------------------------------------------------------------------------------------------------------------
// A row
// ---------------------------------------------------------------------------------------------------------------

template <typename T>
struct RowTask {
  const T* scores;  // of columns 0 .. n - 1, any alignment
  int n;
  int w;                   // 0 <= w <= n
  int first;               // column 0 stands for key `first`, unless `columns` (ascending) names the keys
  const int32_t* columns;  // may be null
  int32_t* list;           // the kept keys, ascending; null: not wanted
  int64_t width;           // of the list: keys beyond it are dropped
};

struct Encoding {
  float threshold;
  int32_t tie_index;
};

// Shared memory of a block: what launch_long() asks for.
struct Room {
  int capacity;  // candidates
  int words;     // of the bitmap
  static constexpr __host__ __device__ size_t bytes(int64_t capacity, int64_t words) {
    return sizeof(Workspace) + capacity * sizeof(Candidate) + words * sizeof(uint32_t);
  }
};

// All threads of the team call it and get the encoding. `memory` has Room::bytes().
template <int kThreads, typename T>
__device__ Encoding select_long_row(const RowTask<T>& task, const Room& room, uint8_t* memory) {
  Workspace& ws = *reinterpret_cast<Workspace*>(memory);
  Candidate* const candidates = reinterpret_cast<Candidate*>(memory + sizeof(Workspace));
  uint32_t* const bitmap = reinterpret_cast<uint32_t*>(candidates + room.capacity);
  Team team{&ws, team_rank(), team_size()};
  constexpr int kPer = Row<T>::kPer;
  if (task.w == 0) return Encoding{__int_as_float(0x7fc00000), -1};
  const Row<T> row(task.scores, task.n);
  // Parts begin at multiples of 32 columns of a bitmap.
  const int vectors = row.vectors();
  const int part = ((vectors + team.size - 1) / team.size + 7) / 8 * 8;
  Segment segment;
  segment.first = min(team.rank * part, vectors);
  segment.last = min(segment.first + part, vectors);
  segment.origin = segment.first * kPer - row.shift;
  const int used = (part * kPer + 31) / 32;
  const bool mapped = task.list != nullptr && used <= room.words;

  for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) ws.bins[0][i] = 0;
  if (mapped) {
    for (int i = threadIdx.x; i < used; i += kThreads) bitmap[i] = 0;
  }
  __syncthreads();
  const Kept kept =
      select_row<kThreads>(row, segment, task.w, team, candidates, room.capacity, bitmap, used, mapped);
  const Result result = kept.result;
  const auto key_of = [&](int column) {
    return task.columns != nullptr ? task.columns[column] : task.first + column;
  };
  if (task.list != nullptr) {
    const auto put = [&](int64_t at, int column) {
      if (at < task.width) task.list[at] = key_of(column);
    };
    const auto keeps = [&](int key, int column) {
      return key > result.threshold || (key == result.threshold && column <= result.tie_index);
    };
    if (kept.listed && mapped) {
      __syncthreads();
      for (int i = threadIdx.x; i < ws.count; i += kThreads) {
        const Candidate c = candidates[i];
        if (!keeps(c.key, c.column)) continue;
        const int bit = c.column - segment.origin;
        atomicOr(&bitmap[bit / 32], 1u << (bit % 32));
      }
      __syncthreads();
      int own = 0;
      if (team.size > 1) {
        for (int i = threadIdx.x; i < used; i += kThreads) own += __popc(bitmap[i]);
        own = block_sum<kThreads>(own, ws);
      }
      const int before = team.size > 1 ? team_prefix(team, own) : 0;
      list_bits<kThreads>(bitmap, used, segment.origin, ws,
                          [&](int i, int column) { put(before + i, column); });
    } else {
      // The row is read again, as many columns at a time as the bitmap holds.
      const auto kept_bits = [&](const uint4& v, int vector) {
        uint32_t bits = 0;
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          if (keeps(Row<T>::key_in(v, e), vector * kPer - row.shift + e)) bits |= 1u << e;
        }
        return vector < segment.last ? bits & row.valid(vector) : 0;
      };
      int own = 0;
      if (team.size > 1) {
        for_each_vector<kThreads>(row, segment.first, segment.last, [&](const auto& v, int at) {
#pragma unroll
          for (int u = 0; u < kStep / kPer; ++u) own += __popc(kept_bits(v[u], at + u * kThreads));
        });
        own = block_sum<kThreads>(own, ws);
      }
      int64_t written = team.size > 1 ? team_prefix(team, own) : 0;
      const int chunk = room.words * 32 / kPer;
      for (int first = segment.first; first < segment.last; first += chunk) {
        const int last = min(first + chunk, segment.last);
        const int here = ((last - first) * kPer + 31) / 32;
        __syncthreads();
        for_each_vector<kThreads>(row, first, last, [&](const auto& v, int at) {
#pragma unroll
          for (int u = 0; u < kStep / kPer; ++u) {
            const int vector = at + u * kThreads;
            const uint32_t bits = kept_bits(v[u], vector);
            store_bits<kPer>(vector < last ? bits : 0, vector - first, here, bitmap);
          }
        });
        __syncthreads();
        written += list_bits<kThreads>(bitmap, here, first * kPer - row.shift, ws,
                                       [&](int i, int column) { put(written + i, column); });
      }
    }
  }
  if (team.size > 1) team_sync(team.size);  // the others may still read this block's shared memory
  return Encoding{order_score(result.threshold), key_of(result.tie_index)};
}

// ---------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------

// Starts kernel(args...) with `team` blocks, a cluster, for each of `rows` rows.
template <typename Kernel, typename... Args>
cudaError_t launch_teams(Kernel kernel, int threads, int64_t rows, int team, size_t bytes,
                         cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * team));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(team), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = team > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Starts kernel(args..., Room) with a team for each of `rows` rows of at most n scores.
template <typename T, int kThreads, typename Kernel, typename... Args>
cudaError_t launch_long(Kernel kernel, int64_t rows, int64_t n, cudaStream_t stream, const Args&... args) {
  int device = 0;
  int processors = 0;
  int major = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (const cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      e != cudaSuccess) {
    return e;
  }
  int team = 1;
  if (kThreads == kLongThreads && major >= 9) {
    // Code that was compiled for an older architecture knows no clusters.
    cudaFuncAttributes attributes;
    if (const cudaError_t e = cudaFuncGetAttributes(&attributes, kernel); e != cudaSuccess) return e;
    const bool clusters = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
    const auto worth = [&](int t) { return 2 * rows * t <= processors * 3 && n / t >= kLeastSegment; };
    while (clusters && team < kMaxTeam && worth(2 * team)) team *= 2;
    // Rows so long that a block's bitmap does not hold its part are read once more for the list.
    while (clusters && team < kMaxTeam && n / team > kBitmapWords * 32) team *= 2;
  }
  constexpr int64_t kPer = 16 / sizeof(T);
  const int64_t vectors = (n + kPer - 1) / kPer + 1;
  const int64_t part = ((vectors + team - 1) / team + 8) * kPer;
  const int64_t capacity = part > kCandidates - 256 ? kCandidates : (part + 255) / 256 * 256;
  const int64_t words = part / 32 + 1 > kBitmapWords + 16 ? kBitmapWords + 16 : part / 32 + 1;
  const size_t bytes = Room::bytes(capacity, words);
  const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (e != cudaSuccess) return e;
  const Room room{static_cast<int>(capacity), static_cast<int>(words)};
  return launch_teams(kernel, kThreads, rows, team, bytes, stream, args..., room);
}

}  // namespace topk_attn::cuda::longrow
