// The folders of a run on disk: which checkpoints there are, whether they are whole, and which to keep.
// Torch-free.
//
// A checkpoint is output_dir/step-N. Its files are written into a hidden folder beside it and synced, the
// folder is renamed, and last of all the marker COMPLETE is written, which holds the size and sha256 of every
// file.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "io/json.h"

namespace topk_sft {

inline constexpr const char* kCompleteMarker = "COMPLETE";

struct CheckpointEntry {
  int64_t step = 0;
  std::string path;
  bool marked = false;  // has the marker
};

// The step-N folders of `output_dir`, oldest first; none if the folder does not exist.
std::vector<CheckpointEntry> list_checkpoints(const std::string& output_dir);

// Writes the marker over the files that are in `path`. Throws Error.
void mark_complete(const std::string& path, int64_t step);

// What is wrong with a checkpoint, in one sentence that names the file; empty if it is whole. `hashes`: also
// read all files and compare their sha256.
std::string checkpoint_fault(const std::string& path, bool hashes);

// Removes the oldest complete checkpoints beyond the newest `keep` (0: keeps all), and unmarked ones older
// than the newest complete one. Returns what was removed.
std::vector<std::string> prune_checkpoints(const std::string& output_dir, int64_t keep);

// Holds output_dir for one process.
class RunFolder {
 public:
  // fresh: the folder must be missing or empty. Otherwise it must be missing, empty or a run's own folder.
  // Throws Error; also when another process trains there.
  RunFolder(const std::string& output_dir, bool fresh);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

 private:
  int lock_ = -1;
};

}  // namespace topk_sft
