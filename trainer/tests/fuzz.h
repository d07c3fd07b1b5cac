// A small mutation fuzzer for readers: every input must either be accepted or end in one topk_sft::Error with
// a one-line message. Anything else (another exception, a sanitizer report, a hang) fails the run.
//
//   fuzz_<name> [iterations [seed]]      the default is a fixed number from a fixed seed, as ctest runs it
//   fuzz_<name> --replay FILE            one input, as saved by a failing run
//
// A fuzzer is a file fuzz_<name>.cpp with a main() that calls run_fuzzer(); it links the torch-free library
// only, compiled under AddressSanitizer and UndefinedBehaviorSanitizer.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace topk_fuzz {

// splitmix64: the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  uint64_t below(uint64_t bound) { return next() % bound; }  // bound >= 1

 private:
  uint64_t state_;
};

// One to four random edits: cut, drop, repeat or overwrite ranges, flip bits, splice from another seed.
std::string mutate_bytes(std::string input, const std::vector<std::string>& seeds, Random& random);

// Edits that keep the text close to JSON or YAML: a number or string replaced by an extreme or ill-typed
// value, a piece between separators repeated (duplicate keys), removed or swapped; now and then a byte edit
// as well.
std::string mutate_text(std::string input, const std::vector<std::string>& seeds, Random& random);

struct Fuzzer {
  std::string name;
  std::vector<std::string> seeds;                  // valid inputs: each must be accepted as it is
  std::function<void(const std::string&)> target;  // returns (accepted) or throws topk_sft::Error (refused)
  std::function<std::string(const std::string& seed, Random& random)> mutate;
  uint64_t iterations = 20000;
};

// The exit code of main().
int run_fuzzer(const Fuzzer& fuzzer, int argc, char** argv);

// Bytes as a regular file of this process that has a path, rewritten by every call; nothing touches the disk.
class MemoryFile {
 public:
  MemoryFile();
  ~MemoryFile();
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  const std::string& write(const std::string& bytes);  // the path

 private:
  int fd_;
  std::string path_;
};

}  // namespace topk_fuzz
