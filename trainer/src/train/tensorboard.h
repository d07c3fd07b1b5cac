// TensorBoard event files with scalars, encoded by hand: CRC-framed records of a small protobuf message.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "train/append_file.h"

namespace topk_sft {

class TensorBoardWriter {
 public:
  // Creates a new event file in `folder` (made if missing); one file per process, as TensorBoard expects.
  explicit TensorBoardWriter(const std::string& folder);

  // Appends the values of one step, flushed to the file. Throws Error when the disk refuses.
  void scalars(int64_t step, const std::vector<std::pair<std::string, double>>& values);

 private:
  void record(const std::string& event);

  AppendFile file_;
};

// CRC-32C (Castagnoli) of `bytes`, and the masked form that record framing uses.
uint32_t crc32c(const std::string& bytes);
uint32_t masked_crc32c(const std::string& bytes);

}  // namespace topk_sft
