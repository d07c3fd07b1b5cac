#include "train/checkpoint.h"

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "io/atomic_file.h"
#include "io/error.h"
#include "io/safetensors.h"
#include "recipe/keys.h"
#include "train/checkpoint_dir.h"

namespace topk_sft {

namespace {

namespace fs = std::filesystem;

constexpr const char* kFormat = "topk-sft-checkpoint";

void write_tensors(const std::string& path, const NamedTensors& tensors, DType dtype) {
  SafetensorsWriter writer(path, {{"format", "pt"}});
  for (const auto& [name, tensor] : tensors) writer.declare(name, dtype, tensor.sizes().vec());
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor host = tensor.detach().to(at::kCPU).contiguous();
    writer.write(name, host.data_ptr(), host.nbytes());
  }
  writer.commit();
}

// The float32 state of all parameters, as (prefix of the names, which) one behind the other.
using StateParts = std::vector<std::pair<std::string, RankOptimizer::State>>;

void write_state(const std::string& path, const StateParts& parts, const RankOptimizer& optimizer) {
  SafetensorsWriter writer(path, {{"format", "pt"}});
  for (const auto& [prefix, state] : parts) {
    for (const auto& [name, tensor] : optimizer.parameters()) {
      writer.declare(prefix + name, DType::kF32, tensor.sizes().vec());
    }
  }
  for (const auto& part : parts) {
    const std::string& prefix = part.first;
    optimizer.read_state(part.second, [&](const std::string& name, const at::Tensor& values) {
      writer.write(prefix + name, values.data_ptr(), values.nbytes());
    });
  }
  writer.commit();
}

// One tensor of a file; its shape must be that of `like`.
at::Tensor state_tensor(const SafetensorsFile& file, const std::string& name, const at::Tensor& like) {
  const TensorInfo& info = file.at(name);
  if (info.dtype != DType::kF32 || info.shape != like.sizes().vec()) {
    fail("{}: {} is {} {}, but this run has F32 {}", file.path(), name, dtype_name(info.dtype),
         shape_string(info.shape), shape_string(like.sizes().vec()));
  }
  const auto bytes = file.bytes(info);
  at::Tensor copy = at::empty(info.shape, at::kFloat);  // the mapping need not be aligned
  std::memcpy(copy.data_ptr(), bytes.data(), bytes.size());
  return copy;
}

const StateParts kWeights = {{"", RankOptimizer::State::kMaster}};
const StateParts kMoments = {{"exp_avg.", RankOptimizer::State::kExpAvg},
                             {"exp_avg_sq.", RankOptimizer::State::kExpAvgSq}};
// Adapters are saved without the weights that they belong to.
const char* weights_file(const RunPlan& plan) {
  return plan.lora ? "adapter_model.safetensors" : "model.safetensors";
}

// Generators whose state a run depends on: the CPU's, and the device's own.
std::vector<std::pair<std::string, at::Generator>> generators(const RankOptimizer& optimizer) {
  std::vector<std::pair<std::string, at::Generator>> out;
  out.emplace_back("cpu", at::globalContext().defaultGenerator(at::kCPU));
  const at::Device device = optimizer.device();
  if (!device.is_cpu()) out.emplace_back("device", at::globalContext().defaultGenerator(device));
  return out;
}

Json may_change_values(const Recipe& recipe) {
  Json out = Json::object();
  for (const Key& key : recipe_keys()) {
    if (key.on_resume == OnResume::kMayChange) out[key.full_name()] = value_text(key, recipe);
  }
  return out;
}

struct SavedState {
  TrainState train;
  int64_t updates = 0;
  Json identity;
  Json settings;
};

SavedState read_state(const std::string& path) {
  const std::string file = (fs::path(path) / "trainer_state.json").string();
  const Json json = read_json_file(file);
  try {
    if (json.at("format").get<std::string>() != kFormat || json.at("version").get<int>() != 1) {
      fail("{}: not the state of a checkpoint that this program reads", file);
    }
    SavedState s;
    s.train.step = json.at("step").get<int64_t>();
    s.train.sampler = {json.at("epoch").get<int64_t>(), json.at("position").get<int64_t>()};
    s.train.tokens = json.at("tokens").get<int64_t>();
    s.train.targets = json.at("targets").get<int64_t>();
    s.updates = json.at("updates").get<int64_t>();
    s.identity = json.at("identity");
    s.settings = json.at("settings");
    if (!s.identity.is_object() || !s.settings.is_object() || s.train.step < 0 || s.updates < 0) {
      fail("{}: not the state of a checkpoint that this program reads", file);
    }
    return s;
  } catch (const Json::exception& e) {
    fail("{}: {}", file, e.what());
  }
}

// Why the checkpoint cannot continue this run; empty if it can.
std::string fault_of(const RunPlan& plan, const std::string& path) {
  if (const std::string fault = checkpoint_fault(path, /*hashes=*/true); !fault.empty()) return fault;
  try {
    const SavedState saved = read_state(path);
    const Json identity = plan.identity();
    for (const auto& [name, value] : identity.items()) {
      const Json was = saved.identity.contains(name) ? saved.identity.at(name) : Json("not recorded");
      if (was != value) {
        return fmt::format("{} belongs to another run: {} was '{}' there and is '{}' here", path, name,
                           was.is_string() ? was.get<std::string>() : was.dump(), value.get<std::string>());
      }
    }
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace

std::string save_checkpoint(const RunPlan& plan, const TrainState& state, const RankOptimizer& optimizer) {
  const std::string target =
      (fs::path(plan.recipe.checkpoint.output_dir) / fmt::format("step-{}", state.step)).string();
  if (!plan.ranks.first()) {
    for (const StateParts* parts : {&kWeights, &kMoments}) {
      for (const auto& part : *parts) optimizer.read_state(part.second, nullptr);
    }
    return target;
  }
  // A folder of that name is a save that was cut short, or one that was found broken: a whole one is never
  // written twice, because a run does not start below a whole checkpoint.
  AtomicFolder folder(target, /*replace=*/true);
  const fs::path inside = folder.path();
  write_state((inside / weights_file(plan)).string(), kWeights, optimizer);
  write_state((inside / "optimizer.safetensors").string(), kMoments, optimizer);
  NamedTensors random;
  for (auto& [name, generator] : generators(optimizer)) random.emplace_back(name, generator.get_state());
  write_tensors((inside / "rng.safetensors").string(), random, DType::kU8);
  const Json json = {{"format", kFormat},
                     {"version", 1},
                     {"step", state.step},
                     {"updates", optimizer.updates()},
                     {"epoch", state.sampler.epoch},
                     {"position", state.sampler.position},
                     {"tokens", state.tokens},
                     {"targets", state.targets},
                     {"identity", plan.identity()},
                     {"settings", may_change_values(plan.recipe)}};
  write_file_atomic((inside / "trainer_state.json").string(), json.dump(2) + "\n");
  write_file_atomic((inside / "recipe.yaml").string(), recipe_to_yaml(plan.recipe));
  folder.commit();
  mark_complete(target, state.step);
  return target;
}

std::string find_checkpoint(const RunPlan& plan, const std::string& wanted, std::vector<std::string>& notes) {
  const std::string& output_dir = plan.recipe.checkpoint.output_dir;
  std::string path = wanted;
  if (wanted == "latest") {
    path.clear();
    for (const CheckpointEntry& entry : list_checkpoints(output_dir)) {
      if (entry.marked) {
        path = entry.path;
      } else {
        notes.push_back(fmt::format("{} has no {} marker: it was never finished and is not used", entry.path,
                                    kCompleteMarker));
      }
    }
    if (path.empty()) fail("--resume latest: {} holds no complete checkpoint", output_dir);
  }
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  if (!fs::exists(path)) fail("--resume: there is no checkpoint {}", path);
  if (const std::string fault = fault_of(plan, path); !fault.empty()) {
    // Offer the newest usable checkpoint before the refused one.
    const std::string parent = fs::path(path).has_parent_path() ? fs::path(path).parent_path().string() : ".";
    std::vector<CheckpointEntry> others = list_checkpoints(parent);
    std::reverse(others.begin(), others.end());
    int64_t refused_step = INT64_MAX;
    for (const CheckpointEntry& entry : others) {
      if (fs::equivalent(entry.path, path)) refused_step = entry.step;
    }
    for (const CheckpointEntry& entry : others) {
      if (entry.step < refused_step && fault_of(plan, entry.path).empty()) {
        fail(
            "checkpoint {} is refused: {}; the previous usable checkpoint is {}: continue from it with "
            "--resume {}",
            path, fault, entry.path, entry.path);
      }
    }
    fail("checkpoint {} is refused: {}; there is no earlier usable checkpoint in {}", path, fault, parent);
  }

  const SavedState saved = read_state(path);
  const Json settings = may_change_values(plan.recipe);
  for (const auto& [name, value] : settings.items()) {
    const Json was = saved.settings.contains(name) ? saved.settings.at(name) : Json("not recorded");
    if (was != value) {
      notes.push_back(fmt::format("{} was {} when the checkpoint was written and is {} now", name,
                                  was.is_string() ? was.get<std::string>() : was.dump(),
                                  value.get<std::string>()));
    }
  }
  // Going on from here would write the later checkpoints of this folder anew.
  for (const CheckpointEntry& entry : list_checkpoints(output_dir)) {
    if (entry.step <= saved.train.step || !entry.marked) continue;
    if (checkpoint_fault(entry.path, /*hashes=*/true).empty()) {
      fail("{} is newer than {}: continue from it, move it away, or give another checkpoint.output_dir",
           entry.path, path);
    }
    const std::string aside =
        (fs::path(output_dir) / ("broken-" + fs::path(entry.path).filename().string())).string();
    std::error_code error;
    fs::rename(entry.path, aside, error);
    if (error) fail("{} is damaged and cannot be renamed to {}: {}", entry.path, aside, error.message());
    notes.push_back(fmt::format("{} is damaged and was renamed to {}", entry.path, aside));
  }
  return path;
}

TrainState restore_checkpoint(const RunPlan& plan, const std::string& path, RankOptimizer& optimizer) {
  const SavedState saved = read_state(path);
  const SafetensorsFile weights((fs::path(path) / weights_file(plan)).string());
  const SafetensorsFile moments((fs::path(path) / "optimizer.safetensors").string());
  const SafetensorsFile random((fs::path(path) / "rng.safetensors").string());
  const NamedTensors& like = optimizer.parameters();
  if (weights.tensors().size() != like.size()) {
    fail("{}: {} tensors, but the model has {} parameters", weights.path(), weights.tensors().size(),
         like.size());
  }
  optimizer.restore(saved.updates, [&](RankOptimizer::State state, size_t i) {
    const auto& [name, tensor] = like[i];
    for (const auto& [prefix, part] : kMoments) {
      if (part == state) return state_tensor(moments, prefix + name, tensor);
    }
    return state_tensor(weights, name, tensor);
  });
  for (auto& [name, generator] : generators(optimizer)) {
    const auto bytes = random.view<uint8_t>(name);
    at::Tensor state = at::empty({static_cast<int64_t>(bytes.size())}, at::kByte);
    std::memcpy(state.data_ptr(), bytes.data(), bytes.size());
    generator.set_state(state);
  }
  Sampler sampler = plan.make_sampler();
  sampler.restore(saved.train.sampler);  // refuses a position outside the data
  return saved.train;
}

}  // namespace topk_sft
