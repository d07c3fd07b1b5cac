// Step 3 of the certified scan: survivors, their exact scores, and the exact selection among them. A row by a
// team of thread blocks (common/select_long.cuh), each with a share of the row's list.
#include "../common/mma.cuh"
#include "../common/select_long_row.cuh"
#include "certified.cuh"
#include "certified_steps.h"
#include "launch.cuh"

namespace topk_attn::cuda::decode {
namespace {

using namespace longrow;

constexpr int kThreads = kLongThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kRepair = -1;  // in place of a list's count: the row could not be certified

// Transposes 4 x 4 words of four lanes: word i of lane t becomes word t of lane i.
__device__ __forceinline__ void exchange(uint32_t& low, uint32_t& high, int lanes) {
  const bool upper = threadIdx.x & lanes;
  const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, lanes);
  (upper ? low : high) = other;
}
__device__ __forceinline__ uint4 transpose(uint4 v) {
  exchange(v.x, v.y, 1);
  exchange(v.z, v.w, 1);
  exchange(v.x, v.z, 2);
  exchange(v.y, v.w, 2);
  return v;
}

// Scores of 8 keys with one query, by a warp, bits as in every kernel: mma.m16n8k16 from zero, channels in
// ascending order, the query as row 0 of the first operand. Lane (g, t) names key g (null: there is none);
// lanes (0, t) get those of keys 2 t and 2 t + 1. Keys are read 16 bytes a lane, which costs a quarter of the
// time of reading operands as they are needed, 4 bytes a lane, and are transposed.
template <typename T, int kWidth>
__device__ __forceinline__ float2 score_keys(const T* key, const T* query, int head_dim) {
  const int lane = threadIdx.x % 32;
  const int t = lane % 4;
  uint4 read[kWidth / 32];
#pragma unroll
  for (int i = 0; i < kWidth / 32; ++i) {
    const int channel = 32 * i + 8 * t;
    read[i] = make_uint4(0, 0, 0, 0);
    if (key != nullptr && channel < head_dim) read[i] = __ldg(reinterpret_cast<const uint4*>(key + channel));
  }
  uint32_t b[kWidth / 16][2];
#pragma unroll
  for (int i = 0; i < kWidth / 32; ++i) {
    const uint4 v = transpose(read[i]);
    b[2 * i][0] = v.x;
    b[2 * i][1] = v.y;
    b[2 * i + 1][0] = v.z;
    b[2 * i + 1][1] = v.w;
  }
  float s[4] = {};
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    uint32_t a[4] = {};
    if (lane < 4) {
      a[0] = *reinterpret_cast<const uint32_t*>(query + 16 * step + 2 * t);
      a[2] = *reinterpret_cast<const uint32_t*>(query + 16 * step + 8 + 2 * t);
    }
    mma_16816<T>(s, a, b[step][0], b[step][1]);
  }
  return make_float2(s[0], s[1]);
}

// put(i, position, score) for i in [begin, end); the block's warps share them, 8 at a time.
template <typename T, int kWidth, typename Position, typename Put>
__device__ void score_all(const DecodeCall& c, int sequence, int kv_head, const T* query, int begin, int end,
                          const Position& position, const Put& put) {
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const T* const base = static_cast<const T*>(c.k.data) + kv_head * c.k.head;
#pragma unroll 1
  for (int first = begin + static_cast<int>(threadIdx.x) / 32 * 8; first < end; first += kWarps * 8) {
    const T* key = nullptr;
    if (first + g < end) key = base + row_offset(c, c.k, sequence, position(first + g));
    const float2 s = score_keys<T, kWidth>(key, query, c.head_dim);
    if (g == 0) {
      const int i = first + 2 * t;
      if (i < end) put(i, s.x);
      if (i + 1 < end) put(i + 1, s.y);
    }
  }
}

// The slab row that a team works on.
struct Place {
  int64_t index;
  int64_t out_row;
  int sequence;
  int kv_head;
  int pair;
  int m;  // row of the KV head
};

__device__ __forceinline__ Place place_of(const DecodeCall& c, const Slab& slab, int64_t index) {
  Place p;
  p.index = index;
  const int token = static_cast<int>(index % slab.tokens);
  const int head = static_cast<int>(index / slab.tokens % c.heads);
  const int slab_sequence = static_cast<int>(index / slab.tokens / c.heads);
  const int group = c.heads / c.kv_heads;
  p.sequence = slab.first_sequence + slab_sequence;
  p.kv_head = head / group;
  p.pair = slab_sequence * c.kv_heads + p.kv_head;
  p.m = head % group * slab.tokens + token;
  p.out_row = p.sequence * c.rows.batch + head * c.rows.head + slab.first_token + token;
  return p;
}

template <typename T, int kWidth>
__device__ void load_query(const DecodeCall& c, const Slab& slab, const Place& p, T* query) {
  if (threadIdx.x < kWidth) {
    const T* const from = query_row<T>(c, slab, p.sequence - slab.first_sequence, p.kv_head, p.m);
    query[threadIdx.x] =
        static_cast<int>(threadIdx.x) < c.head_dim ? from[threadIdx.x] : static_cast<T>(0.0f);
  }
}

template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads, 2) void finish_kernel(const __grid_constant__ DecodeCall c,
                                                             const __grid_constant__ Slab slab,
                                                             const __grid_constant__ Scratch scratch,
                                                             const __grid_constant__ CertifiedScratch own,
                                                             CertifiedStats* const stats, const Room room) {
  extern __shared__ __align__(16) uint8_t memory[];
  __shared__ __align__(16) T query[kWidth];
  __shared__ Place place;
  __shared__ CertifiedRow row;  // not in registers: they are scarce
  Workspace& ws = *reinterpret_cast<Workspace*>(memory);
  Candidate* const candidates = reinterpret_cast<Candidate*>(memory + sizeof(Workspace));
  uint32_t* const bitmap = reinterpret_cast<uint32_t*>(candidates + room.capacity);
  Team team{&ws, team_rank(), team_size()};
  let_next_start();
  for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) ws.bins[0][i] = 0;
  for (int i = threadIdx.x; i < room.words; i += kThreads) bitmap[i] = 0;
  wait_for_previous();

  if (threadIdx.x == 0) {
    place = place_of(c, slab, blockIdx.x / team.size);
    row = own.rows[int64_t{place.pair} * kCertifiedRows + place.m];
  }
  __syncthreads();
  const bool tells = team.rank == 0 && threadIdx.x == 0;
  const auto encode_row = [&](float threshold, int tie_index) {
    if (!tells) return;
    c.threshold[place.out_row] = threshold;
    c.tie_index[place.out_row] = tie_index;
  };
  load_query<T, kWidth>(c, slab, place, query);
  __syncthreads();
  const auto itself = [](int j) { return j; };
  const auto store = [&](int j, float s) { (scratch.scores + place.index * scratch.ld)[j] = s; };
  if (team.rank == 0) {  // always-kept keys need no selection
    score_all<T, kWidth>(c, place.sequence, place.kv_head, query, row.seen_begin, row.begin, itself, store);
    score_all<T, kWidth>(c, place.sequence, place.kv_head, query, row.end, row.seen_end, itself, store);
  }
  if (row.kept == 0) {
    encode_row(__int_as_float(0x7fc00000), -1);
    return;
  }

  // This block's share of the list, and how many of all lower bounds reach the first bound.
  const int listed = own.counts[place.index];
  const int share = (listed + team.size - 1) / team.size;
  const int first = min(team.rank * share, listed);
  int count = min(share, listed - first);
  bool certified = listed <= own.room && share <= room.capacity;
  const int bound = isnan(row.bound) ? kLowest & kKeyMask : order_key(row.bound);
  int reaching = 0;
  int highest = INT_MIN;
  if (certified) {
    const unsigned long long* const entries = own.lists + place.index * own.room + first;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const unsigned long long e = __ldcg(entries + i);
      const Candidate entry{static_cast<int>(e >> 32), static_cast<int>(e & 0xffffffffu)};
      candidates[i] = entry;
      const int lower = entry_lower(entry.key);
      reaching += lower >= bound ? 1 : 0;
      highest = max(highest, lower);
    }
  }
  reaching = block_sum<kThreads>(reaching, ws);
  highest = __reduce_max_sync(~0u, highest);
  if (threadIdx.x == 0) {
    ws.over = reaching;
    ws.kept = INT_MIN;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicMax(&ws.kept, highest);
  team_sync(team.size);
  int all_reaching = 0;
#pragma unroll 1
  for (int block = 0; block < team.size; ++block) {
    all_reaching += *peer(&ws.over, block);
    highest = max(highest, *peer(&ws.kept, block));
  }
  team_sync(team.size);  // nobody leaves, or writes these again, while others still read them
  certified = certified && all_reaching >= row.kept;
  if (tells && stats != nullptr) atomicAdd(&stats->rows, 1ull);

  if (!certified) {
    if (tells) own.counts[place.index] = kRepair;
    return;
  }

  // The cutoff: the kept-th largest lower bound, or a little less: digits that would spare few keys are left
  // out.
  Search cutoff{bound, INT_MAX, row.kept, all_reaching, max(highest, bound)};
  while (!cutoff.done()) {
    narrow<kThreads>(cutoff, team, team.size, [&](const auto& add) {
      for (int i = threadIdx.x; i < count; i += kThreads) add(entry_lower(candidates[i].key));
    });
    if (cutoff.equal <= 16 + row.kept / 64) break;
  }
  // Survivors move to the front; entries are read before any of them is overwritten.
  __syncthreads();
  if (threadIdx.x == 0) ws.count = 0;
  __syncthreads();
  constexpr int kEach = 4;
  for (int base = 0; base < count; base += kEach * kThreads) {
    int position[kEach];
    uint32_t mask[kEach];
    int found = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = base + e * kThreads + static_cast<int>(threadIdx.x);
      const Candidate entry = candidates[min(i, count - 1)];
      const bool survives = i < count && entry_upper(entry.key, entry.column) >= cutoff.lo;
      position[e] = entry_position(entry.column);
      mask[e] = __ballot_sync(~0u, survives);
      found += __popc(mask[e]);
    }
    int at = 0;
    if (threadIdx.x % 32 == 0) at = atomicAdd(&ws.count, found);
    at = __shfl_sync(~0u, at, 0);
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const uint32_t below = (1u << threadIdx.x % 32) - 1;
      if (mask[e] >> threadIdx.x % 32 & 1u) {
        candidates[at + __popc(mask[e] & below)] = Candidate{0, position[e]};
      }
      at += __popc(mask[e]);
    }
    __syncthreads();
  }
  count = ws.count;
  int lowest = INT_MAX;
  highest = INT_MIN;
  score_all<T, kWidth>(
      c, place.sequence, place.kv_head, query, 0, count, [&](int i) { return candidates[i].column; },
      [&](int i, float s) {
        const int key = order_key(s);
        candidates[i].key = key;
        lowest = min(lowest, key);
        highest = max(highest, key);
        (scratch.scores + place.index * scratch.ld)[candidates[i].column] = s;
      });
  __syncthreads();
  if (stats != nullptr && threadIdx.x == 0) {
    atomicAdd(&stats->survivors, static_cast<unsigned long long>(count));
    if (team.rank == 0) {
      atomicAdd(&stats->certified, 1ull);
      atomicAdd(&stats->kept, static_cast<unsigned long long>(row.kept));
      atomicAdd(&stats->listed, static_cast<unsigned long long>(listed));
    }
  }

  // The range of their order keys, of the whole team.
  lowest = __reduce_min_sync(~0u, lowest);
  highest = __reduce_max_sync(~0u, highest);
  if (threadIdx.x == 0) {
    ws.over = INT_MAX;
    ws.kept = INT_MIN;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    atomicMin(&ws.over, lowest);
    atomicMax(&ws.kept, highest);
  }
  team_sync(team.size);
  for (int block = 0; block < team.size; ++block) {
    lowest = min(lowest, *peer(&ws.over, block));
    highest = max(highest, *peer(&ws.kept, block));
  }
  const Search search{lowest, highest, row.kept, INT_MAX, highest};
  const Result result =
      settle_candidates<kThreads>(search, team, candidates, count, [](const Candidate& e) { return e.key; });
  encode_row(order_score(result.threshold), result.tie_index);

  // Bits of the kept keys, in the block whose part of the row they lie in; then the list.
  const int words = ((row.end - row.begin + team.size - 1) / team.size + 31) / 32;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Candidate e = candidates[i];
    if (e.key < result.threshold || (e.key == result.threshold && e.column > result.tie_index)) continue;
    const int bit = e.column - row.begin;
    const int block = bit / (words * 32);
    const int word = bit / 32 - block * words;
    atomicOr(team.size > 1 ? peer(&bitmap[word], block) : &bitmap[word], 1u << (bit % 32));
  }
  team_sync(team.size);
  int before = 0;
  if (team.size > 1) {
    int here = 0;
    for (int i = threadIdx.x; i < words; i += kThreads) here += __popc(bitmap[i]);
    before = team_prefix(team, block_sum<kThreads>(here, ws));
  }
  int32_t* const list = scratch.lists + place.index * c.kept_width;
  list_bits<kThreads>(bitmap, words, row.begin + team.rank * words * 32, ws,
                      [&](int i, int column) { list[before + i] = column; });
  if (team.size > 1) team_sync(team.size);
}

// What could not be certified: all scores of the row, and the selection that reads them.
template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads, 1) void repair_kernel(const __grid_constant__ DecodeCall c,
                                                             const __grid_constant__ Slab slab,
                                                             const __grid_constant__ Scratch scratch,
                                                             const __grid_constant__ CertifiedScratch own,
                                                             const Room room) {
  extern __shared__ __align__(16) uint8_t memory[];
  __shared__ __align__(16) T query[kWidth];
  __shared__ Place place;
  __shared__ CertifiedRow row;
  wait_for_previous();
  if (own.counts[blockIdx.x / team_size()] != kRepair) return;
  if (threadIdx.x == 0) {
    place = place_of(c, slab, blockIdx.x / team_size());
    row = own.rows[int64_t{place.pair} * kCertifiedRows + place.m];
  }
  __syncthreads();
  load_query<T, kWidth>(c, slab, place, query);
  __syncthreads();
  const int n = row.end - row.begin;
  const int part = (n + team_size() - 1) / team_size();
  const int from = min(row.begin + team_rank() * part, row.end);
  score_all<T, kWidth>(
      c, place.sequence, place.kv_head, query, from, min(from + part, row.end), [](int j) { return j; },
      [&](int j, float s) { (scratch.scores + place.index * scratch.ld)[j] = s; });
  __threadfence();
  team_sync(team_size());
  const RowTask<float> task{scratch.scores + place.index * scratch.ld + row.begin,
                            n,
                            row.kept,
                            row.begin,
                            nullptr,
                            scratch.lists + place.index * c.kept_width,
                            row.kept};
  const Encoding e = select_long_row<kThreads>(task, room, memory);
  if (team_rank() == 0 && threadIdx.x == 0) {
    c.threshold[place.out_row] = e.threshold;
    c.tie_index[place.out_row] = e.tie_index;
  }
}

template <typename T, int kWidth>
cudaError_t run_finish(const DecodeCall& c, const Slab& slab, const Scratch& scratch,
                       const CertifiedScratch& own, CertifiedStats* stats, cudaStream_t stream) {
  const int64_t part = (int64_t{c.capacity} + own.team - 1) / own.team;
  const Room room{kCandidates, static_cast<int>(part / 32 + 32)};
  const size_t bytes = Room::bytes(room.capacity, room.words);
  const int64_t rows = int64_t{slab.sequences} * c.heads * slab.tokens;
  const auto finish = finish_kernel<T, kWidth>;
  const auto repair = repair_kernel<T, kWidth>;
  for (const void* kernel : {reinterpret_cast<const void*>(finish), reinterpret_cast<const void*>(repair)}) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  const LaunchShape shape{static_cast<unsigned>(rows * own.team), kThreads, bytes,
                          static_cast<unsigned>(own.team)};
  const cudaError_t error = decode::launch(finish, shape, true, stream, c, slab, scratch, own, stats, room);
  if (error != cudaSuccess) return error;
  return decode::launch(repair, shape, true, stream, c, slab, scratch, own, room);
}

}  // namespace

cudaError_t certified_finish(const DecodeCall& c, const Slab& slab, const Scratch& scratch,
                             const KeyCodes& codes, const CertifiedScratch& own, cudaStream_t stream) {
  CertifiedStats* const stats = codes.stats;
  if (c.dtype == DType::kBFloat16) {
    return codes.width == 64 ? run_finish<__nv_bfloat16, 64>(c, slab, scratch, own, stats, stream)
                             : run_finish<__nv_bfloat16, 128>(c, slab, scratch, own, stats, stream);
  }
  return codes.width == 64 ? run_finish<__half, 64>(c, slab, scratch, own, stats, stream)
                           : run_finish<__half, 128>(c, slab, scratch, own, stats, stream);
}

}  // namespace topk_attn::cuda::decode
