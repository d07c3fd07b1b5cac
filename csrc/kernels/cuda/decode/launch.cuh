// Launches that overlap with the end of the kernel before them (programmatic dependent launch, sm_90). A
// kernel launched so may start when every block of the one before it has called let_next_start() or returned;
// what that one writes is seen after wait_for_previous(). Every block calls that, so that a kernel that has
// ended has the ones before it behind it.
#pragma once

#include <cuda_runtime.h>

namespace topk_attn::cuda::decode {

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether the kernel's code is of sm_90 or newer: that of older architectures knows neither the above nor
// clusters.
template <typename Kernel>
cudaError_t is_sm90_code(Kernel kernel, bool& answer) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  answer = error == cudaSuccess && attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
  return error;
}

struct LaunchShape {
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
};

// `chained`: may overlap with the kernel before it in the stream, one of this file's kind or any other.
template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, const LaunchShape& shape, bool chained, cudaStream_t stream,
                   const Args&... args) {
  if (chained) {
    if (const cudaError_t error = is_sm90_code(kernel, chained); error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {shape.cluster, 1, 1};
    ++count;
  }
  if (chained) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Clusters of this shape that the device can run at the same time; 0 where it cannot run any.
template <typename Kernel>
int clusters_at_once(Kernel kernel, const LaunchShape& shape) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters;
  cudaGetLastError();  // it was an answer, not an error
  return 0;
}

}  // namespace topk_attn::cuda::decode
