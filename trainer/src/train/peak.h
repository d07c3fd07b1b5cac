// The device's peak rate, for MFU.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

namespace topk_sft {

// FLOP/s of a square matrix product of that type on the device: the best of a few, a fraction of a second in
// all.
double measured_peak_flops(at::Device device, at::ScalarType dtype);

}  // namespace topk_sft
