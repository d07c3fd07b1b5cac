// JSON, atomic files and folders, SHA-256, safetensors.
#include <signal.h>
#include <sys/resource.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "io/atomic_file.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "io/sha256.h"
#include "scratch.h"

using namespace topk_sft;
namespace fs = std::filesystem;

namespace {

void put(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string file_of(const std::string& header, const std::string& data) {
  const uint64_t size = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &size, 8);
  return file + header + data;
}

size_t entries_in(const fs::path& folder) {
  return static_cast<size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

// Files of this process cannot grow beyond `bytes` while it lives: a full disk, as write() reports it.
struct FileSizeLimit {
  explicit FileSizeLimit(rlim_t bytes) {
    handler = signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before);
    const rlimit limit{bytes, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &before);
    signal(SIGXFSZ, handler);
  }
  rlimit before{};
  sighandler_t handler;
};

}  // namespace

TEST_CASE("json is strict") {
  CHECK(parse_json(R"({"a": [1, 2.5, "x", null]})", "f")["a"][1] == 2.5);
  CHECK(contains(error_of([] { parse_json(R"({"a": 1, "b": {"c": 1, "c": 2}})", "f.json"); }),
                 "f.json: duplicate key \"c\""));
  CHECK(parse_json(R"([{"a": 1}, {"a": 2}])", "f").size() == 2);
  const std::string syntax = error_of([] { parse_json("{\"a\": 1,\n \"b\": }", "f.json"); });
  CHECK(contains(syntax, "f.json"));
  CHECK(contains(syntax, "line 2, column 7"));
  CHECK(contains(error_of([] { parse_json("{} x", "f"); }), "invalid JSON"));
  CHECK(contains(error_of([] { parse_json("", "f"); }), "invalid JSON"));
  CHECK(contains(error_of([] { parse_json("NaN", "f"); }), "invalid JSON"));
  CHECK(contains(error_of([] { parse_json("1e400", "f"); }), "invalid JSON"));
  CHECK(contains(error_of([] { parse_json("\"\xff\"", "f"); }), "invalid JSON"));
  CHECK(contains(error_of([] { parse_json(std::string(1000, '['), "f"); }), "deeper than 64"));
  std::string many = "{";
  for (size_t i = 0; i <= kMaxOrderedKeys; ++i) many += (i > 0 ? ",\"" : "\"") + std::to_string(i) + "\":0";
  many += "}";
  CHECK(parse_json(many, "f").size() == kMaxOrderedKeys + 1);
  CHECK(contains(error_of([&] { parse_ordered_json(many, "f"); }), "more than 10000 keys"));
  CHECK(parse_ordered_json(R"({"z": 1, "a": 2})", "f").dump() == R"({"z":1,"a":2})");
  CHECK(contains(error_of([] { read_json_file("/nowhere/x.json"); }), "/nowhere/x.json"));
}

TEST_CASE("sha256 of the standard's examples") {
  CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(sha256(std::string(1'000'000, 'a')) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  Sha256 pieces;
  for (int i = 0; i < 1000; ++i) pieces.update("abcdefghi", 9);
  std::string whole;
  for (int i = 0; i < 1000; ++i) whole += "abcdefghi";
  CHECK(pieces.hex_digest() == sha256(whole));
  ScratchFolder scratch;
  put(scratch / "x", whole);
  CHECK(sha256_file(scratch / "x") == sha256(whole));
  CHECK(contains(error_of([&] { sha256_file(scratch / "none"); }), "none"));
}

TEST_CASE("an atomic file appears whole or not at all") {
  ScratchFolder scratch;
  const std::string path = scratch / "x.txt";
  write_file_atomic(path, "first");
  CHECK(read_file(path) == "first");
  {
    AtomicFile file(path);
    file.write("second, ");
    CHECK(read_file(path) == "first");  // an early exit leaves the old one
  }
  CHECK(read_file(path) == "first");
  CHECK(entries_in(scratch.path) == 1);
  {
    AtomicFile file(path);
    file.write("second");
    CHECK(file.bytes_written() == 6);
    file.commit();
  }
  CHECK(read_file(path) == "second");
  CHECK(entries_in(scratch.path) == 1);
  CHECK(contains(error_of([&] { write_file_atomic(scratch / "no/such/x", "a"); }), "cannot be created"));
  fs::create_directory(scratch / "folder");
  CHECK(contains(error_of([&] { write_file_atomic(scratch / "folder", "a"); }), "folder"));
  CHECK(contains(error_of([&] { read_file(scratch / "folder"); }), "not a regular file"));
  CHECK(contains(error_of([&] { read_file(path, 3); }), "6 bytes, more than the 3"));
  CHECK(entries_in(scratch.path) == 2);
}

TEST_CASE("a full disk leaves the old file and no temporary") {
  ScratchFolder scratch;
  const std::string path = scratch / "x.bin";
  write_file_atomic(path, "good");
  std::string message;
  {
    const FileSizeLimit limit(1000);
    message = error_of([&] { write_file_atomic(path, std::string(5000, 'x')); });
  }
  CHECK(contains(message, "x.bin"));
  CHECK(contains(message, "after 1000 bytes"));
  CHECK(read_file(path) == "good");
  CHECK(entries_in(scratch.path) == 1);
}

TEST_CASE("an atomic folder appears whole or not at all") {
  ScratchFolder scratch;
  const std::string target = scratch / "a/out";
  { AtomicFolder abandoned(target); }
  CHECK(entries_in(scratch / "a") == 0);
  {
    AtomicFolder folder(target + "/");
    put(folder.path() + "/x", "1");
    CHECK_FALSE(fs::exists(target));
    folder.commit();
  }
  CHECK(read_file(target + "/x") == "1");
  CHECK(entries_in(scratch / "a") == 1);
  CHECK(contains(error_of([&] { AtomicFolder again(target); }), "not empty"));
  {
    AtomicFolder folder(target, /*replace=*/true);
    put(folder.path() + "/y", "2");
    CHECK(read_file(target + "/x") == "1");
    folder.commit();
  }
  CHECK_FALSE(fs::exists(target + "/x"));
  CHECK(read_file(target + "/y") == "2");
  CHECK(entries_in(scratch / "a") == 1);
  put(scratch / "file", "");
  CHECK(contains(error_of([&] { AtomicFolder folder(scratch / "file"); }), "not a folder"));
  fs::create_directory(scratch / "empty");
  AtomicFolder onto_empty(scratch / "empty");
  put(onto_empty.path() + "/z", "3");
  onto_empty.commit();
  CHECK(read_file(scratch / "empty/z") == "3");
}

TEST_CASE("safetensors round trip") {
  ScratchFolder scratch;
  const std::string path = scratch / "x.safetensors";
  const std::vector<int32_t> ids = {1, 2, 3};
  const std::vector<float> weights = {0.5f, -1.0f};
  {
    SafetensorsWriter writer(path, {{"format", "pt"}});
    writer.declare("ids", DType::kI32, {3});
    writer.declare("nothing", DType::kF64, {0, 4});
    writer.declare("weights", DType::kF32, {2, 1});
    writer.declare("scalar", DType::kI64, {});
    writer.write("ids", ids.data(), 4);
    writer.write("ids", ids.data() + 1, 8);
    writer.write("weights", weights.data(), 8);
    const int64_t nine = 9;
    writer.write("scalar", &nine, 8);
    CHECK_FALSE(fs::exists(path));
    writer.commit();
  }
  const SafetensorsFile file(path);
  CHECK(file.metadata_at("format") == "pt");
  REQUIRE(file.tensors().size() == 4);
  CHECK(file.at("nothing").numel() == 0);
  CHECK(file.at("weights").shape == std::vector<int64_t>{2, 1});
  CHECK(std::memcmp(file.bytes(file.at("weights")).data(), weights.data(), 8) == 0);
  CHECK(file.view<int32_t>("ids")[2] == 3);
  CHECK(file.find("other") == nullptr);
  CHECK(contains(error_of([&] { file.at("other"); }), "no tensor \"other\""));
  CHECK(
      contains(error_of([&] { file.view<int64_t>("ids"); }), "must be I64 with one dimension, got I32 [3]"));
  CHECK(contains(error_of([&] { file.view<float>("weights"); }), "got F32 [2, 1]"));
  CHECK(contains(error_of([&] { file.metadata_at("x"); }), "no metadata \"x\""));
  uint64_t header = 0;
  std::memcpy(&header, read_file(path).data(), 8);
  CHECK(header % 8 == 0);
}

TEST_CASE("the safetensors writer refuses what would not be a file") {
  ScratchFolder scratch;
  const std::string path = scratch / "x.safetensors";
  const float value = 0;
  {
    SafetensorsWriter writer(path);
    writer.declare("a", DType::kF32, {1});
    CHECK(contains(error_of([&] { writer.declare("a", DType::kF32, {1}); }), "declared twice"));
    CHECK(contains(error_of([&] { writer.declare("big", DType::kF32, {INT64_MAX, 2}); }), "2^63"));
    writer.declare("b", DType::kF32, {2});
    CHECK(contains(error_of([&] { writer.write("b", &value, 4); }), "out of order"));
    writer.write("a", &value, 4);
    CHECK(contains(error_of([&] { writer.write("a", &value, 4); }), "4 bytes too many"));
    writer.write("b", &value, 4);
    CHECK(contains(error_of([&] { writer.commit(); }), "4 of its 8 bytes"));
  }
  CHECK(entries_in(scratch.path) == 0);
  {
    const FileSizeLimit limit(500);
    SafetensorsWriter writer(path);
    writer.declare("a", DType::kF32, {1000});
    const std::vector<float> many(1000);
    CHECK(contains(error_of([&] { writer.write("a", many.data(), 4000); }), "cannot be written"));
  }
  CHECK(entries_in(scratch.path) == 0);
}

TEST_CASE("every broken safetensors file is refused by name") {
  ScratchFolder scratch;
  const std::string path = scratch / "x.safetensors";
  struct Case {
    std::string bytes;
    std::string part;
  };
  const auto one = [](const std::string& fields) { return "{\"w\":{" + fields + "}}"; };
  const std::string eight(8, 'x');
  const std::vector<Case> cases = {
      {"", "too few"},
      {"1234567", "too few"},
      {std::string(8, '\xff'), "claims a header"},
      {file_of("{}", "").substr(0, 9), "claims a header"},
      {file_of("", ""), "must begin with '{'"},
      {file_of("[]", ""), "must begin with '{'"},
      {file_of("{\"a\":", ""), "invalid JSON"},
      {file_of("{}", "x"), "the file has 1"},
      {file_of(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])") + "\1", eight), "invalid JSON"},
      {file_of(one(R"("dtype":"F32","shape":[2])"), eight), "lacks \"data_offsets\""},
      {file_of(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1)"), eight), "unknown key \"x\""},
      {file_of(one(R"("dtype":"F7","shape":[2],"data_offsets":[0,8])"), eight), "dtype \"F7\""},
      {file_of(one(R"("dtype":3,"shape":[2],"data_offsets":[0,8])"), eight), "dtype 3"},
      {file_of(one(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), eight), "shape must be an array"},
      {file_of(one(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), eight), "whole number"},
      {file_of(one(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), eight), "whole number"},
      {file_of(one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"), eight),
       "2^63 bytes"},
      {file_of(one(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), eight), "needs 12 bytes"},
      {file_of(one(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), eight), "must rise"},
      {file_of(one(R"("dtype":"F32","shape":[4],"data_offsets":[0,16])"), eight),
       "lie inside the 8 data bytes"},
      {file_of(one(R"("dtype":"F32","shape":[1],"data_offsets":[0,4])"), eight), "end at data byte 4"},
      {file_of(one(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"), eight), "there is a hole"},
      {file_of(
           R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
           eight),
       "they overlap"},
      {file_of(
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
           eight),
       "duplicate key \"a\""},
      {file_of(R"({"__metadata__":{"a":1}})", ""), "must be a string"},
      {file_of(R"({"__metadata__":[]})", ""), "must be an object of strings"},
      {file_of(R"({"w":[]})", ""), "must be an object"},
  };
  for (const Case& broken : cases) {
    put(path, broken.bytes);
    const std::string message = error_of([&] { SafetensorsFile file(path); });
    INFO(message);
    CHECK(contains(message, path));
    CHECK(contains(message, broken.part));
  }
  CHECK(contains(error_of([&] { SafetensorsFile file(scratch.path.string()); }), "not a regular file"));
  CHECK(contains(error_of([&] { SafetensorsFile file(scratch / "none"); }), "cannot be opened"));
  // An odd header length is legal; only a typed view in place needs alignment.
  put(path, file_of(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])") + std::string(3, ' '), eight));
  const SafetensorsFile odd(path);
  CHECK(odd.bytes(odd.at("w")).size() == 8);
  CHECK(contains(error_of([&] { odd.view<float>("w"); }), "must be a multiple of 4"));
}

TEST_CASE("a folder of shards must agree with its index") {
  ScratchFolder scratch;
  const auto shard = [&](const std::string& file, const std::vector<std::string>& names) {
    SafetensorsWriter writer(scratch / file);
    const float value = 1;
    for (const auto& name : names) writer.declare(name, DType::kF32, {1});
    for (const auto& name : names) writer.write(name, &value, 4);
    writer.commit();
  };
  const auto index = [&](const std::string& map) {
    put(scratch / "model.safetensors.index.json", "{\"weight_map\":" + map + "}");
    return [&] { SafetensorsFolder folder(scratch.path.string()); };
  };
  CHECK(contains(error_of([&] { SafetensorsFolder folder(scratch.path.string()); }), "has neither"));
  CHECK(contains(error_of([&] { SafetensorsFolder folder(scratch / "none"); }), "is not a folder"));
  shard("s1", {"a", "b"});
  shard("s2", {"c"});
  index(R"({"a":"s1","b":"s1","c":"s2"})")();
  CHECK(contains(error_of(index(R"({"a":"s1","b":"s1","c":"s1"})")),
                 "\"c\" should be in s1, but it is in no shard"));
  CHECK(
      contains(error_of(index(R"({"a":"s1","b":"s2","c":"s2"})")), "\"b\" should be in s2, but it is in s1"));
  CHECK(contains(error_of(index(R"({"a":"s1","c":"s2"})")), "\"b\" is not in weight_map"));
  CHECK(contains(error_of(index(R"({"a":"../s1"})")), "must be a file of the same folder"));
  CHECK(contains(error_of(index(R"({"a":7})")), "must be a file name"));
  CHECK(contains(error_of(index(R"({"a":"s3"})")), "cannot be opened"));
  CHECK(contains(error_of(index(R"([])")), "weight_map"));
  shard("s2", {"c", "a"});
  CHECK(contains(error_of(index(R"({"a":"s1","b":"s1","c":"s2"})")), "\"a\" is also in"));
  shard("model.safetensors", {"z"});
  const SafetensorsFolder single(scratch.path.string());
  CHECK(single.entries().size() == 1);
  CHECK(single.find("z") != nullptr);
}
