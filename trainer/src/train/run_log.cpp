#include "train/run_log.h"

#include <chrono>
#include <fstream>

namespace topk_sft {

namespace {

bool ends_inside_a_line(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file || file.tellg() <= 0) return false;
  file.seekg(-1, std::ios::end);
  return file.get() != '\n';
}

}  // namespace

RunLog::RunLog(const std::string& output_dir, bool jsonl, bool tensorboard) {
  if (jsonl) {
    const std::string path = output_dir + "/train.jsonl";
    const bool cut_short = ends_inside_a_line(path);
    jsonl_ = std::make_unique<AppendFile>(path);
    if (cut_short) jsonl_->append("\n");  // what a crash left of a line stays a line of its own
  }
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
