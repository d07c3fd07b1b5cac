// What a generation starts from and ends at: prompt files and stop tokens of a Hugging Face folder.
// Torch-free.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"

namespace topk_sft {

// The documents of a token file (`topk-data tokens`). Error if it was made with another tokenizer than
// <hf_dir>/tokenizer.json, or if an id is not below `vocab_size`.
std::vector<std::vector<int64_t>> read_prompts(const std::string& file, const std::string& hf_dir,
                                               int64_t vocab_size);

// eos_token_id of <hf_dir>/generation_config.json, one or several; of config.json if that file or key is
// absent. Empty if none is given. Throws Error.
std::vector<int64_t> read_eos_token_ids(const std::string& hf_dir, const ModelConfig& config);

}  // namespace topk_sft
