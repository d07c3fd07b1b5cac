// How ranks divide the work: micro-batches, tokens, and what they take from the environment. What they do
// together is tested by tests/python/test_trainer_ranks.py.
#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>

#include <cstdlib>
#include <map>
#include <set>

#include "catch_shim.h"
#include "dist/layout.h"
#include "dist/ranks.h"
#include "dist/sequence.h"
#include "scratch.h"

using namespace topk_sft;

namespace {

std::vector<int64_t> values(const at::Tensor& x) {
  const at::Tensor wide = x.to(at::kLong).contiguous();
  return {wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel()};
}

const std::vector<std::string> kVariables = {"RANK",
                                             "LOCAL_RANK",
                                             "WORLD_SIZE",
                                             "MASTER_ADDR",
                                             "MASTER_PORT",
                                             "TORCHELASTIC_USE_AGENT_STORE",
                                             "TORCHELASTIC_RESTART_COUNT"};

Launch launch_with(const std::map<std::string, std::string>& variables) {
  for (const std::string& name : kVariables) unsetenv(name.c_str());
  for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
  struct Clear {
    ~Clear() {
      for (const std::string& name : kVariables) unsetenv(name.c_str());
    }
  } clear;
  return launch_from_environment();
}

}  // namespace

TEST_CASE("Every micro-batch has one data rank, and ranks of a sequence share theirs", "[dist]") {
  for (const int64_t world : {1, 2, 4, 6}) {
    for (const int64_t sequence : {1, 2}) {
      if (world % sequence != 0) continue;
      for (const size_t count : {0, 1, 3, 4, 7}) {
        std::multiset<size_t> seen;
        size_t most = 0;
        for (int64_t rank = 0; rank < world; ++rank) {
          const RankLayout layout{rank, world, sequence};
          const std::vector<size_t> mine = layout.share(count);
          most = std::max(most, mine.size());
          CHECK(mine == RankLayout{rank - layout.sequence_rank(), world, sequence}.share(count));
          if (layout.sequence_rank() == 0) seen.insert(mine.begin(), mine.end());
        }
        CHECK(seen.size() == count);
        CHECK(std::set<size_t>(seen.begin(), seen.end()).size() == count);
        CHECK(RankLayout{0, world, sequence}.rounds(count) == most);
      }
    }
  }
}

TEST_CASE("A micro-batch in equal parts", "[dist]") {
  PackedBatch batch;
  batch.input_ids = at::tensor({11, 12, 13, 14, 15, 16, 17}, at::kLong);
  batch.position_ids = at::tensor({0, 1, 2, 0, 1, 2, 3}, at::kLong);
  batch.labels = at::tensor({12, 13, -100, 15, 16, 17, -100}, at::kLong);
  batch.cu_seqlens = at::tensor({0, 3, 7}, at::kInt);
  batch.max_seqlen = 4;
  // 7 tokens for 3 ranks: two more, a document of their own.
  std::vector<int64_t> ids, positions, labels;
  for (int64_t rank = 0; rank < 3; ++rank) {
    const PackedBatch part = sequence_part(batch, RankLayout{3 + rank, 6, 3});
    CHECK(part.input_ids.size(0) == 3);
    CHECK(values(part.cu_seqlens) == std::vector<int64_t>{0, 3, 7, 9});
    CHECK(part.max_seqlen == 4);
    for (const int64_t x : values(part.input_ids)) ids.push_back(x);
    for (const int64_t x : values(part.position_ids)) positions.push_back(x);
    for (const int64_t x : values(part.labels)) labels.push_back(x);
  }
  CHECK(ids == std::vector<int64_t>{11, 12, 13, 14, 15, 16, 17, 0, 0});
  CHECK(positions == std::vector<int64_t>{0, 1, 2, 0, 1, 2, 3, 0, 1});
  CHECK(labels == std::vector<int64_t>{12, 13, -100, 15, 16, 17, -100, -100, -100});
  // 7 tokens for 8 ranks, and a multiple of the number of ranks.
  CHECK(values(sequence_part(batch, RankLayout{7, 8, 8}).labels) == std::vector<int64_t>{-100});
  CHECK(values(sequence_part(batch, RankLayout{0, 7, 7}).cu_seqlens) == std::vector<int64_t>{0, 3, 7});
  CHECK(sequence_part(batch, RankLayout{1, 2, 1}).input_ids.is_same(batch.input_ids));
}

TEST_CASE("One rank gets back what it gave", "[dist]") {
  Ranks ranks;
  CHECK_FALSE(ranks.several());
  CHECK(ranks.first());
  CHECK(ranks.sum({1.5, -2.0}) == std::vector<double>{1.5, -2.0});
  CHECK(ranks.any(true));
  CHECK_FALSE(ranks.any(false));
  CHECK(ranks.first_text(3, "text") == "text");
  CHECK(ranks.from_first("text") == "text");
  const at::Tensor x = at::arange(4);
  CHECK(ranks.exchange_slices(x).is_same(x));
  ranks.sum(x).wait();
  ranks.wait_for_first();
  CHECK_FALSE(ranks.broken());
}

TEST_CASE("The launcher's variables", "[dist]") {
  CHECK(launch_with({}).world == 1);
  CHECK(launch_with({{"WORLD_SIZE", "1"}, {"RANK", "0"}}).world == 1);
  std::map<std::string, std::string> good = {{"RANK", "5"},
                                             {"LOCAL_RANK", "1"},
                                             {"WORLD_SIZE", "8"},
                                             {"MASTER_ADDR", "host"},
                                             {"MASTER_PORT", "29500"}};
  const Launch own = launch_with(good);
  CHECK(own.rank == 5);
  CHECK(own.local_rank == 1);
  CHECK(own.world == 8);
  CHECK(own.address == "host");
  CHECK(own.port == 29500);
  CHECK_FALSE(own.agent_store);
  CHECK(own.prefix.empty());
  good["TORCHELASTIC_USE_AGENT_STORE"] = "True";
  good["TORCHELASTIC_RESTART_COUNT"] = "2";
  CHECK(launch_with(good).agent_store);
  CHECK(launch_with(good).prefix == "/worker/attempt_2");

  for (const char* name : {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}) {
    std::map<std::string, std::string> lacking = good;
    lacking.erase(name);
    CHECK(contains(error_of([&] { launch_with(lacking); }), std::string(name) + " is not"));
  }
  for (const auto& [name, value] : std::map<std::string, std::string>{
           {"RANK", "8"}, {"WORLD_SIZE", "0"}, {"MASTER_PORT", "70000"}, {"LOCAL_RANK", "1x"}}) {
    std::map<std::string, std::string> wrong = good;
    wrong[name] = value;
    CHECK(contains(error_of([&] { launch_with(wrong); }), fmt::format("{} is '{}'", name, value)));
  }
}
