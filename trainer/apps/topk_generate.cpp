// topk-generate: text from a Hugging Face folder with the KV-cache operator, dense or top-k.
#include <ATen/Parallel.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "generate/cli.h"
#include "generate/generator.h"
#include "generate/prompts.h"
#include "generate/report.h"
#include "io/error.h"
#include "model/model.h"
#include "tokenizer/detokenizer.h"

#ifndef TOPK_ATTN_VERSION
#define TOPK_ATTN_VERSION "0.1.0"
#endif

namespace {

using namespace topk_sft;

void write_out(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    fail("standard output: cannot be written");
  }
}

// float16 is a storage format here: the model computes in float32, bfloat16 or float64.
std::pair<at::ScalarType, std::string> choose_dtype(const std::string& asked, const std::string& stored) {
  const std::string& name = asked.empty() ? stored : asked;
  if (name == "bfloat16") return {at::kBFloat16, name};
  if (name == "float64") return {at::kDouble, name};
  return {at::kFloat, "float32"};
}

c10::Device choose_device(const std::string& name) {
  try {
    return c10::Device(name);
  } catch (const std::exception&) {
    throw GenerateUsageError("--device: must be cpu, cuda or cuda:N, got '" + printable(name, 60) + "'");
  }
}

// Text as it comes. A single completion streams; of several, each is written when it is complete.
class TextWriter {
 public:
  TextWriter(const Detokenizer& detokenizer, size_t sequences, bool skip_special)
      : detokenizer_(detokenizer), skip_special_(skip_special), single_(sequences == 1) {
    if (single_) stream_.emplace(detokenizer.stream(skip_special));
  }
  void token(int64_t id) {
    if (single_) write_out(stream_->push(id));
  }
  void finish(const Generation& generation) {
    if (single_) {
      write_out(stream_->finish() + "\n");
      return;
    }
    for (size_t p = 0; p < generation.sequences.size(); ++p) {
      write_out(fmt::format("{}[{}]\n{}\n", p == 0 ? "" : "\n", p,
                            detokenizer_.decode(generation.sequences[p].ids, skip_special_)));
    }
  }

 private:
  const Detokenizer& detokenizer_;
  bool skip_special_;
  bool single_;
  std::optional<Detokenizer::Stream> stream_;
};

void write_ids(const Generation& generation) {
  for (const Generated& sequence : generation.sequences) {
    write_out(fmt::format("{}\n", fmt::join(sequence.ids, ",")));
  }
}

void run(const GenerateCommand& command) {
  if (command.threads) at::set_num_threads(static_cast<int>(*command.threads));
  const c10::Device device = choose_device(command.device);
  const ModelConfig config = read_model_config(command.model);
  const std::string config_path = command.model + "/config.json";
  // Options that replace the whole attention also stand for a config.json that contradicts itself.
  const std::optional<SparsityConfig> own =
      command.attention.dense ? std::nullopt : own_sparsity(config, config_path);
  const std::optional<SparsityConfig> sparsity = command.attention.apply(own);
  if (sparsity) check_sparsity(*sparsity, config.num_layers, "attention");

  std::vector<std::vector<int64_t>> given =
      command.prompts.empty() ? command.ids : read_prompts(command.prompts, command.model, config.vocab_size);
  if (given.empty()) fail("{}: no prompts in the file", command.prompts);
  std::vector<std::vector<int64_t>> prompts;
  for (const auto& prompt : given) {
    for (int64_t i = 0; i < command.samples; ++i) prompts.push_back(prompt);
  }

  GenerateOptions options;
  options.max_new_tokens = command.max_new_tokens;
  options.eos_token_ids = command.eos ? *command.eos : read_eos_token_ids(command.model, config);
  options.batch_size = command.batch_size;
  options.page_size = command.page_size;
  options.key_codes = command.key_codes;
  options.sampling = command.sampling;
  check_generation(config, prompts, options);

  std::optional<Detokenizer> detokenizer;
  const bool has_tokenizer = std::filesystem::exists(command.model + "/tokenizer.json");
  if (command.format == OutputFormat::kText || (command.format == OutputFormat::kJson && has_tokenizer)) {
    if (!has_tokenizer) {
      fail("{}: no tokenizer.json, so there is no text; use --format ids or --json", command.model);
    }
    detokenizer.emplace(Detokenizer::load(command.model));
  }

  const auto [dtype, dtype_name] = choose_dtype(command.dtype, config.dtype);
  const std::unique_ptr<CausalLM> model = CausalLM::load(command.model, {dtype, device});
  model->set_attention(attention_settings(sparsity));
  for (const auto& prompt : prompts) {
    const int64_t longest = static_cast<int64_t>(prompt.size()) + options.max_new_tokens;
    if (config.max_position > 0 && longest > config.max_position) {
      std::fprintf(stderr, "topk-generate: note: %lld tokens in all, but the model was made for %lld\n",
                   static_cast<long long>(longest), static_cast<long long>(config.max_position));
      break;
    }
  }

  std::optional<TextWriter> writer;
  if (command.format == OutputFormat::kText) {
    writer.emplace(*detokenizer, prompts.size(), !command.keep_special_tokens);
  }
  const bool progress = !(writer && prompts.size() == 1) && isatty(STDERR_FILENO);
  int64_t tokens = 0;
  const Generation generation = generate(*model, prompts, options, [&](size_t, int64_t id) {
    if (writer) writer->token(id);
    if (progress) std::fprintf(stderr, "\r%lld tokens", static_cast<long long>(++tokens));
  });
  if (progress) std::fputs("\r\033[K", stderr);

  if (writer) {
    writer->finish(generation);
  } else if (command.format == OutputFormat::kIds) {
    write_ids(generation);
  } else {
    const GenerationReport report{command.model,
                                  dtype_name,
                                  command.device,
                                  sparsity,
                                  prompts,
                                  options,
                                  generation,
                                  detokenizer ? &*detokenizer : nullptr,
                                  !command.keep_special_tokens};
    write_out(report_json(report).dump(2) + "\n");
  }
  if (command.format != OutputFormat::kJson) {
    const std::string line = fmt::format(
        "prefill {} tokens in {:.2f} s ({:.1f} tokens/s), decode {} tokens in {:.2f} s ({:.1f} tokens/s)\n",
        generation.prefill_tokens, generation.prefill_seconds,
        rate(generation.prefill_tokens, generation.prefill_seconds), generation.decode_tokens,
        generation.decode_seconds, rate(generation.decode_tokens, generation.decode_seconds));
    std::fputs(line.c_str(), stderr);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const GenerateCommand command = parse_generate_command(std::vector<std::string>(argv + 1, argv + argc));
    switch (command.action) {
      case GenerateCommand::Action::kHelp:
        std::fputs(generate_usage_text(), stdout);
        return 0;
      case GenerateCommand::Action::kVersion:
        std::puts("topk-generate " TOPK_ATTN_VERSION);
        return 0;
      case GenerateCommand::Action::kGenerate:
        run(command);
        return 0;
    }
  } catch (const GenerateUsageError& e) {
    std::fprintf(stderr, "topk-generate: error: %s (see topk-generate --help)\n", e.what());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fputs("topk-generate: error: out of memory\n", stderr);
  } catch (const std::exception& e) {
    std::string text = e.what();
    // Errors of the tensor library carry a stack trace behind the first line.
    if (const size_t end = text.find("\nException raised from"); end != std::string::npos) text.resize(end);
    std::fprintf(stderr, "topk-generate: error: %s\n", text.c_str());
  }
  return 1;
}
