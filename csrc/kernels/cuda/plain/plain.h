// Float32 attention without tensor cores: scores, forward and backward, correct everywhere, not tuned.
//
// head_dim and v_dim are any multiples of 8 up to 256; kv_group, sink, recent, packed and strided inputs are
// all supported. Inputs have 16-byte aligned rows (params.h). A score is one chain of fused multiply-adds in
// ascending channel order from zero, so that every kernel here sees the same bits.
//
// Every tile is done here: Regimes are ignored. Nothing is allocated and nothing waits for the device.
#pragma once

#include "../params.h"

namespace topk_attn::cuda::plain {

inline bool supports(const Call& c) {
  return c.dtype == DType::kFloat32 && c.head_dim % 8 == 0 && c.v_dim % 8 == 0 && c.head_dim <= kMaxHeadDim &&
         c.v_dim <= kMaxHeadDim;
}

// Scores of the units [first_unit, first_unit + units), numbered by unit_at() (common/select_scores.h), laid
// out as ScoreSlab says. Units past the end and tiles that see nothing are skipped.
cudaError_t scores(const Call& call, int64_t first_unit, int64_t units, float* slab, int64_t ld,
                   cudaStream_t stream);

// out and lse of every row that a tile holds; packed calls need init_rows() first.
cudaError_t forward(const ForwardCall& call, cudaStream_t stream);

// dq, dk and dv (float32; dk_sum and dv_sum are not used), every row of them, those of gaps between documents
// as zeros. Deterministic: one thread block owns a tile of dq, another one a tile of dk and dv and adds the
// heads of the group and their query tiles in ascending order. 7 products instead of 5. `key_tiles`: packed
// calls, as make_key_tiles() fills them; dense calls: null, 0.
cudaError_t backward(const BackwardCall& call, const int2* key_tiles, int32_t num_key_tiles,
                     cudaStream_t stream);

}  // namespace topk_attn::cuda::plain
