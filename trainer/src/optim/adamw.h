// AdamW on float32 master weights: gradient accumulation, clipping and the fused update.
//
// Parameters that are float32 (or float64) are their own master. For bfloat16 parameters a float32 master and
// a float32 gradient sum are kept; after each update the parameter is the master rounded. On a CUDA device
// bfloat16 parameters are updated by one kernel, which reads the gradients of a step's only backward pass
// where they are: that step has no gradient sum.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace topk_sft {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.0;
  bool decay_embeddings = false;  // also model.embed_tokens.weight and lm_head.weight
};

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

class AdamW {
 public:
  // `parameters`: leaves that require gradients. `masters`: float32 start values of bfloat16 parameters, by
  // position, which become the optimizer's own if they are on the parameters' device; empty: the parameters.
  AdamW(NamedTensors parameters, const AdamWOptions& options, std::vector<at::Tensor> masters = {});

  // True if weight decay applies to the parameter of that name and number of dimensions.
  static bool decays(const std::string& name, int64_t dims, bool decay_embeddings);

  // `single_pass`: one backward pass will follow until the next call.
  void zero_grad(bool single_pass = false);
  // Call after each backward pass: moves the gradients of reduced-precision parameters into the float32 sum.
  void accumulate();
  // L2 norm of the summed gradients, all parameters as one vector: a scalar on their device.
  at::Tensor grad_norm() const;
  // Scales the summed gradients, now or when step() reads them.
  void scale_gradients(double factor);
  // Name of the parameter nearest to the loss, where the backward pass comes first, whose summed gradient
  // holds a NaN or infinity; empty if none does.
  std::string nonfinite_gradient() const;
  // One update from the summed gradients.
  void step(double learning_rate);

  // What a checkpoint keeps: number of updates, and by parameter name the master and both moments.
  int64_t updates() const { return updates_; }
  NamedTensors masters() const;
  NamedTensors exp_avg() const;
  NamedTensors exp_avg_sq() const;
  // Puts the values back and refreshes the parameters. The tensors are given in the order of masters().
  void restore(int64_t updates, const std::vector<at::Tensor>& masters,
               const std::vector<at::Tensor>& exp_avg, const std::vector<at::Tensor>& exp_avg_sq);

 private:
  struct Slot {
    std::string name;
    at::Tensor parameter;
    at::Tensor master;      // the parameter itself, or its float32 copy
    bool separate = false;  // the master is a copy
    at::Tensor grad_sum;    // float32; only with a separate master, made when it is first needed
    at::Tensor exp_avg;
    at::Tensor exp_avg_sq;
    bool decay = false;
    // Updated by the CUDA kernel.
    bool fused = false;
  };
  at::Tensor gradient(const Slot& slot) const;
  std::vector<at::Tensor> gradients() const;
  void refresh(Slot& slot);
  void step_fused(double learning_rate, bool decay);
  void step_on_aten(double learning_rate, bool decay);

  std::vector<Slot> slots_;
  AdamWOptions options_;
  int64_t updates_ = 0;
  bool single_pass_ = false;
  bool summed_ = false;          // the sums hold gradients of this step
  double gradient_scale_ = 1.0;  // what the kernel multiplies by
};

}  // namespace topk_sft
