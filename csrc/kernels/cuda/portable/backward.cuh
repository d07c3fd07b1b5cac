// Backward over contiguous blocks with the selection as a mask, split into two passes without atomics: dQ per
// query tile (three products a block) and dK, dV per key tile (four products). Scores are recomputed,
// bit-identical to the forward's; P = exp(s * scale - lse) on kept pairs, dS = P * (dP - delta). Bit-stable
// from run to run.
#pragma once

#include "forward.cuh"

namespace topk_attn::cuda::portable {

// ---------------------------------------------------------------------------------------------------------------
// dQ
// ---------------------------------------------------------------------------------------------------------------

template <int D>
constexpr int dq_shared_bytes() {
  return 2 * kTileRows * D * 2 + Config<D>::kBackwardStages * 2 * Config<D>::kKeys * D * 2;
}

template <typename T, int D, bool kGroup>
__global__ void __launch_bounds__(Config<D>::kThreads, 2 / Config<D>::kSplit)
    dq_kernel(const __grid_constant__ BackwardCall f) {
  using C = Config<D>;
  constexpr int kKeys = kGroup ? 32 : C::kKeys;  // the group's scores need registers
  constexpr int N = kKeys / 8;
  constexpr int kStages = C::kBackwardStages;
  extern __shared__ __align__(512) uint8_t shared[];
  __shared__ int blocks[128];
  __shared__ int warp_counts[4];
  const Call& c = f.call;
  const Unit unit = unit_of(c, blockIdx.x);
  const Tile t = tile_at(c, unit.tile);
  const int seen = seen_end(c, t);
  const int64_t entry = int64_t{unit.head} * c.num_tiles + unit.tile;
  if (t.rows == 0 || gathered(f.regimes, entry, seen)) return;

  const uint32_t q_tile = shared_address(shared);
  const uint32_t dout_tile = q_tile + kTileRows * D * 2;
  const uint32_t kv_tiles = dout_tile + kTileRows * D * 2;
  constexpr uint32_t kKeyBytes = kKeys * D * 2;
  const int warp = threadIdx.x / 32 % 4;
  const int channel0 = threadIdx.x / 128 * C::kChannels;
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;
  const int kv_head = unit.head / (c.heads / c.kv_heads);
  const T* k = row_pointer<const T>(c.k, t.batch, t.k_begin, kv_head);
  const T* v = row_pointer<const T>(c.v, t.batch, t.k_begin, kv_head);
  const uint32_t* bitmap = f.bitmap == nullptr ? nullptr : f.bitmap + entry * (bitmap_words(c));

  load_tile<T, D, kTileRows, C::kThreads>(q_tile,
                                          row_pointer<const T>(c.q, t.batch, t.q_begin + t.row0, unit.head),
                                          c.q.token, t.rows, c.head_dim);
  load_tile<T, D, kTileRows, C::kThreads>(
      dout_tile, row_pointer<const T>(f.dout, t.batch, t.q_begin + t.row0, unit.head), f.dout.token, t.rows,
      c.v_dim);
  copy_commit();

  const float infinity = __int_as_float(0x7f800000);
  const float scale = c.softmax_scale * kLog2E;
  RowFilter filter[2];
  float lse[2] = {infinity, infinity};  // in base 2; +inf: the row keeps nothing
  float delta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    filter[h] = RowFilter{0.0f, -1, 0, 0, 0};
    const int row = 16 * warp + g + 8 * h;
    if (row < t.rows) {
      const int64_t at = row_index(c, t, unit.head, t.row0 + row);
      filter[h] = row_filter(c, t, t.row0 + row, f.threshold[at], f.tie_index[at]);
      lse[h] = f.lse[at] == -infinity ? infinity : f.lse[at] * kLog2E;
      delta[h] = f.delta[at];
    }
  }
  float dq[C::kChannels / 8][4] = {};

  auto load_block = [&](int block, int stage) {
    const int key = block * kKeys;
    const uint32_t at = kv_tiles + stage * 2 * kKeyBytes;
    load_tile<T, D, kKeys, C::kThreads>(at, k + key * c.k.token, c.k.token, t.tk - key, c.head_dim);
    load_tile<T, D, kKeys, C::kThreads>(at + kKeyBytes, v + key * c.v.token, c.v.token, t.tk - key, c.v_dim);
  };
  const int num_blocks = (seen + kKeys - 1) / kKeys;
  for (int window = 0; window < num_blocks; window += 128) {
    const int count = compact<128>(blocks, warp_counts, window, num_blocks,
                                   [&](int block) { return block_kept<kKeys>(bitmap, block); });
    if (kStages == 2 && count > 0) load_block(blocks[0], 0);
    copy_commit();
    for (int i = 0; i < count; ++i) {
      if (kStages == 1) load_block(blocks[i], 0);
      if (kStages == 2 && i + 1 < count) load_block(blocks[i + 1], (i + 1) % 2);
      copy_commit();
      copy_wait<kStages - 1>();
      __syncthreads();
      const uint32_t k_tile = kv_tiles + i % kStages * 2 * kKeyBytes;
      const int key = blocks[i] * kKeys;
      float s[N][4];
      dot_rows<T, D, N>(s, q_tile, 16 * warp, k_tile, 0);
      if constexpr (kGroup) {
        mask_scores(s, group_keeps<T, D, N>(s, filter, c, t, unit.head, 16 * warp, k_tile, key));
      } else {
        mask_scores(s, filter, key);
      }
      float dp[N][4];
      dot_rows<T, D, N>(dp, dout_tile, 16 * warp, k_tile + kKeyBytes, 0);
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = exp2_fast(fmaf(s[n][e], scale, -lse[e / 2]));
          s[n][e] = p * (dp[n][e] - delta[e / 2]);
        }
      }
      uint32_t ds[N / 2][4];
      as_operand<T, N>(ds, s);
      multiply_rows<T, D, N, C::kChannels / 8>(dq, ds, k_tile, 0, channel0);
      __syncthreads();
    }
    copy_wait<0>();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * warp + g + 8 * h;
    if (row >= t.rows) continue;
    // A row that keeps nothing finite has no gradient, whatever its keys hold (0 * inf is not 0).
    const float factor = lse[h] == infinity ? 0.0f : c.softmax_scale;
    T* o = row_pointer<T>(f.dq, t.batch, t.q_begin + t.row0 + row, unit.head);
#pragma unroll
    for (int n = 0; n < C::kChannels / 8; ++n) {
      const int channel = channel0 + 8 * n + pair;
      if (channel < c.head_dim) {
        *reinterpret_cast<uint32_t*>(o + channel) =
            factor == 0.0f ? 0u : pack<T>(dq[n][2 * h] * factor, dq[n][2 * h + 1] * factor);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// dK, dV
// ---------------------------------------------------------------------------------------------------------------

// One block does 64 keys of one KV head: it walks the group's heads and their query tiles in ascending order,
// in steps of kQueries rows. Warp w computes S^T and dP^T of 16 keys; where registers are short (D = 256,
// kv_group) two warps share the keys and each sums half of the channels. P^T and dS^T go from the results
// straight into the next product.
template <int D, bool kGroup>
struct KeyConfig {
  static constexpr int kSplit = D <= 128 && !kGroup ? 1 : 2;
  static constexpr int kThreads = 128 * kSplit;
  static constexpr int kQueries = D <= 128 ? 64 : 32;
  static constexpr int kStages = D <= 128 ? 2 : 1;
  static constexpr int kColumns = 32;  // queries of one product, a warp's worth: bounded by registers
  static constexpr int kChannels = D / kSplit;
};

template <int D, bool kGroup>
constexpr int dkv_shared_bytes() {
  using C = KeyConfig<D, kGroup>;
  return 2 * kTileRows * D * 2 + C::kStages * 2 * C::kQueries * D * 2;
}

// Tile number of the first query tile of document `document` (packed calls): the entries are sorted, unused
// ones last.
__device__ inline int first_tile_of(const Call& c, int document) {
  int low = 0;
  int high = c.num_tiles;
  while (low < high) {
    const int middle = (low + high) / 2;
    const int owner = c.tiles[middle].x;
    if (owner >= 0 && owner < document) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The keys of a block, and the query tiles of their sequence that see any of them.
struct KeyBlock {
  Tile t;          // the sequence
  int first_key;   // at or beyond t.tk: nothing to do
  int first_tile;  // number of the sequence's first query tile
  int skipped;     // its first query tiles, whose rows see none of the keys
  int tiles;       // the others
};
__device__ inline KeyBlock key_block(const Call& c, const int2* key_tiles, int index) {
  KeyBlock b{};
  if (key_tiles == nullptr) {
    const int per_sequence = (c.tk + kTileRows - 1) / kTileRows;
    const int sequence = index / per_sequence;
    b.t = sequence_at(c, sequence);
    b.first_key = index % per_sequence * kTileRows;
    b.first_tile = sequence * ((c.tq + kTileRows - 1) / kTileRows);
  } else {
    const int2 entry = key_tiles[index];
    if (entry.x < 0) return b;
    b.t = sequence_at(c, entry.x);
    b.first_key = entry.y;
    b.first_tile = first_tile_of(c, entry.x);
  }
  const int tiles = (b.t.tq + kTileRows - 1) / kTileRows;
  const int first_row = c.causal ? max(0, b.first_key - (b.t.tk - b.t.tq)) : 0;
  b.skipped = min(tiles, first_row / kTileRows);
  b.tiles = tiles - b.skipped;
  return b;
}

// What the pass over key tiles needs to know of tile row `row` for the 64 keys from first_key.
struct RowTest {
  bool plain;  // `bound` decides for all of these keys
  float bound;
  float lse;  // in base 2; +inf: the row keeps nothing
  float delta;
};
static __device__ __noinline__ RowTest row_test(const BackwardCall& f, const Tile& t, int head, int row,
                                                int first_key) {
  const float infinity = __int_as_float(0x7f800000);
  if (row >= t.rows) return RowTest{false, 0.0f, infinity, 0.0f};
  const int64_t at = row_index(f.call, t, head, t.row0 + row);
  const RowFilter filter = row_filter(f.call, t, t.row0 + row, f.threshold[at], f.tie_index[at]);
  const bool plain = filter.plain(first_key, first_key + kTileRows);
  const float lse = f.lse[at];
  return RowTest{plain, plain ? filter.bound(first_key) : 0.0f, lse == -infinity ? infinity : lse * kLog2E,
                 f.delta[at]};
}

template <typename T, int D, bool kGroup>
__global__ void __launch_bounds__(KeyConfig<D, kGroup>::kThreads, 2 / KeyConfig<D, kGroup>::kSplit)
    dkv_kernel(const __grid_constant__ BackwardCall f, const int2* key_tiles, int num_key_tiles) {
  using C = KeyConfig<D, kGroup>;
  constexpr int N = C::kColumns / 8;
  constexpr int kSteps = kTileRows / C::kQueries;
  extern __shared__ __align__(512) uint8_t shared[];
  __shared__ int hits[128];
  __shared__ int warp_counts[4];
  __shared__ float bounds[2][C::kQueries];
  __shared__ bool all_plain[2]
                           [C::kQueries / 32];  // whether bounds[] decide for 32 queries over all of the keys
  __shared__ float lses[2][C::kQueries];
  __shared__ float deltas[2][C::kQueries];
  const Call& c = f.call;
  const int kv_head = blockIdx.x / num_key_tiles;
  // In shared memory for the sake of registers.
  __shared__ KeyBlock work;
  if (threadIdx.x == 0) work = key_block(c, key_tiles, static_cast<int>(blockIdx.x % num_key_tiles));
  __syncthreads();
  const int first_key = work.first_key;
  if (first_key >= work.t.tk) return;

  const uint32_t k_tile = shared_address(shared);
  const uint32_t v_tile = k_tile + kTileRows * D * 2;
  const uint32_t q_tiles = v_tile + kTileRows * D * 2;
  constexpr uint32_t kQueryBytes = C::kQueries * D * 2;
  const int warp = threadIdx.x / 32 % 4;
  const int channel0 = threadIdx.x / 128 * C::kChannels;
  const int g = threadIdx.x % 32 / 4;
  const int pair = threadIdx.x % 4 * 2;

  load_tile<T, D, kTileRows, C::kThreads>(
      k_tile, row_pointer<const T>(c.k, work.t.batch, work.t.k_begin + first_key, kv_head), c.k.token,
      work.t.tk - first_key, c.head_dim);
  load_tile<T, D, kTileRows, C::kThreads>(
      v_tile, row_pointer<const T>(c.v, work.t.batch, work.t.k_begin + first_key, kv_head), c.v.token,
      work.t.tk - first_key, c.v_dim);
  copy_commit();

  const float scale = c.softmax_scale * kLog2E;
  float dk[C::kChannels / 8][4] = {};
  float dv[C::kChannels / 8][4] = {};

  // Candidate `i` is query tile work.skipped + i % work.tiles of the group's head i / work.tiles.
  auto tile_of = [&](int candidate) {
    Tile q = work.t;
    q.row0 = (work.skipped + candidate % work.tiles) * kTileRows;
    q.rows = min(kTileRows, q.tq - q.row0);
    return q;
  };
  auto head_of = [&](int candidate) { return kv_head * (c.heads / c.kv_heads) + candidate / work.tiles; };
  auto wanted = [&](int candidate) {
    const Tile q = tile_of(candidate);
    const int64_t entry = int64_t{head_of(candidate)} * c.num_tiles + work.first_tile + q.row0 / kTileRows;
    if (gathered(f.regimes, entry, seen_end(c, q))) return false;
    const int64_t words = bitmap_words(c);
    return f.bitmap == nullptr || block_kept<kTileRows>(f.bitmap + entry * words, first_key / kTileRows);
  };
  // Starts the copy of the rows of step `step` of a candidate into stage `stage`, and writes what their test
  // needs.
  auto load_step = [&](int candidate, int step, int stage) {
    const Tile q = tile_of(candidate);
    const int head = head_of(candidate);
    const int row = step * C::kQueries;
    const uint32_t at = q_tiles + stage * 2 * kQueryBytes;
    load_tile<T, D, C::kQueries, C::kThreads>(
        at, row_pointer<const T>(c.q, q.batch, q.q_begin + q.row0 + row, head), c.q.token, q.rows - row,
        c.head_dim);
    load_tile<T, D, C::kQueries, C::kThreads>(
        at + kQueryBytes, row_pointer<const T>(f.dout, q.batch, q.q_begin + q.row0 + row, head), f.dout.token,
        q.rows - row, c.v_dim);
    if (threadIdx.x < C::kQueries) {
      const RowTest test = row_test(f, q, head, row + threadIdx.x, first_key);
      const bool warp_plain = __all_sync(0xffffffffu, test.plain);
      if (threadIdx.x % 32 == 0) all_plain[stage][threadIdx.x / 32] = warp_plain;
      bounds[stage][threadIdx.x] = test.bound;
      lses[stage][threadIdx.x] = test.lse;
      deltas[stage][threadIdx.x] = test.delta;
    }
  };

  const int candidates = c.heads / c.kv_heads * work.tiles;
  for (int window = 0; window < candidates; window += 128) {
    const int count = compact<128>(hits, warp_counts, window, candidates, wanted) * kSteps;
    if (C::kStages == 2 && count > 0) load_step(hits[0], 0, 0);
    copy_commit();
    for (int i = 0; i < count; ++i) {
      if (C::kStages == 1) load_step(hits[i / kSteps], i % kSteps, 0);
      if (C::kStages == 2 && i + 1 < count) load_step(hits[(i + 1) / kSteps], (i + 1) % kSteps, (i + 1) % 2);
      copy_commit();
      copy_wait<C::kStages - 1>();
      __syncthreads();
      const int stage = i % C::kStages;
      const uint32_t q_tile = q_tiles + stage * 2 * kQueryBytes;
      const uint32_t dout_tile = q_tile + kQueryBytes;
#pragma unroll 1
      for (int column = 0; column < C::kQueries; column += C::kColumns) {
        float s[N][4];
        dot_rows<T, D, N>(s, k_tile, 16 * warp, q_tile, column);
        // P^T: column 8n + pair + e % 2 is a query, row g or g + 8 a key.
        const float* bound = bounds[stage] + column + pair;
        const float* lse = lses[stage] + column + pair;
        if (!kGroup && all_plain[stage][column / 32]) {
#pragma unroll
          for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float p = exp2_fast(fmaf(s[n][e], scale, -lse[8 * n + e % 2]));
              s[n][e] = s[n][e] < bound[8 * n + e % 2] ? 0.0f : p;
            }
          }
        } else {
          const int candidate = hits[i / kSteps];
          const uint32_t kept =
              keeps_by_key<T, D, N, kGroup>(s, f, tile_of(candidate), head_of(candidate),
                                            i % kSteps * C::kQueries + column, k_tile, 16 * warp, first_key);
#pragma unroll
          for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float p = exp2_fast(fmaf(s[n][e], scale, -lse[8 * n + e % 2]));
              s[n][e] = kept >> (4 * n + e) & 1 ? p : 0.0f;
            }
          }
        }
        uint32_t p[N / 2][4];
        as_operand<T, N>(p, s);
        multiply_rows<T, D, N, C::kChannels / 8>(dv, p, dout_tile, column, channel0);
        float dp[N][4];
        dot_rows<T, D, N>(dp, v_tile, 16 * warp, dout_tile, column);
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] *= dp[n][e] - deltas[stage][column + 8 * n + pair + e % 2];
        }
        as_operand<T, N>(p, s);
        multiply_rows<T, D, N, C::kChannels / 8>(dk, p, q_tile, column, channel0);
      }
      __syncthreads();
    }
    copy_wait<0>();
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = first_key + 16 * warp + g + 8 * h;
    if (key >= work.t.tk) continue;
    const int64_t token = work.t.k_begin + key;
    // The sums are contiguous: (batch, token, head, channel).
    const int64_t row = ((work.t.batch * int64_t{c.tk}) + token) * c.kv_heads + kv_head;
    T* dk_row = row_pointer<T>(f.dk, work.t.batch, token, kv_head);
    T* dv_row = row_pointer<T>(f.dv, work.t.batch, token, kv_head);
#pragma unroll
    for (int n = 0; n < C::kChannels / 8; ++n) {
      const int channel = channel0 + 8 * n + pair;
      if (channel < c.head_dim) {
        const float2 x = make_float2(dk[n][2 * h] * c.softmax_scale, dk[n][2 * h + 1] * c.softmax_scale);
        if (f.dk_sum != nullptr) {
          *reinterpret_cast<float2*>(f.dk_sum + row * c.head_dim + channel) = x;
        } else {
          *reinterpret_cast<uint32_t*>(dk_row + channel) = pack<T>(x.x, x.y);
        }
      }
      if (channel < c.v_dim) {
        const float2 x = make_float2(dv[n][2 * h], dv[n][2 * h + 1]);
        if (f.dv_sum != nullptr) {
          *reinterpret_cast<float2*>(f.dv_sum + row * c.v_dim + channel) = x;
        } else {
          *reinterpret_cast<uint32_t*>(dv_row + channel) = pack<T>(x.x, x.y);
        }
      }
    }
  }
}

template <typename T, int D, bool kGroup>
cudaError_t run_backward(const BackwardCall& f, const int2* key_tiles, int32_t num_key_tiles,
                         cudaStream_t stream) {
  constexpr int kDqBytes = dq_shared_bytes<D>();
  constexpr int kDkvBytes = dkv_shared_bytes<D, kGroup>();
  const int64_t blocks = int64_t{f.call.num_tiles} * f.call.heads;
  if (blocks > 0) {
    const auto kernel = dq_kernel<T, D, kGroup>;
    cudaError_t error = allow_shared<kDqBytes>(kernel);
    if (error != cudaSuccess) return error;
    kernel<<<static_cast<unsigned>(blocks), Config<D>::kThreads, kDqBytes, stream>>>(f);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  const int64_t key_blocks = int64_t{num_key_tiles} * f.call.kv_heads;
  if (key_blocks > 0) {
    const auto kernel = dkv_kernel<T, D, kGroup>;
    cudaError_t error = allow_shared<kDkvBytes>(kernel);
    if (error != cudaSuccess) return error;
    kernel<<<static_cast<unsigned>(key_blocks), KeyConfig<D, kGroup>::kThreads, kDkvBytes, stream>>>(
        f, key_tiles, num_key_tiles);
  }
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::portable
