#include "train/device.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <algorithm>
#include <chrono>

#include "train/console.h"

namespace topk_sft {

double measured_peak_flops(at::Device device, at::ScalarType dtype) {
  using Clock = std::chrono::steady_clock;
  const at::NoGradGuard no_grad;
  const int64_t n = device.is_cpu() ? 768 : 8192;
  const at::Tensor a = at::full({n, n}, 0.5, at::TensorOptions().device(device).dtype(dtype));
  at::mm(a, a);  // the first call sets the library up
  double best = 1e300;
  const auto start = Clock::now();
  for (int i = 0; i < 8 && std::chrono::duration<double>(Clock::now() - start).count() < 0.3; ++i) {
    const auto begin = Clock::now();
    // Reading one element waits for the device.
    at::mm(a, a).select(0, 0).select(0, 0).item<double>();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  const auto size = static_cast<double>(n);
  return 2 * size * size * size / best;
}

namespace {

c10::CachingDeviceAllocator::DeviceStats device_stats(at::Device device) {
  const auto index = device.has_index() ? device.index() : c10::DeviceIndex{0};
  return c10::getDeviceAllocator(device.type())->getDeviceStats(index);
}

}  // namespace

double memory_in_use(at::Device device) {
  if (device.is_cpu()) return resident_bytes();
  return static_cast<double>(device_stats(device).reserved_bytes[0].current);  // [0]: all pools together
}

double peak_memory(at::Device device) {
  if (device.is_cpu()) return peak_resident_bytes();
  return static_cast<double>(device_stats(device).allocated_bytes[0].peak);
}

}  // namespace topk_sft
