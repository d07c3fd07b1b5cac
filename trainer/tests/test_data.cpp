// Token shards, cutting, packing, the order of sequences, and the tensors made of them.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "catch_shim.h"
#include "data/packing.h"
#include "data/sampler.h"
#include "data/shards.h"
#include "io/error.h"
#include "io/safetensors.h"
#include "train_helpers.h"

using namespace topk_sft;

namespace {

const std::string kSha(64, 'a');

TokenDataset open_shard(const std::string& path) {
  return TokenDataset({path}, {"tokenizer.json", kSha, 100});
}

std::string error_of(const std::string& path) {
  try {
    open_shard(path);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

#define CHECK_ERROR(error, part)     \
  do {                               \
    const std::string text_ = error; \
    INFO(text_);                     \
    CHECK(contains(text_, part));    \
  } while (false)

}  // namespace

TEST_CASE("shards are read as they were written", "[data]") {
  const TempDir dir;
  write_shard(dir.file("train-00000.safetensors"), {{{1, 2, 3}, {0, 1, 1}}, {{4}, {1}}}, kSha);
  write_shard(dir.file("train-00001.safetensors"), {{{5, 6}, {0, 1}}}, kSha);
  write_shard(dir.file("validation-00000.safetensors"), {{{7, 8}, {0, 1}}}, kSha, {{"split", "validation"}});
  const auto files = find_shards(dir.path(), "train");
  REQUIRE(files ==
          std::vector<std::string>{dir.file("train-00000.safetensors"), dir.file("train-00001.safetensors")});
  CHECK(find_shards(dir.path(), "test").empty());
  const TokenDataset data(files, {"tokenizer.json", kSha, 100});
  REQUIRE(data.num_documents() == 3);
  CHECK(data.num_tokens() == 6);
  CHECK(data.document(2).ids[1] == 6);
  CHECK(data.document(0).loss_mask[0] == 0);
  // The fingerprint sees values, masks and bounds.
  const std::string fingerprint = data.fingerprint();
  CHECK(fingerprint == TokenDataset(files, {"tokenizer.json", kSha, 100}).fingerprint());
  write_shard(dir.file("train-00001.safetensors"), {{{5, 6}, {1, 1}}}, kSha);
  CHECK(fingerprint != TokenDataset(files, {"tokenizer.json", kSha, 100}).fingerprint());
  write_shard(dir.file("train-00001.safetensors"), {{{5}, {0}}, {{6}, {1}}}, kSha);
  CHECK(fingerprint != TokenDataset(files, {"tokenizer.json", kSha, 100}).fingerprint());
}

TEST_CASE("shards that cannot be used", "[data]") {
  const TempDir dir;
  const std::string path = dir.file("s.safetensors");
  const std::vector<ShardDocument> documents = {{{1, 2, 3}, {0, 1, 1}}, {{4, 5}, {1, 1}}};
  SECTION("another tokenizer: both hashes are named") {
    write_shard(path, documents, std::string(64, 'b'));
    CHECK_ERROR(error_of(path), std::string(64, 'b'));
    CHECK_ERROR(error_of(path), kSha);
    CHECK_ERROR(error_of(path), path);
  }
  SECTION("format and version") {
    write_shard(path, documents, kSha, {{"format", "pt"}});
    CHECK_ERROR(error_of(path), "not a token shard");
    write_shard(path, documents, kSha, {{"version", "2"}});
    CHECK_ERROR(error_of(path), "version '1', got 'topk-data' and '2'");
  }
  SECTION("counts that do not fit") {
    write_shard(path, documents, kSha, {{"num_documents", "3"}});
    CHECK_ERROR(error_of(path), "metadata num_documents is '3' but the tensors hold 2");
    write_shard(path, documents, kSha, {{"num_tokens", "5x"}});
    CHECK_ERROR(error_of(path), "num_tokens");
  }
  SECTION("ids outside the vocabulary") {
    write_shard(path, {{{1, 100}, {0, 1}}}, kSha);
    CHECK_ERROR(error_of(path), "input_ids[1] is 100, but the model's vocabulary has 100 entries");
    write_shard(path, {{{-1, 1}, {0, 1}}}, kSha);
    CHECK_ERROR(error_of(path), "input_ids[0] is -1");
  }
  SECTION("mask values") {
    write_shard(path, {{{1, 2}, {0, 2}}}, kSha);
    CHECK_ERROR(error_of(path), "loss_mask[1] must be 0 or 1, got 2");
  }
  SECTION("offsets and lengths") {
    const auto write = [&](const std::vector<int64_t>& offsets, size_t mask_length) {
      SafetensorsWriter writer(path, shard_metadata(2, 4, kSha));
      const std::vector<int32_t> ids = {1, 2, 3, 4};
      const std::vector<uint8_t> mask(mask_length, 1);
      writer.declare("doc_offsets", DType::kI64, {static_cast<int64_t>(offsets.size())});
      writer.declare("input_ids", DType::kI32, {4});
      writer.declare("loss_mask", DType::kU8, {static_cast<int64_t>(mask_length)});
      writer.write("doc_offsets", offsets.data(), offsets.size() * 8);
      writer.write("input_ids", ids.data(), 16);
      writer.write("loss_mask", mask.data(), mask.size());
      writer.commit();
    };
    write({0, 2, 4}, 4);
    CHECK(error_of(path) == "no error");
    write({0, 2, 4}, 3);
    CHECK_ERROR(error_of(path), "loss_mask has 3 entries for 4 input_ids");
    write({0, 2, 5}, 4);
    CHECK_ERROR(error_of(path), "doc_offsets must go from 0 to the number of tokens, 4");
    write({1, 2, 4}, 4);
    CHECK_ERROR(error_of(path), "doc_offsets must go from 0");
    write({0, 5, 4}, 4);
    CHECK_ERROR(error_of(path), "doc_offsets must rise, but entry 2 is 4 after 5");
    write({0, -9, 4}, 4);
    CHECK_ERROR(error_of(path), "doc_offsets must rise, but entry 1 is -9 after 0");
    write({}, 4);
    CHECK_ERROR(error_of(path), "doc_offsets must go from 0");
  }
  SECTION("wrong dtype") {
    SafetensorsWriter writer(path, shard_metadata(1, 1, kSha));
    const int64_t one[2] = {0, 1};
    writer.declare("doc_offsets", DType::kI64, {2});
    writer.declare("input_ids", DType::kI64, {1});
    writer.declare("loss_mask", DType::kU8, {1});
    writer.write("doc_offsets", one, 16);
    writer.write("input_ids", one, 8);
    writer.write("loss_mask", one, 1);
    writer.commit();
    CHECK_ERROR(error_of(path), "input_ids");
  }
  SECTION("not there, not safetensors, no folder") {
    CHECK_ERROR(error_of(dir.file("none.safetensors")), "none.safetensors");
    std::ofstream(path) << "{}";
    CHECK_ERROR(error_of(path), path);
    CHECK_THROWS_AS(find_shards(dir.file("nowhere"), "train"), Error);
    CHECK_THROWS_AS(find_shards(dir.path(), "train"), Error);
  }
}

TEST_CASE("documents are cut by truncation or by splitting", "[data]") {
  const TempDir dir;
  const std::string path = dir.file("s.safetensors");
  // Lengths 10, 3, 2 (no target: its only loss token is the first), 9 with targets in the second half only,
  // 0.
  write_shard(path,
              {{std::vector<int32_t>(10, 1), {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
               {{1, 2, 3}, {0, 0, 1}},
               {{1, 2}, {1, 0}},
               {std::vector<int32_t>(9, 2), {0, 0, 0, 0, 0, 1, 1, 1, 1}},
               {{}, {}}},
              kSha);
  const TokenDataset data = open_shard(path);
  SECTION("truncate") {
    const PiecePlan plan = plan_pieces(data, 4, /*split=*/false);
    REQUIRE(plan.pieces.size() == 2);
    CHECK(plan.pieces[0].length == 4);
    CHECK(plan.pieces[0].targets == 3);  // its fifth token is dropped, so the fourth predicts nothing
    CHECK(plan.pieces[1].targets == 1);
    CHECK(plan.documents_without_target == 3);
    CHECK(plan.documents_cut == 2);
    CHECK(plan.tokens_truncated == 6 + 5);
    CHECK(plan.longest == 4);
    CHECK(plan.tokens == 7);
    CHECK(plan.targets == 4);
  }
  SECTION("split: every target is predicted exactly once") {
    const PiecePlan plan = plan_pieces(data, 4, /*split=*/true);
    // 10 = 4 + 4 + 2; 3; 9 = 4 + 4 + 1, of which only the second piece predicts anything.
    REQUIRE(plan.pieces.size() == 5);
    CHECK(plan.pieces[0].targets == 4);
    CHECK(plan.pieces[2].targets == 1);
    CHECK(plan.pieces[4].document == 3);
    CHECK(plan.pieces[4].begin == 4);
    CHECK(plan.pieces[4].targets == 4);
    CHECK(plan.targets == 9 + 1 + 4);
    CHECK(plan.tokens_truncated == 0);
    CHECK(plan.documents_without_target == 2);
    CHECK(plan.pieces_without_target == 2);
  }
  SECTION("nothing to cut") {
    const PiecePlan plan = plan_pieces(data, 16, /*split=*/false);
    CHECK(plan.documents_cut == 0);
    CHECK(plan.targets == 9 + 1 + 4);
  }
}

TEST_CASE("best fit decreasing", "[data]") {
  using Bins = std::vector<std::vector<int64_t>>;
  CHECK(pack_best_fit({}, 8).empty());
  CHECK(pack_best_fit({8, 8}, 8) == Bins{{0}, {1}});
  // 6 and 5 open bins; 3 fits best beside 5, 2 beside 6.
  CHECK(pack_best_fit({2, 5, 3, 6}, 8) == Bins{{0, 3}, {1, 2}});
  // Best, not first: 4 goes beside 6 (room 4), not beside 5 (room 5).
  CHECK(pack_best_fit({5, 6, 4, 5}, 10) == Bins{{0, 3}, {1, 2}});
  std::mt19937_64 rng(1);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<int64_t> lengths(rng() % 400 + 1);
    for (auto& l : lengths) l = static_cast<int64_t>(rng() % 64 + 1);
    const Bins bins = pack_best_fit(lengths, 64);
    std::vector<int64_t> seen;
    for (const auto& bin : bins) {
      int64_t sum = 0;
      for (const int64_t i : bin) sum += lengths[static_cast<size_t>(i)];
      CHECK(sum <= 64);
      seen.insert(seen.end(), bin.begin(), bin.end());
    }
    std::sort(seen.begin(), seen.end());
    std::vector<int64_t> all(lengths.size());
    std::iota(all.begin(), all.end(), 0);
    CHECK(seen == all);
    // No packing needs fewer bins than this, and best fit decreasing is never far above it.
    const int64_t sum = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    const auto large = std::count_if(lengths.begin(), lengths.end(), [](int64_t l) { return l > 32; });
    CHECK(2 * static_cast<int64_t>(bins.size()) <= 3 * std::max<int64_t>((sum + 63) / 64, large) + 2);
    CHECK(bins == pack_best_fit(lengths, 64));
  }
}

TEST_CASE("an epoch visits every sequence once, and resumes anywhere", "[data]") {
  for (const bool shuffle : {false, true}) {
    Sampler sampler(11, 2, 2, shuffle, 5);
    CHECK(sampler.steps_per_epoch() == 3);
    std::vector<SamplerState> states;
    std::vector<StepPlan> plans;
    for (int step = 0; step < 9; ++step) {
      states.push_back(sampler.state());
      plans.push_back(sampler.next_step());
    }
    for (int epoch = 0; epoch < 3; ++epoch) {
      std::vector<int64_t> seen;
      for (int s = 0; s < 3; ++s) {
        const StepPlan& plan = plans[static_cast<size_t>(3 * epoch + s)];
        CHECK(plan.size() == 2);  // the last step has micro-batches of 2 and 1
        for (const auto& micro : plan) seen.insert(seen.end(), micro.begin(), micro.end());
      }
      if (!shuffle) CHECK(std::is_sorted(seen.begin(), seen.end()));
      std::sort(seen.begin(), seen.end());
      std::vector<int64_t> all(11);
      std::iota(all.begin(), all.end(), 0);
      CHECK(seen == all);
      CHECK(states[static_cast<size_t>(3 * epoch)] == SamplerState{epoch, 0});
    }
    if (shuffle) CHECK(plans[0] != plans[3]);
    for (size_t from = 0; from < 9; ++from) {
      Sampler again(11, 2, 2, shuffle, 5);
      again.restore(states[from]);
      for (size_t step = from; step < 9; ++step) CHECK(again.next_step() == plans[step]);
    }
    CHECK_THROWS_AS(sampler.restore({0, 11}), Error);
    CHECK_THROWS_AS(sampler.restore({-1, 0}), Error);
    CHECK_THROWS_AS(sampler.restore({0, -1}), Error);
  }
  CHECK(Sampler(50, 1, 1, true, 1).next_step() != Sampler(50, 1, 1, true, 2).next_step());
  CHECK_THROWS_AS(Sampler(0, 1, 1, true, 1), Error);
}

TEST_CASE("the shuffled order is the same on every machine", "[data]") {
  // std::mt19937_64 and std::seed_seq are specified to the bit; this pins what is made of them.
  Sampler sampler(8, 8, 1, true, 42);
  const StepPlan first = sampler.next_step();
  CHECK(first == Sampler(8, 8, 1, true, 42).next_step());
  CHECK(first[0] == kShuffleOfEight);
}

TEST_CASE("a batch restarts positions and keeps labels inside documents", "[data]") {
  const TempDir dir;
  const std::string path = dir.file("s.safetensors");
  write_shard(path,
              {{{11, 12, 13}, {1, 1, 0}}, {{21, 22}, {1, 1}}, {{31, 32, 33, 34, 35, 36}, {0, 1, 1, 1, 1, 1}}},
              kSha);
  const TokenDataset data = open_shard(path);
  SECTION("packed") {
    const PackedDataset packed = pack_dataset(data, 6, false, true);
    REQUIRE(packed.bins.size() == 2);
    const BatchValues batch = batch_values(data, packed, {0, 1});
    CHECK(batch.input_ids == std::vector<int64_t>{11, 12, 13, 21, 22, 31, 32, 33, 34, 35, 36});
    CHECK(batch.position_ids == std::vector<int64_t>{0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5});
    CHECK(batch.labels == std::vector<int64_t>{12, -100, -100, 22, -100, 32, 33, 34, 35, 36, -100});
    CHECK(batch.cu_seqlens == std::vector<int64_t>{0, 3, 5, 11});
    CHECK(batch.max_seqlen == 6);
    CHECK(packed.tokens({0, 1}) == 11);
    CHECK(packed.targets({0, 1}) == 7);
  }
  SECTION("split: the last position of a piece predicts the first token of the next") {
    const PackedDataset packed = pack_dataset(data, 4, true, false);
    REQUIRE(packed.bins.size() == 4);
    const BatchValues batch = batch_values(data, packed, {2, 3});
    CHECK(batch.input_ids == std::vector<int64_t>{31, 32, 33, 34, 35, 36});
    CHECK(batch.position_ids == std::vector<int64_t>{0, 1, 2, 3, 0, 1});
    CHECK(batch.labels == std::vector<int64_t>{32, 33, 34, 35, 36, -100});
    CHECK(batch.cu_seqlens == std::vector<int64_t>{0, 4, 6});
  }
  SECTION("truncate: nothing beyond the cut is predicted") {
    const BatchValues batch = batch_values(data, pack_dataset(data, 4, false, false), {2});
    CHECK(batch.labels == std::vector<int64_t>{32, 33, 34, -100});
  }
}
