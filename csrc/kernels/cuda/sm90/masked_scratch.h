// The schedule and the workspace of the masked dense backward.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../params.h"

namespace topk_attn::cuda::sm90 {

// The order in which the key blocks of a chain (those of one KV head and sequence, numbered along the keys)
// begin, and in which their additions to a tile's dQ are due if that order is fixed: each tile has a turn
// counter, and a block waits until it shows its turn. A block waits only for blocks of earlier tickets, so it
// cannot wait forever.
//
// Additions should be due in the order in which they come if all thread blocks run in step; then nobody
// waits, and neighbours meet at a tile while its Q, dO and dQ are still in L2. Positions are cut into waves
// of as many blocks as run at a time. Under the causal mask, of blocks that begin together the later one is
// two steps ahead at every tile of the first head and more at the next, so even waves go from their last
// block down to their first. The later block is also done sooner, by two steps a head: odd waves go upwards,
// which makes their blocks end together, and the wave after them begin together again.
struct BlockOrder {
  int block;
  int before;  // blocks of earlier waves
  int last;    // last block of this wave
  bool downwards;

  // The turn at tiles whose last visible key lies in block `seen_last` (>= block): the number of earlier
  // blocks among the seen ones.
  TOPK_HD int turn(int seen_last) const {
    const int first_down = last < seen_last ? last : seen_last;
    return downwards ? before + first_down - block : block;
  }
};

// Position `position` of a chain of `blocks` blocks; block = blocks: there is none. wave = 0: ascending.
TOPK_HD BlockOrder block_order(int position, int blocks, int wave) {
  BlockOrder o;
  const int number = wave == 0 ? 0 : position / wave;
  o.before = number * wave;
  o.last = (wave == 0 || o.before + wave > blocks ? blocks : o.before + wave) - 1;
  o.downwards = wave != 0 && number % 2 == 0;
  o.block = position >= blocks ? blocks : o.downwards ? o.last - (position - o.before) : position;
  return o;
}

// The workspace of backward_masked().
struct BackwardScratch {
  float* dq_sum = nullptr;     // (head, tile) entries of kTileRows * head_dim
  int32_t* turns = nullptr;    // (head, tile): contributions made
  int32_t* ticket = nullptr;   // thread blocks begun
  int32_t* tile_of = nullptr;  // packed: tile of slot cu_q[document] / 64 + document + row / 64, -1: none
  int32_t slots = 0;
  int32_t section = 1;  // chains of key blocks worked off side by side
  int32_t wave = 0;     // key blocks of a wave of a chain; 0: the order of additions is free
  int64_t words = 0;
};

}  // namespace topk_attn::cuda::sm90
