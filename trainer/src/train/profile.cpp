#include "train/profile.h"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <set>
#include <utility>

#include "io/error.h"

namespace topk_sft {

namespace {

namespace profiler = torch::autograd::profiler;
using torch::profiler::impl::ActivityType;

// Past the first steps, in which libraries choose and load their kernels.
constexpr int64_t kFirst = 6;
constexpr int64_t kCount = 3;

}  // namespace

StepProfiler::StepProfiler(std::string path, at::Device device, int64_t steps)
    : path_(std::move(path)), cuda_(device.is_cuda()) {
  last_ = std::min(kFirst + kCount - 1, steps);
  first_ = std::max<int64_t>(1, last_ - kCount + 1);
}

StepProfiler::~StepProfiler() {
  if (!recording_) return;
  try {
    profiler::disableProfiler();
  } catch (const std::exception&) {
    // The run ends by an error of its own, which is the one to be seen.
  }
}

void StepProfiler::before_step() {
  if (path_.empty() || ++step_ != first_) return;
  std::set<ActivityType> activities = {ActivityType::CPU};
  if (cuda_) activities.insert(ActivityType::CUDA);
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO,
                                                     /*report_input_shapes=*/false,
                                                     /*profile_memory=*/true);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  recording_ = true;
}

bool StepProfiler::after_step() {
  if (!recording_ || step_ < last_) return false;
  recording_ = false;
  profiler::disableProfiler()->save(path_);
  return true;
}

}  // namespace topk_sft
