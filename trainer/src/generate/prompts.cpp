#include "generate/prompts.h"

#include <filesystem>

#include "data/shards.h"
#include "io/error.h"
#include "io/json.h"
#include "io/sha256.h"

namespace topk_sft {

std::vector<std::vector<int64_t>> read_prompts(const std::string& file, const std::string& hf_dir,
                                               int64_t vocab_size) {
  ShardRequirements requirements;
  requirements.tokenizer_path = hf_dir + "/tokenizer.json";
  requirements.tokenizer_sha256 = sha256_file(requirements.tokenizer_path);
  requirements.vocab_size = vocab_size;
  const TokenDataset dataset({file}, requirements);
  std::vector<std::vector<int64_t>> prompts;
  for (int64_t i = 0; i < dataset.num_documents(); ++i) {
    const Document& document = dataset.document(i);
    prompts.emplace_back(document.ids.begin(), document.ids.end());
  }
  return prompts;
}

std::vector<int64_t> read_eos_token_ids(const std::string& hf_dir, const ModelConfig& config) {
  const std::string path = hf_dir + "/generation_config.json";
  if (!std::filesystem::exists(path)) return config.eos_token_ids;
  const Json json = read_json_file(path);
  if (!json.is_object()) fail("{}: must be a JSON object", path);
  const auto found = json.find("eos_token_id");
  if (found == json.end() || found->is_null()) return config.eos_token_ids;
  const Json list = found->is_array() ? *found : Json::array({*found});
  std::vector<int64_t> ids;
  for (const Json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(config.vocab_size)) {
      fail("{}: eos_token_id must hold ids from 0 to {}, got {}", path, config.vocab_size - 1,
           printable(id.dump(), 60));
    }
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}

}  // namespace topk_sft
