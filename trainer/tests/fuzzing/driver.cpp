// The loop, the mutations and the file in memory that fuzz.h declares.
#include "fuzz.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>

#include "io/error.h"

namespace topk_fuzz {
namespace {

constexpr size_t kMaxInput = size_t{1} << 20;
constexpr double kMaxSecondsPerInput = 5.0;

const char* const kExtremeValues[] = {"0",
                                      "-0",
                                      "-1",
                                      "1",
                                      "2",
                                      "7",
                                      "255",
                                      "4294967296",
                                      "2147483648",
                                      "9223372036854775807",
                                      "9223372036854775808",
                                      "18446744073709551615",
                                      "18446744073709551616",
                                      "-9223372036854775808",
                                      "-9223372036854775809",
                                      "1e308",
                                      "1e309",
                                      "-1e999",
                                      "1e-400",
                                      "0.1",
                                      "1.5",
                                      "NaN",
                                      "Infinity",
                                      "-.inf",
                                      ".nan",
                                      "null",
                                      "~",
                                      "true",
                                      "false",
                                      "\"\"",
                                      "\"x\"",
                                      "[]",
                                      "{}",
                                      "[0]",
                                      "[[[[]]]]",
                                      "{\"a\":1}",
                                      "\"\\u0000\"",
                                      "\"\\ud800\"",
                                      "\"F64\"",
                                      "\"U8\"",
                                      "\"../x\"",
                                      "99999999999999999999999999999999999999",
                                      "&a [*a]",
                                      "!!int x",
                                      "0x10",
                                      "1_000",
                                      "'",
                                      "\xff\xfe",
                                      "\xe2\x82"};

const std::string* current_input = nullptr;
const char* current_name = "";

// Keeps the input that a sanitizer or a wrong exception stopped at.
void save_current_input() {
  if (current_input == nullptr) return;
  const std::string path = std::string("fuzz_failure_") + current_name;
  std::ofstream(path, std::ios::binary) << *current_input;
  std::fprintf(stderr, "the input was saved as %s (%zu bytes)\n", path.c_str(), current_input->size());
}

// What is wrong with how the target took this input; empty when nothing is. `accepted` tells which way it
// went.
std::string judge(const Fuzzer& fuzzer, const std::string& input, bool& accepted) {
  const auto begin = std::chrono::steady_clock::now();
  accepted = false;
  std::string problem;
  try {
    fuzzer.target(input);
    accepted = true;
  } catch (const topk_sft::Error& error) {
    const std::string message = error.what();
    const bool one_line =
        std::none_of(message.begin(), message.end(), [](unsigned char c) { return c < 0x20; });
    if (message.empty() || !one_line)
      problem = "the message is not one line: " + topk_sft::printable(message);
    if (message.size() > 2000) problem = "the message has " + std::to_string(message.size()) + " characters";
  } catch (const std::exception& error) {
    problem = std::string("another exception: ") + topk_sft::printable(error.what());
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  if (seconds.count() > kMaxSecondsPerInput) problem = "took " + std::to_string(seconds.count()) + " s";
  return problem;
}

std::string random_piece(const std::string& from, Random& random) {
  if (from.empty()) return "";
  const size_t begin = random.below(from.size());
  return from.substr(begin, 1 + random.below(64));
}

// A piece of text between separators, as [begin, end).
std::pair<size_t, size_t> random_token(const std::string& text, Random& random) {
  static const std::string kSeparators = ",:[]{}\n ";
  size_t begin = random.below(text.size());
  begin = text.find_first_not_of(kSeparators, begin);
  if (begin == std::string::npos) return {text.size(), text.size()};
  while (begin > 0 && kSeparators.find(text[begin - 1]) == std::string::npos) --begin;
  const size_t end = std::min(text.find_first_of(kSeparators, begin), text.size());
  return {begin, end};
}

}  // namespace

uint64_t Random::next() {
  uint64_t z = (state_ += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

std::string mutate_bytes(std::string input, const std::vector<std::string>& seeds, Random& random) {
  for (uint64_t edits = 1 + random.below(4); edits > 0; --edits) {
    const size_t at = random.below(input.size() + 1);
    const size_t length = std::min<size_t>(1 + random.below(32), input.size() - at);
    switch (random.below(7)) {
      case 0:
        input.resize(at);
        break;
      case 1:
        input.erase(at, length);
        break;
      case 2:
        input.insert(at, input.substr(at, length));
        break;
      case 3:
        for (size_t i = 0; i < length; ++i) input[at + i] = static_cast<char>(random.next());
        break;
      case 4:
        if (length > 0) input[at] = static_cast<char>(input[at] ^ (1 << random.below(8)));
        break;
      case 5:
        input.insert(at, random_piece(seeds[random.below(seeds.size())], random));
        break;
      default:
        input.insert(at, std::string(1 + random.below(64), static_cast<char>(random.next())));
    }
  }
  if (input.size() > kMaxInput) input.resize(kMaxInput);
  return input;
}

std::string mutate_text(std::string input, const std::vector<std::string>& seeds, Random& random) {
  for (uint64_t edits = 1 + random.below(3); edits > 0 && !input.empty(); --edits) {
    const auto [begin, end] = random_token(input, random);
    switch (random.below(6)) {
      case 0:
      case 1:
        input.replace(begin, end - begin, kExtremeValues[random.below(std::size(kExtremeValues))]);
        break;
      case 2: {  // repeat a piece up to the next comma or line: duplicate keys, duplicate entries
        const size_t stop = std::min(input.find_first_of(",\n}", end), input.size());
        const std::string piece = input.substr(begin, stop - begin);
        input.insert(begin, piece + (input.find('\n') != std::string::npos && random.below(2) ? "\n" : ","));
        break;
      }
      case 3:
        input.erase(begin, std::min(input.find_first_of(",\n", end), input.size()) - begin);
        break;
      case 4: {
        const auto [other, other_end] = random_token(input, random);
        const std::string text = input.substr(other, other_end - other);
        input.replace(begin, end - begin, text);
        break;
      }
      default:
        if (random.below(4) == 0) input = mutate_bytes(std::move(input), seeds, random);
    }
  }
  if (input.size() > kMaxInput) input.resize(kMaxInput);
  return input;
}

int run_fuzzer(const Fuzzer& fuzzer, int argc, char** argv) {
  current_name = fuzzer.name.c_str();
  __sanitizer_set_death_callback(save_current_input);
  const auto fails = [&](const std::string& input, bool& accepted, const std::string& which) {
    current_input = &input;
    const std::string problem = judge(fuzzer, input, accepted);
    if (problem.empty()) return false;
    std::fprintf(stderr, "%s, %s: %s\n", fuzzer.name.c_str(), which.c_str(), problem.c_str());
    save_current_input();
    return true;
  };

  bool accepted = false;
  if (argc == 3 && std::strcmp(argv[1], "--replay") == 0) {
    std::ifstream file(argv[2], std::ios::binary);
    const std::string input{std::istreambuf_iterator<char>(file), {}};
    if (fails(input, accepted, "replay")) return 1;
    std::printf("%s: %s\n", fuzzer.name.c_str(), accepted ? "accepted" : "refused with a clear error");
    return 0;
  }

  for (size_t i = 0; i < fuzzer.seeds.size(); ++i) {
    if (fails(fuzzer.seeds[i], accepted, "seed " + std::to_string(i))) return 1;
    if (!accepted) {
      std::fprintf(stderr, "%s: valid seed %zu was refused\n", fuzzer.name.c_str(), i);
      return 1;
    }
  }
  const uint64_t iterations = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : fuzzer.iterations;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  uint64_t accepted_count = 0;
  for (uint64_t i = 0; i < iterations; ++i) {
    const std::string input = fuzzer.mutate(fuzzer.seeds[random.below(fuzzer.seeds.size())], random);
    if (fails(input, accepted, "iteration " + std::to_string(i))) return 1;
    accepted_count += accepted ? 1 : 0;
  }
  current_input = nullptr;
  std::printf("%s: %llu mutated inputs, %llu accepted, %llu refused with a clear error\n",
              fuzzer.name.c_str(), static_cast<unsigned long long>(iterations),
              static_cast<unsigned long long>(accepted_count),
              static_cast<unsigned long long>(iterations - accepted_count));
  return iterations > 0 && accepted_count == iterations ? 1 : 0;  // mutations that break nothing test nothing
}

MemoryFile::MemoryFile() : fd_(memfd_create("fuzz", 0)), path_("/proc/self/fd/" + std::to_string(fd_)) {
  if (fd_ < 0) std::abort();
}

MemoryFile::~MemoryFile() {
  close(fd_);
}

const std::string& MemoryFile::write(const std::string& bytes) {
  if (ftruncate(fd_, 0) != 0 ||
      pwrite(fd_, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    std::abort();
  }
  return path_;
}

}  // namespace topk_fuzz
