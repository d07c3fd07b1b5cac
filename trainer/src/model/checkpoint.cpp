// Activation checkpointing: a graph node that keeps the input and runs the function once more when its
// gradient is asked for.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>

#include "model/functions.h"

namespace topk_sft {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct CheckpointNode : torch::autograd::Node {
  std::function<at::Tensor(const at::Tensor&)> function;
  SavedVariable saved_x;
  variable_list parameters;

  std::string name() const override { return "Checkpoint"; }
  void release_variables() override {
    saved_x.reset_data();
    parameters.clear();
    function = nullptr;
  }

  variable_list apply(variable_list&& grads) override {
    const at::Tensor x = saved_x.unpack(shared_from_this()).detach().requires_grad_(true);
    const at::AutoGradMode enable(true);
    const at::Tensor out = function(x);
    variable_list inputs = {x};
    for (const at::Tensor& parameter : parameters) {
      if (parameter.requires_grad()) inputs.push_back(parameter);
    }
    const variable_list found = torch::autograd::grad({out}, inputs, {grads[0]});
    variable_list result = {found[0]};
    size_t next = 1;
    for (const at::Tensor& parameter : parameters) {
      result.push_back(parameter.requires_grad() ? found[next++] : at::Tensor());
    }
    return result;
  }
};

}  // namespace

at::Tensor checkpoint(const std::function<at::Tensor(const at::Tensor&)>& function, const at::Tensor& x,
                      const std::vector<at::Tensor>& parameters) {
  variable_list inputs = {x};
  inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(inputs)) return function(x);

  auto node = std::make_shared<CheckpointNode>();
  node->function = function;
  node->parameters = parameters;
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  node->saved_x = SavedVariable(x, /*is_output=*/false);
  at::Tensor out;
  {
    const at::NoGradGuard no_grad;
    out = function(x);
  }
  torch::autograd::set_history(out, node);
  return out;
}

}  // namespace topk_sft
