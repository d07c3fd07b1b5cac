// Torch-free interface of the kernels: plain structs of pointers, strides (in elements) and sizes.
//
// Nothing here checks its input; the operators (csrc/ops) do. Scores are raw dot products accumulated in `A`
// (float; double for float64 tensors), one chain of fused multiply-adds in ascending channel order, so that
// neither blocking nor threading nor the number of rows in a call changes a bit (contract section 4).
#pragma once

#include <cstdint>

#include "topk_attn/contract.h"

namespace topk_attn {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Element (b, t, h, c) lies at data + b * batch + t * token + h * head + c; channels are contiguous.
struct View {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t token = 0;
  int64_t head = 0;
};

// One sequence: rows q_begin .. q_begin + tq of batch entry `batch`, and its keys likewise. Dense batches
// have begin = 0; packed documents have batch = 0.
struct Sequence {
  int64_t batch = 0;
  int64_t q_begin = 0;
  int64_t k_begin = 0;
  int64_t tq = 0;
  int64_t tk = 0;
  int64_t leftpad = 0;
};

// Runs body(context, task, worker) for every task in [0, tasks), each once, on up to `workers` threads; a
// worker number in [0, workers) is never used by two threads at once.
struct Executor {
  int64_t workers = 1;
  void (*run)(const Executor& self, int64_t tasks, void (*body)(void* context, int64_t task, int64_t worker),
              void* context) = nullptr;
};

// Per-row values (lse, threshold, tie_index) are contiguous: row (b, h, t) lies at b * batch + h * head + t.
struct RowLayout {
  int64_t batch = 0;
  int64_t head = 0;
  int64_t at(int64_t b, int64_t h, int64_t t) const { return b * batch + h * head + t; }
};

// What every attention kernel shares.
struct Problem {
  DType dtype = DType::kFloat32;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;  // of q and k; a multiple of 8
  int64_t v_dim = 0;     // of v and out; a multiple of 8
  const Sequence* sequences = nullptr;
  int64_t num_sequences = 0;
  bool causal = true;
  Budget budget;
  bool kv_group = false;
  int64_t sink = 0;
  int64_t recent = 0;
  double softmax_scale = 1.0;
  RowLayout rows;
};

// Selection, and attention over the selected keys.
struct ForwardParams {
  Problem problem;
  bool attend = true;  // false: selection only; v, out and lse are unused
  View q, k, v, out;
  void* lse = nullptr;        // A
  void* threshold = nullptr;  // A
  int32_t* tie_index = nullptr;
  int32_t* kept_index = nullptr;  // (rows, kept_width): ascending key positions; nullptr: not wanted
  void* kept_prob = nullptr;      // A (rows, kept_width): their probabilities; nullptr: not wanted
  int64_t kept_width = 0;
  bool pad_index = false;  // fill the rest of a row of kept_index with -1
};

struct BackwardParams {
  Problem problem;
  View q, k, v, dout, dq;      // dq in the input's dtype, every row is written
  View dk, dv;                 // A, zeroed by the caller, accumulated in ascending row order
  const void* dlse = nullptr;  // A, row layout, or nullptr
  const void* lse = nullptr;
  const void* threshold = nullptr;
  const int32_t* tie_index = nullptr;
  const int32_t* kept_index =
      nullptr;  // as the forward left them; kept_width 0: recomputed from the encoding
  const void* kept_prob = nullptr;
  int64_t kept_width = 0;
};

// Keys and values that live in a cache. Contiguous: entry b holds its own rows. Paged: position j of sequence
// b lies in page block_table[b * max_pages + j / page_size] at row j % page_size; View::batch is then the
// stride of a page.
struct CacheParams {
  Problem problem;  // sequences: batch = b, q_begin = k_begin = 0, tk = valid keys, leftpad
  View q, k, v, out;
  const int32_t* block_table = nullptr;
  int64_t max_pages = 0;
  int64_t page_size = 0;
  int64_t slots_per_entry = 0;  // contiguous: S, so that slot = b * S + position
  void* lse = nullptr;
  void* threshold = nullptr;
  int32_t* tie_index = nullptr;
  int32_t* indices = nullptr;  // (rows, kept_width), -1 padded, or nullptr
  int32_t* slots = nullptr;    // likewise
  int64_t kept_width = 0;
};

// New rows, copied into the cache before it is read: row t of `src` goes to position start[b] + t.
struct AppendParams {
  View src;  // (B, tnew, Hkv, row)
  View cache;
  const int64_t* start = nullptr;  // (B)
  const int32_t* block_table = nullptr;
  int64_t max_pages = 0;
  int64_t page_size = 0;
  int64_t batch = 0, tokens = 0, kv_heads = 0;
  int64_t row_dim = 0;       // channels
  int64_t element_size = 0;  // bytes of one channel
};

struct SelectScoresParams {
  DType dtype = DType::kFloat32;  // float32, bfloat16 or float16
  const void* scores = nullptr;   // (rows, n)
  int64_t row_stride = 0;
  int64_t rows = 0, n = 0, topk = 0;
  const int32_t* lengths = nullptr;  // (rows) or nullptr
  float* threshold = nullptr;
  int32_t* tie_index = nullptr;
  int32_t* indices = nullptr;  // (rows, topk), -1 padded
};

namespace cpu {
void forward(const ForwardParams& p, const Executor& executor);
// False when kept_index, or the encoding, is not a selection of q and k: the gradients are then unfinished.
bool backward(const BackwardParams& p, const Executor& executor);
void forward_kvcache(const CacheParams& p, const Executor& executor);
void select_scores(const SelectScoresParams& p, const Executor& executor);
void append(const AppendParams& p);
}  // namespace cpu

// Instruction set the CPU kernels use on this machine: "avx512", "avx2" or "generic".
const char* cpu_isa();

}  // namespace topk_attn
