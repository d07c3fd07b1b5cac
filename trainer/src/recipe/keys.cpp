// The table of recipe keys.
#include "recipe/keys.h"

#include <charconv>
#include <cmath>

#include "model/lora.h"

namespace topk_sft {

namespace {

#define RECIPE_FIELD(expression) \
  +[](Recipe & r) -> auto& {     \
    return r.expression;         \
  }

constexpr double kMaxInt = 9007199254740992.0;  // 2^53

Range at_least(double min) {
  return {.min = min, .max = kMaxInt};
}
Range above(double min) {
  return {.min = min, .min_open = true};
}
Range between(double min, double max) {
  return {.min = min, .max = max};
}

std::vector<Key> make_keys() {
  using enum OnResume;
  return {
      // --- model
      // ---------------------------------------------------------------------------------------------------
      {"model",
       "base_model",
       RECIPE_FIELD(model.base_model),
       kFree,
       "Hugging Face folder of the model: config.json, *.safetensors and tokenizer.json. Llama, Mistral, "
       "Qwen2 and "
       "Qwen3 architectures.",
       {},
       {},
       {"model_name_or_path", "model_path"},
       {},
       true},
      {"model",
       "dtype",
       RECIPE_FIELD(model.dtype),
       kMustMatch,
       "Type of weights and activations in forward and backward. With bfloat16 the optimizer keeps float32 "
       "master "
       "weights. auto: float32 on cpu, bfloat16 elsewhere.",
       {},
       {"auto", "float32", "bfloat16"},
       {"torch_dtype"},
       {{"fp32", "float32"}, {"float", "float32"}, {"bf16", "bfloat16"}}},
      {"model", "device", RECIPE_FIELD(model.device), kMayChange,
       "Where to compute: cpu, cuda or cuda:N. With several ranks cuda is each one's own GPU."},
      {"model", "random_init", RECIPE_FIELD(model.random_init), kFree,
       "Start from random weights, drawn from train.seed, with the shapes of base_model's config.json, "
       "instead of "
       "reading its weights."},
      {"model",
       "adapter",
       RECIPE_FIELD(model.adapter),
       kMustMatch,
       "lora: the model is frozen, and low-rank adapters of some of its maps train instead: a weight W "
       "becomes "
       "W + lora_alpha / lora_r * B A. Checkpoints hold the adapters only; the exported model has them "
       "merged.",
       {},
       {"none", "lora"},
       {"finetuning_type"},
       {{"full", "none"}}},
      {"model",
       "lora_r",
       RECIPE_FIELD(model.lora_r),
       kMustMatch,
       "Rank of the adapters.",
       between(1, 65536),
       {},
       {"lora_rank"}},
      {"model", "lora_alpha", RECIPE_FIELD(model.lora_alpha), kMustMatch,
       "The adapters' product counts lora_alpha / lora_r times.", above(0)},
      {"model",
       "lora_dropout",
       RECIPE_FIELD(model.lora_dropout),
       kMustMatch,
       "Must be 0: adapters train without dropout.",
       {.min = 0, .max = 1, .max_open = true}},
      {"model",
       "lora_target_modules",
       RECIPE_FIELD(model.lora_target_modules),
       kMustMatch,
       "Maps that get an adapter, in every layer.",
       {},
       {kLoraTargets.begin(), kLoraTargets.end()},
       {"lora_target", "target_modules"}},
      // --- data
      // ----------------------------------------------------------------------------------------------------
      {"data",
       "dataset_prepared_path",
       RECIPE_FIELD(data.dataset_prepared_path),
       kFree,
       "Folder of token shards written by `topk-data prepare`. Each shard's metadata says which split it "
       "belongs to.",
       {},
       {},
       {"tokenized_path"}},
      {"data",
       "train_files",
       RECIPE_FIELD(data.train_files),
       kFree,
       "Shards to train on, by name, instead of dataset_prepared_path.",
       {},
       {},
       {"train_file"}},
      {"data",
       "eval_files",
       RECIPE_FIELD(data.eval_files),
       kFree,
       "Held-out shards, by name; with train_files.",
       {},
       {},
       {"validation_file", "eval_file"}},
      {"data", "train_split", RECIPE_FIELD(data.train_split), kFree,
       "Name of the training split in dataset_prepared_path."},
      {"data", "eval_split", RECIPE_FIELD(data.eval_split), kFree,
       "Name of the held-out split in dataset_prepared_path; there is no evaluation if it holds no such "
       "shard."},
      {"data",
       "sequence_len",
       RECIPE_FIELD(data.sequence_len),
       kMustMatch,
       "Tokens in one packed sequence; also the longest piece of a document that is trained on at once.",
       {.min = 2, .max = 1 << 24},
       {},
       {"cutoff_len", "max_seq_length", "max_seq_len", "max_length"}},
      {"data",
       "sample_packing",
       RECIPE_FIELD(data.sample_packing),
       kMustMatch,
       "Pack documents into sequences of up to sequence_len tokens (best fit decreasing). Documents never "
       "see each "
       "other, and positions restart in each. false: one document a sequence, never padded.",
       {},
       {},
       {"packing"}},
      {"data",
       "overflow",
       RECIPE_FIELD(data.overflow),
       kMustMatch,
       "What happens to a document longer than sequence_len. truncate: the rest is dropped. split: it is cut "
       "into "
       "pieces trained on as documents of their own; each target token is still predicted exactly once.",
       {},
       {"truncate", "split"}},
      {"data", "shuffle", RECIPE_FIELD(data.shuffle), kMustMatch,
       "Visit the sequences of each epoch in a new order drawn from train.seed; false: in the order of the "
       "shards."},
      // --- attention
      // -----------------------------------------------------------------------------------------------
      {"attention",
       "mode",
       RECIPE_FIELD(attention.mode),
       kMayChange,
       "topk: each query keeps its best keys only, exactly, in forward and backward. dense: all visible "
       "keys.",
       {},
       {"topk", "dense"},
       {"attn_implementation"},
       {{"topk_attn", "topk"}, {"sdpa", "dense"}, {"eager", "dense"}}},
      {"attention", "topk", RECIPE_FIELD(attention.topk), kMayChange,
       "Keys kept by each query, absolute. Exactly one of topk and ratio is given.", at_least(1)},
      {"attention",
       "ratio",
       RECIPE_FIELD(attention.ratio),
       kMayChange,
       "Share of the visible keys kept by each query: ceil(ratio * n) of n.",
       {.min = 0, .max = 1, .min_open = true}},
      {"attention", "min_keys", RECIPE_FIELD(attention.min_keys), kMayChange,
       "Floor of the keys kept (never more than are visible).", at_least(1)},
      {"attention", "max_keys", RECIPE_FIELD(attention.max_keys), kMayChange,
       "Ceiling of the keys kept; null: none.", at_least(1)},
      {"attention",
       "select",
       RECIPE_FIELD(attention.select),
       kMayChange,
       "head: each query head keeps its own keys. kv_group: the query heads of a KV head keep one set.",
       {},
       {"head", "kv_group"}},
      {"attention", "sink", RECIPE_FIELD(attention.sink), kMayChange,
       "The first visible keys that are always kept, within the budget.", at_least(0)},
      {"attention", "recent", RECIPE_FIELD(attention.recent), kMayChange,
       "The last visible keys that are always kept, within the budget.", at_least(0)},
      {"attention", "dense_layers", RECIPE_FIELD(attention.dense_layers), kMayChange,
       "Layers (from 0) that stay dense when mode is topk.", at_least(0)},
      // --- train
      // ---------------------------------------------------------------------------------------------------
      {"train",
       "num_epochs",
       RECIPE_FIELD(train.num_epochs),
       kMayChange,
       "Passes over the training data; may be a fraction. Ignored when max_steps is given.",
       {.min = 0, .max = 1e6, .min_open = true},
       {},
       {"num_train_epochs", "epochs"}},
      {"train", "max_steps", RECIPE_FIELD(train.max_steps), kMayChange,
       "Optimizer steps, whatever the number of epochs that takes; null: by num_epochs.", at_least(1)},
      {"train",
       "micro_batch_size",
       RECIPE_FIELD(train.micro_batch_size),
       kMustMatch,
       "Packed sequences in one forward and backward pass.",
       between(1, 1 << 20),
       {},
       {"per_device_train_batch_size", "batch_size"}},
      {"train",
       "gradient_accumulation_steps",
       RECIPE_FIELD(train.gradient_accumulation_steps),
       kMustMatch,
       "Micro-batches of each rank in one optimizer step. The loss is averaged over all target tokens of the "
       "step, so accumulation and ranks do not change the result. Resuming with another number of ranks "
       "needs "
       "the same product of the two.",
       between(1, 1 << 20),
       {},
       {"grad_accum"}},
      {"train",
       "gradient_checkpointing",
       RECIPE_FIELD(train.gradient_checkpointing),
       kMayChange,
       "Keep little of each layer and compute the rest again in the backward pass: less memory, more time.",
       {},
       {},
       {"enable_activation_checkpointing", "activation_checkpointing"}},
      {"train",
       "recompute",
       RECIPE_FIELD(train.recompute),
       kMayChange,
       "What gradient_checkpointing computes again. all: each layer's input is kept, nothing else. "
       "all_but_attention: the attention's result and the selection are kept too, so that attention runs and "
       "keys are selected once.",
       {},
       {"all", "all_but_attention"}},
      {"train",
       "offload_activations",
       RECIPE_FIELD(train.offload_activations),
       kMayChange,
       "Keep what gradient_checkpointing keeps in pinned host memory until the backward pass needs it. Only "
       "on "
       "a GPU.",
       {},
       {},
       {"activation_offloading"}},
      {"train", "seed", RECIPE_FIELD(train.seed), kMustMatch,
       "Seed of the data order, of random_init and of sampled generations.", between(0, kMaxInt)},
      {"train", "deterministic", RECIPE_FIELD(train.deterministic), kMayChange,
       "Refuse operations whose result may differ from run to run. On the cpu training is deterministic "
       "anyway for "
       "one number of threads."},
      {"train", "num_threads", RECIPE_FIELD(train.num_threads), kMayChange,
       "CPU threads; null: OMP_NUM_THREADS, or all cores.", between(1, 4096)},
      {"train",
       "on_nonfinite",
       RECIPE_FIELD(train.on_nonfinite),
       kMayChange,
       "What a NaN or infinite loss or gradient does. stop: an error that says where it arose. skip: says "
       "where, "
       "leaves the weights alone in that step, and goes on; ten skipped steps in a row stop the run.",
       {},
       {"stop", "skip"}},
      {"train",
       "sharding",
       RECIPE_FIELD(train.sharding),
       kFree,
       "What several ranks divide among them. none: each has all. optimizer: each has its part of the "
       "float32 "
       "weights and moments. full: also of the weights and gradients; a layer is gathered when it is "
       "computed.",
       {},
       {"none", "optimizer", "full"}},
      {"train", "sequence_parallel", RECIPE_FIELD(train.sequence_parallel), kFree,
       "Ranks that share each micro-batch: each has a part of the tokens, and for attention a part of the "
       "heads. "
       "It divides the number of ranks and of KV heads.",
       between(1, 4096)},
      {"train", "rank_timeout", RECIPE_FIELD(train.rank_timeout), kFree,
       "Seconds without a sign of life after which a rank counts as lost, which ends all ranks.",
       between(2, 600)},
      {"train", "eval_steps", RECIPE_FIELD(train.eval_steps), kFree,
       "Evaluate on the held-out split every so many steps, before the first step and at the end; 0: only at "
       "the end.",
       at_least(0)},
      {"train",
       "eval_attention",
       RECIPE_FIELD(train.eval_attention),
       kFree,
       "Attention that evaluation runs under, one pass each; empty: the one trained with.",
       {},
       {"topk", "dense"}},
      {"train",
       "eval_ratios",
       RECIPE_FIELD(train.eval_ratios),
       kFree,
       "Evaluation also runs under top-k attention at each of these ratios, one pass each, with the other "
       "settings "
       "of section attention.",
       {.min = 0, .max = 1, .min_open = true}},
      {"train", "max_eval_batches", RECIPE_FIELD(train.max_eval_batches), kFree,
       "Evaluate on the first micro-batches of the held-out split only; null: all.", at_least(1)},
      {"train", "sample_prompts", RECIPE_FIELD(train.sample_prompts), kFree,
       "Token file of prompts (`topk-data tokens`) to complete during training; empty: none."},
      {"train", "sample_steps", RECIPE_FIELD(train.sample_steps), kFree,
       "Complete sample_prompts every so many steps and at the end; 0: only at the end.", at_least(0)},
      {"train",
       "sample_max_new_tokens",
       RECIPE_FIELD(train.sample_max_new_tokens),
       kFree,
       "Longest completion, in tokens.",
       between(1, 1 << 20),
       {},
       {"max_new_tokens"}},
      {"train",
       "sample_temperature",
       RECIPE_FIELD(train.sample_temperature),
       kFree,
       "0: greedy; above: sampling at that temperature.",
       between(0, 100),
       {},
       {"temperature"}},
      // --- optim
      // ---------------------------------------------------------------------------------------------------
      {"optim",
       "optimizer",
       RECIPE_FIELD(optim.optimizer),
       kMustMatch,
       "adamw: Adam with decoupled weight decay, fused.",
       {},
       {"adamw"},
       {"optim"},
       {{"adamw_torch", "adamw"}, {"adamw_torch_fused", "adamw"}}},
      {"optim",
       "learning_rate",
       RECIPE_FIELD(optim.learning_rate),
       kMayChange,
       "Peak learning rate.",
       above(0),
       {},
       {"lr"}},
      {"optim",
       "weight_decay",
       RECIPE_FIELD(optim.weight_decay),
       kMayChange,
       "Decoupled weight decay of matrices; norms and biases never decay.",
       {.min = 0}},
      {"optim", "weight_decay_embeddings", RECIPE_FIELD(optim.weight_decay_embeddings), kMayChange,
       "Decay the token embedding and an untied output head too."},
      {"optim",
       "adam_beta1",
       RECIPE_FIELD(optim.adam_beta1),
       kMayChange,
       "Decay of the mean of gradients.",
       {.min = 0, .max = 1, .max_open = true}},
      {"optim",
       "adam_beta2",
       RECIPE_FIELD(optim.adam_beta2),
       kMayChange,
       "Decay of the mean of squared gradients.",
       {.min = 0, .max = 1, .max_open = true}},
      {"optim", "adam_epsilon", RECIPE_FIELD(optim.adam_epsilon), kMayChange,
       "Added to the root in the denominator.", above(0)},
      {"optim",
       "max_grad_norm",
       RECIPE_FIELD(optim.max_grad_norm),
       kMayChange,
       "Scale the gradients of a step down to this L2 norm; 0: never.",
       {.min = 0},
       {},
       {"clip_grad_norm"}},
      {"optim",
       "lr_scheduler",
       RECIPE_FIELD(optim.lr_scheduler),
       kMayChange,
       "Shape after the linear warm-up from 0. cosine and linear: down to min_lr_ratio at the end. constant. "
       "wsd: "
       "constant, then a decay over the last decay_steps. The values are those of transformers' schedules "
       "(its "
       "warmup_stable_decay warms up from min_lr_ratio; here every warm-up starts at 0).",
       {},
       {"cosine", "linear", "constant", "wsd"},
       {"lr_scheduler_type"},
       {{"constant_with_warmup", "constant"},
        {"warmup_stable_decay", "wsd"},
        {"cosine_with_min_lr", "cosine"}}},
      {"optim", "warmup_steps", RECIPE_FIELD(optim.warmup_steps), kMayChange,
       "Steps of linear warm-up; not together with warmup_ratio.", at_least(0)},
      {"optim",
       "warmup_ratio",
       RECIPE_FIELD(optim.warmup_ratio),
       kMayChange,
       "Warm-up as a share of all steps, rounded up.",
       {.min = 0, .max = 1, .max_open = true}},
      {"optim", "min_lr_ratio", RECIPE_FIELD(optim.min_lr_ratio), kMayChange,
       "Learning rate at the end of the decay, as a share of the peak.", between(0, 1)},
      {"optim", "decay_steps", RECIPE_FIELD(optim.decay_steps), kMayChange,
       "wsd: steps of the final decay; not together with decay_ratio.", at_least(0)},
      {"optim", "decay_ratio", RECIPE_FIELD(optim.decay_ratio), kMayChange,
       "wsd: the final decay as a share of all steps, rounded up. Without decay_steps and decay_ratio it is "
       "0.1.",
       between(0, 1)},
      {"optim",
       "decay_shape",
       RECIPE_FIELD(optim.decay_shape),
       kMayChange,
       "wsd: shape of the final decay. sqrt: 1 - sqrt(progress).",
       {},
       {"cosine", "linear", "sqrt"},
       {"decay_type"},
       {{"1-sqrt", "sqrt"}}},
      // --- checkpoint
      // ----------------------------------------------------------------------------------------------
      {"checkpoint",
       "output_dir",
       RECIPE_FIELD(checkpoint.output_dir),
       kFree,
       "Folder of the run: checkpoints (step-N), logs, the final model (final). A new run needs a new or "
       "empty one.",
       {},
       {},
       {},
       {},
       true},
      {"checkpoint", "save_steps", RECIPE_FIELD(checkpoint.save_steps), kFree,
       "Write a checkpoint every so many steps; 0: only at the end and when stopped by a signal.",
       at_least(0)},
      {"checkpoint",
       "save_total_limit",
       RECIPE_FIELD(checkpoint.save_total_limit),
       kFree,
       "Keep the newest so many complete checkpoints; 0: all.",
       at_least(0),
       {},
       {"keep_last_n_checkpoints"}},
      {"checkpoint", "save_at_end", RECIPE_FIELD(checkpoint.save_at_end), kFree,
       "Write a checkpoint after the last step, so that the run can be continued."},
      {"checkpoint", "export_model", RECIPE_FIELD(checkpoint.export_model), kFree,
       "Write the trained model as a Hugging Face folder, output_dir/final, at the end."},
      {"checkpoint", "resume_from_checkpoint", RECIPE_FIELD(checkpoint.resume_from_checkpoint), kFree,
       "Checkpoint folder to continue from, or `latest`: the newest complete one in output_dir. Same as "
       "--resume."},
      // --- logging
      // -------------------------------------------------------------------------------------------------
      {"logging",
       "logging_steps",
       RECIPE_FIELD(logging.logging_steps),
       kFree,
       "Print a line every so many steps (the files hold every step).",
       at_least(1),
       {},
       {"log_every_n_steps"}},
      {"logging", "jsonl", RECIPE_FIELD(logging.jsonl), kFree,
       "Write output_dir/train.jsonl, one object a step."},
      {"logging", "tensorboard", RECIPE_FIELD(logging.tensorboard), kFree,
       "Write TensorBoard event files to output_dir/tensorboard."},
      {"logging",
       "progress",
       RECIPE_FIELD(logging.progress),
       kFree,
       "bar: a progress bar below the lines. plain: lines only. auto: bar on a terminal.",
       {},
       {"auto", "bar", "plain"}},
      {"logging", "peak_tflops", RECIPE_FIELD(logging.peak_tflops), kFree,
       "Peak of the device in TFLOP/s, the 100 % of MFU; null: measured by a matrix product at the start.",
       above(0)},
      {"logging", "probe_steps", RECIPE_FIELD(logging.probe_steps), kFree,
       "Every so many steps, write each layer's attention entropy and the probability that the kept keys "
       "hold, "
       "from a few query rows; 0: never.",
       at_least(0)},
  };
}

#undef RECIPE_FIELD

std::string number_text(double value) {
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  return {buffer, end};
}

// A YAML scalar that reads back as the same text: double-quoted unless it is plainly a word or a path.
std::string quoted(const std::string& text) {
  const std::string plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./";
  const bool word = !text.empty() && text != "null" && text != "Null" && text != "NULL" &&
                    text.find_first_not_of(plain) == std::string::npos;
  if (word) return text;
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

struct TypeText {
  std::string operator()(Accessor<bool>) const { return "true or false"; }
  std::string operator()(Accessor<int64_t>) const { return "integer"; }
  std::string operator()(Accessor<double>) const { return "number"; }
  std::string operator()(Accessor<std::string>) const { return "text"; }
  std::string operator()(Accessor<std::optional<int64_t>>) const { return "integer or null"; }
  std::string operator()(Accessor<std::optional<double>>) const { return "number or null"; }
  std::string operator()(Accessor<std::vector<int64_t>>) const { return "list of integers"; }
  std::string operator()(Accessor<std::vector<double>>) const { return "list of numbers"; }
  std::string operator()(Accessor<std::vector<std::string>>) const { return "list of text"; }
};

std::string to_text(bool v) {
  return v ? "true" : "false";
}
std::string to_text(int64_t v) {
  return std::to_string(v);
}
std::string to_text(double v) {
  return number_text(v);
}
std::string to_text(const std::string& v) {
  return v.empty() ? "null" : quoted(v);
}
template <typename T>
std::string to_text(const std::optional<T>& v) {
  return v ? to_text(*v) : "null";
}
template <typename T>
std::string to_text(const std::vector<T>& v) {
  std::string out = "[";
  for (size_t i = 0; i < v.size(); ++i) out += (i ? ", " : "") + to_text(v[i]);
  return out + "]";
}

}  // namespace

const std::vector<Key>& recipe_keys() {
  static const std::vector<Key> keys = make_keys();
  return keys;
}

const std::vector<std::pair<const char*, const char*>>& recipe_sections() {
  static const std::vector<std::pair<const char*, const char*>> sections = {
      {"model", "The model, its type and where it runs."},
      {"data", "Token shards and how documents become sequences."},
      {"attention", "Dense or exact top-k attention, and how many keys are kept."},
      {"train", "Length of the run, batches, evaluation, sample generations."},
      {"optim", "Optimizer and learning-rate schedule."},
      {"checkpoint", "Where the run is kept and how it is continued."},
      {"logging", "What is printed and written about it."},
  };
  return sections;
}

const Key* find_key(const std::string& full_name) {
  for (const Key& key : recipe_keys()) {
    if (key.full_name() == full_name) return &key;
  }
  return nullptr;
}

std::string type_text(const Key& key) {
  return std::visit(TypeText{}, key.field);
}

std::string range_text(const Key& key) {
  if (!key.choices.empty()) {
    std::string out = "one of ";
    for (size_t i = 0; i < key.choices.size(); ++i) out += std::string(i ? ", " : "") + key.choices[i];
    return out;
  }
  const bool low = std::isfinite(key.range.min);
  const bool high = std::isfinite(key.range.max) && key.range.max < kMaxInt;
  const std::string low_text = (key.range.min_open ? "above " : "at least ") + number_text(key.range.min);
  const std::string high_text = (key.range.max_open ? "below " : "at most ") + number_text(key.range.max);
  if (low && high) return low_text + ", " + high_text;
  if (low) return low_text;
  if (high) return high_text;
  return "";
}

std::string value_text(const Key& key, const Recipe& recipe) {
  Recipe& mutable_recipe = const_cast<Recipe&>(recipe);  // accessors serve reading and writing
  return std::visit([&](auto accessor) { return to_text(accessor(mutable_recipe)); }, key.field);
}

}  // namespace topk_sft
