// Sequence parallelism as Ulysses does it (Jacobs et al., 2023): each rank holds an equal part of a
// micro-batch's tokens, and all of the work but attention is token by token. Around attention an exchange
// between the ranks turns "my tokens, all heads" into "all tokens, my heads" and back: every head sees its
// whole documents, so that dense and top-k attention are exactly those of one rank. A rank sends 1/N of its
// queries, keys and values to each of the N ranks, and as much of the output; the backward makes the same two
// exchanges the other way round.
#pragma once

#include "dist/ranks.h"
#include "model/attention.h"
#include "model/model.h"

namespace topk_sft {

// This rank's part of a micro-batch: its tokens, and the bounds of the documents of the whole micro-batch,
// which becomes a multiple of the number of ranks by a last document of tokens that carry no loss.
PackedBatch sequence_part(const PackedBatch& batch, const RankLayout& layout);

// `inner`, attention over all tokens for some heads, as attention over this rank's tokens for all heads. The
// number of KV heads must be a multiple of the number of ranks. `ranks` must outlive the result.
std::shared_ptr<const PackedAttention> sequence_attention(Ranks& ranks,
                                                          std::shared_ptr<const PackedAttention> inner);

}  // namespace topk_sft
