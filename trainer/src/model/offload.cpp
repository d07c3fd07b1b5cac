// Pinned blocks, the two copies of a layer and the events between the streams.
#include "model/offload.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sys/mman.h>

#include <cstdlib>

#include "io/error.h"

#ifdef TOPK_TRAINER_CUDA
#include <cuda_runtime_api.h>
#endif

namespace topk_sft {
namespace {

constexpr size_t kInFlight = 2;
constexpr int64_t kPage = int64_t{2} << 20;  // huge pages: far fewer to pin
// Smaller tensors stay on the device.
constexpr int64_t kSmallest = int64_t{1} << 20;

void* allocate_pinned(int64_t bytes) {
#ifdef TOPK_TRAINER_CUDA
  void* data = std::aligned_alloc(static_cast<size_t>(kPage), static_cast<size_t>(bytes));
  if (data == nullptr) fail("train.offload_activations: {} bytes of host memory are not to be had", bytes);
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // only a wish
  // Pages are made by the first write; all cores share that work.
  at::parallel_for(0, bytes / kPage, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * kPage; at < end * kPage; at += 4096) static_cast<volatile char*>(data)[at] = 0;
  });
  const cudaError_t error = cudaHostRegister(data, static_cast<size_t>(bytes), cudaHostRegisterDefault);
  if (error != cudaSuccess) {
    std::free(data);
    cudaGetLastError();
    fail("train.offload_activations: {} bytes of host memory cannot be pinned: {}", bytes,
         cudaGetErrorString(error));
  }
  return data;
#else
  fail("this program was built without CUDA; {} bytes were to be pinned", bytes);
#endif
}

c10::Stream copy_stream(at::Device device) {
  if (!device.is_cuda()) {
    fail("train.offload_activations: activations of a {} model are in host memory already", device.str());
  }
  return c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
}

}  // namespace

class Offload::Parcel {
 public:
  explicit Parcel(Offload& owner) : owner_(owner), copied_(at::kCUDA), fetched_(at::kCUDA) {}
  ~Parcel() {
    // Dropped without a backward: the device's memory may be used again only after the copies from it.
    if (on_device_ && copied_.was_marked_for_recording()) copied_.block(owner_.current_stream());
    for (const Item& item : items_) {
      if (item.block.data != nullptr) owner_.give_block(item.block);
    }
  }

 private:
  friend class Offload;
  struct Item {
    at::Tensor device;  // undefined while only the host has it
    at::Tensor host;    // undefined for what stays
    Block block;
  };
  Offload& owner_;
  std::vector<Item> items_;
  std::weak_ptr<Parcel> previous_;
  c10::Event copied_, fetched_;
  bool on_device_ = true;
  bool fetching_ = false;
};

Offload::Offload(at::Device device) : device_(device), copies_(copy_stream(device)) {
  if (!device_.has_index()) device_ = copies_.device();
}

Offload::~Offload() {
  in_flight_.clear();
  for (const auto& [bytes, data] : free_blocks_) release_block({data, bytes});
}

c10::Stream Offload::current_stream() const {
  return c10::impl::VirtualGuardImpl(device_.type()).getStream(device_);
}

Offload::Block Offload::take_block(int64_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  if (const auto fit = free_blocks_.lower_bound(bytes); fit != free_blocks_.end()) {
    const Block block{fit->second, fit->first};
    free_blocks_.erase(fit);
    return block;
  }
  // All free ones are too small: the largest makes room, so that what is pinned stays near what is used.
  if (!free_blocks_.empty()) {
    const auto largest = std::prev(free_blocks_.end());
    release_block({largest->second, largest->first});
    free_blocks_.erase(largest);
  }
  const Block block{allocate_pinned(bytes), bytes};
  host_bytes_ += bytes;
  return block;
}

void Offload::give_block(const Block& block) {
  free_blocks_.emplace(block.bytes, block.data);
}

void Offload::release_block(const Block& block) {
#ifdef TOPK_TRAINER_CUDA
  copies_.synchronize();
  cudaHostUnregister(block.data);
#endif
  std::free(block.data);
  host_bytes_ -= block.bytes;
}

std::shared_ptr<Offload::Parcel> Offload::put(std::vector<at::Tensor> tensors) {
  const c10::Stream compute = current_stream();
  auto parcel = std::make_shared<Parcel>(*this);
  for (at::Tensor& tensor : tensors) {
    Parcel::Item item;
    const bool small =
        !tensor.defined() || !tensor.is_cuda() || static_cast<int64_t>(tensor.nbytes()) < kSmallest;
    item.device = small ? tensor : tensor.contiguous();
    if (!small) {
      item.block = take_block(static_cast<int64_t>(tensor.nbytes()));
      item.host = at::from_blob(item.block.data, tensor.sizes(), tensor.options().device(at::kCPU));
    }
    parcel->items_.push_back(std::move(item));
  }
  c10::Event ready(at::kCUDA);
  ready.record(compute);
  ready.block(copies_);
  {
    const c10::StreamGuard guard(copies_);
    for (const Parcel::Item& item : parcel->items_) {
      if (item.host.defined()) item.host.copy_(item.device, /*non_blocking=*/true);
    }
  }
  parcel->copied_.record(copies_);
  parcel->previous_ = newest_;
  newest_ = parcel;
  in_flight_.push_back(parcel);
  while (in_flight_.size() > kInFlight) {
    Parcel& oldest = *in_flight_.front();
    oldest.copied_.block(compute);
    for (Parcel::Item& item : oldest.items_) {
      if (item.host.defined()) item.device.reset();
    }
    oldest.on_device_ = false;
    in_flight_.pop_front();
  }
  return parcel;
}

void Offload::fetch(Parcel& parcel) {
  if (parcel.on_device_ || parcel.fetching_) return;
  parcel.fetching_ = true;
  for (Parcel::Item& item : parcel.items_) {
    if (item.host.defined()) item.device = at::empty(item.host.sizes(), item.host.options().device(device_));
  }
  // What the memory held before must have been used.
  c10::Event free(at::kCUDA);
  free.record(current_stream());
  free.block(copies_);
  {
    const c10::StreamGuard guard(copies_);
    for (const Parcel::Item& item : parcel.items_) {
      if (item.host.defined()) item.device.copy_(item.host, /*non_blocking=*/true);
    }
  }
  parcel.fetched_.record(copies_);
}

std::vector<at::Tensor> Offload::take(Parcel& parcel) {
  fetch(parcel);
  // Also when the tensors never left: they are freed after use, and the copies must be done by then.
  (parcel.fetching_ ? parcel.fetched_ : parcel.copied_).block(current_stream());
  std::erase_if(in_flight_, [&](const auto& other) { return other.get() == &parcel; });
  std::vector<at::Tensor> tensors;
  for (Parcel::Item& item : parcel.items_) {
    tensors.push_back(item.device);
    item.device.reset();
  }
  parcel.on_device_ = false;
  parcel.fetching_ = false;
  if (const auto previous = parcel.previous_.lock()) fetch(*previous);
  return tensors;
}

}  // namespace topk_sft
