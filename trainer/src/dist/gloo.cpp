// Gloo groups: the ranks of a run on CPUs, and the host's side of a run on GPUs.
#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "dist/backends.h"

namespace topk_sft {

BackendPtr make_gloo(const StorePtr& store, const std::string& name, int64_t rank, int64_t size) {
  // The network interface is the one of GLOO_SOCKET_IFNAME, or that of the host's name.
  auto options = c10d::ProcessGroupGloo::Options::create_default(kOperationTimeout);
  return c10::make_intrusive<c10d::ProcessGroupGloo>(c10::make_intrusive<c10d::PrefixStore>(name, store),
                                                     static_cast<int>(rank), static_cast<int>(size), options);
}

}  // namespace topk_sft
