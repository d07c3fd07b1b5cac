// From run-time types to the instances of the portable kernels.

#include <algorithm>

#include "../built.h"
#include "instances.h"

namespace topk_attn::cuda::portable {
namespace {

// select="kv_group" has no instance of its own for head dim 64 (it is not made for speed): the next one
// serves it.
constexpr int kSmallestGroupDim = 128;

int instance_dim(const Call& c) {
  const int dim = std::max(c.head_dim, c.v_dim);
  return padded_head_dim(c.kv_group ? std::max(dim, kSmallestGroupDim) : dim);
}

}  // namespace

bool supports(const Call& c, bool attend) {
  return built_dtype(c.dtype) && (attend ? instance_dim(c) : padded_head_dim(c.head_dim)) != 0;
}

bool supports_gathered(const Call& c) {
  return supports(c, true) && !c.kv_group && instance_dim(c) <= 128;
}

cudaError_t scores(const Call& c, int64_t first, int64_t units, float* slab, int64_t ld,
                   cudaStream_t stream) {
  return with_instance(c.dtype, padded_head_dim(c.head_dim), [&]<typename T, int D>() {
    return run_scores<T, D>(c, first, units, slab, ld, stream);
  });
}

cudaError_t forward(const ForwardCall& f, cudaStream_t stream) {
  if (f.regimes.union_size != nullptr) {
    if (!supports_gathered(f.call)) return cudaErrorNotSupported;
    const cudaError_t error =
        with_instance<128>(f.call.dtype, instance_dim(f.call),
                           [&]<typename T, int D>() { return run_forward_gathered<T, D>(f, stream); });
    if (error != cudaSuccess) return error;
  }
  return with_instance(f.call.dtype, instance_dim(f.call), [&]<typename T, int D>() {
    if (!f.call.kv_group) return run_forward<T, D, false>(f, stream);
    if constexpr (D >= kSmallestGroupDim) return run_forward<T, D, true>(f, stream);
    return cudaErrorNotSupported;
  });
}

cudaError_t backward(const BackwardCall& f, const int2* key_tiles, int32_t num_key_tiles,
                     cudaStream_t stream) {
  const bool gather = f.regimes.union_size != nullptr;
  if (gather && !supports_gathered(f.call)) return cudaErrorNotSupported;
  const cudaError_t error = with_instance(f.call.dtype, instance_dim(f.call), [&]<typename T, int D>() {
    if (!f.call.kv_group) return run_backward<T, D, false>(f, key_tiles, num_key_tiles, stream);
    if constexpr (D >= kSmallestGroupDim)
      return run_backward<T, D, true>(f, key_tiles, num_key_tiles, stream);
    return cudaErrorNotSupported;
  });
  if (error != cudaSuccess || !gather) return error;
  return with_instance<128>(f.call.dtype, instance_dim(f.call),
                            [&]<typename T, int D>() { return run_backward_gathered<T, D>(f, stream); });
}

}  // namespace topk_attn::cuda::portable
