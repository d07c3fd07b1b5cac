// Heartbeats and claims on c10d's TCPStore.
#include "dist/store.h"

#include <unistd.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "dist/store_impl.h"
#include "io/error.h"

namespace topk_sft {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kBeat{500};
constexpr std::chrono::minutes kConnectTimeout{5};
// A rank that has never beaten may still be starting on another host.
constexpr double kFirstBeatSeconds = 300;
// Once an operation has failed, some rank is known to be gone: the one that is silent for this long.
constexpr double kSuspectSeconds = 5;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::string beat_key(int64_t rank) {
  return fmt::format("topk-sft/beat/{}", rank);
}

constexpr const char* kClaimKey = "topk-sft/claim";
constexpr const char* kSuspectKey = "topk-sft/suspect";

StorePtr connect(const Launch& launch, bool serve) {
  c10d::TCPStoreOptions options;
  options.port = launch.port;
  options.isServer = serve;
  options.multiTenant = true;
  options.timeout = kConnectTimeout;
  StorePtr store = c10::make_intrusive<c10d::TCPStore>(launch.address, options);
  if (launch.prefix.empty()) return store;
  return c10::make_intrusive<c10d::PrefixStore>(launch.prefix, store);
}

}  // namespace

RankStore::RankStore(const Launch& launch) : launch_(launch), impl_(std::make_unique<Impl>()) {
  // c10d reports lost connections with a stack trace each; the message of this program says what matters.
  setenv("TORCH_CPP_LOG_LEVEL", "ERROR", /*overwrite=*/0);
  try {
    impl_->main = connect(launch, !launch.agent_store && launch.rank == 0);
    impl_->beats = connect(launch, /*serve=*/false);
  } catch (const std::exception& e) {
    fail("rank {} of {}: the store at {}:{} cannot be reached: {}", launch.rank, launch.world, launch.address,
         launch.port, first_line(e.what()));
  }
  thread_ = std::thread([this] { beat(); });
}

RankStore::~RankStore() {
  leaving_ = true;
  if (thread_.joinable()) thread_.join();
}

std::vector<std::string> RankStore::exchange(const std::string& text) {
  const std::string name = fmt::format("topk-sft/text/{}/", exchanges_++);
  c10d::Store& store = *impl_->main;
  store.set(name + std::to_string(launch_.rank), text);
  std::vector<std::string> out;
  for (int64_t r = 0; r < launch_.world; ++r) {
    const std::string key = name + std::to_string(r);
    store.wait({key}, kOperationTimeout);
    out.push_back(store.get_to_str(key));
  }
  return out;
}

void RankStore::wait_for_first() {
  const std::string key = fmt::format("topk-sft/first/{}", waits_++);
  if (launch_.rank == 0) {
    impl_->main->set(key, std::string("done"));
  } else {
    impl_->main->wait({key}, std::chrono::hours(24 * 30));
  }
}

void RankStore::report(const std::string& text) {
  bool mine = true;
  reporting_ = true;
  try {
    mine = impl_->beats->add(kClaimKey, 1) == 1;
  } catch (const std::exception&) {
    // The store is gone: nobody else can be asked.
  }
  if (mine) std::fprintf(stderr, "topk-sft: error: %s\n", text.c_str());
  // Rank 0 may serve the store, which the others must be able to ask once more.
  if (launch_.rank == 0 && !launch_.agent_store) std::this_thread::sleep_for(3 * kBeat);
}

void RankStore::end_with(const std::string& text) {
  report(text);
  std::fflush(nullptr);
  _exit(1);
}

void RankStore::await_verdict() {
  try {
    impl_->beats->add(kSuspectKey, 1);
  } catch (const std::exception&) {
    return;
  }
  std::this_thread::sleep_for(std::chrono::duration<double>(kSuspectSeconds + 3));
}

void RankStore::leave() {
  exchange("end");
  leaving_ = true;
  thread_.join();
  // Rank 0 may serve the store: the last to leave, it waits until nobody reads it any more.
  const std::string key = "topk-sft/left";
  impl_->main->add(key, 1);
  if (launch_.rank != 0 || launch_.agent_store) return;
  const auto begin = Clock::now();
  while (impl_->main->add(key, 0) < launch_.world && seconds_since(begin) < kSuspectSeconds) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

void RankStore::beat() {
  struct Watched {
    int64_t rank;
    int64_t count = 0;
    Clock::time_point changed = Clock::now();
  };
  std::vector<Watched> watched;
  if (launch_.rank != 0) {
    watched.push_back({0});
  } else {
    for (int64_t r = 1; r < launch_.world; ++r) watched.push_back({r});
  }
  c10d::Store& store = *impl_->beats;
  auto turn = Clock::now();
  while (!leaving_) {
    try {
      store.add(beat_key(launch_.rank), 1);
      if (store.add(kClaimKey, 0) > 0 && !reporting_) _exit(1);  // another rank has said why
      // A thread that was not scheduled itself must not blame others for its own silence.
      const double late = seconds_since(turn);
      turn = Clock::now();
      const bool suspect = store.add(kSuspectKey, 0) > 0;
      for (Watched& peer : watched) {
        const int64_t count = store.add(beat_key(peer.rank), 0);
        if (count != peer.count || late > 4) {
          peer.count = count;
          peer.changed = Clock::now();
          continue;
        }
        const double limit = count == 0 ? kFirstBeatSeconds : suspect ? kSuspectSeconds : timeout_.load();
        if (seconds_since(peer.changed) > limit) {
          end_with(fmt::format(
              "rank {} of {} was lost: no sign of life for {:.0f} s; all ranks end, continue with "
              "--resume latest",
              peer.rank, launch_.world, seconds_since(peer.changed)));
        }
      }
    } catch (const std::exception&) {
      if (leaving_) return;
      std::fprintf(stderr,
                   "topk-sft: error: rank %lld of %lld: the store at %s:%u was lost, and with it the other "
                   "ranks; continue with --resume latest\n",
                   static_cast<long long>(launch_.rank), static_cast<long long>(launch_.world),
                   launch_.address.c_str(), static_cast<unsigned>(launch_.port));
      std::fflush(nullptr);
      _exit(1);
    }
    std::this_thread::sleep_for(kBeat);
  }
}

}  // namespace topk_sft
