// How the ranks of a run divide the work, and how a process learns which of them it is. Torch-free.
//
// Ranks are numbered from 0. With sequence parallelism, `sequence_ranks` ranks in a row share each
// micro-batch: rank r has part r % sequence_ranks of the tokens of data rank r / sequence_ranks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace topk_sft {

struct RankLayout {
  int64_t rank = 0;
  int64_t world = 1;
  int64_t sequence_ranks = 1;  // divides world

  bool several() const { return world > 1; }
  bool first() const { return rank == 0; }
  int64_t data_ranks() const { return world / sequence_ranks; }
  int64_t data_rank() const { return rank / sequence_ranks; }
  int64_t sequence_rank() const { return rank % sequence_ranks; }

  // Of `count` micro-batches, those of this rank's data rank: every data_ranks()-th. Which rank runs one does
  // not change the sum over all of them.
  std::vector<size_t> share(size_t count) const;
  // The most that any rank has of them.
  size_t rounds(size_t count) const;
};

// What the launcher (torchrun) put into the environment.
struct Launch {
  int64_t rank = 0;
  int64_t world = 1;
  int64_t local_rank = 0;  // among the ranks of this host
  std::string address;     // of the store
  uint16_t port = 0;
  bool agent_store = false;  // the launcher serves the store; else rank 0 does
  std::string prefix;        // of the run's keys in the launcher's store
};

// One rank if WORLD_SIZE is not set. Error for a variable that is missing or makes no sense.
Launch launch_from_environment();

}  // namespace topk_sft
