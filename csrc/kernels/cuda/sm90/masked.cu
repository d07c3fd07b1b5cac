// Host side of the masked dense kernels: what they support, and which instantiation runs.
#include "masked.h"

#include <algorithm>
#include <type_traits>

#include "../common/sequence.cuh"
#include "hopper.cuh"
#include "masked_scratch.h"

namespace topk_attn::cuda::sm90 {

template <typename T, int D>
cudaError_t launch_masked_forward(const ForwardCall& f, cudaStream_t stream);
template <typename T, int D>
cudaError_t launch_masked_backward(const BackwardCall& b, const BackwardScratch& w, cudaStream_t stream);

bool supports_masked(const Call& c) {
  const bool half = c.dtype == DType::kBFloat16 || c.dtype == DType::kFloat16;
  const bool dims = c.head_dim == c.v_dim && (c.head_dim == 64 || c.head_dim == 128);
  const int64_t batch = c.cu_q == nullptr ? c.batch : 1;
  return half && dims && !c.kv_group && mappable(c.q, c.tq, c.heads, batch) &&
         mappable(c.k, c.tk, c.kv_heads, batch) && mappable(c.v, c.tk, c.kv_heads, batch);
}

namespace {

// Calls run(T{}, integral_constant<int, D>) for the call's type and head dim.
template <typename Run>
cudaError_t dispatch(const Call& c, Run run) {
  if (!supports_masked(c)) return cudaErrorNotSupported;
  using D64 = std::integral_constant<int, 64>;
  using D128 = std::integral_constant<int, 128>;
  if (c.dtype == DType::kBFloat16) {
    return c.head_dim == 64 ? run(__nv_bfloat16{}, D64{}) : run(__nv_bfloat16{}, D128{});
  }
  return c.head_dim == 64 ? run(__half{}, D64{}) : run(__half{}, D128{});
}

// Workspace: dQ sums, turns, ticket (zeroed), then the slots (set to -1).
size_t dq_floats(const Call& c) {
  return static_cast<size_t>(c.heads) * c.num_tiles * kTileRows * c.head_dim;
}
size_t counters(const Call& c) {
  return static_cast<size_t>(c.heads) * c.num_tiles + 1;
}
int32_t packed_slots(const Call& c) {
  return c.tiles == nullptr ? 0 : c.tq / kTileRows + c.batch + 1;
}

// The largest of the equal parts of `n` that do not exceed `most`.
int even_share(int n, int most) {
  const int parts = (n + most - 1) / most;
  return (n + parts - 1) / parts;
}

// Finds a document's tiles in a list of any order.
__global__ void find_tiles_kernel(const __grid_constant__ Call c, int32_t* tile_of, int32_t slots) {
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (index >= c.num_tiles) return;
  const int2 entry = c.tiles[index];
  const Tile t = tile_at(c, index);
  if (t.rows == 0) return;
  const int slot = t.q_begin / kTileRows + entry.x + entry.y / kTileRows;
  if (slot < slots) tile_of[slot] = index;
}

}  // namespace

cudaError_t forward_masked(const ForwardCall& f, cudaStream_t stream) {
  return dispatch(f.call, [&](auto type, auto dim) {
    return launch_masked_forward<decltype(type), decltype(dim)::value>(f, stream);
  });
}

size_t backward_masked_workspace(const Call& c) {
  return dq_floats(c) * sizeof(float) +
         (counters(c) + static_cast<size_t>(packed_slots(c))) * sizeof(int32_t);
}

cudaError_t backward_masked(const BackwardCall& b, void* workspace, size_t bytes, cudaStream_t stream,
                            bool deterministic) {
  const Call& c = b.call;
  const int64_t batch = c.cu_q == nullptr ? c.batch : 1;
  if (!supports_masked(c) || !mappable(b.dout, c.tq, c.heads, batch)) return cudaErrorNotSupported;
  if (bytes < backward_masked_workspace(c)) return cudaErrorInvalidValue;
  BackwardScratch w;
  w.dq_sum = static_cast<float*>(workspace);
  w.turns = reinterpret_cast<int32_t*>(w.dq_sum + dq_floats(c));
  w.ticket = w.turns + counters(c) - 1;
  w.tile_of = w.ticket + 1;
  w.slots = packed_slots(c);
  w.words = bitmap_words(c);
  int device = 0;
  int multiprocessors = 1;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const int blocks = std::max(1, (c.max_k + 127) / 128);
  const int chains = std::max(1, c.kv_heads * c.batch);
  if (deterministic) {
    // An even number of waves, of as many blocks of each chain as run at a time.
    w.section = even_share(chains, 16);
    const int pairs = std::max(1, (blocks * w.section + multiprocessors) / (2 * multiprocessors));
    w.wave = (blocks + 2 * pairs - 1) / (2 * pairs);
  } else {
    // A chain's heaviest block takes as long as 2 / blocks of the chain on one multiprocessor.
    w.section = even_share(chains, (4 * multiprocessors + blocks - 1) / blocks);
  }
  if (error == cudaSuccess) {
    error =
        cudaMemsetAsync(workspace, 0, dq_floats(c) * sizeof(float) + counters(c) * sizeof(int32_t), stream);
  }
  if (error == cudaSuccess && w.slots > 0 && c.num_tiles > 0) {
    error = cudaMemsetAsync(w.tile_of, 0xff, w.slots * sizeof(int32_t), stream);
    const int threads = 256;
    find_tiles_kernel<<<(c.num_tiles + threads - 1) / threads, threads, 0, stream>>>(c, w.tile_of, w.slots);
    if (error == cudaSuccess) error = cudaGetLastError();
  }
  if (error != cudaSuccess) return error;
  return dispatch(c, [&](auto type, auto dim) {
    return launch_masked_backward<decltype(type), decltype(dim)::value>(b, w, stream);
  });
}

}  // namespace topk_attn::cuda::sm90
