// Flat buffers, the hooks that fill them in the backward, and when units are gathered, summed and dropped.
#include "dist/parameter_shards.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <c10/core/StorageImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <charconv>

#include "io/error.h"

namespace topk_sft {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

constexpr int64_t kAlignment = 64;  // elements: whole cache lines, and what vector loads on a GPU ask for

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// N of "....layers.N....", -1 of any other name.
int64_t layer_of(const std::string& name) {
  constexpr std::string_view kLayers = "layers.";
  const size_t at = name.find(kLayers);
  if (at == std::string::npos) return -1;
  int64_t layer = -1;
  const char* begin = name.data() + at + kLayers.size();
  std::from_chars(begin, name.data() + name.size(), layer);
  return layer;
}

// Gives the memory of a tensor back, or gets it anew, behind every view of it: what autograd keeps of the
// parameters are views of the flat buffer.
void set_bytes(const at::Tensor& tensor, size_t bytes) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  storage->set_data_ptr_noswap(storage->allocator()->allocate(bytes));
  storage->set_nbytes(bytes);
}

}  // namespace

struct GradientHook : torch::autograd::PostAccumulateGradHook {
  GradientHook(ParameterShards& owner, size_t index) : shards(owner), parameter(index) {}
  void operator()(const at::Tensor&) override { shards.on_gradient(parameter); }
  ParameterShards& shards;
  size_t parameter;
};

Sharding sharding_of(const std::string& name) {
  if (name == "none") return Sharding::kNone;
  return name == "full" ? Sharding::kFull : Sharding::kOptimizer;
}

// ---------------------------------------------------------------------------------------------------------------
// Layout
// ---------------------------------------------------------------------------------------------------------------

ParameterShards::ParameterShards(const NamedTensors& parameters, int64_t layers, Ranks& ranks,
                                 Sharding sharding)
    : ranks_(ranks), sharding_(sharding), units_(static_cast<size_t>(layers) + 1) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : parameters) {
    Member member;
    member.name = name;
    member.tensor = tensor;
    member.unit = unit_of_layer(layer_of(name));
    units_.at(member.unit).members.push_back(members_.size());
    members_.push_back(std::move(member));
  }
  for (Unit& unit : units_) lay_out(unit);
  for (size_t i = 0; i < members_.size(); ++i) {
    torch::autograd::impl::set_post_acc_grad_hooks(members_[i].tensor,
                                                   std::make_unique<GradientHook>(*this, i));
  }
  if (sharding_ == Sharding::kFull) release_all();
}

ParameterShards::~ParameterShards() {
  for (const Member& member : members_)
    torch::autograd::impl::set_post_acc_grad_hooks(member.tensor, nullptr);
}

int64_t ParameterShards::owners() const {
  return sharding_ == Sharding::kNone ? 1 : ranks_.layout().world;
}

void ParameterShards::lay_out(Unit& unit) {
  if (unit.members.empty()) return;
  int64_t end = 0;
  for (const size_t i : unit.members) {
    members_[i].offset = end;
    end = round_up(end + members_[i].tensor.numel(), kAlignment);
  }
  unit.size = round_up(end, owners() * kAlignment);
  const int64_t part = unit.size / owners();
  const int64_t first = owners() == 1 ? 0 : ranks_.layout().rank * part;
  unit.flat = at::zeros({unit.size}, members_[unit.members[0]].tensor.options().requires_grad(false));
  for (const size_t i : unit.members) {
    Member& member = members_[i];
    const int64_t numel = member.tensor.numel();
    const at::Tensor place = unit.flat.narrow(0, member.offset, numel).view(member.tensor.sizes());
    place.copy_(member.tensor);
    member.tensor.set_data(place);
    const int64_t begin = std::max(first, member.offset);
    const int64_t size = std::min(first + part, member.offset + numel) - begin;
    if (size <= 0) continue;
    pieces_.push_back({i, member.unit, begin - member.offset, size, begin - first, member.tensor.dim() >= 2});
  }
  unit.own = unit.flat.narrow(0, first, part);
  if (sharding_ == Sharding::kFull) unit.own = unit.own.clone();
}

namespace {

at::Tensor piece_of(const at::Tensor& own, const ParameterShards::Piece& piece) {
  const at::Tensor flat = own.narrow(0, piece.place, piece.size);
  return piece.matrix ? flat.unsqueeze(0) : flat;
}

}  // namespace

at::Tensor ParameterShards::parameter(const Piece& piece) const {
  return piece_of(units_[piece.unit].own, piece);
}

at::Tensor ParameterShards::gradient(const Piece& piece) const {
  return piece_of(units_[piece.unit].own_gradients, piece);
}

// ---------------------------------------------------------------------------------------------------------------
// Gradients
// ---------------------------------------------------------------------------------------------------------------

void ParameterShards::zero_gradients() {
  const at::NoGradGuard no_grad;
  for (Unit& unit : units_) {
    if (sharding_ == Sharding::kFull) {
      if (unit.own_gradients.defined()) unit.own_gradients.zero_();
    } else if (unit.gradients.defined()) {
      unit.gradients.zero_();
    }
  }
}

void ParameterShards::on_gradient(size_t parameter) {
  const at::NoGradGuard no_grad;
  const Member& member = members_[parameter];
  const at::Tensor grad = member.tensor.grad();
  member.tensor.mutable_grad().reset();
  if (!grad.defined()) return;
  if (inspecting_) {
    const auto position = static_cast<int64_t>(parameter);
    if (position > bad_gradient_ && !at::isfinite(grad).all().item<bool>()) bad_gradient_ = position;
    return;
  }
  Unit& unit = units_[member.unit];
  if (!unit.gradients.defined()) {
    unit.gradients = at::zeros({unit.size}, grad.options().dtype(at::kFloat));
  }
  unit.gradients.narrow(0, member.offset, grad.numel()).view(grad.sizes()).add_(grad);
  ++unit.ready;
  if (last_backward_) sum_units(/*all=*/false);
}

void ParameterShards::sum_units(bool all) {
  while (next_sum_ < units_.size()) {
    // Layers from the last to the first, then the root, whose embedding is the last of all to be ready.
    Unit& unit = next_sum_ + 1 < units_.size() ? units_[units_.size() - 1 - next_sum_] : units_[0];
    if (!all && unit.ready < unit.members.size()) return;
    ++next_sum_;
    if (!unit.members.empty()) start_sum(unit);
  }
}

void ParameterShards::start_sum(Unit& unit) {
  const at::TensorOptions options = unit.flat.options().dtype(at::kFloat);
  const int64_t part = unit.size / owners();
  if (!unit.gradients.defined()) unit.gradients = at::zeros({unit.size}, options);
  switch (sharding_) {
    case Sharding::kNone:
      unit.own_gradients = unit.gradients;
      unit.summing = ranks_.sum(unit.gradients);
      return;
    case Sharding::kOptimizer:
      if (!unit.own_gradients.defined()) unit.own_gradients = at::empty({part}, options);
      unit.summing = ranks_.sum_scatter(unit.own_gradients, unit.gradients);
      return;
    case Sharding::kFull:
      // Two units of gradients at most are in memory: the one on its way and the one that is being made.
      for (Unit& other : units_) collect(other);
      unit.arriving = at::empty({part}, options);
      unit.summing = ranks_.sum_scatter(unit.arriving, unit.gradients);
      return;
  }
}

void ParameterShards::collect(Unit& unit) {
  if (!unit.summing.under_way()) return;
  unit.summing.wait();
  if (sharding_ != Sharding::kFull) return;
  if (unit.own_gradients.defined()) {
    unit.own_gradients.add_(unit.arriving);
  } else {
    unit.own_gradients = unit.arriving;
  }
  unit.arriving.reset();
  unit.gradients.reset();
}

void ParameterShards::begin_micro_batch(bool last) {
  last_backward_ = (last || sharding_ == Sharding::kFull) && !inspecting_;
  next_sum_ = 0;
  for (Unit& unit : units_) unit.ready = 0;
  begin_forward();
}

void ParameterShards::end_micro_batch() {
  const at::NoGradGuard no_grad;
  if (last_backward_) sum_units(/*all=*/true);
  if (sharding_ == Sharding::kFull) {
    for (Unit& unit : units_) collect(unit);
  }
  end_forward();
}

void ParameterShards::idle_micro_batch(bool last) {
  begin_micro_batch(last);
  idle_forward();
  if (sharding_ == Sharding::kFull) {
    for (size_t u = units_.size() - 1; u > 0; --u) {
      make_resident(u);
      if (u > 1) start_gather(u - 1);
      release(u);
    }
  }
  end_micro_batch();
}

void ParameterShards::finish_gradients() {
  const at::NoGradGuard no_grad;
  for (Unit& unit : units_) collect(unit);
}

void ParameterShards::inspect_gradients(bool on) {
  inspecting_ = on;
  bad_gradient_ = -1;
}

std::string ParameterShards::bad_gradient() const {
  return bad_gradient_ < 0 ? "" : members_[static_cast<size_t>(bad_gradient_)].name;
}

// ---------------------------------------------------------------------------------------------------------------
// Parameters
// ---------------------------------------------------------------------------------------------------------------

void ParameterShards::publish() {
  if (sharding_ != Sharding::kOptimizer) return;
  for (Unit& unit : units_) {
    if (!unit.members.empty()) unit.gathering = ranks_.gather(unit.flat, unit.own);
  }
  for (Unit& unit : units_) unit.gathering.wait();
}

void ParameterShards::start_gather(size_t index) {
  Unit& unit = units_[index];
  if (sharding_ != Sharding::kFull || unit.members.empty() || unit.resident) return;
  if (unit.gathering.under_way()) return;
  set_bytes(unit.flat, static_cast<size_t>(unit.size) * unit.flat.element_size());
  unit.gathering = ranks_.gather(unit.flat, unit.own);
}

void ParameterShards::make_resident(size_t index) {
  start_gather(index);
  units_[index].gathering.wait();
  units_[index].resident = true;
}

void ParameterShards::release(size_t index) {
  Unit& unit = units_[index];
  if (sharding_ != Sharding::kFull || keep_ || !unit.resident) return;
  if (!unit.members.empty()) set_bytes(unit.flat, 0);
  unit.resident = false;
}

void ParameterShards::begin_forward() {
  make_resident(0);
  if (units_.size() > 1) start_gather(1);
}

void ParameterShards::end_forward() {
  for (size_t u = 0; u < units_.size(); ++u) {
    // A layer that nothing asked the gradient of was gathered ahead and never used.
    if (units_[u].gathering.under_way()) make_resident(u);
    release(u);
  }
}

void ParameterShards::idle_forward() {
  if (sharding_ != Sharding::kFull) return;
  begin_forward();
  for (size_t u = 1; u < units_.size(); ++u) {
    make_resident(u);
    if (u + 1 < units_.size()) start_gather(u + 1);
    release(u);
  }
}

void ParameterShards::gather_all() {
  keep_ = true;
  for (size_t u = 0; u < units_.size(); ++u) make_resident(u);
}

void ParameterShards::release_all() {
  keep_ = false;
  for (size_t u = 0; u < units_.size(); ++u) release(u);
}

class EnterLayer : public torch::autograd::Function<EnterLayer> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, int64_t shards, int64_t layer) {
    auto& s = *reinterpret_cast<ParameterShards*>(shards);
    ctx->saved_data["shards"] = shards;
    ctx->saved_data["layer"] = layer;
    const size_t unit = s.unit_of_layer(layer);
    s.make_resident(unit);
    if (unit + 1 < s.units_.size()) s.start_gather(unit + 1);
    return x;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& s = *reinterpret_cast<ParameterShards*>(ctx->saved_data["shards"].toInt());
    s.release(s.unit_of_layer(ctx->saved_data["layer"].toInt()));
    return {grads[0], at::Tensor(), at::Tensor()};
  }
};

class LeaveLayer : public torch::autograd::Function<LeaveLayer> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, int64_t shards, int64_t layer) {
    auto& s = *reinterpret_cast<ParameterShards*>(shards);
    ctx->saved_data["shards"] = shards;
    ctx->saved_data["layer"] = layer;
    s.release(s.unit_of_layer(layer));
    return x;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& s = *reinterpret_cast<ParameterShards*>(ctx->saved_data["shards"].toInt());
    const size_t unit = s.unit_of_layer(ctx->saved_data["layer"].toInt());
    s.make_resident(unit);
    if (unit > 1) s.start_gather(unit - 1);
    return {grads[0], at::Tensor(), at::Tensor()};
  }
};

at::Tensor ParameterShards::enter_layer(int64_t layer, const at::Tensor& x) {
  return EnterLayer::apply(x, reinterpret_cast<int64_t>(this), layer);
}

at::Tensor ParameterShards::leave_layer(int64_t layer, const at::Tensor& x) {
  return LeaveLayer::apply(x, reinterpret_cast<int64_t>(this), layer);
}

// ---------------------------------------------------------------------------------------------------------------
// Whole parameters for checkpoints
// ---------------------------------------------------------------------------------------------------------------

ParameterShards::Collector::Collector(const ParameterShards& shards, std::vector<at::Tensor> values)
    : shards_(shards), values_(std::move(values)), gathered_(shards.units_.size()) {}

at::Tensor ParameterShards::Collector::whole(size_t parameter) {
  const at::NoGradGuard no_grad;
  const Member& member = shards_.members_.at(parameter);
  at::Tensor& gathered = gathered_[member.unit];
  if (!gathered.defined()) {
    // One layer at a time; the root's parameters lie around all layers and stay.
    for (size_t u = 1; u < gathered_.size(); ++u) gathered_[u].reset();
    const Unit& unit = shards_.units_[member.unit];
    const int64_t part = unit.size / shards_.owners();
    const at::Tensor own = at::zeros({part}, unit.flat.options().dtype(at::kFloat));
    for (size_t i = 0; i < values_.size(); ++i) {
      const Piece& piece = shards_.pieces_[i];
      if (piece.unit == member.unit) piece_of(own, piece).copy_(values_[i]);
    }
    gathered = own;
    if (shards_.owners() > 1) {
      gathered = at::empty({unit.size}, own.options());
      shards_.ranks_.gather(gathered, own).wait();
    }
    if (shards_.ranks_.first()) gathered = gathered.to(at::kCPU);
  }
  if (!shards_.ranks_.first()) return at::Tensor();
  return gathered.narrow(0, member.offset, member.tensor.numel()).view(member.tensor.sizes());
}

}  // namespace topk_sft
