// The parameters of a model, divided over the ranks.
//
// Parameters travel in units: one per layer, and one, the root, of everything outside the layers. The
// parameters of a unit lie one behind the other in a flat buffer, each at a multiple of 64 elements, padded
// so that every rank owns an equal part of it. Gradients are added up in a flat float32 buffer of the same
// layout, as each becomes ready in the backward; when a unit is complete in the last backward pass of a step
// its sum over all ranks is started, while the backward goes on with the layers before it. Units are summed
// in one fixed order, last layer first and the root at the end, so that all ranks agree about it.
//
//   kNone       every rank owns everything and gets the sums of everything
//   kOptimizer  a rank gets the sum of its own part, updates it, and the updated parts are gathered: no more
//               travels than with kNone, and the optimizer's state is divided by the number of ranks (ZeRO-1;
//               Rajbhandari et al., 2020)
//   kFull       parameters and gradients are divided too: a layer is gathered before its forward and again
//               before its backward, one layer ahead of its use, and dropped afterwards; gradients are summed
//               after every backward pass (ZeRO-3)
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dist/ranks.h"
#include "model/model.h"
#include "optim/adamw.h"

namespace topk_sft {

enum class Sharding { kNone, kOptimizer, kFull };

// "none", "optimizer", "full".
Sharding sharding_of(const std::string& name);

class ParameterShards {
 public:
  // `parameters`: leaves of a model of `layers` layers, whose memory becomes that of the flat buffers. All of
  // them are trained; others of the model stay whole on every rank.
  ParameterShards(const NamedTensors& parameters, int64_t layers, Ranks& ranks, Sharding sharding);
  ~ParameterShards();
  ParameterShards(const ParameterShards&) = delete;
  ParameterShards& operator=(const ParameterShards&) = delete;

  // What this rank owns of a parameter.
  struct Piece {
    size_t parameter;  // position in the list given
    size_t unit;
    int64_t begin;  // in the parameter, in elements
    int64_t size;
    int64_t place;  // in the unit's own part
    bool matrix;
  };
  const std::vector<Piece>& pieces() const { return pieces_; }
  // A piece of the parameters and of their gradients: (size), or (1, size) of a matrix.
  at::Tensor parameter(const Piece& piece) const;
  at::Tensor gradient(const Piece& piece) const;

  // --- a step
  void zero_gradients();
  // Around the forward and backward of a micro-batch. `last`: no rank has another one in this step.
  void begin_micro_batch(bool last);
  void end_micro_batch();
  // In place of a micro-batch, on a rank that has fewer of them than others.
  void idle_micro_batch(bool last);
  // After the last micro-batch: gradient() is the sum over all ranks.
  void finish_gradients();
  // After the owned pieces changed: brings the changes to all ranks.
  void publish();

  // --- without gradients
  void begin_forward();
  void end_forward();
  void idle_forward();
  // All parameters whole on every rank, for decoding and export.
  void gather_all();
  void release_all();

  // --- looking for a value that is not finite: gradients are looked at and dropped. The name of the
  // parameter nearest to the loss whose gradient was not finite since the call; empty if none was.
  void inspect_gradients(bool on);
  std::string bad_gradient() const;

  // Any float32 numbers of the pieces' kind, in the order of pieces(), as whole parameters on rank 0's CPU;
  // undefined on other ranks. Collective: all ranks ask for the same parameters in the same order.
  class Collector {
   public:
    Collector(const ParameterShards& shards, std::vector<at::Tensor> values);
    at::Tensor whole(size_t parameter);

   private:
    const ParameterShards& shards_;
    std::vector<at::Tensor> values_;
    std::vector<at::Tensor> gathered_;  // by unit
  };

  // To be called by the model around each layer in kFull.
  at::Tensor enter_layer(int64_t layer, const at::Tensor& x);
  at::Tensor leave_layer(int64_t layer, const at::Tensor& x);
  Sharding sharding() const { return sharding_; }

 private:
  friend struct GradientHook;
  friend class EnterLayer;
  friend class LeaveLayer;

  struct Unit {
    std::vector<size_t> members;
    int64_t size = 0;          // of the flat buffers, a multiple of the number of owners
    at::Tensor flat;           // the parameters
    at::Tensor own;            // this rank's part of them: a view of `flat`, or in kFull a tensor of its own
    at::Tensor gradients;      // float32: this rank's sum, (size)
    at::Tensor own_gradients;  // float32: all ranks' sum of this rank's part
    at::Tensor arriving;       // kFull: what the sum under way will add to own_gradients
    size_t ready = 0;          // members whose gradient of this backward pass is there
    bool resident = true;      // kFull: `flat` has memory and values
    Pending gathering;
    Pending summing;
  };
  struct Member {
    std::string name;
    at::Tensor tensor;
    size_t unit = 0;
    int64_t offset = 0;
  };

  void lay_out(Unit& unit);
  void on_gradient(size_t parameter);
  void sum_units(bool all);
  void start_sum(Unit& unit);
  void collect(Unit& unit);
  void start_gather(size_t unit);
  void make_resident(size_t unit);
  void release(size_t unit);
  size_t unit_of_layer(int64_t layer) const { return static_cast<size_t>(layer) + 1; }
  int64_t owners() const;

  Ranks& ranks_;
  Sharding sharding_;
  std::vector<Member> members_;  // by position in the list given
  std::vector<Unit> units_;      // the root, then the layers
  std::vector<Piece> pieces_;
  bool last_backward_ = false;
  size_t next_sum_ = 0;  // units whose sum has been started in this backward pass
  bool keep_ = false;    // gather_all(): nothing is released
  bool inspecting_ = false;
  int64_t bad_gradient_ = -1;  // position of the parameter
};

}  // namespace topk_sft
