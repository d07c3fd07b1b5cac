#include "train/sampling.h"

#include <fmt/ranges.h>

#include "generate/generator.h"
#include "generate/prompts.h"
#include "io/error.h"
#include "io/json.h"

namespace topk_sft {

namespace {

GenerateOptions generate_options(const RunPlan& plan, int64_t step) {
  const TrainSection& train = plan.recipe.train;
  GenerateOptions options;
  options.max_new_tokens = train.sample_max_new_tokens;
  options.eos_token_ids = read_eos_token_ids(plan.recipe.model.base_model, plan.config);
  options.sampling.sample = train.sample_temperature > 0;
  if (options.sampling.sample) options.sampling.temperature = train.sample_temperature;
  options.sampling.seed = static_cast<uint64_t>(train.seed) + static_cast<uint64_t>(step);
  return options;
}

}  // namespace

TextOfIds::TextOfIds(const std::string& hf_dir) {
  try {
    detokenizer_.emplace(Detokenizer::load(hf_dir));
  } catch (const Error& e) {
    notice_ = fmt::format("token ids are shown instead of text: {}", e.what());
  }
}

std::string TextOfIds::operator()(std::span<const int64_t> ids) const {
  if (!detokenizer_) return fmt::format("{}", fmt::join(ids, " "));
  return Json(detokenizer_->decode(ids, /*skip_special_tokens=*/false))
      .dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::vector<std::vector<int64_t>> load_sample_prompts(const RunPlan& plan) {
  const std::string& file = plan.recipe.train.sample_prompts;
  if (file.empty()) return {};
  auto prompts = read_prompts(file, plan.recipe.model.base_model, plan.config.vocab_size);
  if (prompts.empty()) fail("train.sample_prompts: {} holds no prompt", file);
  check_generation(plan.config, prompts, generate_options(plan, 0));
  return prompts;
}

std::vector<Completion> complete_prompts(const CausalLM& model, const RunPlan& plan,
                                         const std::vector<std::vector<int64_t>>& prompts,
                                         const TextOfIds& text, int64_t step) {
  std::vector<Completion> out;
  const Generation generation = generate(model, prompts, generate_options(plan, step));
  for (size_t i = 0; i < prompts.size(); ++i) {
    out.push_back({text(prompts[i]), text(generation.sequences[i].ids)});
  }
  return out;
}

}  // namespace topk_sft
