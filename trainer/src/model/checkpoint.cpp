// Activation checkpointing: a graph node that keeps the inputs and runs the function once more when its
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
  TensorFunction function;
  std::vector<SavedVariable> saved;
  variable_list parameters;

  std::string name() const override { return "Checkpoint"; }
  void release_variables() override {
    saved.clear();
    parameters.clear();
    function = nullptr;
  }

  variable_list apply(variable_list&& grads) override {
    const at::AutoGradMode enable(true);
    variable_list inputs;
    for (SavedVariable& variable : saved) {
      const at::Tensor x = variable.unpack(shared_from_this());
      inputs.push_back(x.detach().requires_grad_(x.requires_grad()));
    }
    const variable_list all_outputs = function(inputs);
    // An output that nobody used has no gradient.
    variable_list outputs, output_grads;
    for (size_t i = 0; i < all_outputs.size(); ++i) {
      if (!grads[i].defined()) continue;
      outputs.push_back(all_outputs[i]);
      output_grads.push_back(grads[i]);
    }
    variable_list wanted;
    for (const variable_list* list : {&inputs, &parameters}) {
      for (const at::Tensor& tensor : *list) {
        if (tensor.requires_grad()) wanted.push_back(tensor);
      }
    }
    const variable_list found = torch::autograd::grad(outputs, wanted, output_grads, /*retain_graph=*/false,
                                                      /*create_graph=*/false, /*allow_unused=*/true);
    variable_list result;
    size_t next = 0;
    for (const variable_list* list : {&inputs, &parameters}) {
      for (const at::Tensor& tensor : *list) {
        result.push_back(tensor.requires_grad() ? found[next++] : at::Tensor());
      }
    }
    return result;
  }
};

}  // namespace

std::vector<at::Tensor> checkpoint(const TensorFunction& function, const std::vector<at::Tensor>& inputs,
                                   const std::vector<at::Tensor>& parameters) {
  variable_list sources = inputs;
  sources.insert(sources.end(), parameters.begin(), parameters.end());
  if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(sources)) {
    return function(inputs);
  }
  auto node = std::make_shared<CheckpointNode>();
  node->function = function;
  node->parameters = parameters;
  node->set_next_edges(torch::autograd::collect_next_edges(sources));
  for (const at::Tensor& x : inputs) node->saved.emplace_back(x, /*is_output=*/false);
  variable_list outputs;
  {
    const at::NoGradGuard no_grad;
    outputs = function(inputs);
  }
  torch::autograd::set_history(outputs, node);
  return outputs;
}

}  // namespace topk_sft
