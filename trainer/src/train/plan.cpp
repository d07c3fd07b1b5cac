#include "train/plan.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "io/error.h"
#include "io/sha256.h"
#include "recipe/keys.h"
#include "topk_attn/contract.h"
#include "train/base_weights.h"
#include "train/console.h"

namespace topk_sft {

namespace {

namespace fs = std::filesystem;

SparsityConfig recipe_sparsity(const Recipe& recipe) {
  const AttentionSection& a = recipe.attention;
  SparsityConfig s;
  s.topk = a.topk;
  s.ratio = a.ratio;
  s.min_keys = a.min_keys;
  s.max_keys = a.max_keys;
  s.select = a.select;
  s.sink = a.sink;
  s.recent = a.recent;
  s.dense_layers = a.dense_layers;
  std::sort(s.dense_layers.begin(), s.dense_layers.end());
  return s;
}

int64_t kept_keys(const SparsityConfig& s, int64_t n) {
  topk_attn::Budget budget;
  budget.topk = s.topk.value_or(0);
  budget.ratio = s.ratio.value_or(0.0);
  budget.min_keys = s.min_keys;
  budget.max_keys = s.max_keys.value_or(topk_attn::kNoLimit);
  return topk_attn::budget(n, budget);
}

// Tokens of the largest micro-batch that the training data can give.
int64_t largest_batch(const RunPlan& plan) {
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < plan.train.bins.size(); ++i)
    sizes.push_back(plan.train.tokens({static_cast<int64_t>(i)}));
  std::sort(sizes.rbegin(), sizes.rend());
  sizes.resize(std::min(sizes.size(), static_cast<size_t>(plan.recipe.train.micro_batch_size)));
  int64_t sum = 0;
  for (const int64_t size : sizes) sum += size;
  return sum;
}

std::string describe_data(const char* name, const TokenDataset& data, const PackedDataset& packed,
                          int64_t sequence_len) {
  const PiecePlan& p = packed.plan;
  const double room = static_cast<double>(packed.bins.size()) * static_cast<double>(sequence_len);
  std::string out = fmt::format(
      "  {:<10} {} documents, {} tokens, {} of them targets, in {} sequences ({:.1f} % full)\n", name,
      count_text(data.num_documents()), count_text(p.tokens), count_text(p.targets),
      count_text(packed.bins.size()), room > 0 ? 100 * static_cast<double>(p.tokens) / room : 0.0);
  const auto add = [&](const std::string& text) { out += fmt::format("  {:<10} {}\n", "", text); };
  if (p.documents_without_target > 0) {
    add(fmt::format("{} documents left out: no token in them carries loss",
                    count_text(p.documents_without_target)));
  }
  if (p.documents_cut > 0) {
    add(p.tokens_truncated > 0
            ? fmt::format("{} documents cut to {} tokens: {} tokens dropped", count_text(p.documents_cut),
                          sequence_len, count_text(p.tokens_truncated))
            : fmt::format("{} documents split into pieces of up to {} tokens", count_text(p.documents_cut),
                          sequence_len));
  }
  if (p.pieces_without_target > 0) {
    add(fmt::format("{} pieces of them left out: no token in them carries loss",
                    count_text(p.pieces_without_target)));
  }
  return out;
}

std::string describe_attention(const RunPlan& plan) {
  const Recipe& r = plan.recipe;
  if (!r.uses_topk()) return "dense";
  const SparsityConfig& s = *plan.sparsity;
  std::string out =
      s.topk ? fmt::format("exact top-k, topk {}", *s.topk) : fmt::format("exact top-k, ratio {}", *s.ratio);
  out += fmt::format(", min_keys {}", s.min_keys);
  if (s.max_keys) out += fmt::format(", max_keys {}", *s.max_keys);
  out += fmt::format(", per {}", s.select == "head" ? "head" : "KV group");
  if (s.sink > 0) out += fmt::format(", sink {}", s.sink);
  if (s.recent > 0) out += fmt::format(", recent {}", s.recent);
  if (!s.dense_layers.empty()) out += fmt::format("; layers {} dense", fmt::join(s.dense_layers, ", "));
  out += "; keeps";
  for (int64_t n = 64; n < r.data.sequence_len; n *= 8) out += fmt::format(" {} of {},", kept_keys(s, n), n);
  out += fmt::format(" {} of {} keys", kept_keys(s, r.data.sequence_len), r.data.sequence_len);
  return r.attention.mode == "topk" ? out : "dense; evaluation also under " + out;
}

std::string describe_memory(const RunPlan& plan) {
  const Recipe& r = plan.recipe;
  MemorySettings settings;
  settings.bfloat16 = r.model.dtype == "bfloat16";
  settings.cuda = r.model.device != "cpu";
  settings.tokens = largest_batch(plan) / plan.ranks.sequence_ranks;
  settings.longest = plan.train.plan.longest;
  settings.kept = r.attention.mode == "topk" ? kept_keys(*plan.sparsity, plan.train.plan.longest) : 0;
  settings.accumulates = r.train.gradient_accumulation_steps > 1 || plan.ranks.several();
  settings.checkpointing = r.train.gradient_checkpointing;
  settings.keeps_attention = r.train.recompute == "all_but_attention";
  settings.offloads = r.train.offload_activations;
  settings.lora = plan.lora;
  MemoryEstimate m = estimate_memory(plan.config, settings);
  const auto ranks = static_cast<double>(plan.ranks.world);
  if (r.train.sharding != "none") {
    m.master_weights /= ranks;
    m.moments /= ranks;
  }
  if (r.train.sharding == "full" && !plan.lora) {
    m.weights /= ranks;
    m.gradients /= ranks;
  }
  std::string out = fmt::format("about {}{}: weights {}", bytes_text(m.total()),
                                plan.ranks.several() ? " a rank" : "", bytes_text(m.weights));
  if (settings.bfloat16) out += fmt::format(", float32 masters {}", bytes_text(m.master_weights));
  out += fmt::format(
      ", gradients {}, moments {}, activations {} kept and {} at work (micro-batches of up to {} tokens), "
      "output head {}",
      bytes_text(m.gradients), bytes_text(m.moments), bytes_text(m.kept), bytes_text(m.working),
      count_text(settings.tokens), bytes_text(m.logits));
  if (settings.offloads) out += fmt::format("; {} of activations in host memory", bytes_text(m.host));
  return out;
}

std::string describe_ranks(const RunPlan& plan) {
  const RankLayout& ranks = plan.ranks;
  const std::string& sharding = plan.recipe.train.sharding;
  std::string out = fmt::format("{}, {} micro-batches at a time", ranks.world, ranks.data_ranks());
  if (ranks.sequence_ranks > 1) out += fmt::format(", each over the heads of {} ranks", ranks.sequence_ranks);
  if (sharding == "none") return out + "; nothing is divided";
  return out + (sharding == "full" ? "; weights, gradients and the optimizer's state are divided"
                                   : "; the optimizer's state is divided");
}

// Micro-batches in one optimizer step of all ranks.
int64_t micro_batches_per_step(const RunPlan& plan) {
  return plan.recipe.train.gradient_accumulation_steps * plan.ranks.data_ranks();
}

// The division of the ranks, and this rank's device.
void lay_out_ranks(RunPlan& plan, const Launch& launch) {
  const TrainSection& t = plan.recipe.train;
  const ModelConfig& c = plan.config;
  plan.ranks = {launch.rank, launch.world, t.sequence_parallel};
  const int64_t n = t.sequence_parallel;
  if (launch.world % n != 0) {
    fail("train.sequence_parallel is {}: it must divide the number of ranks, {}", n, launch.world);
  }
  if (c.num_heads % n != 0 || c.num_kv_heads % n != 0) {
    fail("train.sequence_parallel is {}: it must divide the model's {} heads and {} KV heads", n, c.num_heads,
         c.num_kv_heads);
  }
  plan.device = plan.recipe.model.device;
  if (!plan.ranks.several() || plan.device == "cpu") return;
  if (plan.device != "cuda") {
    fail(
        "model.device is {}: with several ranks it must be cuda, of which each takes the GPU of its "
        "LOCAL_RANK",
        plan.device);
  }
  plan.device = fmt::format("cuda:{}", launch.local_rank);
}

std::string describe_schedule(const RunPlan& plan) {
  const Schedule& s = plan.schedule;
  std::string out = fmt::format("{}, peak {:g}, {} steps of warm-up", s.kind, s.peak, s.warmup_steps);
  if (s.kind == "wsd") out += fmt::format(", {} steps of {} decay", s.decay_steps, s.decay_shape);
  out += "; rate";
  int64_t last = -1;
  for (const int64_t step : {int64_t{0}, s.warmup_steps, s.total_steps / 2, s.total_steps - 1}) {
    if (step <= last || step >= s.total_steps) continue;
    out += fmt::format("{} {:.3g} at step {}", last < 0 ? "" : ",", s.learning_rate(step), step + 1);
    last = step;
  }
  return out;
}

}  // namespace

Sampler RunPlan::make_sampler() const {
  return Sampler(static_cast<int64_t>(train.bins.size()), recipe.train.micro_batch_size,
                 micro_batches_per_step(*this), recipe.data.shuffle,
                 static_cast<uint64_t>(recipe.train.seed));
}

std::optional<SparsityConfig> RunPlan::sparsity_of(const std::string& mode) const {
  return mode == "topk" ? sparsity : std::nullopt;
}

SparsityConfig RunPlan::sparsity_at(double ratio) const {
  SparsityConfig s = recipe_sparsity(recipe);
  s.topk.reset();
  s.ratio = ratio;
  return s;
}

Json RunPlan::identity() const {
  Json out = Json::object();
  const ModelConfig& c = config;
  out["model"] = fmt::format(
      "{}: {} layers, hidden {}, mlp {}, {} heads, {} KV heads, head dim {}, vocabulary {}, {}",
      family_name(c.family), c.num_layers, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads,
      c.head_dim, c.vocab_size, c.tie_embeddings ? "tied embeddings" : "untied embeddings");
  out["tokenizer_sha256"] = tokenizer_sha256;
  out["training data"] = fmt::format("{} documents, {} tokens, fingerprint {}", train_data.num_documents(),
                                     train_data.num_tokens(), train_data.fingerprint());
  if (!base_fingerprint.empty()) out["frozen weights"] = base_fingerprint;
  for (const Key& key : recipe_keys()) {
    if (key.on_resume == OnResume::kMustMatch) out[key.full_name()] = value_text(key, recipe);
  }
  // A run may go on with another number of ranks if its steps stay the same.
  out["train.gradient_accumulation_steps"] = std::to_string(micro_batches_per_step(*this));
  return out;
}

RunPlan make_plan(const Recipe& recipe, const Launch& launch) {
  RunPlan plan;
  plan.recipe = recipe;
  const std::string& folder = recipe.model.base_model;
  if (!fs::is_directory(folder)) fail("model.base_model: {} is not a folder", folder);
  plan.config = read_model_config(folder);
  lay_out_ranks(plan, launch);
  if (recipe.attention.topk || recipe.attention.ratio) {
    plan.sparsity = recipe_sparsity(recipe);
    check_sparsity(*plan.sparsity, plan.config.num_layers, "section attention");
  }
  for (const double ratio : recipe.train.eval_ratios) {
    check_sparsity(plan.sparsity_at(ratio), plan.config.num_layers, "section attention");
  }
  if (recipe.model.adapter == "lora") {
    const ModelSection& m = recipe.model;
    plan.lora = LoraOptions{m.lora_r, m.lora_alpha, m.lora_target_modules};
    if (!m.random_init) plan.base_fingerprint = weights_fingerprint(folder);
  }
  plan.tokenizer_path = (fs::path(folder) / "tokenizer.json").string();
  plan.tokenizer_sha256 = sha256_file(plan.tokenizer_path);
  const ShardRequirements requirements{plan.tokenizer_path, plan.tokenizer_sha256, plan.config.vocab_size};

  const DataSection& d = recipe.data;
  std::vector<std::string> train_files = d.train_files;
  std::vector<std::string> eval_files = d.eval_files;
  if (!d.dataset_prepared_path.empty()) {
    train_files = find_shards(d.dataset_prepared_path, d.train_split);
    eval_files = find_shards(d.dataset_prepared_path, d.eval_split);
    if (train_files.empty()) {
      fail("data.dataset_prepared_path: {} holds no token shard of the split '{}'", d.dataset_prepared_path,
           d.train_split);
    }
  }
  plan.train_data = TokenDataset(train_files, requirements);
  plan.eval_data = TokenDataset(eval_files, requirements);
  const bool split = d.overflow == "split";
  plan.train = pack_dataset(plan.train_data, d.sequence_len, split, d.sample_packing);
  plan.eval = pack_dataset(plan.eval_data, d.sequence_len, split, d.sample_packing);
  if (recipe.train.eval_steps > 0 && plan.eval.bins.empty()) {
    fail("train.eval_steps is {}, but there is no held-out data: {}", recipe.train.eval_steps,
         d.dataset_prepared_path.empty() ? std::string("data.eval_files is empty")
                                         : fmt::format("{} holds no document with a target in split '{}'",
                                                       d.dataset_prepared_path, d.eval_split));
  }
  if (plan.config.max_position > 0 && plan.train.plan.longest > plan.config.max_position) {
    plan.notes.push_back(
        fmt::format("documents of up to {} tokens are longer than the model's max_position_embeddings, {}",
                    plan.train.plan.longest, plan.config.max_position));
  }

  const Sampler sampler = plan.make_sampler();  // an Error if there is nothing to train on
  plan.steps_per_epoch = sampler.steps_per_epoch();
  const double steps = recipe.train.num_epochs * static_cast<double>(plan.steps_per_epoch);
  if (!recipe.train.max_steps && steps > 1e15)
    fail("train.num_epochs is {}: too many steps", recipe.train.num_epochs);
  plan.total_steps = recipe.train.max_steps
                         ? *recipe.train.max_steps
                         : std::max<int64_t>(1, static_cast<int64_t>(std::ceil(steps - 1e-9)));
  plan.schedule = make_schedule(recipe.optim, plan.total_steps);
  if (plan.schedule.warmup_steps >= plan.total_steps) {
    plan.notes.push_back(
        fmt::format("the warm-up takes {} steps and the run has {}: the peak learning rate is never "
                    "reached",
                    plan.schedule.warmup_steps, plan.total_steps));
  }
  return plan;
}

StepPlan eval_batches(const RunPlan& plan) {
  StepPlan batches;
  const auto total = static_cast<int64_t>(plan.eval.bins.size());
  for (int64_t begin = 0; begin < total; begin += plan.recipe.train.micro_batch_size) {
    if (plan.recipe.train.max_eval_batches &&
        static_cast<int64_t>(batches.size()) == *plan.recipe.train.max_eval_batches) {
      break;
    }
    std::vector<int64_t> batch;
    for (int64_t i = begin; i < std::min(total, begin + plan.recipe.train.micro_batch_size); ++i)
      batch.push_back(i);
    batches.push_back(std::move(batch));
  }
  return batches;
}

std::string describe_plan(const RunPlan& plan) {
  const Recipe& r = plan.recipe;
  const ModelConfig& c = plan.config;
  std::string out;
  const auto add = [&](const char* name, const std::string& text) {
    out += fmt::format("  {:<10} {}\n", name, text);
  };
  add("model",
      fmt::format("{}: {}, {} layers, {} parameters, {} on {}", r.model.base_model, family_name(c.family),
                  c.num_layers, count_text(parameter_count(c)), r.model.dtype, r.model.device));
  if (plan.lora) {
    add("adapter", fmt::format("LoRA of rank {}, alpha {:g}, on {}; {} parameters train", plan.lora->rank,
                               plan.lora->alpha, fmt::join(plan.lora->targets, ", "),
                               count_text(adapter_parameter_count(c, *plan.lora))));
  }
  add("attention", describe_attention(plan));
  out += describe_data("train", plan.train_data, plan.train, r.data.sequence_len);
  if (plan.eval_data.num_documents() > 0) {
    out += describe_data("held out", plan.eval_data, plan.eval, r.data.sequence_len);
  } else {
    add("held out", "none");
  }
  add("steps",
      fmt::format("{} ({:.2f} epochs of {}); {} x {} sequences of up to {} tokens each", plan.total_steps,
                  static_cast<double>(plan.total_steps) / static_cast<double>(plan.steps_per_epoch),
                  plan.steps_per_epoch, micro_batches_per_step(plan), r.train.micro_batch_size,
                  r.data.sequence_len));
  add("optimizer",
      fmt::format("AdamW, betas {:g} and {:g}, epsilon {:g}, weight decay {:g}, clipped at {}",
                  r.optim.adam_beta1, r.optim.adam_beta2, r.optim.adam_epsilon, r.optim.weight_decay,
                  r.optim.max_grad_norm > 0 ? fmt::format("{:g}", r.optim.max_grad_norm) : "nothing"));
  add("schedule", describe_schedule(plan));
  if (plan.ranks.several()) add("ranks", describe_ranks(plan));
  add("memory", describe_memory(plan));
  add("output", r.checkpoint.output_dir);
  return out;
}

}  // namespace topk_sft
