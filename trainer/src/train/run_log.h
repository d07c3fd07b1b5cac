// The files that record a run: output_dir/train.jsonl (append-only, one JSON object a line) and TensorBoard
// events.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "io/json.h"
#include "train/append_file.h"
#include "train/tensorboard.h"

namespace topk_sft {

class RunLog {
 public:
  RunLog(const std::string& output_dir, bool jsonl, bool tensorboard);

  // Appends {"event": kind, "time": seconds since 1970, ...fields}. NaN and infinity become null.
  void event(const std::string& kind, const Json& fields);
  void scalars(int64_t step, const std::vector<std::pair<std::string, double>>& values);

 private:
  std::unique_ptr<AppendFile> jsonl_;
  std::unique_ptr<TensorBoardWriter> tensorboard_;
};

}  // namespace topk_sft
