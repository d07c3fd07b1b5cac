// Checks lengths, paddings and pages of every sequence, and writes the new rows into the cache.
//
// A block looks at all pages of its sequence before it writes anything, so a sequence is written wholly or
// not at all, and never outside its pages. Cost: one read of the page table a block, and the new rows.
#include <algorithm>

#include "cache.cuh"
#include "launch.cuh"

namespace topk_attn::cuda::decode {
namespace {

constexpr int kThreads = 256;

// Copies in pieces of `Piece` rows t of (tokens, kv_heads, channels) into the cache.
template <typename Piece>
__device__ void append_rows(const DecodeCall& c, const View& from, const View& to, int sequence, int block,
                            int blocks, int channels, int element_size) {
  const int pieces = channels * element_size / static_cast<int>(sizeof(Piece));  // of a head's row
  const int64_t per_token = int64_t{c.kv_heads} * pieces;
  const int64_t total = c.appended * per_token;
  const int before = c.cache_seqlens[sequence];
  for (int64_t i = int64_t{block} * kThreads + threadIdx.x; i < total; i += int64_t{blocks} * kThreads) {
    const int token = static_cast<int>(i / per_token);
    const int rest = static_cast<int>(i % per_token);
    const int head = rest / pieces;
    const int64_t source = sequence * from.batch + token * from.token + head * from.head;
    const int64_t target = row_offset(c, to, sequence, before + token) + head * to.head;
    const auto* const in =
        reinterpret_cast<const Piece*>(static_cast<const char*>(from.data) + source * element_size);
    auto* const out = reinterpret_cast<Piece*>(static_cast<char*>(to.data) + target * element_size);
    out[rest % pieces] = in[rest % pieces];
  }
}

__global__ __launch_bounds__(kThreads) void prepare_kernel(const DecodeCall c, State* const states,
                                                           const int blocks, const bool vectors) {
  let_next_start();
  const int sequence = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  State state = unchecked_state(c, sequence);
  if (c.block_table != nullptr) {
    const int pages = (state.keys + c.page_size - 1) / c.page_size;
    const int32_t* const table = c.block_table + int64_t{sequence} * c.max_pages;
    bool bad = false;
    for (int i = threadIdx.x; i < pages; i += kThreads) bad |= table[i] < 0 || table[i] >= c.pages;
    if (__syncthreads_or(bad)) state = State{0, 0};
  }
  if (block == 0 && threadIdx.x == 0) states[sequence] = state;
  if (state.keys == 0 || c.appended == 0) return;
  const int size = c.dtype == DType::kFloat32 ? 4 : 2;
  if (vectors) {
    append_rows<uint4>(c, c.new_k, c.k, sequence, block, blocks, c.head_dim, size);
    append_rows<uint4>(c, c.new_v, c.v, sequence, block, blocks, c.v_dim, size);
  } else {
    append_rows<uint16_t>(c, c.new_k, c.k, sequence, block, blocks, c.head_dim, size);
    append_rows<uint16_t>(c, c.new_v, c.v, sequence, block, blocks, c.v_dim, size);
  }
}

bool in_vectors(const View& v, int64_t unit) {
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.batch % unit == 0 && v.token % unit == 0 &&
         v.head % unit == 0;
}

}  // namespace

cudaError_t prepare(const DecodeCall& c, const Scratch& scratch, cudaStream_t stream) {
  if (c.batch == 0 || scratch.state == nullptr) return cudaSuccess;
  const int64_t unit = c.dtype == DType::kFloat32 ? 4 : 8;
  const bool vectors = c.appended == 0 || (in_vectors(c.new_k, unit) && in_vectors(c.new_v, unit) &&
                                           in_vectors(c.k, unit) && in_vectors(c.v, unit));
  const int64_t pieces = int64_t{c.appended} * c.kv_heads * ((c.head_dim + c.v_dim) / unit);
  const int64_t most = std::max<int64_t>(1, 0x7fffffff / c.batch);
  const int blocks = static_cast<int>(std::min(std::clamp<int64_t>(pieces / (4 * kThreads), 1, 64), most));
  prepare_kernel<<<static_cast<unsigned>(int64_t{c.batch} * blocks), kThreads, 0, stream>>>(c, scratch.state,
                                                                                            blocks, vectors);
  return cudaGetLastError();
}

}  // namespace topk_attn::cuda::decode
