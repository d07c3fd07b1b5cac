// Activations of checkpointed layers in pinned host memory between forward and backward.
//
// Copies run on a stream of their own. In the forward a layer's tensors stay on the device until the copies
// of the layers before are done, at most kInFlight layers at a time; in the backward the next layer's tensors
// are fetched while the current layer computes. The device never waits for the host, nor the host for the
// device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <vector>

namespace topk_sft {

class Offload {
 public:
  // Error unless `device` is a CUDA device.
  explicit Offload(at::Device device);
  ~Offload();
  Offload(const Offload&) = delete;
  Offload& operator=(const Offload&) = delete;

  // One layer's tensors, wherever they are. Must not outlive the Offload it came from.
  class Parcel;

  // Called in the order of the layers.
  std::shared_ptr<Parcel> put(std::vector<at::Tensor> tensors);
  // The tensors on the device again, once; called in the opposite order.
  std::vector<at::Tensor> take(Parcel& parcel);

  int64_t host_bytes() const { return host_bytes_; }  // pinned so far

 private:
  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  Block take_block(int64_t bytes);
  void give_block(const Block& block);
  void release_block(const Block& block);
  c10::Stream current_stream() const;
  void fetch(Parcel& parcel);

  at::Device device_;
  c10::Stream copies_;
  std::deque<std::shared_ptr<Parcel>> in_flight_;
  std::weak_ptr<Parcel> newest_;
  std::multimap<int64_t, void*> free_blocks_;  // by size
  int64_t host_bytes_ = 0;
};

}  // namespace topk_sft
