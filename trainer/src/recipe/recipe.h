// A training recipe: every setting of one run, in the sections of the YAML file.
//
// The defaults are the ones a recipe gets when it does not name a key; keys.cpp documents each of them.
// Torch-free.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace topk_sft {

struct ModelSection {
  std::string base_model;        // Hugging Face folder: config.json, safetensors, tokenizer.json
  std::string dtype = "auto";    // auto, float32, bfloat16; `auto` is resolved by `check_recipe`
  std::string device = "cpu";    // cpu, cuda, cuda:N
  bool random_init = false;      // weights drawn from train.seed instead of read
  std::string adapter = "none";  // none, lora
  int64_t lora_r = 16;
  double lora_alpha = 32.0;
  double lora_dropout = 0.0;
  std::vector<std::string> lora_target_modules = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                  "gate_proj", "up_proj", "down_proj"};
};

struct DataSection {
  std::string dataset_prepared_path;     // folder of token shards; their metadata says which split they are
  std::vector<std::string> train_files;  // or the shards by name
  std::vector<std::string> eval_files;
  std::string train_split = "train";
  std::string eval_split = "validation";
  int64_t sequence_len = 2048;
  bool sample_packing = true;
  std::string overflow = "truncate";  // truncate, split
  bool shuffle = true;
};

struct AttentionSection {
  std::string mode = "topk";  // topk, dense
  std::optional<int64_t> topk;
  std::optional<double> ratio;
  int64_t min_keys = 1;
  std::optional<int64_t> max_keys;
  std::string select = "head";  // head, kv_group
  int64_t sink = 0;
  int64_t recent = 0;
  std::vector<int64_t> dense_layers;
};

struct TrainSection {
  double num_epochs = 1.0;
  std::optional<int64_t> max_steps;
  int64_t micro_batch_size = 1;
  int64_t gradient_accumulation_steps = 1;
  bool gradient_checkpointing = false;
  std::string recompute = "all_but_attention";  // all, all_but_attention
  bool offload_activations = false;
  int64_t seed = 42;
  bool deterministic = false;
  std::optional<int64_t> num_threads;
  std::string on_nonfinite = "stop";   // stop, skip
  std::string sharding = "optimizer";  // none, optimizer, full
  int64_t sequence_parallel = 1;
  double rank_timeout = 20.0;
  int64_t eval_steps = 0;
  std::vector<std::string> eval_attention;  // topk, dense; empty: the attention trained with
  std::vector<double> eval_ratios;          // and top-k attention at each of these
  std::optional<int64_t> max_eval_batches;
  std::string sample_prompts;
  int64_t sample_steps = 0;
  int64_t sample_max_new_tokens = 64;
  double sample_temperature = 0.0;
};

struct OptimSection {
  std::string optimizer = "adamw";
  double learning_rate = 2e-5;
  double weight_decay = 0.0;
  bool weight_decay_embeddings = false;
  double adam_beta1 = 0.9;
  double adam_beta2 = 0.999;
  double adam_epsilon = 1e-8;
  double max_grad_norm = 1.0;
  std::string lr_scheduler = "cosine";  // cosine, linear, constant, wsd
  std::optional<int64_t> warmup_steps;
  std::optional<double> warmup_ratio;
  double min_lr_ratio = 0.0;
  std::optional<int64_t> decay_steps;
  std::optional<double> decay_ratio;
  std::string decay_shape = "cosine";  // cosine, linear, sqrt
};

struct CheckpointSection {
  std::string output_dir;
  int64_t save_steps = 0;
  int64_t save_total_limit = 2;
  bool save_at_end = true;
  bool export_model = true;
  std::string resume_from_checkpoint;
};

struct LoggingSection {
  int64_t logging_steps = 1;
  bool jsonl = true;
  bool tensorboard = true;
  std::string progress = "auto";  // auto, bar, plain
  std::optional<double> peak_tflops;
  int64_t probe_steps = 0;
};

struct Recipe {
  ModelSection model;
  DataSection data;
  AttentionSection attention;
  TrainSection train;
  OptimSection optim;
  CheckpointSection checkpoint;
  LoggingSection logging;

  // True if a training or evaluation pass of this run uses top-k attention.
  bool uses_topk() const;
  // Attention kinds ("topk", "dense") that evaluation runs under, in order.
  std::vector<std::string> eval_modes() const;
};

// A recipe and what was noticed while reading it (synonyms, settings without effect), one sentence each.
struct ParsedRecipe {
  Recipe recipe;
  std::vector<std::string> notes;
};

// Reads `text` (YAML; `name` is used in messages) and applies `overrides` ("section.key=value") in order.
// Throws Error with "name:line:column: ..." or "override 'section.key=value': ..." for anything that is not a
// known key with a value of its type and range, and for settings that contradict each other.
ParsedRecipe parse_recipe(const std::string& text, const std::string& name,
                          const std::vector<std::string>& overrides = {});

// The same for a file.
ParsedRecipe load_recipe(const std::string& path, const std::vector<std::string>& overrides = {});

// The recipe as YAML that `parse_recipe` reads back to the same settings; every key is written.
std::string recipe_to_yaml(const Recipe& recipe);

// The reference of all keys, as plain text for a terminal and as Markdown (docs/recipes.md).
std::string recipe_help();
std::string recipe_markdown();

}  // namespace topk_sft
