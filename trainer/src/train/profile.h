// --profile: a Chrome trace of a few steps: what ran on the CPU and on the device, and the memory in use,
// which each allocation writes down ("[memory]" events). The scopes forward, backward and optimizer divide a
// step.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>

namespace topk_sft {

class StepProfiler {
 public:
  // `path` empty: records nothing. The steps recorded are the 6th to the 8th of this process, or the last
  // ones of a shorter run; `steps` is how many it will run.
  StepProfiler(std::string path, at::Device device, int64_t steps);
  ~StepProfiler();
  StepProfiler(const StepProfiler&) = delete;
  StepProfiler& operator=(const StepProfiler&) = delete;

  void before_step();
  // True when the trace has just been written.
  bool after_step();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  bool cuda_;
  int64_t first_ = 0;  // counted from 1
  int64_t last_ = 0;
  int64_t step_ = 0;
  bool recording_ = false;
};

}  // namespace topk_sft
