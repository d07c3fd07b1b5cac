// The variables that torchrun sets; the keys of a store that its agent serves have the prefix that
// torch.distributed gives them, so that a restarted run does not read those of the one before.
#include "dist/layout.h"

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "io/error.h"

namespace topk_sft {

std::vector<size_t> RankLayout::share(size_t count) const {
  std::vector<size_t> mine;
  for (auto i = static_cast<size_t>(data_rank()); i < count; i += static_cast<size_t>(data_ranks())) {
    mine.push_back(i);
  }
  return mine;
}

size_t RankLayout::rounds(size_t count) const {
  const auto ranks = static_cast<size_t>(data_ranks());
  return (count + ranks - 1) / ranks;
}

namespace {

const char* text_of(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

int64_t integer(const char* name, int64_t low, int64_t high) {
  const char* text = text_of(name);
  if (text == nullptr) fail("WORLD_SIZE is set, but {} is not: start the ranks with torchrun", name);
  int64_t value = 0;
  const char* end = text + std::strlen(text);
  const auto result = std::from_chars(text, end, value);
  if (result.ec != std::errc() || result.ptr != end || value < low || value > high) {
    fail("the environment variable {} is '{}': it must be an integer from {} to {}", name,
         printable(text, 60), low, high);
  }
  return value;
}

}  // namespace

Launch launch_from_environment() {
  Launch launch;
  if (text_of("WORLD_SIZE") == nullptr) {
    if (text_of("RANK") != nullptr) fail("RANK is set, but WORLD_SIZE is not: start the ranks with torchrun");
    return launch;
  }
  launch.world = integer("WORLD_SIZE", 1, 1 << 20);
  launch.rank = integer("RANK", 0, launch.world - 1);
  if (launch.world == 1) return launch;
  launch.local_rank = integer("LOCAL_RANK", 0, launch.world - 1);
  const char* address = text_of("MASTER_ADDR");
  if (address == nullptr) fail("WORLD_SIZE is set, but MASTER_ADDR is not: start the ranks with torchrun");
  launch.address = address;
  launch.port = static_cast<uint16_t>(integer("MASTER_PORT", 1, 65535));
  const char* agent = text_of("TORCHELASTIC_USE_AGENT_STORE");
  launch.agent_store = agent != nullptr && std::strcmp(agent, "True") == 0;
  if (launch.agent_store) {
    const char* attempt = text_of("TORCHELASTIC_RESTART_COUNT");
    launch.prefix = fmt::format("/worker/attempt_{}", attempt != nullptr ? attempt : "0");
  }
  return launch;
}

}  // namespace topk_sft
