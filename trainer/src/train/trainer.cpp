#include "train/trainer.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Generator.h>
#include <ATen/record_function.h>
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <optional>

#include "dist/rank_optimizer.h"
#include "dist/ranks.h"
#include "dist/sequence.h"
#include "io/atomic_file.h"
#include "io/error.h"
#include "model/export_hf.h"
#include "model/model.h"
#include "model/probe.h"
#include "train/checkpoint.h"
#include "train/checkpoint_dir.h"
#include "train/console.h"
#include "train/device.h"
#include "train/evaluate.h"
#include "train/profile.h"
#include "train/run_log.h"
#include "train/sampling.h"
#include "train/signals.h"
#include "train/step.h"

namespace topk_sft {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMaxSkipsInARow = 10;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct LoadedModel {
  std::unique_ptr<CausalLM> model;
  // float32 start values of what trains; empty if the model itself is float32
  std::vector<at::Tensor> masters;
};

LoadedModel load_model(const RunPlan& plan) {
  const Recipe& r = plan.recipe;
  LoadedModel loaded;
  LoadOptions options;
  options.device = at::Device(plan.device);
  options.dtype = r.model.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  // Masters start from the weights as they are stored, not from their bfloat16 rounding.
  const bool stored_wider = r.model.random_init || plan.config.dtype != "bfloat16";
  const bool rounded = options.dtype == at::kBFloat16;
  if (rounded && stored_wider && !plan.lora) options.masters = &loaded.masters;
  loaded.model = r.model.random_init
                     ? CausalLM::create(plan.config, options, static_cast<uint64_t>(r.train.seed))
                     : CausalLM::load(r.model.base_model, options);
  if (plan.lora) {
    loaded.model->add_lora(*plan.lora, static_cast<uint64_t>(r.train.seed),
                           rounded ? &loaded.masters : nullptr);
  }
  return loaded;
}

Recompute recompute_of(const TrainSection& t) {
  if (!t.gradient_checkpointing) return Recompute::kNothing;
  return t.recompute == "all" ? Recompute::kAll : Recompute::kAllButAttention;
}

// One run in progress; its parts are made in the order of the members.
class Run {
 public:
  Run(const RunPlan& plan, Console& console, Ranks& ranks, LoadedModel loaded, std::string profile);
  void train();

 private:
  enum class Outcome { kDone, kStopped };

  Outcome loop();
  void finish();
  StepResult step(const StepPlan& micro_batches);
  void report(const StepResult& result, const StepPlan& micro_batches, double rate, double seconds);
  void skip(const StepResult& result);
  void report_probe();
  bool evaluate_all();
  void sample();
  void save();
  bool due(int64_t every) const { return every > 0 && state_.step % every == 0; }
  std::string bar_text(const std::string& what) const;

  const RunPlan& plan_;
  const Recipe& recipe_;
  Console& console_;
  Ranks& ranks_;
  LoadedModel loaded_;
  CausalLM& model_;
  std::vector<std::vector<int64_t>> prompts_;  // to complete now and then
  TextOfIds text_;
  RankOptimizer optimizer_;
  Sampler sampler_;
  FlopCounter flops_;
  double peak_flops_ = 0;
  std::string profile_;
  std::unique_ptr<RunLog> log_;
  std::shared_ptr<AttentionProbe> probe_;  // of the step in progress; null: it is not probed
  TrainState state_;
  int64_t saved_step_ = -1;      // of the newest checkpoint written or restored
  int64_t evaluated_step_ = -1;  // of the newest evaluation and samples
  int64_t sampled_step_ = -1;
  int skips_in_a_row_ = 0;
  double seconds_per_step_ = 0;  // smoothed
};

AdamWOptions adamw_options(const OptimSection& o) {
  AdamWOptions options;
  options.beta1 = o.adam_beta1;
  options.beta2 = o.adam_beta2;
  options.epsilon = o.adam_epsilon;
  options.weight_decay = o.weight_decay;
  options.decay_embeddings = o.weight_decay_embeddings;
  return options;
}

Run::Run(const RunPlan& plan, Console& console, Ranks& ranks, LoadedModel loaded, std::string profile)
    : plan_(plan),
      recipe_(plan.recipe),
      console_(console),
      ranks_(ranks),
      loaded_(std::move(loaded)),
      model_(*loaded_.model),
      prompts_(load_sample_prompts(plan)),
      text_(recipe_.model.base_model),
      optimizer_(model_, adamw_options(recipe_.optim), std::move(loaded_.masters), ranks,
                 sharding_of(recipe_.train.sharding)),
      sampler_(plan.make_sampler()),
      flops_(plan.config, plan.sparsity_of(recipe_.attention.mode),
             std::max<int64_t>(1, plan.train.plan.longest), plan.lora),
      profile_(ranks.first() ? std::move(profile) : "") {
  model_.set_activation_checkpointing(recompute_of(recipe_.train), recipe_.train.offload_activations);
  AttentionSettings attention = attention_settings(plan.sparsity_of(recipe_.attention.mode));
  attention.options.deterministic = recipe_.train.deterministic;
  model_.set_attention(attention);
  if (plan.ranks.sequence_ranks > 1) {
    model_.set_sequence_parallel(plan.ranks.sequence_ranks,
                                 [&ranks](std::shared_ptr<const PackedAttention> inner) {
                                   return sequence_attention(ranks, std::move(inner));
                                 });
  }
  if (!ranks.first()) return;  // the others show nothing
  peak_flops_ = recipe_.logging.peak_tflops ? *recipe_.logging.peak_tflops * 1e12
                                            : measured_peak_flops(model_.device(), model_.dtype());
}

void Run::train() {
  const std::string& wanted = recipe_.checkpoint.resume_from_checkpoint;
  std::string checkpoint;
  if (!wanted.empty()) {
    std::vector<std::string> notes;
    if (ranks_.first()) checkpoint = find_checkpoint(plan_, wanted, notes);
    checkpoint = ranks_.from_first(checkpoint);
    for (const std::string& note : notes) console_.line("note: " + note);
    state_ = restore_checkpoint(plan_, checkpoint, optimizer_);
    sampler_.restore(state_.sampler);
    // A checkpoint of another folder is only a starting point; this run's folder gets its own.
    const std::filesystem::path own(recipe_.checkpoint.output_dir);
    if (std::filesystem::weakly_canonical(std::filesystem::path(checkpoint).parent_path()) ==
        std::filesystem::weakly_canonical(own)) {
      saved_step_ = state_.step;
    }
    if (state_.step > plan_.total_steps) {
      fail("{} is at step {}, but this run ends after {}: raise train.max_steps or train.num_epochs",
           checkpoint, state_.step, plan_.total_steps);
    }
  }
  const std::string& output_dir = recipe_.checkpoint.output_dir;
  const bool first = ranks_.first();
  if (first) write_file_atomic(output_dir + "/recipe.yaml", recipe_to_yaml(recipe_));
  log_ = std::make_unique<RunLog>(output_dir, first && recipe_.logging.jsonl,
                                  first && recipe_.logging.tensorboard);
  Json start = {{"step", state_.step},
                {"total_steps", plan_.total_steps},
                {"parameters", parameter_count(plan_.config)},
                {"trained_parameters", plan_.lora ? adapter_parameter_count(plan_.config, *plan_.lora)
                                                  : parameter_count(plan_.config)},
                {"peak_tflops", peak_flops_ / 1e12},
                {"peak_tflops_measured", !recipe_.logging.peak_tflops.has_value()},
                {"threads", at::get_num_threads()},
                {"ranks", plan_.ranks.world},
                {"identity", plan_.identity()}};
  if (!checkpoint.empty()) start["checkpoint"] = checkpoint;
  log_->event(checkpoint.empty() ? "start" : "resume", start);
  if (!checkpoint.empty()) {
    console_.line(
        fmt::format("continuing from {}, after step {} of {}", checkpoint, state_.step, plan_.total_steps));
  }
  console_.line(
      fmt::format("100 % MFU is {:.3g} TFLOP/s ({}); {} threads", peak_flops_ / 1e12,
                  recipe_.logging.peak_tflops ? "logging.peak_tflops" : "measured by a matrix product",
                  at::get_num_threads()));
  if (loop() == Outcome::kStopped) {
    const int signal = stop_signal();
    save();
    log_->event("stop", {{"step", state_.step}, {"signal", signal_name(signal)}});
    console_.line(fmt::format("stopped by {} after step {} of {}; continue with --resume latest",
                              signal_name(signal), state_.step, plan_.total_steps));
    return;
  }
  finish();
}

Run::Outcome Run::loop() {
  if (state_.step == 0 && recipe_.train.eval_steps > 0 && !evaluate_all()) return Outcome::kStopped;
  if (state_.step == 0 && recipe_.train.sample_steps > 0) sample();
  StepProfiler profiler(profile_, model_.device(), plan_.total_steps - state_.step);
  while (state_.step < plan_.total_steps) {
    if (ranks_.any(stop_signal() != 0)) return Outcome::kStopped;
    const auto begin = Clock::now();
    profiler.before_step();
    const StepPlan micro_batches = sampler_.next_step();
    const StepResult result = step(micro_batches);
    if (result.stopped) {  // the unfinished step is done again after a resume
      sampler_.restore(state_.sampler);
      return Outcome::kStopped;
    }
    const double rate = plan_.schedule.learning_rate(state_.step);
    if (result.nonfinite.empty()) {
      const double norm = recipe_.optim.max_grad_norm;
      // The factor of torch.nn.utils.clip_grad_norm_.
      if (norm > 0 && norm / (result.grad_norm + 1e-6) < 1) {
        optimizer_.scale_gradients(norm / (result.grad_norm + 1e-6));
      }
      RECORD_USER_SCOPE("optimizer");
      optimizer_.step(rate);
      skips_in_a_row_ = 0;
    } else {
      skip(result);
    }
    optimizer_.zero_grad();
    if (profiler.after_step()) console_.line("trace written to " + profiler.path());
    ++state_.step;
    state_.sampler = sampler_.state();
    state_.tokens += result.tokens;
    state_.targets += result.targets;
    const double seconds = seconds_since(begin);
    seconds_per_step_ = seconds_per_step_ == 0 ? seconds : 0.8 * seconds_per_step_ + 0.2 * seconds;
    if (result.nonfinite.empty()) report(result, micro_batches, rate, seconds);
    if (result.nonfinite.empty() && probe_ != nullptr) report_probe();
    if (state_.step == plan_.total_steps) break;
    // Save before evaluating: what was trained is worth more.
    if (due(recipe_.checkpoint.save_steps)) save();
    if (due(recipe_.train.eval_steps) && !evaluate_all()) return Outcome::kStopped;
    if (due(recipe_.train.sample_steps)) sample();
  }
  return Outcome::kDone;
}

void Run::finish() {
  if (recipe_.checkpoint.save_at_end) save();
  if (recipe_.checkpoint.export_model) {
    const std::string target = recipe_.checkpoint.output_dir + "/final";
    optimizer_.on_first_with_whole_model([&] {
      export_hf(model_, recipe_.model.base_model, target, model_.attention(), /*replace=*/true);
      log_->event("export", {{"step", state_.step}, {"path", target}});
      console_.line("model written to " + target);
    });
  }
  if (evaluated_step_ != state_.step) evaluate_all();
  if (sampled_step_ != state_.step) sample();
  const double peak = peak_memory(model_.device());
  log_->event("end", {{"step", state_.step}, {"tokens", state_.tokens}, {"peak_memory_bytes", peak}});
  console_.line(fmt::format("done: {} steps, {} tokens, peak memory {}", state_.step,
                            count_text(state_.tokens), bytes_text(peak)));
}

StepResult Run::step(const StepPlan& micro_batches) {
  const int64_t every = recipe_.logging.probe_steps;
  probe_.reset();
  if (ranks_.first() && every > 0 && (state_.step + 1) % every == 0) {
    std::optional<topk_attn::Options> budget;
    if (plan_.sparsity) budget = attention_settings(plan_.sparsity).options;
    probe_ = std::make_shared<AttentionProbe>(budget);
  }
  model_.set_attention_probe(probe_);
  const auto total = static_cast<double>(plan_.total_steps);
  return run_step(model_, optimizer_, plan_, micro_batches, state_.step + 1, ranks_, [&](int64_t done) {
    const double share = static_cast<double>(done) / static_cast<double>(micro_batches.size());
    console_.progress(static_cast<double>(state_.step) + share, total, bar_text("training"));
    return stop_signal() == 0 || done == static_cast<int64_t>(micro_batches.size());
  });
}

std::string Run::bar_text(const std::string& what) const {
  std::string text = fmt::format("{} {}/{}", what, state_.step, plan_.total_steps);
  if (seconds_per_step_ > 0) {
    text += " eta " + duration_text(seconds_per_step_ * static_cast<double>(plan_.total_steps - state_.step));
  }
  return text;
}

void Run::report(const StepResult& result, const StepPlan& micro_batches, double rate, double seconds) {
  Flops flops;
  for (const auto& sequences : micro_batches) {
    for (const int64_t sequence : sequences) {
      for (const int64_t index : plan_.train.bins[static_cast<size_t>(sequence)]) {
        const Piece& piece = plan_.train.plan.pieces[static_cast<size_t>(index)];
        flops += flops_.document(piece.length, piece.targets);
      }
    }
  }
  const double peak = peak_flops_ * static_cast<double>(plan_.ranks.world);
  const double mfu = flops.spent / seconds / peak;
  const double mfu_dense = flops.dense / seconds / peak;
  const double tokens_per_second = static_cast<double>(result.tokens) / seconds;
  const double memory = memory_in_use(model_.device());
  const double epoch =
      static_cast<double>(state_.sampler.epoch) +
      static_cast<double>(state_.sampler.position) / static_cast<double>(plan_.train.bins.size());
  log_->event("step", {{"step", state_.step},
                       {"epoch", epoch},
                       {"loss", result.loss},
                       {"grad_norm", result.grad_norm},
                       {"learning_rate", rate},
                       {"tokens", result.tokens},
                       {"targets", result.targets},
                       {"seconds", seconds},
                       {"tokens_per_second", tokens_per_second},
                       {"flops", flops.spent},
                       {"flops_dense", flops.dense},
                       {"mfu", mfu},
                       {"mfu_dense", mfu_dense},
                       {"memory_bytes", memory}});
  log_->scalars(state_.step, {{"train/loss", result.loss},
                              {"train/grad_norm", result.grad_norm},
                              {"train/learning_rate", rate},
                              {"train/tokens_per_second", tokens_per_second},
                              {"train/mfu", mfu},
                              {"train/mfu_dense", mfu_dense},
                              {"train/memory_gib", memory / (1024.0 * 1024.0 * 1024.0)},
                              {"train/epoch", epoch}});
  if (state_.step % recipe_.logging.logging_steps != 0 && state_.step != plan_.total_steps) return;
  const std::string sparse =
      recipe_.attention.mode == "topk" ? fmt::format(" ({:.1f}% if dense)", 100 * mfu_dense) : "";
  console_.line(
      fmt::format("step {}/{} | loss {:.4f} | grad norm {:.3f} | lr {:.3e} | {:.0f} tok/s | mfu {:.1f}%{} | "
                  "mem {} | eta {}",
                  state_.step, plan_.total_steps, result.loss, result.grad_norm, rate, tokens_per_second,
                  100 * mfu, sparse, bytes_text(memory),
                  duration_text(seconds_per_step_ * static_cast<double>(plan_.total_steps - state_.step))));
  console_.progress(static_cast<double>(state_.step), static_cast<double>(plan_.total_steps),
                    bar_text("training"));
}

void Run::report_probe() {
  const AttentionProbeResult result = probe_->result();
  log_->event("probe", {{"step", state_.step},
                        {"rows", AttentionProbe::kRows},
                        {"entropy", result.entropy},
                        {"kept_mass", result.kept_mass}});
  std::vector<std::pair<std::string, double>> scalars;
  const auto add = [&](const char* name, const std::vector<double>& values) {
    for (size_t i = 0; i < values.size(); ++i) {
      scalars.emplace_back(fmt::format("probe/{}/layer_{:02}", name, i), values[i]);
    }
  };
  add("entropy", result.entropy);
  add("kept_mass", result.kept_mass);
  log_->scalars(state_.step, scalars);
}

void Run::skip(const StepResult& result) {
  log_->event(
      "nonfinite",
      {{"step", state_.step + 1}, {"where", result.nonfinite}, {"action", recipe_.train.on_nonfinite}});
  if (recipe_.train.on_nonfinite == "stop") {
    fail("{} (train.on_nonfinite is stop)", result.nonfinite);
  }
  if (++skips_in_a_row_ >= kMaxSkipsInARow) {
    fail("{} steps in a row were skipped, the last at {}", kMaxSkipsInARow, result.nonfinite);
  }
  console_.line("skipped " + result.nonfinite);
}

bool Run::evaluate_all() {
  if (plan_.eval.bins.empty()) return true;
  std::vector<EvalResult> results;
  for (const EvalMode& mode : eval_modes(plan_)) {
    const auto result = evaluate(model_, &optimizer_, plan_, ranks_, mode, [&](int64_t done, int64_t total) {
      console_.progress(static_cast<double>(state_.step), static_cast<double>(plan_.total_steps),
                        fmt::format("evaluating ({}) {}/{}", mode.name, done, total));
      return stop_signal() == 0;
    });
    if (!result) return false;
    results.push_back(*result);
  }
  evaluated_step_ = state_.step;
  std::vector<std::pair<std::string, double>> scalars;
  for (const EvalResult& result : results) scalars.emplace_back("eval/loss_" + result.mode, result.loss);
  log_->event("eval", eval_fields(state_.step, results));
  log_->scalars(state_.step, scalars);
  console_.line(fmt::format("held out after step {}: {}", state_.step, eval_text(results)));
  return true;
}

void Run::sample() {
  if (prompts_.empty()) return;
  sampled_step_ = state_.step;
  optimizer_.on_first_with_whole_model([&] {
    for (const Completion& c : complete_prompts(model_, plan_, prompts_, text_, state_.step)) {
      log_->event("sample", {{"step", state_.step}, {"prompt", c.prompt}, {"completion", c.completion}});
      console_.line(fmt::format("sample after step {}: {} => {}", state_.step, c.prompt, c.completion));
    }
  });
}

void Run::save() {
  if (saved_step_ == state_.step) return;
  const auto begin = Clock::now();
  const std::string path = save_checkpoint(plan_, state_, optimizer_);
  saved_step_ = state_.step;
  if (!ranks_.first()) {
    ranks_.wait_for_first();
    return;
  }
  const auto removed = prune_checkpoints(recipe_.checkpoint.output_dir, recipe_.checkpoint.save_total_limit);
  log_->event("checkpoint", {{"step", state_.step}, {"path", path}, {"removed", removed}});
  console_.line(fmt::format("checkpoint {} written in {}{}", path, duration_text(seconds_since(begin)),
                            removed.empty() ? "" : fmt::format("; {} older removed", removed.size())));
  ranks_.wait_for_first();
}

}  // namespace

void run_training(const RunPlan& plan, const std::vector<std::string>& notes, const std::string& profile,
                  RankStore* store) {
  const Recipe& r = plan.recipe;
  Console console(plan.ranks.first() ? r.logging.progress : "silent");
  for (const std::string& note : notes) console.line("note: " + note);
  for (const std::string& note : plan.notes) console.line("note: " + note);
  std::string text = describe_plan(plan);
  text.pop_back();
  console.line(text);
  // Rank 0 alone writes.
  std::optional<RunFolder> folder;
  if (plan.ranks.first()) {
    folder.emplace(r.checkpoint.output_dir, /*fresh=*/r.checkpoint.resume_from_checkpoint.empty());
  }
  if (r.train.num_threads) at::set_num_threads(static_cast<int>(*r.train.num_threads));
  if (r.train.deterministic) {
    // cuBLAS is deterministic only with a fixed workspace, which it reads from here when it starts.
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  }
  for (const at::Device device : {at::Device(at::kCPU), at::Device(plan.device)}) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    generator.set_current_seed(static_cast<uint64_t>(r.train.seed));
  }
  load_sample_prompts(plan);  // checked before the model is loaded
  LoadedModel loaded = load_model(plan);
  std::unique_ptr<Ranks> ranks = store == nullptr
                                     ? std::make_unique<Ranks>()
                                     : std::make_unique<Ranks>(*store, plan.ranks, at::Device(plan.device));
  try {
    Run run(plan, console, *ranks, std::move(loaded), profile);
    run.train();
  } catch (const std::exception&) {
    // What an operation said about the loss of another rank matters less than which rank it was.
    if (ranks->broken()) store->await_verdict();
    throw;
  }
  if (store != nullptr) store->leave();
}

}  // namespace topk_sft
