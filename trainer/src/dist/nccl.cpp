// NCCL groups, in builds with CUDA whose torch brings NCCL's header (TOPK_TRAINER_NCCL).
#include "dist/backends.h"
#include "io/error.h"

#ifdef TOPK_TRAINER_NCCL
#define USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace topk_sft {

#ifdef TOPK_TRAINER_NCCL

BackendPtr make_nccl(const StorePtr& store, const std::string& name, int64_t rank, int64_t size,
                     at::Device device) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = kOperationTimeout;
  options->group_name = name;
  const auto group =
      c10::make_intrusive<c10d::ProcessGroupNCCL>(c10::make_intrusive<c10d::PrefixStore>(name, store),
                                                  static_cast<int>(rank), static_cast<int>(size), options);
  group->setBoundDeviceId(device);
  return group;
}

#else

BackendPtr make_nccl(const StorePtr&, const std::string&, int64_t, int64_t, at::Device device) {
  fail("several ranks on {} need NCCL, and this build has none: it needs CUDA and a torch with nccl.h",
       device.str());
}

#endif

}  // namespace topk_sft
