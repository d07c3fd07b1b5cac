// Torch-free interface of the decode kernels: attention of a few new query rows over keys and values in a
// cache.
//
// Lengths, paddings and page numbers are in device memory and never read back: launches are sized by what the
// cache has room for, kernels stop at what is there. A sequence whose length, padding or pages are out of
// range counts as empty (contract section 9).
//
// Work goes in slabs, (sequences x query tokens), whose scores fit a scratch of bounded size. Rows of a slab
// are numbered (sequence, head, token); the rows of one KV head lie side by side.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

#include "../../params.h"

namespace topk_attn::cuda::decode {

// A call of fwd_kvcache. Passed to kernels by value; all pointers are device pointers.
struct DecodeCall {
  DType dtype = DType::kBFloat16;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;  // of q and k; a multiple of 8, at most 256
  int32_t v_dim = 0;     // of v and out; likewise
  int32_t batch = 0;
  int32_t tq = 0;
  bool causal = true;
  bool kv_group = false;
  Budget budget;
  int64_t sink = 0;
  int64_t recent = 0;
  float softmax_scale = 1.0f;
  View q, out;
  RowLayout rows;  // of lse, threshold, tie_index, indices, slots: (B, H, Tq)
  float* lse = nullptr;
  float* threshold = nullptr;
  int32_t* tie_index = nullptr;
  int32_t* indices = nullptr;  // (rows, kept_width) ascending, -1 padded; null: not wanted
  int32_t* slots = nullptr;    // likewise, with indices
  int64_t kept_width = 0;      // budget(capacity)

  // Contiguous (block_table null): View::batch is the stride of an entry. Paged: that of a page. Rows of q, k
  // and v are 16-byte aligned.
  View k, v;
  const int32_t* block_table = nullptr;  // (batch, max_pages)
  int32_t max_pages = 0;
  int32_t page_size = 1;
  int32_t pages = 0;                       // page numbers are in [0, pages)
  int64_t slots_per_entry = 0;             // contiguous: slot = sequence * slots_per_entry + position
  int32_t capacity = 0;                    // positions that a sequence has room for
  const int32_t* cache_seqlens = nullptr;  // (batch), keys before the new rows
  const int32_t* cache_leftpad = nullptr;  // (batch), or null

  int32_t appended = 0;  // new rows of a sequence
  View new_k, new_v;     // any alignment
};

// A sequence as the kernels see it: valid keys, the new ones included, and its padding. A bad one is {0, 0}.
struct State {
  int32_t keys;
  int32_t leftpad;
};

struct Slab {
  int32_t first_sequence = 0;
  int32_t sequences = 0;
  int32_t first_token = 0;
  int32_t tokens = 0;
};

inline constexpr int kMaxSlabSequences = 256;
inline constexpr int kScanRows = 16;  // query rows of a KV head that scan.cuh takes
// And short.cuh, of which keys, with how many blocks, up to which head dims.
inline constexpr int kShortRows = 8;
inline constexpr int kShortKeys = 8192;
inline constexpr int kShortTeam = 8;  // or twice as many, where the device allows it
inline constexpr int kShortDim = 128;
inline constexpr int kMaxCandidates = 8192;  // of a row that pick() takes
struct ScoredKey {
  int32_t key;  // order_key (contract.h) of the score
  int32_t column;
};
inline constexpr int kUnitKeys = 32;  // keys of a work unit of the scan; score rows are a multiple of it

// Pieces of one workspace.
struct Scratch {
  State* state = nullptr;         // (batch); null: read from cache_seqlens
  float* scores = nullptr;        // (slab rows, ld)
  float* group_scores = nullptr;  // kv_group: (selected rows, ld), the largest of each group
  int64_t ld = 0;                 // at least capacity, a multiple of kUnitKeys
  int32_t* lists = nullptr;       // (selected rows, kept_width): kept columns that compete, ascending
  // Null where the scan writes all scores; see sample.cuh.
  float* bounds = nullptr;          // (slab rows)
  ScoredKey* candidates = nullptr;  // (slab rows, kMaxCandidates), in no order
  int32_t* counts = nullptr;        // (slab rows): candidates, also those that did not fit
  float* kept_scores = nullptr;     // like lists
  int32_t* flags = nullptr;         // (slab sequences, kv_heads): whether the bound did not serve
  int32_t* any_flag = nullptr;
  bool only_flagged = false;   // the second scan and selection, of what is flagged
  bool picked = false;         // attend: scores of listed keys are in kept_scores, but for flagged KV heads
  float* partial = nullptr;    // (slab rows, splits, v_dim + 2)
  int32_t* arrived = nullptr;  // (slab rows), zeroed by the first step of a slab
  int32_t splits = 1;
};

// ---------------------------------------------------------------------------------------------------------------
// The steps, in stream order. None allocates or waits.
// ---------------------------------------------------------------------------------------------------------------

// Checks every sequence and writes the new rows of those that are good. Nothing to do where scratch.state is
// null (contiguous, no new rows). k and v may have any alignment here.
cudaError_t prepare(const DecodeCall& call, const Scratch& scratch, cudaStream_t stream);

// Scores of the slab's rows, bits as contract section 4 says. `sms`: multiprocessors of the device.
cudaError_t scan(const DecodeCall& call, const Slab& slab, const Scratch& scratch, int sms,
                 cudaStream_t stream);

// With scratch.bounds: the bounds of the slab's rows, before the scan, and after it encodings and lists from
// the scores that reach them.
cudaError_t sample(const DecodeCall& call, const Slab& slab, const Scratch& scratch, cudaStream_t stream);
cudaError_t pick(const DecodeCall& call, const Slab& slab, const Scratch& scratch, cudaStream_t stream);

// Encodings of the slab's rows, and the lists.
cudaError_t select(const DecodeCall& call, const Slab& slab, const Scratch& scratch, cudaStream_t stream);

// out, lse, indices and slots of the slab's rows.
cudaError_t attend(const DecodeCall& call, const Slab& slab, const Scratch& scratch, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------------------------
// All of it
// ---------------------------------------------------------------------------------------------------------------

// Whether this build has what the call needs.
bool supports(const DecodeCall& call);

// Bytes of the workspace, 256 MiB and little more wherever the scores and the kept keys of one token fit;
// where they do not, theirs. It is 256-byte aligned.
size_t workspace_bytes(const DecodeCall& call, int sms);
Scratch scratch_of(const DecodeCall& call, void* workspace, int sms);

// The size of a call's slabs; the last ones may be smaller.
Slab largest_slab(const DecodeCall& call);

// Everything after prepare(), which comes first in the stream. The exact scan, or, with `by_codes`, the
// certified one (certified.h, where no_certified() has nothing against it).
struct CertifiedRun;
cudaError_t run(const DecodeCall& call, const Scratch& scratch, int sms, cudaStream_t stream,
                const CertifiedRun* by_codes = nullptr);

}  // namespace topk_attn::cuda::decode
