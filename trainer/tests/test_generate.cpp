// Generation with a tiny random model: the cache against recomputing the whole forward at every token,
// batches against single runs, stop tokens, the command line.
#include "generate/generator.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <fstream>
#include <set>

#include "generate/cli.h"
#include "generate/prompts.h"
#include "scratch.h"

using namespace topk_sft;

namespace {

using Ids = std::vector<int64_t>;

std::unique_ptr<CausalLM> tiny() {
  ModelConfig config;
  config.family = ModelFamily::kLlama;
  config.vocab_size = 97;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.max_position = 256;
  config.initializer_range = 0.5;  // far from uniform logits
  auto model = CausalLM::create(config, {at::kFloat, at::kCPU}, 3);
  // Attention that is spread over many keys, so that it matters which of them are kept.
  const at::NoGradGuard no_grad;
  for (auto& [name, parameter] : model->named_parameters()) {
    if (contains(name, "q_proj") || contains(name, "k_proj")) parameter.mul_(0.25);
  }
  return model;
}

AttentionSettings topk(int64_t keys) {
  AttentionSettings settings;
  settings.topk = true;
  settings.options.topk = keys;
  return settings;
}

// The next token from the packed forward over all tokens so far, no cache.
int64_t next_by_forward(const CausalLM& model, const Ids& ids) {
  const auto length = static_cast<int64_t>(ids.size());
  PackedBatch batch;
  batch.input_ids = at::tensor(ids, at::kLong);
  batch.position_ids = at::arange(length, at::kLong);
  batch.labels = at::full({length}, kIgnoreLabel, at::kLong);
  batch.cu_seqlens = at::tensor(Ids{0, length}, at::kInt);
  batch.max_seqlen = length;
  const at::Tensor hidden = model.hidden_states(batch).detach();
  return model.logits(hidden[length - 1]).argmax().item<int64_t>();
}

Ids by_forward(const CausalLM& model, Ids ids, int64_t count) {
  Ids chosen;
  for (int64_t i = 0; i < count; ++i) {
    chosen.push_back(next_by_forward(model, ids));
    ids.push_back(chosen.back());
  }
  return chosen;
}

const std::vector<Ids> kPrompts = {
    {5, 9, 11, 4, 60, 33, 2, 8, 90, 1, 17}, {3}, {7, 7, 7, 20, 41}, {3}, {96, 0, 50}};

GenerateOptions options(int64_t count) {
  GenerateOptions o;
  o.max_new_tokens = count;
  return o;
}

std::vector<Ids> ids_of(const Generation& generation) {
  std::vector<Ids> ids;
  for (const Generated& sequence : generation.sequences) ids.push_back(sequence.ids);
  return ids;
}

}  // namespace

TEST_CASE("decoding with the cache equals recomputing the forward") {
  const auto model = tiny();
  AttentionSettings mixed = topk(3);
  mixed.dense_layers = {1};
  mixed.options.sink = 1;
  std::set<Ids> distinct;
  for (const AttentionSettings& settings : {AttentionSettings{}, topk(3), topk(1), mixed}) {
    model->set_attention(settings);
    distinct.insert(by_forward(*model, kPrompts[0], 16));
    for (const Ids& prompt : kPrompts) {
      const Generation generation = generate(*model, {prompt}, options(16));
      CHECK(generation.sequences[0].ids == by_forward(*model, prompt, 16));
    }
  }
  CHECK(distinct.size() == 4);  // the settings matter
}

TEST_CASE("dense prefill differs from sparse prefill only before decoding") {
  const auto model = tiny();
  AttentionSettings settings = topk(2);
  settings.prefill_dense = true;
  model->set_attention(settings);
  const Generation mixed = generate(*model, {kPrompts[0]}, options(12));
  model->set_attention({});
  const Generation dense = generate(*model, {kPrompts[0]}, options(12));
  model->set_attention(topk(2));
  const Generation sparse = generate(*model, {kPrompts[0]}, options(12));
  CHECK(mixed.sequences[0].ids[0] == dense.sequences[0].ids[0]);
  CHECK(mixed.sequences[0].ids != dense.sequences[0].ids);
  CHECK(mixed.sequences[0].ids != sparse.sequences[0].ids);
}

TEST_CASE("a batch equals single runs, greedy and sampled, whatever the batch size") {
  const auto model = tiny();
  for (const AttentionSettings& settings : {AttentionSettings{}, topk(3)}) {
    model->set_attention(settings);
    for (const bool sample : {false, true}) {
      GenerateOptions o = options(14);
      o.sampling.sample = sample;
      o.sampling.seed = 11;
      o.sampling.temperature = 4.0;
      // Sequences that end at different steps make the batch smaller on the way.
      o.eos_token_ids = {by_forward(*model, kPrompts[0], 3).back(), 40, 41, 42, 43, 44};
      std::vector<Ids> single;
      for (const Ids& prompt : kPrompts) single.push_back(generate(*model, {prompt}, o).sequences[0].ids);
      for (const int64_t batch_size : {1, 2, 8}) {
        o.batch_size = batch_size;
        const std::vector<Ids> batch = ids_of(generate(*model, kPrompts, o));
        for (size_t p = 0; p < kPrompts.size(); ++p) {
          // The second copy of a prompt is another sample.
          if (sample && p == 3) {
            CHECK(batch[3] != batch[1]);
          } else {
            CHECK(batch[p] == single[p]);
          }
        }
      }
    }
  }
}

TEST_CASE("samples of one prompt share its prefill and its pages, and are what they are alone") {
  const auto model = tiny();
  for (const AttentionSettings& settings : {AttentionSettings{}, topk(3)}) {
    model->set_attention(settings);
    GenerateOptions o = options(14);
    o.sampling.sample = true;
    o.sampling.seed = 5;
    const std::vector<Ids> prompts(4, kPrompts[0]);  // 11 tokens
    o.batch_size = 1;
    const Generation alone = generate(*model, prompts, o);
    CHECK(alone.prefill_tokens == 44);
    CHECK(std::set<Ids>{alone.sequences[0].ids, alone.sequences[1].ids, alone.sequences[2].ids}.size() == 3);
    o.batch_size = 4;
    for (const int64_t page_size : {1, 4, 11, 64}) {
      o.page_size = page_size;
      const Generation together = generate(*model, prompts, o);
      CHECK(ids_of(together) == ids_of(alone));
      CHECK(together.prefill_tokens == 11);
      for (const Generated& sequence : together.sequences) {
        CHECK(sequence.prefill_seconds == together.prefill_seconds);
      }
    }
    // 24 tokens each, of which 8 lie in two pages that all have: 6 pages, and 4 for every other sample.
    o.page_size = 4;
    const int64_t row = 2 * model->config().num_kv_heads * model->config().head_dim * 4;
    const int64_t pages = 6 + 3 * 4;
    const int64_t bytes = generate(*model, prompts, o).cache_bytes;
    CHECK(bytes >= pages * 4 * row * model->config().num_layers);
    CHECK(bytes < (pages + 1) * 4 * row * model->config().num_layers);
  }
}

TEST_CASE("generation stops behind an eos token or at max_new_tokens") {
  const auto model = tiny();
  const Ids free = generate(*model, {kPrompts[0]}, options(20)).sequences[0].ids;
  REQUIRE(free.size() == 20);
  const int64_t eos = free[6];
  const auto first = static_cast<size_t>(std::find(free.begin(), free.end(), eos) - free.begin());
  GenerateOptions o = options(20);
  o.eos_token_ids = {95, eos};
  const Generation stopped = generate(*model, {kPrompts[0]}, o);
  CHECK(stopped.sequences[0].ids == Ids(free.begin(), free.begin() + static_cast<int64_t>(first) + 1));
  CHECK(stopped.sequences[0].finish_reason == FinishReason::kStop);
  o.max_new_tokens = 1;
  o.eos_token_ids = {};
  const Generation one = generate(*model, {kPrompts[0]}, o);
  CHECK(one.sequences[0].ids == Ids{free[0]});
  CHECK(one.sequences[0].finish_reason == FinishReason::kLength);
  CHECK(one.decode_tokens == 0);
}

TEST_CASE("tokens are reported as they come, and counted") {
  const auto model = tiny();
  std::vector<Ids> seen(kPrompts.size());
  const Generation generation =
      generate(*model, kPrompts, options(5), [&](size_t prompt, int64_t id) { seen[prompt].push_back(id); });
  CHECK(seen == ids_of(generation));
  CHECK(generation.prefill_tokens == 20);  // 21 but for the second {3}, which shares the first one's
  CHECK(generation.decode_tokens == 20);
  for (const Generated& sequence : generation.sequences) {
    CHECK(sequence.token_seconds.size() == sequence.ids.size());
    CHECK(sequence.token_seconds[0] == sequence.prefill_seconds);
  }
  CHECK(generate(*model, {}, options(5)).sequences.empty());
}

TEST_CASE("bad prompts and options are named before anything runs") {
  const auto model = tiny();
  const auto refused = [&](const std::vector<Ids>& prompts, const GenerateOptions& o,
                           const std::string& part) {
    bool called = false;
    const std::string message =
        error_of([&] { generate(*model, prompts, o, [&](size_t, int64_t) { called = true; }); });
    CHECK(contains(message, part));
    CHECK_FALSE(called);
  };
  refused({{1}, {}}, options(1), "prompt 1 is empty");
  GenerateOptions no_page = options(1);
  no_page.page_size = 0;
  refused({{1}}, no_page, "page_size must be at least 1, got 0");
  refused({{1, 97}}, options(1), "97 is not in [0, 97)");
  refused({{-1}}, options(1), "-1 is not in [0, 97)");
  refused({{1}}, options(0), "max_new_tokens");
  GenerateOptions o = options(1);
  o.batch_size = 0;
  refused({{1}}, o, "batch_size");
  o = options(1);
  o.eos_token_ids = {97};
  refused({{1}}, o, "eos_token_ids");
  o = options(1);
  o.sampling.top_p = 2.0;
  refused({{1}}, o, "top_p");
}

TEST_CASE("stop tokens come from generation_config.json, else from config.json") {
  const ScratchFolder folder;
  ModelConfig config;
  config.vocab_size = 10;
  config.eos_token_ids = {2};
  const std::string path = folder / "generation_config.json";
  const auto read = [&](const std::string& text) {
    std::ofstream(path) << text;
    return read_eos_token_ids(folder.path.string(), config);
  };
  CHECK(read_eos_token_ids(folder.path.string(), config) == Ids{2});
  CHECK(read(R"({"eos_token_id": 4})") == Ids{4});
  CHECK(read(R"({"eos_token_id": [4, 5]})") == Ids{4, 5});
  CHECK(read(R"({"eos_token_id": null})") == Ids{2});
  CHECK(read("{}") == Ids{2});
  CHECK(contains(error_of([&] { read(R"({"eos_token_id": "x"})"); }), "eos_token_id"));
  CHECK(contains(error_of([&] { read(R"({"eos_token_id": [10]})"); }), "from 0 to 9"));
  CHECK(contains(error_of([&] { read("[]"); }), "must be a JSON object"));
}

TEST_CASE("command line") {
  const auto parse = [](std::vector<std::string> extra) {
    extra.insert(extra.begin(), {"--model", "dir"});
    return parse_generate_command(extra);
  };
  const GenerateCommand c =
      parse({"--ids", "1,2", "--ids=3", "--topk=5", "--sink", "0", "--seed", "9", "--temperature", "0.5",
             "--top-k", "4", "--json", "--dense-layers", "0,1"});
  CHECK(c.ids == std::vector<Ids>{{1, 2}, {3}});
  CHECK(c.attention.topk == std::optional<int64_t>(5));
  CHECK(c.sampling.sample);
  CHECK(c.sampling.top_k == 4);
  CHECK(c.sampling.seed == 9);
  CHECK(c.format == OutputFormat::kJson);
  CHECK(c.attention.dense_layers == std::optional<Ids>({0, 1}));
  CHECK_FALSE(parse({"--ids", "1", "--temperature", "0"}).sampling.sample);
  CHECK(parse({"--ids", "1", "--ignore-eos"}).eos == std::optional<Ids>(Ids{}));
  CHECK(parse_generate_command({"--help"}).action == GenerateCommand::Action::kHelp);

  const auto refused = [&](const std::vector<std::string>& extra, const std::string& part) {
    try {
      parse(extra);
      FAIL("accepted: " << part);
    } catch (const GenerateUsageError& error) {
      INFO(error.what());
      CHECK(contains(error.what(), part));
    }
  };
  refused({}, "a prompt is needed");
  refused({"--ids", "1", "--prompts", "f"}, "give one of them");
  refused({"--ids", "1,x"}, "--ids");
  refused({"--ids", "1,"}, "--ids");
  refused({"--ids", ""}, "--ids");
  refused({"--ids", "1", "--topk", "0"}, "--topk");
  refused({"--ids", "1", "--ratio", "1.5"}, "--ratio");
  refused({"--ids", "1", "--ratio", "nan"}, "--ratio");
  refused({"--ids", "1", "--topk", "2", "--ratio", "0.5"}, "--topk and --ratio");
  refused({"--ids", "1", "--dense", "--sink", "1"}, "--dense");
  refused({"--ids", "1", "--top-p", "0.5"}, "--top-p needs --temperature");
  refused({"--ids", "1", "--samples", "2"}, "--samples");
  refused({"--ids", "1", "--select", "group"}, "head, kv_group");
  refused({"--ids", "1", "--dense=1"}, "takes no value");
  refused({"--ids", "1", "--seed"}, "needs a value");
  refused({"--ids", "1", "--tpok", "2"}, "unknown option '--tpok'");
  refused({"--ids", "1", "extra"}, "unknown argument 'extra'");
}

TEST_CASE("attention options go on top of the model's own") {
  SparsityConfig own;
  own.ratio = 0.05;
  own.min_keys = 16;
  AttentionOverrides none;
  CHECK_FALSE(none.apply(std::nullopt));
  CHECK(none.apply(own)->ratio == std::optional<double>(0.05));
  AttentionOverrides topk_only;
  topk_only.topk = 7;
  CHECK(topk_only.apply(own)->topk == std::optional<int64_t>(7));
  CHECK_FALSE(topk_only.apply(own)->ratio);
  CHECK(topk_only.apply(own)->min_keys == 16);
  AttentionOverrides dense;
  dense.dense = true;
  CHECK_FALSE(dense.apply(own));
  AttentionOverrides floor;
  floor.min_keys = 3;
  CHECK(floor.apply(own)->min_keys == 3);
  CHECK_THROWS_AS(floor.apply(std::nullopt), GenerateUsageError);
}
