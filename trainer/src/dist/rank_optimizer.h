// The optimizer of a run on any number of ranks. With one rank it is AdamW on the parameters; with several it
// is AdamW on the pieces of them that this rank owns (parameter_shards.h).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dist/parameter_shards.h"
#include "dist/ranks.h"
#include "model/model.h"
#include "optim/adamw.h"

namespace topk_sft {

class RankOptimizer {
 public:
  // `masters` as for AdamW. The model's layers are gathered and dropped by this optimizer when `sharding` is
  // kFull. `ranks` must outlive it.
  RankOptimizer(CausalLM& model, const AdamWOptions& options, std::vector<at::Tensor> masters, Ranks& ranks,
                Sharding sharding);
  ~RankOptimizer();

  // --- a step, all ranks together
  void zero_grad(bool single_pass = false);
  // Around the forward and the backward pass of a micro-batch. `last`: no rank has another one in this step.
  void begin_micro_batch(bool last);
  void end_micro_batch();
  // In place of a micro-batch, on a rank that has fewer of them than others.
  void idle_micro_batch(bool last);
  // After the last one. The square of the L2 norm of this rank's share of the summed gradients: the sum over
  // all ranks is that of the whole gradient. A scalar.
  at::Tensor finish_gradients();
  void scale_gradients(double factor) { adamw_->scale_gradients(factor); }
  void step(double learning_rate);

  // --- around forward passes without gradients, all ranks together
  void begin_forward();
  void end_forward();
  void idle_forward();
  // Calls `action` on rank 0 while the model is whole there; the others wait.
  void on_first_with_whole_model(const std::function<void()>& action);

  // --- when a number is not finite
  // From now on micro-batches leave no gradients but are searched: bad_gradient() names the first parameter,
  // from the loss backwards, whose gradient in one of them was not finite; empty if none was.
  void inspect_gradients(bool on);
  std::string bad_gradient() const;
  // Of the parameters this rank owns, one that holds a value that is not finite; empty if none does.
  std::string bad_parameter() const;

  // --- checkpoints
  enum class State { kMaster, kExpAvg, kExpAvgSq };
  int64_t updates() const { return adamw_->updates(); }
  // Names and shapes; whole parameters, whoever owns them.
  const NamedTensors& parameters() const { return parameters_; }
  // Calls `take(name, values)` on rank 0 for every parameter in order, float32 on the CPU. All ranks
  // together.
  void read_state(State state, const std::function<void(const std::string&, const at::Tensor&)>& take) const;
  // `values(state, i)`: whole values of parameter i, float32 on the CPU. All ranks together.
  void restore(int64_t updates, const std::function<at::Tensor(State, size_t)>& values);

  at::Device device() const;

 private:
  NamedTensors parameters_;
  Ranks& ranks_;
  std::unique_ptr<ParameterShards> shards_;  // none with one rank
  std::vector<at::Tensor> pieces_;           // what AdamW has as its parameters, with several ranks
  std::unique_ptr<AdamW> adamw_;
  CausalLM& model_;
  bool inspecting_ = false;
  std::string bad_gradient_;
};

}  // namespace topk_sft
