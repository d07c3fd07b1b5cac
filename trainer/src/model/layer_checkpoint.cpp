// The graph node of a checkpointed layer: its forward in chunks of tokens, and the backward that runs each
// part once more.
#include "model/layer_checkpoint.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "io/error.h"

namespace topk_sft {
namespace {

using torch::autograd::variable_list;

struct Chunk {
  int64_t begin, size;
  at::Tensor of(const at::Tensor& x) const { return x.narrow(0, begin, size); }
};

std::vector<Chunk> chunks_of(int64_t tokens, int64_t chunk_tokens) {
  std::vector<Chunk> chunks;
  for (int64_t begin = 0; begin < tokens; begin += chunk_tokens) {
    chunks.push_back({begin, std::min(chunk_tokens, tokens - begin)});
  }
  return chunks;
}

at::Tensor joined(const variable_list& parts) {
  return parts.size() == 1 ? parts[0] : at::cat(parts, 0);
}

// A leaf over the same memory.
at::Tensor leaf(const at::Tensor& x, bool requires_grad = true) {
  return x.detach().requires_grad_(requires_grad);
}

// Gradients of the parameters of one part of a layer, summed over its chunks.
class ParameterGradients {
 public:
  explicit ParameterGradients(variable_list parameters) : parameters_(std::move(parameters)) {
    for (const at::Tensor& parameter : parameters_) {
      if (parameter.requires_grad()) trained_.push_back(parameter);
    }
    sums_.resize(trained_.size());
  }

  // Runs the backward of one chunk: adds the gradients of the parameters and returns those of `inputs`,
  // undefined where an input has none. `chunks`: how many there are in all.
  variable_list run(const variable_list& outputs, const variable_list& grads, const variable_list& inputs,
                    size_t chunks) {
    variable_list wanted;
    for (const at::Tensor& input : inputs) {
      if (input.requires_grad()) wanted.push_back(input);
    }
    const size_t first_parameter = wanted.size();
    wanted.insert(wanted.end(), trained_.begin(), trained_.end());
    // What nothing that trains went into has no graph.
    variable_list roots, root_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grads[i]);
    }
    variable_list found(wanted.size());
    if (!roots.empty()) {
      found = torch::autograd::grad(roots, wanted, root_grads, /*retain_graph=*/false,
                                    /*create_graph=*/false, /*allow_unused=*/true);
    }
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < trained_.size(); ++i) {
      const at::Tensor& grad = found[first_parameter + i];
      if (!grad.defined()) continue;
      if (sums_[i].defined()) {
        sums_[i].add_(grad);
      } else {
        const bool widen = chunks > 1 && grad.scalar_type() != at::kDouble;
        sums_[i] = widen ? grad.to(at::kFloat) : grad;
      }
    }
    variable_list result;
    size_t next = 0;
    for (const at::Tensor& input : inputs) {
      result.push_back(input.requires_grad() ? found[next++] : at::Tensor());
    }
    return result;
  }

  // One gradient a parameter, in its type; undefined for those that do not train.
  void append_to(variable_list& out) const {
    size_t next = 0;
    for (const at::Tensor& parameter : parameters_) {
      if (!parameter.requires_grad()) {
        out.emplace_back();
        continue;
      }
      const at::Tensor& sum = sums_[next++];
      out.push_back(sum.defined() ? sum.to(parameter.scalar_type()) : sum);
    }
  }

 private:
  variable_list parameters_, trained_, sums_;
};

struct LayerNode : torch::autograd::Node {
  const ModelConfig* config = nullptr;
  Layer layer;
  std::shared_ptr<const RopeTable> rope;
  std::shared_ptr<const PackedAttention> attention;
  CheckpointOptions options;
  bool input_trains = false;  // the layer's input has a gradient

  // What is kept: the input and the results of attention, here or in the parcel.
  variable_list kept;
  std::shared_ptr<Offload::Parcel> parcel;
  // The same of an attention that is not separable: its heads, leaves of its graph, and the result.
  variable_list graph_heads;
  at::Tensor graph_result;

  std::string name() const override { return "CheckpointedLayer"; }

  void release_variables() override {
    kept.clear();
    parcel.reset();
    graph_heads.clear();
    graph_result.reset();
    layer = {};
    attention.reset();
    rope.reset();
  }

  variable_list heads(const at::Tensor& x, const Chunk& chunk) const {
    return layer_heads(*config, layer, x, {chunk.of(rope->cos), chunk.of(rope->sin)});
  }

  // The three heads of all tokens from those of the chunks.
  static std::array<at::Tensor, 3> join_heads(const std::vector<variable_list>& parts) {
    std::array<at::Tensor, 3> out;
    for (size_t i = 0; i < 3; ++i) {
      variable_list pieces;
      for (const variable_list& part : parts) pieces.push_back(part[i].detach());
      out[i] = joined(pieces);
    }
    return out;
  }

  // The graph of an attention that has no gradient of its own.
  at::Tensor attend_with_graph(const std::array<at::Tensor, 3>& qkv) {
    const at::AutoGradMode enable(true);
    graph_heads = {leaf(qkv[0]), leaf(qkv[1]), leaf(qkv[2])};
    graph_result = attention->attend(graph_heads[0], graph_heads[1], graph_heads[2]);
    return graph_result.detach();
  }

  at::Tensor forward(const at::Tensor& x, bool separable) {
    const at::NoGradGuard no_grad;
    const auto chunks = chunks_of(x.size(0), options.chunk_tokens);
    at::Tensor attended;
    {
      std::vector<variable_list> parts;
      for (const Chunk& chunk : chunks) parts.push_back(heads(chunk.of(x), chunk));
      const auto qkv = join_heads(parts);
      parts.clear();
      kept = {x.detach()};
      if (!options.keep_attention) {
        attended = attention->attend(qkv[0], qkv[1], qkv[2]);
      } else if (separable) {
        const variable_list results = attention->forward(qkv[0], qkv[1], qkv[2]);
        attended = results[0];
        kept.insert(kept.end(), results.begin(), results.end());
      } else {
        attended = attend_with_graph(qkv);
      }
    }
    at::Tensor out;
    if (chunks.size() == 1) {
      out = layer_output(*config, layer, x, attended);
    } else {
      out = at::empty_like(x);
      for (const Chunk& chunk : chunks) {
        chunk.of(out).copy_(layer_output(*config, layer, chunk.of(x), chunk.of(attended)));
      }
    }
    if (options.offload != nullptr) {
      parcel = options.offload->put(std::move(kept));
      kept.clear();
    }
    return out;
  }

  variable_list apply(variable_list&& grads) override {
    const at::AutoGradMode enable(true);
    if (kept.empty() && parcel == nullptr) fail("the backward of a checkpointed layer can run once only");
    variable_list state = parcel != nullptr ? options.offload->take(*parcel) : std::exchange(kept, {});
    parcel.reset();
    const at::Tensor x = state[0];
    const at::Tensor grad_out = grads[0];
    const auto chunks = chunks_of(x.size(0), options.chunk_tokens);
    const bool separable = attention->separable(x.options(), config->head_dim);

    // The heads with their graphs. Where attention was kept they are not needed before the MLP is through.
    variable_list inputs;
    std::vector<variable_list> parts;
    const auto make_heads = [&] {
      for (const Chunk& chunk : chunks) {
        inputs.push_back(leaf(chunk.of(x), input_trains));
        parts.push_back(heads(inputs.back(), chunk));
      }
    };
    std::array<at::Tensor, 3> qkv;
    at::Tensor attended;
    variable_list results;
    if (options.keep_attention) {
      results.assign(state.begin() + 1, state.end());
      attended = separable ? results[0] : graph_result.detach();
    } else {
      make_heads();
      qkv = join_heads(parts);
      if (separable) {
        const at::NoGradGuard no_grad;
        results = attention->forward(qkv[0], qkv[1], qkv[2]);
        attended = results[0];
      } else {
        attended = attend_with_graph(qkv);
      }
    }
    state.clear();

    // The output projection and the MLP.
    ParameterGradients output_gradients(layer.output_parameters());
    at::Tensor grad_x = input_trains && chunks.size() > 1 ? at::empty_like(x) : at::Tensor();
    at::Tensor grad_attended = chunks.size() > 1 ? at::empty_like(attended) : at::Tensor();
    for (const Chunk& chunk : chunks) {
      const variable_list in = {leaf(chunk.of(x), input_trains), leaf(chunk.of(attended))};
      const at::Tensor out = layer_output(*config, layer, in[0], in[1]);
      const variable_list found = output_gradients.run({out}, {chunk.of(grad_out)}, in, chunks.size());
      const at::NoGradGuard no_grad;
      if (chunks.size() == 1) {
        grad_x = found[0];
        grad_attended = found[1];
      } else {
        if (input_trains) chunk.of(grad_x).copy_(found[0]);
        chunk.of(grad_attended).copy_(found[1]);
      }
    }

    // Attention.
    std::array<at::Tensor, 3> grad_heads;
    if (options.keep_attention) {
      make_heads();
      if (separable) qkv = join_heads(parts);
    }
    if (separable) {
      const at::NoGradGuard no_grad;
      grad_heads = attention->gradients(grad_attended, qkv[0], qkv[1], qkv[2], results);
    } else {
      const variable_list found = torch::autograd::grad({graph_result}, graph_heads, {grad_attended});
      std::copy(found.begin(), found.end(), grad_heads.begin());
      graph_heads.clear();
      graph_result.reset();
    }
    qkv = {};
    attended.reset();
    grad_attended.reset();
    results.clear();

    // The heads.
    ParameterGradients head_gradients(layer.head_parameters());
    for (size_t i = 0; i < chunks.size(); ++i) {
      const variable_list chunk_grads = {chunks[i].of(grad_heads[0]), chunks[i].of(grad_heads[1]),
                                         chunks[i].of(grad_heads[2])};
      const at::Tensor found = head_gradients.run(parts[i], chunk_grads, {inputs[i]}, chunks.size())[0];
      parts[i].clear();
      const at::NoGradGuard no_grad;
      if (found.defined()) chunks[i].of(grad_x).add_(found);
    }

    variable_list result = {grad_x};
    head_gradients.append_to(result);
    output_gradients.append_to(result);
    return result;
  }
};

}  // namespace

int64_t default_chunk_tokens(int64_t intermediate_size) {
  const int64_t elements = int64_t{1} << 27;
  return std::max<int64_t>(256, elements / intermediate_size / 256 * 256);
}

at::Tensor checkpointed_layer(const ModelConfig& config, const Layer& layer, const at::Tensor& x,
                              const std::shared_ptr<const RopeTable>& rope,
                              const std::shared_ptr<const PackedAttention>& attention,
                              const CheckpointOptions& options) {
  const variable_list head_parameters = layer.head_parameters();
  const variable_list output_parameters = layer.output_parameters();
  variable_list sources = {x};
  sources.insert(sources.end(), head_parameters.begin(), head_parameters.end());
  sources.insert(sources.end(), output_parameters.begin(), output_parameters.end());

  auto node = std::make_shared<LayerNode>();
  node->config = &config;
  node->layer = layer;
  node->rope = rope;
  node->attention = attention;
  node->options = options;
  if (options.chunk_tokens == 0) node->options.chunk_tokens = default_chunk_tokens(config.intermediate_size);
  const bool separable = attention->separable(x.options(), config.head_dim);
  if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(sources)) {
    // Nothing to keep; the chunks still bound the memory.
    node->options.keep_attention = false;
    node->options.offload = nullptr;
    return node->forward(x, separable);
  }
  node->input_trains = x.requires_grad();
  node->set_next_edges(torch::autograd::collect_next_edges(sources));
  at::Tensor out = node->forward(x, separable);
  torch::autograd::set_history(out, node);
  return out;
}

}  // namespace topk_sft
