// AdamW over whole parameters or over pieces of them.
#include "dist/rank_optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>

#include "io/error.h"

namespace topk_sft {

RankOptimizer::RankOptimizer(CausalLM& model, const AdamWOptions& options, std::vector<at::Tensor> masters,
                             Ranks& ranks, Sharding sharding)
    : parameters_(model.trained_parameters()), ranks_(ranks), model_(model) {
  if (!ranks.several()) {
    adamw_ = std::make_unique<AdamW>(parameters_, options, std::move(masters));
    return;
  }
  const at::NoGradGuard no_grad;
  shards_ = std::make_unique<ParameterShards>(parameters_, model.config().num_layers, ranks, sharding);
  NamedTensors pieces;
  std::vector<at::Tensor> piece_masters;
  for (const ParameterShards::Piece& piece : shards_->pieces()) {
    const at::Tensor own = shards_->parameter(piece);
    pieces.emplace_back(parameters_[piece.parameter].first, own);
    pieces_.push_back(own);
    if (masters.empty()) continue;
    // A copy, so that what other ranks own of the master can go.
    const at::Tensor flat = masters.at(piece.parameter).flatten();
    piece_masters.push_back(flat.narrow(0, piece.begin, piece.size).clone().view(own.sizes()));
  }
  adamw_ = std::make_unique<AdamW>(std::move(pieces), options, std::move(piece_masters));
  if (sharding == Sharding::kFull) {
    model.set_layer_hooks(
        {[this](int64_t layer, const at::Tensor& x) { return shards_->enter_layer(layer, x); },
         [this](int64_t layer, const at::Tensor& x) { return shards_->leave_layer(layer, x); }});
  }
}

RankOptimizer::~RankOptimizer() {
  model_.set_layer_hooks({});
}

at::Device RankOptimizer::device() const {
  return parameters_.front().second.device();
}

// ---------------------------------------------------------------------------------------------------------------
// A step
// ---------------------------------------------------------------------------------------------------------------

void RankOptimizer::zero_grad(bool single_pass) {
  // Pieces get their gradients once, when the sum over all ranks is there.
  adamw_->zero_grad(shards_ != nullptr || single_pass);
  if (shards_ != nullptr) shards_->zero_gradients();
}

void RankOptimizer::begin_micro_batch(bool last) {
  if (shards_ != nullptr) shards_->begin_micro_batch(last);
}

void RankOptimizer::end_micro_batch() {
  if (shards_ != nullptr) {
    shards_->end_micro_batch();
    return;
  }
  adamw_->accumulate();
  if (!inspecting_) return;
  if (bad_gradient_.empty()) bad_gradient_ = adamw_->nonfinite_gradient();
  adamw_->zero_grad(/*single_pass=*/true);
}

void RankOptimizer::idle_micro_batch(bool last) {
  if (shards_ != nullptr) shards_->idle_micro_batch(last);
}

at::Tensor RankOptimizer::finish_gradients() {
  if (shards_ != nullptr) {
    shards_->finish_gradients();
    adamw_->zero_grad(/*single_pass=*/true);
    for (size_t i = 0; i < pieces_.size(); ++i) {
      pieces_[i].mutable_grad() = shards_->gradient(shards_->pieces()[i]);
    }
    adamw_->accumulate();
    // Every rank owns everything: one of them counts.
    if (shards_->sharding() == Sharding::kNone && !ranks_.first()) return at::zeros({});
  }
  // In float64 the square of a float32 norm neither overflows nor rounds.
  return adamw_->grad_norm().to(at::kDouble).square();
}

void RankOptimizer::step(double learning_rate) {
  adamw_->step(learning_rate);
  if (shards_ != nullptr) shards_->publish();
}

void RankOptimizer::inspect_gradients(bool on) {
  inspecting_ = on;
  bad_gradient_.clear();
  if (shards_ != nullptr) shards_->inspect_gradients(on);
  if (shards_ == nullptr) adamw_->zero_grad(/*single_pass=*/true);
}

std::string RankOptimizer::bad_gradient() const {
  return shards_ != nullptr ? shards_->bad_gradient() : bad_gradient_;
}

std::string RankOptimizer::bad_parameter() const {
  for (const auto& [name, master] : adamw_->masters()) {
    if (!at::isfinite(master).all().item<bool>()) return name;
  }
  return "";
}

// ---------------------------------------------------------------------------------------------------------------
// Forward passes and the whole model
// ---------------------------------------------------------------------------------------------------------------

void RankOptimizer::begin_forward() {
  if (shards_ != nullptr) shards_->begin_forward();
}

void RankOptimizer::end_forward() {
  if (shards_ != nullptr) shards_->end_forward();
}

void RankOptimizer::idle_forward() {
  if (shards_ == nullptr) return;
  shards_->idle_forward();
  shards_->end_forward();
}

void RankOptimizer::on_first_with_whole_model(const std::function<void()>& action) {
  if (shards_ != nullptr) shards_->gather_all();
  if (ranks_.first()) action();
  ranks_.wait_for_first();
  if (shards_ != nullptr) shards_->release_all();
}

// ---------------------------------------------------------------------------------------------------------------
// Checkpoints
// ---------------------------------------------------------------------------------------------------------------

void RankOptimizer::read_state(State state,
                               const std::function<void(const std::string&, const at::Tensor&)>& take) const {
  const NamedTensors values = state == State::kMaster   ? adamw_->masters()
                              : state == State::kExpAvg ? adamw_->exp_avg()
                                                        : adamw_->exp_avg_sq();
  if (shards_ == nullptr) {
    for (const auto& [name, value] : values) take(name, value.detach().to(at::kCPU).contiguous());
    return;
  }
  std::vector<at::Tensor> pieces;
  for (const auto& [name, value] : values) pieces.push_back(value);
  ParameterShards::Collector collector(*shards_, std::move(pieces));
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor whole = collector.whole(i);
    if (ranks_.first()) take(parameters_[i].first, whole.contiguous());
  }
}

void RankOptimizer::restore(int64_t updates, const std::function<at::Tensor(State, size_t)>& values) {
  const auto all = [&](State state) {
    std::vector<at::Tensor> out;
    if (shards_ == nullptr) {
      for (size_t i = 0; i < parameters_.size(); ++i) out.push_back(values(state, i));
      return out;
    }
    for (const ParameterShards::Piece& piece : shards_->pieces()) {
      const at::Tensor flat = values(state, piece.parameter).flatten().narrow(0, piece.begin, piece.size);
      out.push_back(flat.clone().view(shards_->parameter(piece).sizes()));
    }
    return out;
  };
  adamw_->restore(updates, all(State::kMaster), all(State::kExpAvg), all(State::kExpAvgSq));
  if (shards_ != nullptr) shards_->publish();
}

}  // namespace topk_sft
