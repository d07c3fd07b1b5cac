#include "generate/generator.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <set>
#include <span>

#include "io/error.h"

namespace topk_sft {
namespace {

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

at::Tensor ids_tensor(std::span<const int64_t> ids, int64_t rows) {
  return at::tensor(at::ArrayRef<int64_t>(ids.data(), ids.size()), at::kLong).view({rows, -1});
}

// A sequence being generated.
struct Running {
  size_t prompt;
  TokenSampler sampler;
  int64_t handle = -1;  // in the cache
  bool done = false;
};

using Prompts = std::vector<std::vector<int64_t>>;

class Batch {
 public:
  Batch(const CausalLM& model, const GenerateOptions& options, const TokenCallback& on_token,
        Generation& result)
      : model_(model), options_(options), on_token_(on_token), result_(result) {}

  void run(const Prompts& prompts, std::vector<Running> running) {
    running_ = std::move(running);
    cache_.emplace(make_cache(prompts));
    result_.cache_bytes = std::max(result_.cache_bytes, bytes_of(cache_->memory()));
    std::map<std::vector<int64_t>, size_t> first;  // prompt -> row that computed it
    for (size_t row = 0; row < running_.size(); ++row) {
      const std::vector<int64_t>& prompt = prompts[running_[row].prompt];
      const auto [entry, is_new] = first.try_emplace(prompt, row);
      is_new ? prefill(prompt, row) : share(entry->second, row);
    }
    // Only now: a sequence that is done would give up its pages before they were shared.
    while (drop_finished()) step();
  }

 private:
  int64_t pages_of(int64_t tokens) const { return (tokens + options_.page_size - 1) / options_.page_size; }

  static int64_t bytes_of(const topk_attn::KVCacheMemory& m) {
    return m.k_bytes + m.v_bytes + m.code_bytes + m.table_bytes;
  }

  // Room for all that the batch may become. Equal prompts have the pages of their whole length in common.
  topk_attn::KVCache make_cache(const Prompts& prompts) const {
    int64_t pages = 0, longest = 0;
    std::set<std::vector<int64_t>> seen;
    for (const Running& r : running_) {
      const std::vector<int64_t>& prompt = prompts[r.prompt];
      const int64_t most = most_tokens(prompt);
      longest = std::max(longest, most);
      pages += pages_of(most);
      const bool shared = !seen.insert(prompt).second;
      if (shared) pages -= static_cast<int64_t>(prompt.size()) / options_.page_size;
    }
    return model_.make_kv_cache(pages, options_.page_size, longest, options_.key_codes);
  }

  // The last token chosen is never fed.
  int64_t most_tokens(const std::vector<int64_t>& prompt) const {
    return static_cast<int64_t>(prompt.size()) + options_.max_new_tokens - 1;
  }

  void prefill(const std::vector<int64_t>& prompt, size_t row) {
    const Stopwatch watch;
    Running& running = running_[row];
    running.handle = cache_->add();
    // All its pages at once: they then lie in a row, which dense steps read without a copy.
    cache_->reserve({running.handle}, most_tokens(prompt));
    logits_[running.handle] = host_logits(model_.decode(ids_tensor(prompt, 1), *cache_))[0];
    const double seconds = watch.seconds();
    result_.sequences[running.prompt].prefill_seconds = seconds;
    result_.prefill_tokens += static_cast<int64_t>(prompt.size());
    result_.prefill_seconds += seconds;
    choose(running, logits_[running.handle], seconds);
  }

  // Another sample of the prompt that row `from` has: the same pages, the same logits.
  void share(size_t from, size_t row) {
    const Running& source = running_[from];
    Running& running = running_[row];
    const double seconds = result_.sequences[source.prompt].prefill_seconds;
    running.handle = cache_->fork(source.handle, cache_->length(source.handle));
    result_.sequences[running.prompt].prefill_seconds = seconds;
    choose(running, logits_[source.handle], seconds);
  }

  void step() {
    const Stopwatch watch;
    std::vector<int64_t> fed, handles;
    for (const Running& r : running_) {
      fed.push_back(result_.sequences[r.prompt].ids.back());
      handles.push_back(r.handle);
    }
    cache_->reserve(handles, 1);
    at::Tensor logits =
        host_logits(model_.decode(ids_tensor(fed, static_cast<int64_t>(fed.size())), *cache_));
    const double seconds = watch.seconds();
    result_.decode_seconds += seconds;
    for (size_t row = 0; row < running_.size(); ++row) {
      ++result_.decode_tokens;
      choose(running_[row], logits[static_cast<int64_t>(row)], seconds);
    }
  }

  static at::Tensor host_logits(const at::Tensor& logits) {
    return logits.to(at::TensorOptions().device(at::kCPU).dtype(at::kFloat)).contiguous();
  }

  void choose(Running& running, const at::Tensor& logits, double seconds) {
    Generated& sequence = result_.sequences[running.prompt];
    const at::Tensor row = logits.clone();
    const int64_t id = running.sampler.next({row.data_ptr<float>(), static_cast<size_t>(row.numel())});
    sequence.ids.push_back(id);
    sequence.token_seconds.push_back(seconds);
    const std::vector<int64_t>& eos = options_.eos_token_ids;
    if (std::find(eos.begin(), eos.end(), id) != eos.end()) {
      sequence.finish_reason = FinishReason::kStop;
      running.done = true;
    } else if (static_cast<int64_t>(sequence.ids.size()) == options_.max_new_tokens) {
      sequence.finish_reason = FinishReason::kLength;
      running.done = true;
    }
    if (on_token_) on_token_(running.prompt, id);
  }

  // Takes finished sequences out of the batch; their pages are free. False when nothing is left to do.
  bool drop_finished() {
    logits_.clear();
    std::vector<Running> left;
    for (Running& r : running_) {
      if (r.done) {
        cache_->remove(r.handle);
      } else {
        left.push_back(std::move(r));
      }
    }
    running_ = std::move(left);
    return !running_.empty();
  }

  const CausalLM& model_;
  const GenerateOptions& options_;
  const TokenCallback& on_token_;
  Generation& result_;
  std::optional<topk_attn::KVCache> cache_;
  std::map<int64_t, at::Tensor> logits_;  // of the prefills, by handle, until all prompts have started
  std::vector<Running> running_;          // row by row
};

}  // namespace

const char* finish_reason_name(FinishReason reason) {
  return reason == FinishReason::kStop ? "stop" : "length";
}

void check_generation(const ModelConfig& config, const std::vector<std::vector<int64_t>>& prompts,
                      const GenerateOptions& options) {
  if (options.max_new_tokens < 1) fail("max_new_tokens must be at least 1, got {}", options.max_new_tokens);
  if (options.batch_size < 1) fail("batch_size must be at least 1, got {}", options.batch_size);
  if (options.page_size < 1) fail("page_size must be at least 1, got {}", options.page_size);
  check_sampling(options.sampling);
  const int64_t vocab_size = config.vocab_size;
  for (const int64_t id : options.eos_token_ids) {
    if (id < 0 || id >= vocab_size) {
      fail("eos_token_ids: {} is not in [0, {}) of the vocabulary", id, vocab_size);
    }
  }
  for (size_t p = 0; p < prompts.size(); ++p) {
    if (prompts[p].empty()) fail("prompt {} is empty: it must hold at least one token", p);
    for (const int64_t id : prompts[p]) {
      if (id < 0 || id >= vocab_size) {
        fail("prompt {}: token id {} is not in [0, {}) of the vocabulary", p, id, vocab_size);
      }
    }
  }
}

Generation generate(const CausalLM& model, const std::vector<std::vector<int64_t>>& prompts,
                    const GenerateOptions& options, const TokenCallback& on_token) {
  check_generation(model.config(), prompts, options);
  Generation result;
  result.sequences.resize(prompts.size());
  std::map<std::vector<int64_t>, uint64_t> occurrences;
  std::vector<Running> waiting;
  for (size_t p = 0; p < prompts.size(); ++p) {
    const uint64_t occurrence = options.sampling.sample ? occurrences[prompts[p]]++ : 0;
    waiting.push_back({p, TokenSampler(options.sampling, prompts[p], occurrence)});
  }
  const auto size = static_cast<size_t>(options.batch_size);
  for (size_t begin = 0; begin < waiting.size(); begin += size) {
    std::vector<Running> chunk;
    for (size_t i = begin; i < std::min(begin + size, waiting.size()); ++i) {
      chunk.push_back(std::move(waiting[i]));
    }
    Batch(model, options, on_token, result).run(prompts, std::move(chunk));
  }
  return result;
}

}  // namespace topk_sft
