// c10d's process groups behind the trainer's own few operations.
#include "dist/ranks.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>

#include "dist/backends.h"
#include "dist/store_impl.h"
#include "io/error.h"

namespace topk_sft {

struct Ranks::Impl {
  RankStore& store;
  BackendPtr hosts;     // Gloo, CPU tensors
  BackendPtr sums;      // of gradients
  BackendPtr gathers;   // of parameters
  BackendPtr sequence;  // the ranks that share a micro-batch; none without sequence parallelism
  std::atomic<bool> broken{false};
};

struct Pending::Work {
  c10::intrusive_ptr<c10d::Work> work;
  std::atomic<bool>* broken;
};

void Pending::wait() {
  if (work_ == nullptr) return;
  const std::shared_ptr<Work> work = std::move(work_);
  work_ = nullptr;
  try {
    work->work->wait();
  } catch (const std::exception& e) {
    *work->broken = true;
    fail("an operation between the ranks failed: {}", first_line(e.what()));
  }
}

namespace {

// Starts an operation; a failure is told as Pending::wait tells it.
template <typename Start>
c10::intrusive_ptr<c10d::Work> started(std::atomic<bool>& broken, const Start& start) {
  try {
    return start();
  } catch (const std::exception& e) {
    broken = true;
    fail("an operation between the ranks failed: {}", first_line(e.what()));
  }
}

at::Tensor bytes(const at::Tensor& tensor) {
  return tensor.view(at::kByte);
}

}  // namespace

Ranks::Ranks() = default;
Ranks::~Ranks() = default;

Ranks::Ranks(RankStore& store, const RankLayout& layout, at::Device device) : layout_(layout) {
  if (!layout.several()) return;
  impl_ = std::make_unique<Impl>(store);
  const StorePtr& meeting = store.impl().main;
  const auto group = [&](const std::string& name, int64_t rank, int64_t size) {
    return device.is_cpu() ? make_gloo(meeting, name, rank, size)
                           : make_nccl(meeting, name, rank, size, device);
  };
  try {
    impl_->hosts = make_gloo(meeting, "hosts", layout.rank, layout.world);
    impl_->sums = group("sums", layout.rank, layout.world);
    impl_->gathers = group("gathers", layout.rank, layout.world);
    if (layout.sequence_ranks > 1) {
      impl_->sequence = group(fmt::format("sequence/{}", layout.data_rank()), layout.sequence_rank(),
                              layout.sequence_ranks);
    }
  } catch (const Error&) {
    throw;
  } catch (const std::exception& e) {
    fail("rank {} of {} cannot reach the others: {}", layout.rank, layout.world, first_line(e.what()));
  }
}

bool Ranks::broken() const {
  return impl_ != nullptr && impl_->broken;
}

Pending Ranks::gather(const at::Tensor& whole, const at::Tensor& part) {
  Pending pending;
  if (impl_ == nullptr) return pending;
  at::Tensor out = bytes(whole);
  at::Tensor in = bytes(part);
  pending.work_ = std::make_shared<Pending::Work>(
      started(impl_->broken, [&] { return impl_->gathers->_allgather_base(out, in); }), &impl_->broken);
  return pending;
}

Pending Ranks::sum(const at::Tensor& tensor) {
  Pending pending;
  if (impl_ == nullptr) return pending;
  std::vector<at::Tensor> tensors = {tensor};
  pending.work_ = std::make_shared<Pending::Work>(
      started(impl_->broken, [&] { return impl_->sums->allreduce(tensors); }), &impl_->broken);
  return pending;
}

Pending Ranks::sum_scatter(const at::Tensor& part, const at::Tensor& whole) {
  Pending pending;
  if (impl_ == nullptr) return pending;
  at::Tensor out = part;
  at::Tensor in = whole;
  pending.work_ = std::make_shared<Pending::Work>(
      started(impl_->broken, [&] { return impl_->sums->_reduce_scatter_base(out, in); }), &impl_->broken);
  return pending;
}

at::Tensor Ranks::exchange_slices(const at::Tensor& tensor) {
  if (impl_ == nullptr || impl_->sequence == nullptr) return tensor;
  const at::Tensor source = tensor.contiguous();
  const at::Tensor target = at::empty_like(source);
  // As bytes: Gloo does not know every type.
  at::Tensor in = bytes(source.view({layout_.sequence_ranks, -1}));
  at::Tensor out = bytes(target.view({layout_.sequence_ranks, -1}));
  std::vector<int64_t> even;
  Pending pending;
  pending.work_ = std::make_shared<Pending::Work>(
      started(impl_->broken, [&] { return impl_->sequence->alltoall_base(out, in, even, even); }),
      &impl_->broken);
  pending.wait();
  return target;
}

std::vector<double> Ranks::sum(std::vector<double> values) {
  if (impl_ == nullptr) return values;
  std::vector<at::Tensor> tensors = {
      at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, at::kDouble)};
  Pending pending;
  pending.work_ = std::make_shared<Pending::Work>(
      started(impl_->broken, [&] { return impl_->hosts->allreduce(tensors); }), &impl_->broken);
  pending.wait();
  return values;
}

bool Ranks::any(bool value) {
  return sum({value ? 1.0 : 0.0})[0] > 0;
}

std::string Ranks::first_text(int64_t order, const std::string& text) {
  if (impl_ == nullptr) return text;
  // Fixed width, so that texts sort by number.
  const std::vector<std::string> all =
      impl_->store.exchange(text.empty() ? "" : fmt::format("{:020}{}", order, text));
  std::string best;
  for (const std::string& candidate : all) {
    if (!candidate.empty() && (best.empty() || candidate.substr(0, 20) < best.substr(0, 20)))
      best = candidate;
  }
  return best.empty() ? "" : best.substr(20);
}

std::string Ranks::from_first(const std::string& text) {
  if (impl_ == nullptr) return text;
  wait_for_first();  // it may be reading for long
  return impl_->store.exchange(text)[0];
}

void Ranks::wait_for_first() {
  if (impl_ != nullptr) impl_->store.wait_for_first();
}

}  // namespace topk_sft
