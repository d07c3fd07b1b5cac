// The operations between the ranks of a run, on c10d: NCCL for tensors on GPUs, Gloo for tensors on CPUs and,
// on either, for the few numbers that the hosts agree on. All are collective: every rank calls them in the
// same order. With one rank they return what they were given.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "dist/layout.h"
#include "dist/store.h"

namespace topk_sft {

// An operation under way. Its tensors are neither read nor written by others before wait().
class Pending {
 public:
  Pending() = default;
  void wait();  // does nothing if there is none, or a second time
  bool under_way() const { return work_ != nullptr; }

 private:
  friend class Ranks;
  struct Work;
  std::shared_ptr<Work> work_;
};

class Ranks {
 public:
  Ranks();  // one rank
  // `device`: where the tensors are. Collective.
  Ranks(RankStore& store, const RankLayout& layout, at::Device device);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  const RankLayout& layout() const { return layout_; }
  bool several() const { return layout_.several(); }
  bool first() const { return layout_.first(); }

  // Over all ranks, on contiguous tensors. Parameters travel on a group of their own, so that gathers and
  // sums need no common order.
  Pending gather(const at::Tensor& whole, const at::Tensor& part);  // any type; `part` may lie in `whole`
  Pending sum(const at::Tensor& tensor);                            // in place
  Pending sum_scatter(const at::Tensor& part, const at::Tensor& whole);

  // Among the ranks that share a micro-batch: slice j along the first dimension, of size sequence_ranks, goes
  // to rank j of them; slice j of the result came from there.
  at::Tensor exchange_slices(const at::Tensor& tensor);

  // Among the hosts.
  std::vector<double> sum(std::vector<double> values);
  bool any(bool value);
  // The first text that is not empty, in the order of `order`, then of ranks; empty if all are.
  std::string first_text(int64_t order, const std::string& text);
  // The text of rank 0.
  std::string from_first(const std::string& text);
  // Waits for what only rank 0 does: checkpoints on disk, samples, exports.
  void wait_for_first();

  // An operation has failed: some other rank is gone.
  bool broken() const;

 private:
  struct Impl;
  RankLayout layout_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace topk_sft
