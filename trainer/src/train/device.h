// Figures of the device that trains: its peak rate, for MFU, and the memory in use.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

namespace topk_sft {

// FLOP/s of a square matrix product of that type on the device: the best of a few, a fraction of a second in
// all.
double measured_peak_flops(at::Device device, at::ScalarType dtype);

// Memory in use, in bytes: of this process on the CPU, of the tensor library's allocator on another device.
double memory_in_use(at::Device device);
// The most of it so far; on a device, of what tensors took, without the allocator's reserve.
double peak_memory(at::Device device);

}  // namespace topk_sft
