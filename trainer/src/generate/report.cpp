#include "generate/report.h"

namespace topk_sft {

double rate(int64_t tokens, double seconds) {
  return seconds > 0.0 ? static_cast<double>(tokens) / seconds : 0.0;
}

OrderedJson report_json(const GenerationReport& r) {
  const auto text = [&](const std::vector<int64_t>& ids) -> OrderedJson {
    if (r.detokenizer == nullptr) return nullptr;
    return r.detokenizer->decode(ids, r.skip_special_tokens);
  };
  const SamplingOptions& s = r.options.sampling;
  OrderedJson sampling = {{"greedy", !s.sample}};
  if (s.sample) {
    sampling["temperature"] = s.temperature;
    sampling["top_k"] = s.top_k;
    sampling["top_p"] = s.top_p;
    sampling["min_p"] = s.min_p;
    sampling["seed"] = s.seed;
  }
  sampling["repetition_penalty"] = s.repetition_penalty;

  OrderedJson results = OrderedJson::array();
  for (size_t p = 0; p < r.prompts.size(); ++p) {
    const Generated& sequence = r.generation.sequences[p];
    results.push_back({{"prompt_ids", r.prompts[p]},
                       {"prompt_text", text(r.prompts[p])},
                       {"ids", sequence.ids},
                       {"text", text(sequence.ids)},
                       {"finish_reason", finish_reason_name(sequence.finish_reason)},
                       {"prefill_seconds", sequence.prefill_seconds},
                       {"token_seconds", sequence.token_seconds}});
  }
  const auto phase = [](int64_t tokens, double seconds) {
    return OrderedJson{
        {"tokens", tokens}, {"seconds", seconds}, {"tokens_per_second", rate(tokens, seconds)}};
  };
  return {{"model", r.model},
          {"dtype", r.dtype},
          {"device", r.device},
          {"attention", r.attention ? OrderedJson(sparsity_to_json(*r.attention)) : OrderedJson("dense")},
          {"sampling", sampling},
          {"max_new_tokens", r.options.max_new_tokens},
          {"eos_token_ids", r.options.eos_token_ids},
          {"prefill", phase(r.generation.prefill_tokens, r.generation.prefill_seconds)},
          {"decode", phase(r.generation.decode_tokens, r.generation.decode_seconds)},
          {"cache",
           {{"page_size", r.options.page_size},
            {"key_codes", r.options.key_codes},
            {"bytes", r.generation.cache_bytes}}},
          {"results", results}};
}

}  // namespace topk_sft
