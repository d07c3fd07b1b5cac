// Selection from the scores that reached their row's bound.
//
// One block a row: the set bits of its mask give the candidates' columns, ascending; their scores are
// gathered, and a radix select over at most kMaxCandidates of them in shared memory finds the row's encoding.
// It is the row's own if it reaches the bound: then every key before it in the order does, so all of them are
// candidates. Where it does not, or the candidates are fewer than W or do not fit, the KV head is flagged: it
// is scanned again without a bound (select.cu). Cost: n / 8 bytes and 32 a candidate.
#include "../common/select_long.cuh"
#include "cache.cuh"

namespace topk_attn::cuda::decode {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

struct Row {
  int64_t slab_row;
  int64_t out_row;
  int head;  // KV head of the slab: index in flags
  int begin, end, kept;
};

__global__ __launch_bounds__(kThreads, 2) void pick_kernel(const __grid_constant__ DecodeCall c,
                                                           const __grid_constant__ Slab slab,
                                                           const __grid_constant__ Scratch scratch) {
  extern __shared__ __align__(16) uint8_t memory[];
  longrow::Workspace& ws = *reinterpret_cast<longrow::Workspace*>(memory);
  auto* const candidates = reinterpret_cast<longrow::Candidate*>(memory + sizeof(longrow::Workspace));
  __shared__ Row row;
  __shared__ int lowest;
  __shared__ int highest;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    const SelectedRow selected = selected_row(c, slab, blockIdx.x);
    const int sequence = slab.first_sequence + selected.slab_sequence;
    const int token = slab.first_token + selected.token;
    const RowPlan plan =
        plan_row(seen_by(c, state_of(c, scratch, sequence), token), c.budget, c.sink, c.recent);
    row.slab_row = blockIdx.x;
    row.out_row = sequence * c.rows.batch + selected.first_head * c.rows.head + token;
    row.head = selected.slab_sequence * c.kv_heads + selected.first_head / (c.heads / c.kv_heads);
    row.begin = static_cast<int>(plan.contested().begin);
    row.end = static_cast<int>(plan.contested().end);
    row.kept = static_cast<int>(plan.contested_kept());
    lowest = INT_MAX;
    highest = INT_MIN;
  }
  for (int i = threadIdx.x; i < 2 * longrow::kBins; i += kThreads) ws.bins[0][i] = 0;
  __syncthreads();
  if (row.kept == 0) {
    if (threadIdx.x == 0) {
      c.threshold[row.out_row] = __int_as_float(0x7fc00000);
      c.tie_index[row.out_row] = -1;
    }
    return;
  }

  // Each warp owns a run of mask words.
  const int first_word = row.begin / 32;
  const int last_word = (row.end + 31) / 32;
  const int run = (last_word - first_word + kWarps - 1) / kWarps;
  const int from = first_word + warp * run;
  const int to = min(from + run, last_word);
  const uint32_t* const masks = scratch.masks + row.slab_row * (scratch.ld / 32);
  const auto mask_at = [&](int word) {
    if (word >= to) return 0u;
    uint32_t bits = masks[word];
    if (word == first_word) bits &= ~0u << (row.begin % 32);
    if (word == last_word - 1 && row.end % 32 != 0) bits &= ~0u >> (32 - row.end % 32);
    return bits;
  };
  int own = 0;
#pragma unroll 4
  for (int word = from + lane; word < to; word += 32) own += __popc(mask_at(word));
  own = __reduce_add_sync(~0u, own);
  if (lane == 0) ws.totals[warp] = own;
  __syncthreads();
  int at = 0;
  int count = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    at += w < warp ? ws.totals[w] : 0;
    count += ws.totals[w];
  }
  const auto flag = [&] {
    if (threadIdx.x == 0) {
      scratch.flags[row.head] = 1;
      *scratch.any_flag = 1;
    }
  };
  if (count > kMaxCandidates || count < row.kept) return flag();
#pragma unroll 2
  for (int base = from; base < to; base += 32) {
    uint32_t bits = mask_at(base + lane);
    const int here = __popc(bits);
    const int through = longrow::warp_scan(here);
    int place = at + through - here;
    at += __shfl_sync(~0u, through, 31);
    while (bits != 0) {
      candidates[place++].column = (base + lane) * 32 + __ffs(static_cast<int>(bits)) - 1;
      bits &= bits - 1;
    }
  }
  __syncthreads();
  const float* const scores = scratch.scores + row.slab_row * scratch.ld;
  int low = INT_MAX;
  int high = INT_MIN;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int key = order_key(scores[candidates[i].column]);
    candidates[i].key = key;
    low = min(low, key);
    high = max(high, key);
  }
  low = __reduce_min_sync(~0u, low);
  high = __reduce_max_sync(~0u, high);
  if (lane == 0) {
    atomicMin(&lowest, low);
    atomicMax(&highest, high);
  }
  __syncthreads();
  longrow::Team team{&ws, 0, 1};
  const longrow::Search search{lowest, highest, row.kept, count, highest};
  const longrow::Result result = longrow::settle_candidates<kThreads>(
      search, team, candidates, count, [](const longrow::Candidate& x) { return x.key; });
  const float threshold = order_score(result.threshold);
  if (threshold < scratch.bounds[row.slab_row]) return flag();
  if (threadIdx.x == 0) {
    c.threshold[row.out_row] = threshold;
    c.tie_index[row.out_row] = result.tie_index;
  }

  // The kept ones, in the order of their columns.
  const int share = (count + kWarps - 1) / kWarps;
  const int begin = warp * share;
  const int end = min(begin + share, count);
  const auto keeps = [&](int i) {
    if (i >= end) return false;
    const longrow::Candidate x = candidates[i];
    return x.key > result.threshold || (x.key == result.threshold && x.column <= result.tie_index);
  };
  int kept = 0;
  for (int base = begin; base < end; base += 32) kept += __popc(__ballot_sync(~0u, keeps(base + lane)));
  __syncthreads();
  if (lane == 0) ws.totals[warp] = kept;
  __syncthreads();
  int place = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) place += w < warp ? ws.totals[w] : 0;
  int32_t* const list = scratch.lists + row.slab_row * c.kept_width;
  for (int base = begin; base < end; base += 32) {
    const bool mine = keeps(base + lane);
    const uint32_t ballot = __ballot_sync(~0u, mine);
    if (mine) list[place + __popc(ballot & ((1u << lane) - 1))] = candidates[base + lane].column;
    place += __popc(ballot);
  }
}

}  // namespace

cudaError_t pick(const DecodeCall& c, const Slab& slab, const Scratch& scratch, cudaStream_t stream) {
  constexpr int kBytes = sizeof(longrow::Workspace) + kMaxCandidates * sizeof(longrow::Candidate);
  const cudaError_t error =
      cudaFuncSetAttribute(pick_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  pick_kernel<<<static_cast<unsigned>(selected_rows(c, slab)), kThreads, kBytes, stream>>>(c, slab, scratch);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::decode
