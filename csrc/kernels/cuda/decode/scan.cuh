// Scores of at most 16 query rows of a KV head against all keys of the cache: decode, bf16 and fp16.
//
// A warp is on its own: it takes work units of 32 keys of one KV head, streams the key rows through a ring of
// 16-key stages in shared memory (cp.async) and multiplies each stage with the rows of the group, which it
// holds as operands in registers. Units are numbered (sequence, 32 keys, KV head) over the real lengths, and
// warp w of the grid takes units w, w + warps, ...: neighbouring warps read neighbouring heads of the same
// tokens, every length fills the card, and the grid does not depend on what the cache has room for. There is
// no barrier after the first.
//
// With scratch.bounds, which sample.cuh made, only the scores that reach their row's bound are written, as
// (key, column) lists in no order, which pick.cu reads: a warp collects them in shared memory, as single
// writes all over the score rows would cost more than writing all scores does. The ring is filled before the
// sample has ended. With `only_flagged` only KV heads are scanned whose bound turned out wrong, and
// everything is written.
//
// Scores are summed as in every kernel: mma.m16n8k16 from zero, channels in ascending order, query rows as
// the first operand. Cost: one read of K; 4 bytes written a score, or 8 a candidate.
#pragma once

#include <climits>

#include "../common/mma.cuh"
#include "cache.cuh"
#include "launch.cuh"

namespace topk_attn::cuda::decode {

inline constexpr int kCollected = 384;  // candidates of a warp in shared memory, of all its rows

template <int D>
struct ScanConfig {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16;  // of a stage
  static constexpr int kStageBytes = kKeys * D * 2;
  static constexpr int kStages = 24 * 1024 / kStageBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kWarpBytes = kRingBytes + kCollected * static_cast<int>(sizeof(ScoredKey));
  static constexpr int kSharedBytes = kWarps * kWarpBytes;
  static constexpr int kBlocksPerSm = 2;
};

// Units of the sequences of a slab before each of them: `before[s]` for s in [0, sequences].
__device__ inline void count_units(const DecodeCall& c, const Slab& slab, const Scratch& scratch,
                                   int (&before)[kMaxSlabSequences + 1], int threads) {
  __shared__ int totals[32];
  int running = 0;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int base = 0; base < slab.sequences; base += threads) {
    const int s = base + static_cast<int>(threadIdx.x);
    int own = 0;
    if (s < slab.sequences) {
      const Span span = seen_by_slab(c, slab, state_of(c, scratch, slab.first_sequence + s));
      if (span.size() > 0) {
        own = static_cast<int>((span.end + kUnitKeys - 1) / kUnitKeys - span.begin / kUnitKeys) * c.kv_heads;
      }
    }
    int through = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, through, step);
      if (lane >= step) through += other;
    }
    __syncthreads();
    if (lane == 31) totals[warp] = through;
    __syncthreads();
    for (int w = 0; w < threads / 32; ++w) {
      if (w < warp) through += totals[w];
    }
    if (s < slab.sequences) before[s + 1] = running + through;
    for (int w = 0; w < threads / 32; ++w) running += totals[w];
  }
  if (threadIdx.x == 0) before[0] = 0;
  __syncthreads();
}

// A warp's place in its units.
struct Cursor {
  int unit;
  int sequence;  // of the slab; slab.sequences: past the end
  int kv_head;
  int key;   // first key of the stage
  int keys;  // valid keys of the sequence
  int part;  // stage of the unit

  // False: the unit is not wanted.
  __device__ bool locate(const DecodeCall& c, const Slab& slab, const Scratch& scratch,
                         const int (&before)[kMaxSlabSequences + 1], int& loaded, int& first_unit_key) {
    while (sequence < slab.sequences && unit >= before[sequence + 1]) ++sequence;
    if (sequence >= slab.sequences) return false;
    if (loaded != sequence) {
      const State state = state_of(c, scratch, slab.first_sequence + sequence);
      keys = state.keys;
      first_unit_key = static_cast<int>(seen_by_slab(c, slab, state).begin) / kUnitKeys * kUnitKeys;
      loaded = sequence;
    }
    const int rest = unit - before[sequence];
    kv_head = rest % c.kv_heads;
    key = first_unit_key + rest / c.kv_heads * kUnitKeys;
    part = 0;
    return !scratch.only_flagged || scratch.flags[sequence * c.kv_heads + kv_head] != 0;
  }
};

template <typename T, int D>
class Stream {
 public:
  using Config = ScanConfig<D>;
  __device__ Stream(const DecodeCall& c, const Slab& slab, const Scratch& scratch,
                    const int (&before)[kMaxSlabSequences + 1], int first, int stride)
      : c_(c), slab_(slab), scratch_(scratch), before_(before), stride_(stride) {
    at_ = Cursor{first, 0, 0, 0, 0, 0};
    find();
  }
  __device__ bool done() const { return at_.sequence >= slab_.sequences; }
  __device__ const Cursor& at() const { return at_; }
  __device__ void advance() {
    at_.key += Config::kKeys;
    if (++at_.part < kUnitKeys / Config::kKeys) return;
    at_.unit += stride_;
    find();
  }
  // Starts the copy of the stage's key rows; rows past the valid keys are zeros and not read.
  __device__ void load(uint32_t stage) const {
    constexpr int kChunks = D / 8;  // of 16 bytes a row
    constexpr int kRowsAtOnce = kChunks >= 32 ? 1 : 32 / kChunks;
    const int lane = threadIdx.x % 32;
    const int chunk = lane % kChunks;
    const int row0 = lane / kChunks;
    const bool channel_exists = chunk * 8 < c_.head_dim;
    const int sequence = slab_.first_sequence + at_.sequence;
    const T* const base = static_cast<const T*>(c_.k.data) + at_.kv_head * c_.k.head + chunk * 8;
    if (c_.block_table == nullptr) {
      const T* from = base + sequence * c_.k.batch + (at_.key + row0) * c_.k.token;
#pragma unroll
      for (int r = 0; r < Config::kKeys; r += kRowsAtOnce) {
        const bool valid = channel_exists && at_.key + r + row0 < at_.keys;
        copy16(place(stage, r + row0, chunk), valid ? from : base, valid);
        from += kRowsAtOnce * c_.k.token;
      }
      return;
    }
    // Each page is looked up once.
    const int mine = at_.key + lane % Config::kKeys;
    const int64_t own = mine < at_.keys ? row_offset(c_, c_.k, sequence, mine) : -1;
#pragma unroll
    for (int r = 0; r < Config::kKeys; r += kRowsAtOnce) {
      const int64_t offset = __shfl_sync(~0u, own, r + row0);
      const bool valid = channel_exists && offset >= 0;
      copy16(place(stage, r + row0, chunk), valid ? base + offset : base, valid);
    }
  }

 private:
  __device__ void find() {
    while (!at_.locate(c_, slab_, scratch_, before_, loaded_, first_unit_key_) && !done())
      at_.unit += stride_;
  }
  static __device__ uint32_t place(uint32_t stage, int row, int chunk) {
    return stage + row * (D * 2) + ((chunk ^ (row & 7)) << 4);
  }
  const DecodeCall& c_;
  const Slab& slab_;
  const Scratch& scratch_;
  const int (&before_)[kMaxSlabSequences + 1];
  const int stride_;
  Cursor at_;
  int loaded_ = -1;
  int first_unit_key_ = 0;
};

// Query rows g and g + 8 of the group as operands; rows and channels that do not exist are zeros.
template <typename T, int D>
__device__ inline void load_queries(uint32_t (&a)[D / 16][4], const DecodeCall& c, const Slab& slab,
                                    int slab_sequence, int kv_head, int rows) {
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = g + 8 * half;
    const bool exists = m < rows;
    const T* const row = query_row<T>(c, slab, slab_sequence, kv_head, exists ? m : 0) + 2 * t;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int channel = 16 * step + 8 * part;
        uint32_t pair = 0;
        if (exists && channel < c.head_dim) pair = *reinterpret_cast<const uint32_t*>(row + channel);
        a[step][half + 2 * part] = pair;
      }
    }
  }
}

// A warp's candidates of one KV head, on their way to memory.
class Collector {
 public:
  __device__ Collector(const DecodeCall& c, const Slab& slab, const Scratch& scratch, ScoredKey* room)
      : c_(c), slab_(slab), scratch_(scratch), room_(room), rows_(c.heads / c.kv_heads * slab.tokens) {
    slots_ = rows_ <= 4 ? kCollected / 4 : rows_ <= 8 ? kCollected / 8 : kCollected / 16;
  }

  // Starts with another KV head; the one before it has been flushed.
  __device__ void begin(int slab_sequence, int64_t first_slab_row) {
    first_slab_row_ = first_slab_row;
    const int g = threadIdx.x % 32 / 4;
    bounds_[0] = g < rows_ ? scratch_.bounds[first_slab_row + g] : 0.0f;
    bounds_[1] = g + 8 < rows_ ? scratch_.bounds[first_slab_row + g + 8] : 0.0f;
    const State state = state_of(c_, scratch_, slab_.first_sequence + slab_sequence);
    const int64_t sink = c_.sink < c_.capacity ? c_.sink : c_.capacity;
    const int64_t recent = c_.recent < c_.capacity ? c_.recent : c_.capacity;
    const Span span = seen_by_slab(c_, slab_, state);
    from_ = static_cast<int>(span.begin + sink);
    to_ = static_cast<int>(span.end - recent);
    // The first token's row ends first, and so its recent keys begin first.
    recent_from_ = static_cast<int>(seen_by(c_, state, slab_.first_token).end - recent);
  }

  // The scores of 16 keys as mma leaves them: rows g and g + 8, keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
  __device__ void add(const float (&s)[2][4], int key) {
    const int g = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    const bool inner = key >= from_ && key + 16 <= to_ && key + 16 <= recent_from_;
    uint32_t passed = 0;  // bit 16 half + i: key + i of row g + 8 half
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (g + 8 * half >= rows_) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!(s[n][2 * half + e] < bounds_[half])) passed |= 1u << (16 * half + 8 * n + 2 * t + e);
        }
      }
    }
    if (!inner) passed = at_an_end(s, key, passed);
    passed |= __shfl_xor_sync(~0u, passed, 1);
    passed |= __shfl_xor_sync(~0u, passed, 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t bits = passed >> (16 * half) & 0xffffu;
      if (bits == 0) continue;
      ScoredKey* const row = room_ + (g + 8 * half) * slots_ + counts_[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = 8 * n + 2 * t + e;
          if (bits >> i & 1) {
            row[__popc(bits & ((1u << i) - 1))] = ScoredKey{order_key(s[n][2 * half + e]), key + i};
          }
        }
      }
      counts_[half] += __popc(bits);
    }
    if (__any_sync(~0u, counts_[0] > slots_ - 16 || counts_[1] > slots_ - 16)) flush();
  }

  __device__ void flush() {
    const int lane = threadIdx.x % 32;
    const int g = lane / 4;
    const int t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= rows_) break;
      const int count = counts_[half];
      const int64_t row = first_slab_row_ + g + 8 * half;
      int base = 0;
      if (t == 0 && count > 0) base = atomicAdd(scratch_.counts + row, count);
      base = __shfl_sync(~0u, base, lane - t);
      ScoredKey* const to = scratch_.candidates + row * kMaxCandidates + base;
      const int fit = min(count, kMaxCandidates - base);
      const ScoredKey* const from = room_ + (g + 8 * half) * slots_;
      for (int i = t; i < fit; i += 4) to[i] = from[i];
      counts_[half] = 0;
    }
    __syncwarp();
  }

 private:
  // Keys that are always kept are no candidates, but their scores are wanted; keys outside the slab's are
  // neither.
  __device__ uint32_t at_an_end(const float (&s)[2][4], int key, uint32_t passed) const {
    const int g = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    uint32_t contested = 0;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = 8 * n + 2 * t + e;
        const int j = key + i;
        if (j >= from_ && j < to_) contested |= 0x10001u << i;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = first_slab_row_ + g + 8 * half;
          if (g + 8 * half < rows_ && (j < from_ || j >= recent_from_) && j < scratch_.ld) {
            scratch_.scores[row * scratch_.ld + j] = s[n][2 * half + e];
          }
        }
      }
    }
    return passed & contested;
  }

  const DecodeCall& c_;
  const Slab& slab_;
  const Scratch& scratch_;
  ScoredKey* const room_;
  const int rows_;
  int slots_;
  int64_t first_slab_row_ = 0;
  float bounds_[2] = {};
  int counts_[2] = {};  // of rows g and g + 8; the four lanes of a row agree
  int from_ = 0;        // keys that compete in some row
  int to_ = 0;
  int recent_from_ = 0;
};

// All scores of 16 keys.
template <typename Sums>
__device__ __forceinline__ void write_scores(const Sums& s, const Scratch& scratch, int64_t first_slab_row,
                                             int rows, int key) {
  const int g = threadIdx.x % 32 / 4;
  float* const out = scratch.scores + (first_slab_row + g) * scratch.ld + key + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (g + 8 * half >= rows) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      *reinterpret_cast<float2*>(out + 8 * half * scratch.ld + 8 * n) =
          make_float2(s[n][2 * half], s[n][2 * half + 1]);
    }
  }
}

template <typename T, int D, bool kBounded>
__global__ __launch_bounds__(ScanConfig<D>::kThreads, ScanConfig<D>::kBlocksPerSm) void scan_kernel(
    const __grid_constant__ DecodeCall c, const __grid_constant__ Slab slab,
    const __grid_constant__ Scratch scratch) {
  using Config = ScanConfig<D>;
  extern __shared__ __align__(1024) char ring[];
  __shared__ int before[kMaxSlabSequences + 1];
  let_next_start();
  // A bounded scan may read what was there before the sample began.
  if constexpr (!kBounded) wait_for_previous();
  if (scratch.only_flagged && *scratch.any_flag == 0) return;
  const int rows = c.heads / c.kv_heads * slab.tokens;
  const int lane = threadIdx.x % 32;
  const int64_t slab_rows = int64_t{slab.sequences} * c.heads * slab.tokens;
  for (int64_t i = int64_t{blockIdx.x} * Config::kThreads + threadIdx.x; !kBounded && i < slab_rows;
       i += int64_t{gridDim.x} * Config::kThreads) {
    scratch.arrived[i] = 0;
  }
  count_units(c, slab, scratch, before, Config::kThreads);

  const int warp = threadIdx.x / 32;
  const int first = static_cast<int>(blockIdx.x) * Config::kWarps + warp;
  const int stride = static_cast<int>(gridDim.x) * Config::kWarps;
  char* const own = ring + warp * Config::kWarpBytes;
  const uint32_t mine = shared_address(own);
  Stream<T, D> ahead(c, slab, scratch, before, first, stride);
  Stream<T, D> now(c, slab, scratch, before, first, stride);
#pragma unroll 1
  for (int i = 0; i < Config::kStages - 1; ++i) {
    if (!ahead.done()) {
      ahead.load(mine + i * Config::kStageBytes);
      ahead.advance();
    }
    copy_commit();
  }
  if constexpr (kBounded) wait_for_previous();
  Collector collector(c, slab, scratch, reinterpret_cast<ScoredKey*>(own + Config::kRingBytes));
  uint32_t a[D / 16][4];
  int held = -1;  // (sequence, KV head) of the operands
  int read = 0;
  int write = Config::kStages - 1;
#pragma unroll 1
  for (; !now.done(); now.advance()) {
    copy_wait<Config::kStages - 2>();
    __syncwarp();  // the stage has arrived for all lanes, and the one before it is no longer read
    if (!ahead.done()) {
      ahead.load(mine + write * Config::kStageBytes);
      ahead.advance();
    }
    copy_commit();
    const Cursor& at = now.at();
    const int wanted = at.sequence * c.kv_heads + at.kv_head;
    const int64_t first_slab_row = first_row(c, slab, at.sequence, at.kv_head);
    if (wanted != held) {
      load_queries<T, D>(a, c, slab, at.sequence, at.kv_head, rows);
      if constexpr (kBounded) {
        if (held >= 0) collector.flush();
        collector.begin(at.sequence, first_slab_row);
      }
      held = wanted;
    }
    // Registers 0, 1 serve keys 0-7, registers 2, 3 keys 8-15.
    const uint32_t stage = mine + read * Config::kStageBytes + (lane % 8 + lane / 16 * 8) * (D * 2) +
                           (((lane / 8 % 2) ^ (lane & 7)) << 4);
    float s[2][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t b[4];
      load_matrix_x4(b, stage ^ (32 * step));
      mma_16816<T>(s[0], a[step], b[0], b[1]);
      mma_16816<T>(s[1], a[step], b[2], b[3]);
    }
    if constexpr (kBounded) {
      collector.add(s, at.key);
    } else {
      write_scores(s, scratch, first_slab_row, rows, at.key);
    }
    read = read + 1 == Config::kStages ? 0 : read + 1;
    write = write + 1 == Config::kStages ? 0 : write + 1;
  }
  if constexpr (kBounded) collector.flush();
}

template <typename T, int D, bool kBounded>
cudaError_t launch_scan(const DecodeCall& call, const Slab& slab, const Scratch& scratch, int sms,
                        cudaStream_t stream) {
  using Config = ScanConfig<D>;
  const auto kernel = scan_kernel<T, D, kBounded>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t units = (int64_t{call.capacity} + kUnitKeys) / kUnitKeys * call.kv_heads * slab.sequences;
  const int64_t most = (units + Config::kWarps - 1) / Config::kWarps;
  const int64_t blocks = int64_t{sms} * Config::kBlocksPerSm;
  const LaunchShape shape{static_cast<unsigned>(blocks < most ? blocks : most), Config::kThreads,
                          Config::kSharedBytes};
  // With `state` this call's prepare() came before; without, it may be a kernel of anybody's.
  const bool chained = kBounded || scratch.only_flagged || scratch.state != nullptr;
  return launch(kernel, shape, chained, stream, call, slab, scratch);
}

template <typename T, int D>
cudaError_t run_scan(const DecodeCall& call, const Slab& slab, const Scratch& scratch, int sms,
                     cudaStream_t stream) {
  const bool bounded = scratch.bounds != nullptr && !scratch.only_flagged;
  return bounded ? launch_scan<T, D, true>(call, slab, scratch, sms, stream)
                 : launch_scan<T, D, false>(call, slab, scratch, sms, stream);
}

}  // namespace topk_attn::cuda::decode
