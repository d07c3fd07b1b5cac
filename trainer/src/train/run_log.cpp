#include "train/run_log.h"

#include <chrono>

namespace topk_sft {

RunLog::RunLog(const std::string& output_dir, bool jsonl, bool tensorboard) {
  if (jsonl) jsonl_ = std::make_unique<AppendFile>(output_dir + "/train.jsonl");
  if (tensorboard) tensorboard_ = std::make_unique<TensorBoardWriter>(output_dir + "/tensorboard");
}

void RunLog::event(const std::string& kind, const Json& fields) {
  if (!jsonl_) return;
  Json line = Json::object();
  line["event"] = kind;
  line["time"] = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  line.update(fields);
  // Completions may end inside a UTF-8 sequence.
  jsonl_->append(line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
}

void RunLog::scalars(int64_t step, const std::vector<std::pair<std::string, double>>& values) {
  if (tensorboard_) tensorboard_->scalars(step, values);
}

}  // namespace topk_sft
