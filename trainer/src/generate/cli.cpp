#include "generate/cli.h"

#include <charconv>
#include <functional>
#include <map>

#include "io/error.h"

namespace topk_sft {
namespace {

template <typename... Args>
[[noreturn]] void usage_error(fmt::format_string<Args...> format, Args&&... args) {
  throw GenerateUsageError(fmt::format(format, std::forward<Args>(args)...));
}

template <typename T>
T number(const std::string& option, const std::string& text, T low, T high, const char* what) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value >= low && value <= high)) {
    usage_error("{}: must be {}, got '{}'", option, what, printable(text, 60));
  }
  return value;
}

int64_t count(const std::string& option, const std::string& text, int64_t low = 1) {
  return number<int64_t>(option, text, low, INT64_MAX,
                         low == 0 ? "a whole number of at least 0" : "a whole number of at least 1");
}

std::vector<int64_t> id_list(const std::string& option, const std::string& text) {
  std::vector<int64_t> ids;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    ids.push_back(number<int64_t>(option, text.substr(begin, comma - begin), 0, INT64_MAX,
                                  "ids such as 1,2,3 (whole numbers of at least 0)"));
    begin = comma + 1;
  }
  return ids;
}

template <typename T>
T one_of(const std::string& option, const std::string& text, const std::map<std::string, T>& known) {
  const auto found = known.find(text);
  if (found != known.end()) return found->second;
  std::string names;
  for (const auto& [name, value] : known) names += (names.empty() ? "" : ", ") + name;
  usage_error("{}: must be one of {}, got '{}'", option, names, printable(text, 60));
}

}  // namespace

std::optional<SparsityConfig> AttentionOverrides::apply(const std::optional<SparsityConfig>& own) const {
  const bool adjusts =
      min_keys || max_keys || select || sink || recent || dense_layers || prefill_dense.has_value();
  if (dense) {
    if (topk || ratio || adjusts) usage_error("--dense cannot be combined with options of top-k attention");
    return std::nullopt;
  }
  if (topk && ratio) usage_error("--topk and --ratio: give one of them");
  if (!own && !topk && !ratio) {
    if (adjusts) {
      usage_error(
          "the model's config.json has no topk_attention: options of top-k attention need --topk or --ratio");
    }
    return std::nullopt;
  }
  SparsityConfig sparsity = own.value_or(SparsityConfig{});
  if (topk || ratio) {
    sparsity.topk = topk;
    sparsity.ratio = ratio;
  }
  if (min_keys) sparsity.min_keys = *min_keys;
  if (max_keys) sparsity.max_keys = *max_keys;
  if (select) sparsity.select = *select;
  if (sink) sparsity.sink = *sink;
  if (recent) sparsity.recent = *recent;
  if (dense_layers) sparsity.dense_layers = *dense_layers;
  if (prefill_dense) sparsity.prefill_dense = *prefill_dense;
  return sparsity;
}

GenerateCommand parse_generate_command(const std::vector<std::string>& arguments) {
  GenerateCommand c;
  bool sampling_option = false;
  std::string sampling_name;
  using Handler = std::function<void(const std::string& option, const std::string& value)>;
  const auto sampled = [&](const std::string& option) {
    sampling_option = true;
    sampling_name = option;
  };
  const double kHuge = 1e30;
  const std::map<std::string, Handler> with_value = {
      {"--model", [&](auto&, auto& v) { c.model = v; }},
      {"--prompts", [&](auto&, auto& v) { c.prompts = v; }},
      {"--ids", [&](auto& o, auto& v) { c.ids.push_back(id_list(o, v)); }},
      {"--topk", [&](auto& o, auto& v) { c.attention.topk = count(o, v); }},
      {"--ratio",
       [&](auto& o, auto& v) {
         c.attention.ratio = number<double>(o, v, 5e-324, 1.0, "a number above 0 and at most 1");
       }},
      {"--min-keys", [&](auto& o, auto& v) { c.attention.min_keys = count(o, v); }},
      {"--max-keys", [&](auto& o, auto& v) { c.attention.max_keys = count(o, v); }},
      {"--select",
       [&](auto& o, auto& v) {
         c.attention.select = one_of<std::string>(o, v, {{"head", "head"}, {"kv_group", "kv_group"}});
       }},
      {"--sink", [&](auto& o, auto& v) { c.attention.sink = count(o, v, 0); }},
      {"--recent", [&](auto& o, auto& v) { c.attention.recent = count(o, v, 0); }},
      {"--dense-layers", [&](auto& o, auto& v) { c.attention.dense_layers = id_list(o, v); }},
      {"--prefill",
       [&](auto& o, auto& v) {
         c.attention.prefill_dense = one_of<bool>(o, v, {{"dense", true}, {"topk", false}});
       }},
      {"--max-new-tokens", [&](auto& o, auto& v) { c.max_new_tokens = count(o, v); }},
      {"--temperature",
       [&](auto& o, auto& v) {
         c.sampling.temperature = number<double>(o, v, 0.0, kHuge, "a number of at least 0");
         c.sampling.sample = c.sampling.temperature > 0.0;
         if (!c.sampling.sample) c.sampling.temperature = 1.0;
       }},
      {"--top-k",
       [&](auto& o, auto& v) {
         c.sampling.top_k = count(o, v, 0);
         sampled(o);
       }},
      {"--top-p",
       [&](auto& o, auto& v) {
         c.sampling.top_p = number<double>(o, v, 5e-324, 1.0, "a number above 0 and at most 1");
         sampled(o);
       }},
      {"--min-p",
       [&](auto& o, auto& v) {
         c.sampling.min_p = number<double>(o, v, 0.0, 1.0, "a number from 0 to 1");
         sampled(o);
       }},
      {"--repetition-penalty",
       [&](auto& o, auto& v) {
         c.sampling.repetition_penalty = number<double>(o, v, 5e-324, kHuge, "a number above 0");
       }},
      {"--seed",
       [&](auto& o, auto& v) {
         c.sampling.seed = number<uint64_t>(o, v, 0, UINT64_MAX, "a whole number of at least 0");
       }},
      {"--samples", [&](auto& o, auto& v) { c.samples = count(o, v); }},
      {"--batch-size", [&](auto& o, auto& v) { c.batch_size = count(o, v); }},
      {"--page-size",
       [&](auto& o, auto& v) {
         c.page_size = number<int64_t>(o, v, 1, int64_t{1} << 20, "a whole number from 1 to 1048576");
       }},
      {"--eos", [&](auto& o, auto& v) { c.eos = id_list(o, v); }},
      {"--format",
       [&](auto& o, auto& v) {
         c.format = one_of<OutputFormat>(
             o, v,
             {{"text", OutputFormat::kText}, {"ids", OutputFormat::kIds}, {"json", OutputFormat::kJson}});
       }},
      {"--dtype",
       [&](auto& o, auto& v) {
         c.dtype = one_of<std::string>(
             o, v, {{"float32", "float32"}, {"bfloat16", "bfloat16"}, {"float64", "float64"}});
       }},
      {"--device", [&](auto&, auto& v) { c.device = v; }},
      {"--threads", [&](auto& o, auto& v) { c.threads = number<int64_t>(o, v, 1, 4096, "from 1 to 4096"); }},
  };
  const std::map<std::string, std::function<void()>> flags = {
      {"--dense", [&] { c.attention.dense = true; }},
      {"--key-codes", [&] { c.key_codes = true; }},
      {"--ignore-eos", [&] { c.eos = std::vector<int64_t>{}; }},
      {"--json", [&] { c.format = OutputFormat::kJson; }},
      {"--keep-special-tokens", [&] { c.keep_special_tokens = true; }},
      {"--help", [&] { c.action = GenerateCommand::Action::kHelp; }},
      {"-h", [&] { c.action = GenerateCommand::Action::kHelp; }},
      {"--version", [&] { c.action = GenerateCommand::Action::kVersion; }},
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const size_t equals = argument.rfind("--", 0) == 0 ? argument.find('=') : std::string::npos;
    const std::string option = argument.substr(0, equals);
    if (const auto flag = flags.find(option); flag != flags.end()) {
      if (equals != std::string::npos) usage_error("{} takes no value", option);
      flag->second();
    } else if (const auto handler = with_value.find(option); handler != with_value.end()) {
      if (equals == std::string::npos && i + 1 == arguments.size()) usage_error("{} needs a value", option);
      handler->second(option, equals == std::string::npos ? arguments[++i] : argument.substr(equals + 1));
    } else {
      usage_error("unknown {} '{}'", option.rfind('-', 0) == 0 ? "option" : "argument",
                  printable(option, 60));
    }
  }
  if (c.action != GenerateCommand::Action::kGenerate) return c;
  if (c.model.empty()) usage_error("--model must name a Hugging Face folder");
  if (c.prompts.empty() == c.ids.empty()) {
    usage_error("{}", c.prompts.empty() ? "a prompt is needed: --prompts FILE or --ids 1,2,3"
                                        : "--prompts and --ids: give one of them");
  }
  if (sampling_option && !c.sampling.sample) {
    usage_error("{} needs --temperature above 0: without it decoding is greedy", sampling_name);
  }
  if (c.samples > 1 && !c.sampling.sample) {
    usage_error("--samples needs --temperature above 0: greedy decoding has one result");
  }
  if (c.attention.dense) c.attention.apply(std::nullopt);  // refuses contradictions before any file is read
  if (c.attention.topk && c.attention.ratio) usage_error("--topk and --ratio: give one of them");
  return c;
}

const char* generate_usage_text() {
  return R"(usage: topk-generate --model DIR (--prompts FILE | --ids 1,2,3) [options]

Generates text with a Llama, Mistral, Qwen2 or Qwen3 model from a Hugging Face folder.

prompts
  --prompts FILE          token file from `topk-data tokens`; one completion per document
  --ids 1,2,3             token ids; repeat the option for several prompts

attention (default: what the model's config.json says; without topk_attention there, dense)
  --topk N | --ratio R    keys kept per query: N, or the share R of the visible keys
  --min-keys N            at least N keys
  --max-keys N            at most N keys
  --select head|kv_group  a set per query head, or one per KV group
  --sink N, --recent N    always keep the first, the last N visible keys
  --dense-layers 0,1      these layers stay dense
  --prefill dense|topk    dense: the prompt attends to everything, only decoding is sparse
  --dense                 dense attention, whatever config.json says

decoding
  --max-new-tokens N      (256)
  --temperature T         sample at temperature T; 0, the default: greedy
  --top-k N, --top-p P, --min-p P, --repetition-penalty R
  --seed N                (0) a prompt's samples depend on the seed and the prompt, not on the batch
  --samples N             completions per prompt (1)
  --eos 1,2               stop tokens instead of those of generation_config.json
  --ignore-eos            no stop tokens
  --batch-size N          sequences decoded together (8)
  --page-size N           tokens of a page of the KV cache (64)
  --key-codes             keep an int8 copy of the keys for the certified scan: the same tokens, fewer bytes
                          read; CUDA with bfloat16

running
  --dtype float32|bfloat16|float64   (as the weights are stored; float16 becomes float32)
  --device cpu|cuda[:N]   (cpu)
  --threads N             CPU threads

output
  --format text|ids|json  (text: written to the terminal as it comes); --json is short for --format json
  --keep-special-tokens   show <|im_end|> and the like in the text
  --help, --version
)";
}

}  // namespace topk_sft
