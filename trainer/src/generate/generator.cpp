#include "generate/generator.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <chrono>
#include <map>
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

// The caches of row `row` as a batch of one: views, so that what is written there is in the batch.
KvState row_of(const KvState& state, int64_t row) {
  KvState one;
  for (const at::Tensor& k : state.k) one.k.push_back(k.narrow(0, row, 1));
  for (const at::Tensor& v : state.v) one.v.push_back(v.narrow(0, row, 1));
  one.cache_seqlens = state.cache_seqlens.narrow(0, row, 1);
  one.prefill_dense = state.prefill_dense;
  return one;
}

KvState rows_of(const KvState& state, const at::Tensor& rows) {
  KvState some;
  for (const at::Tensor& k : state.k) some.k.push_back(k.index_select(0, rows));
  for (const at::Tensor& v : state.v) some.v.push_back(v.index_select(0, rows));
  some.cache_seqlens = state.cache_seqlens.index_select(0, rows);
  some.prefill_dense = state.prefill_dense;
  return some;
}

at::Tensor ids_tensor(std::span<const int64_t> ids, int64_t rows) {
  return at::tensor(at::ArrayRef<int64_t>(ids.data(), ids.size()), at::kLong).view({rows, -1});
}

// A sequence being generated.
struct Running {
  size_t prompt;
  TokenSampler sampler;
  bool done = false;
};

class Batch {
 public:
  Batch(const CausalLM& model, const GenerateOptions& options, const TokenCallback& on_token,
        Generation& result)
      : model_(model), options_(options), on_token_(on_token), result_(result) {}

  void run(const std::vector<std::vector<int64_t>>& prompts, std::vector<Running> running) {
    running_ = std::move(running);
    int64_t longest = 0;
    for (const Running& r : running_) {
      longest = std::max(longest, static_cast<int64_t>(prompts[r.prompt].size()));
    }
    // The last token chosen is never fed.
    state_ = model_.make_kv_state(static_cast<int64_t>(running_.size()), longest + options_.max_new_tokens);
    for (size_t row = 0; row < running_.size(); ++row) prefill(prompts[running_[row].prompt], row);
    while (drop_finished()) step();
  }

 private:
  void prefill(const std::vector<int64_t>& prompt, size_t row) {
    const Stopwatch watch;
    KvState one = row_of(state_, static_cast<int64_t>(row));
    at::Tensor logits = host_logits(model_.decode(ids_tensor(prompt, 1), one));
    // `one` may have replaced its tensor instead of adding in place.
    state_.cache_seqlens.narrow(0, static_cast<int64_t>(row), 1).copy_(one.cache_seqlens);
    const double seconds = watch.seconds();
    result_.sequences[running_[row].prompt].prefill_seconds = seconds;
    result_.prefill_tokens += static_cast<int64_t>(prompt.size());
    result_.prefill_seconds += seconds;
    choose(running_[row], logits[0], seconds);
  }

  void step() {
    const Stopwatch watch;
    std::vector<int64_t> fed;
    for (const Running& r : running_) fed.push_back(result_.sequences[r.prompt].ids.back());
    const at::Tensor before = state_.cache_seqlens.clone();
    at::Tensor logits = host_logits(model_.decode(ids_tensor(fed, static_cast<int64_t>(fed.size())), state_));
    const double seconds = watch.seconds();
    result_.decode_seconds += seconds;
    for (size_t row = 0; row < running_.size(); ++row) {
      if (running_[row].done) {
        // A finished row steps along until the batch is made smaller; its cache stays where it was.
        const auto at = static_cast<int64_t>(row);
        state_.cache_seqlens.narrow(0, at, 1).copy_(before.narrow(0, at, 1));
        continue;
      }
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

  // Makes the batch smaller once half of it is done: the copy of the caches then pays for itself. False when
  // nothing is left to do.
  bool drop_finished() {
    std::vector<int64_t> rows;
    for (size_t row = 0; row < running_.size(); ++row) {
      if (!running_[row].done) rows.push_back(static_cast<int64_t>(row));
    }
    if (rows.empty()) return false;
    if (rows.size() * 2 <= running_.size()) {
      state_ = rows_of(state_, at::tensor(rows, at::kLong).to(state_.cache_seqlens.device()));
      std::vector<Running> left;
      for (const int64_t row : rows) left.push_back(std::move(running_[static_cast<size_t>(row)]));
      running_ = std::move(left);
    }
    return true;
  }

  const CausalLM& model_;
  const GenerateOptions& options_;
  const TokenCallback& on_token_;
  Generation& result_;
  KvState state_;
  std::vector<Running> running_;  // row by row
};

}  // namespace

const char* finish_reason_name(FinishReason reason) {
  return reason == FinishReason::kStop ? "stop" : "length";
}

void check_generation(const ModelConfig& config, const std::vector<std::vector<int64_t>>& prompts,
                      const GenerateOptions& options) {
  if (options.max_new_tokens < 1) fail("max_new_tokens must be at least 1, got {}", options.max_new_tokens);
  if (options.batch_size < 1) fail("batch_size must be at least 1, got {}", options.batch_size);
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
