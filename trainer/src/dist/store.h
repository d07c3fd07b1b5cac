// The store through which the ranks of a run meet, and what ends all of them when one is lost.
//
// A thread of every rank counts up a number of its own in the store, twice a second, whatever the rank is
// doing. Rank 0 looks at the numbers of all, the others at rank 0's: O(ranks) requests a beat. A number that
// stands still for `timeout` seconds means that its rank is dead or stopped. Who notices claims the failure
// in the store, prints one message and ends; the others see the claim and end silently. The same happens when
// a rank fails with an error of its own, so that there is one message, whatever went wrong.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "dist/layout.h"

namespace topk_sft {

class RankStore {
 public:
  // Connects and starts to beat. Error if there is no store to be reached.
  explicit RankStore(const Launch& launch);
  ~RankStore();
  RankStore(const RankStore&) = delete;
  RankStore& operator=(const RankStore&) = delete;

  const Launch& launch() const { return launch_; }
  void set_timeout(double seconds) { timeout_ = seconds; }

  // The texts of all ranks, by rank. Collective.
  std::vector<std::string> exchange(const std::string& text);
  // Returns once rank 0 has called it as often as this rank, however long that takes.
  void wait_for_first();

  // An operation between the ranks failed, which says little about why: waits for the beat to name the rank
  // that was lost, which ends this process. Returns if all ranks are alive.
  void await_verdict();
  // Prints `text` as this program's error, unless another rank has told of a failure already. The process
  // must then end.
  void report(const std::string& text);
  // The end of a run that went well: all ranks get here before any of them leaves. Collective.
  void leave();

  struct Impl;
  Impl& impl() { return *impl_; }

 private:
  void beat();
  void end_with(const std::string& text);

  Launch launch_;
  std::unique_ptr<Impl> impl_;
  std::atomic<double> timeout_{20.0};
  std::atomic<bool> leaving_{false};
  std::atomic<bool> reporting_{false};  // the claim may be this rank's own
  int64_t exchanges_ = 0;
  int64_t waits_ = 0;
  std::thread thread_;
};

}  // namespace topk_sft
