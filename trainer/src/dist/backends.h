// The process groups of c10d that this program uses. Heavy headers: for the files of dist/ only.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <string>

namespace topk_sft {

using BackendPtr = c10::intrusive_ptr<c10d::Backend>;
using StorePtr = c10::intrusive_ptr<c10d::Store>;

// A group of `size` ranks, which meet under `name` in the store. Collective over the group.
BackendPtr make_gloo(const StorePtr& store, const std::string& name, int64_t rank, int64_t size);
// The same on NCCL, for tensors on `device`. Error in a build without NCCL.
BackendPtr make_nccl(const StorePtr& store, const std::string& name, int64_t rank, int64_t size,
                     at::Device device);

// An operation that takes longer is given up. Ranks that die are noticed earlier, by the store's heartbeat.
inline constexpr std::chrono::minutes kOperationTimeout{10};

}  // namespace topk_sft
