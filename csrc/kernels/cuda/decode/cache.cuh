// Where keys and values of a sequence lie, and what its query rows see. Device side.
#pragma once

#include "params.h"

namespace topk_attn::cuda::decode {

// Length and padding of a sequence; pages are looked at by prepare().
__device__ inline State unchecked_state(const DecodeCall& c, int sequence) {
  const int64_t before = c.cache_seqlens[sequence];
  const int64_t keys = before + c.appended;
  const int64_t pad = c.cache_leftpad != nullptr ? c.cache_leftpad[sequence] : 0;
  const bool good = before >= 0 && keys <= c.capacity && pad >= 0 && pad <= keys;
  return good ? State{static_cast<int32_t>(keys), static_cast<int32_t>(pad)} : State{0, 0};
}

__device__ inline State state_of(const DecodeCall& c, const Scratch& scratch, int sequence) {
  return scratch.state != nullptr ? scratch.state[sequence] : unchecked_state(c, sequence);
}

__device__ inline Span seen_by(const DecodeCall& c, const State& state, int token) {
  return visible(token, c.tq, state.keys, c.causal, state.leftpad);
}

// Keys that any row of the slab sees: rows see prefixes, the last one the longest.
__device__ inline Span seen_by_slab(const DecodeCall& c, const Slab& slab, const State& state) {
  return seen_by(c, state, slab.first_token + slab.tokens - 1);
}

// Row m of a KV head's slab rows is head m / tokens of the group, token m % tokens of the slab.
__device__ inline int64_t first_row(const DecodeCall& c, const Slab& slab, int slab_sequence, int kv_head) {
  const int64_t group_rows = int64_t{c.heads / c.kv_heads} * slab.tokens;
  return (int64_t{slab_sequence} * c.kv_heads + kv_head) * group_rows;
}

template <typename T>
__device__ inline const T* query_row(const DecodeCall& c, const Slab& slab, int slab_sequence, int kv_head,
                                     int m) {
  const int head = kv_head * (c.heads / c.kv_heads) + m / slab.tokens;
  const int token = slab.first_token + m % slab.tokens;
  return static_cast<const T*>(c.q.data) + (slab.first_sequence + slab_sequence) * c.q.batch +
         token * c.q.token + head * c.q.head;
}

// Element offset in `view` of position j of a sequence, head 0. The position is valid, and so is its page.
__device__ inline int64_t row_offset(const DecodeCall& c, const View& view, int sequence, int j) {
  if (c.block_table == nullptr) return sequence * view.batch + j * view.token;
  const int page = c.block_table[int64_t{sequence} * c.max_pages + j / c.page_size];
  return page * view.batch + (j % c.page_size) * view.token;
}

__device__ inline int32_t slot_of(const DecodeCall& c, int sequence, int j) {
  if (c.block_table == nullptr) return static_cast<int32_t>(sequence * c.slots_per_entry + j);
  const int page = c.block_table[int64_t{sequence} * c.max_pages + j / c.page_size];
  return page * c.page_size + j % c.page_size;
}

// A row that is selected: a slab row, or with kv_group the rows of a group and token together.
struct SelectedRow {
  int32_t slab_sequence;
  int32_t first_head;
  int32_t heads;
  int32_t token;  // of the slab
};

__device__ inline SelectedRow selected_row(const DecodeCall& c, const Slab& slab, int64_t index) {
  const int heads = c.kv_group ? c.heads / c.kv_heads : 1;
  const int sets = c.heads / heads;
  const int64_t rest = index / slab.tokens;
  return SelectedRow{static_cast<int32_t>(rest / sets), static_cast<int32_t>(rest % sets) * heads, heads,
                     static_cast<int32_t>(index % slab.tokens)};
}

__host__ __device__ inline int64_t selected_rows(const DecodeCall& c, const Slab& slab) {
  return int64_t{slab.sequences} * (c.kv_group ? c.kv_heads : c.heads) * slab.tokens;
}

}  // namespace topk_attn::cuda::decode
