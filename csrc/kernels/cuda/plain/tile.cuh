// Products of 64 x 64 float32 tiles by 256 threads, 4 x 4 results each, through shared memory.
//
// Thread (y, x) of 16 x 16 owns rows 4 y .. 4 y + 3 and columns 4 x .. 4 x + 3 of a result. Two kinds of
// product: dot_rows(): scores and dP, both operands are rows of channels; multiply_rows(): P V, dS K, dS^T Q,
// P^T dO, one operand is a score tile in shared memory.
#pragma once

#include "../common/sequence.cuh"

namespace topk_attn::cuda::plain {

inline constexpr int kTile = 64;
inline constexpr int kThreads = 256;
inline constexpr int kChunk = 32;      // channels staged at a time
inline constexpr int kPitch = 64 + 4;  // floats; rows stay 16-byte aligned

static_assert(kTile == kTileRows);

// Up to 64 rows of channels in global memory.
struct Rows {
  const float* data;
  int64_t stride;
  int count;  // rows that exist; the others read as zeros
};

__device__ inline Rows rows_at(const View& v, int64_t batch, int64_t token, int64_t head, int count) {
  return Rows{row_pointer<const float>(v, batch, token, head), v.token, min(count, kTile)};
}

struct Stage {
  float a[kChunk][kPitch];  // [channel][row]
  float b[kChunk][kPitch];
};

// What a kernel needs of shared memory. `stage` and `channels` are never alive together.
struct Shared {
  union {
    Stage stage;
    float channels[kTile][kPitch];  // [row][channel]
  };
  float weights[kTile][kPitch];  // [row that is summed over][row of the result]
};

// Rows of queries, keys and values are 16-byte aligned; those of dout need not be.
__device__ __forceinline__ float4 load_four(const float* p) {
  if ((reinterpret_cast<uintptr_t>(p) & 15) == 0) return *reinterpret_cast<const float4*>(p);
  return make_float4(p[0], p[1], p[2], p[3]);
}

// Channels [c0, c0 + 32) of the rows, channel by channel.
__device__ inline void stage_chunk(float (&to)[kChunk][kPitch], const Rows& rows, int c0, int channels) {
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kChunk / 4; i += kThreads) {
    const int row = i / (kChunk / 4);
    const int c = i % (kChunk / 4) * 4;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row < rows.count && c0 + c < channels) v = load_four(rows.data + row * rows.stride + c0 + c);
    to[c][row] = v.x;
    to[c + 1][row] = v.y;
    to[c + 2][row] = v.z;
    to[c + 3][row] = v.w;
  }
}

// result[i][j] = sum over channels of a[4 y + i] * b[4 x + j]: one chain of fused multiply-adds from zero in
// ascending channel order. Ends with the stage still being read.
__device__ inline void dot_rows(float (&result)[4][4], const Rows& a, const Rows& b, int channels,
                                Stage& stage) {
  const int x = threadIdx.x % 16;
  const int y = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) result[i][j] = 0.0f;
  }
#pragma unroll 1
  for (int c0 = 0; c0 < channels; c0 += kChunk) {
    __syncthreads();
    stage_chunk(stage.a, a, c0, channels);
    stage_chunk(stage.b, b, c0, channels);
    __syncthreads();
    const int chunk = min(kChunk, channels - c0);
#pragma unroll 8
    for (int c = 0; c < chunk; ++c) {
      const float4 u = *reinterpret_cast<const float4*>(&stage.a[c][4 * y]);
      const float4 v = *reinterpret_cast<const float4*>(&stage.b[c][4 * x]);
      const float us[4] = {u.x, u.y, u.z, u.w};
      const float vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) result[i][j] = __fmaf_rn(us[i], vs[j], result[i][j]);
      }
    }
  }
}

// sum[block][i][j] += sum over rows r of weights[r][4 y + i] * rows[r][64 block + 4 x + j]. Zero weights add
// nothing, not even NaN times zero: what one row holds never reaches another row's result. Ends with the
// weights still being read.
template <int kBlocks>
__device__ inline void multiply_rows(float (&sum)[kBlocks][4][4], const Rows& rows, int channels,
                                     Shared& shared) {
  const int x = threadIdx.x % 16;
  const int y = threadIdx.x / 16;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    if (64 * block >= channels) break;
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kTile * 16; i += kThreads) {
      const int row = i / 16;
      const int c = i % 16 * 4;
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < rows.count && 64 * block + c < channels) {
        v = load_four(rows.data + row * rows.stride + 64 * block + c);
      }
      *reinterpret_cast<float4*>(&shared.channels[row][c]) = v;
    }
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < kTile; ++r) {
      const float4 w = *reinterpret_cast<const float4*>(&shared.weights[r][4 * y]);
      const float4 v = *reinterpret_cast<const float4*>(&shared.channels[r][4 * x]);
      const float ws[4] = {w.x, w.y, w.z, w.w};
      const float vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (ws[i] == 0.0f) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[block][i][j] = __fmaf_rn(ws[i], vs[j], sum[block][i][j]);
      }
    }
  }
}

template <int kBlocks>
__device__ inline void clear(float (&sum)[kBlocks][4][4]) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[block][i][j] = 0.0f;
    }
  }
}

// Row i of the thread's results times `scale`, to `row`.
template <int kBlocks>
__device__ inline void store_row(float* row, const float (&sum)[kBlocks][4][4], int i, int channels,
                                 float scale) {
  const int x = threadIdx.x % 16;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const int c = 64 * block + 4 * x;
    if (c >= channels) continue;
    const float* const s = sum[block][i];
    *reinterpret_cast<float4*>(row + c) = make_float4(s[0] * scale, s[1] * scale, s[2] * scale, s[3] * scale);
  }
}

// NaN if either is NaN.
__device__ __forceinline__ float larger(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// The scores that decide what is kept, from those of `head` itself: the same, or with kv_group the largest
// over the heads of the group, whose scores are computed again. Results are (query, key), or (key, query) if
// kKeysFirst.
template <bool kKeysFirst = false>
__device__ inline void best_of_group(float (&best)[4][4], const float (&own)[4][4], const Call& c,
                                     const Tile& t, int head, const Rows& keys, Stage& stage) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) best[i][j] = own[i][j];
  }
  if (!c.kv_group) return;
  const int group = c.heads / c.kv_heads;
#pragma unroll 1
  for (int other = head / group * group; other < (head / group + 1) * group; ++other) {
    if (other == head) continue;
    const Rows q = rows_at(c.q, t.batch, t.q_begin + t.row0, other, t.rows);
    float s[4][4];
    if constexpr (kKeysFirst) {
      dot_rows(s, keys, q, c.head_dim, stage);
    } else {
      dot_rows(s, q, keys, c.head_dim, stage);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) best[i][j] = larger(best[i][j], s[i][j]);
    }
  }
}

// Filters of a tile's rows, by the first 64 threads; rows that do not exist keep nothing.
__device__ inline void load_filters(RowFilter (&filters)[kTile], const Call& c, const Tile& t, int head,
                                    const float* threshold, const int32_t* tie_index) {
  const int r = threadIdx.x;
  if (r >= kTile) return;
  if (r < t.rows) {
    const int64_t row = row_index(c, t, head, t.row0 + r);
    filters[r] = row_filter(c, t, t.row0 + r, threshold[row], tie_index[row]);
  } else {
    filters[r] = RowFilter{0.0f, -1, 0, 0, 0};
  }
}

// Whether any row of the tile keeps a key of [k0, k0 + 64), k0 a multiple of 64.
__device__ inline bool any_kept(const uint32_t* bitmap, int64_t entry, int64_t words, int k0) {
  if (bitmap == nullptr) return true;
  const uint32_t* const word = bitmap + entry * words + k0 / 32;
  return (word[0] | word[1]) != 0;
}

}  // namespace topk_attn::cuda::plain
