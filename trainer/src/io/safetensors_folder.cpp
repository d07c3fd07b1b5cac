// The weights of a Hugging Face folder: one file, or shards and their index.
#include <filesystem>
#include <map>

#include "io/json.h"
#include "io/safetensors.h"

namespace topk_sft {
namespace fs = std::filesystem;

SafetensorsFolder::SafetensorsFolder(const std::string& folder) {
  if (!fs::is_directory(folder)) fail("{}: is not a folder", folder);
  const std::string single = (fs::path(folder) / "model.safetensors").string();
  if (fs::exists(single)) {
    add_file(single);
    return;
  }
  const std::string index_path = single + ".index.json";
  if (!fs::exists(index_path)) {
    fail("{}: has neither model.safetensors nor model.safetensors.index.json", folder);
  }

  const Json index = read_json_file(index_path);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    fail("{}: must be an object with the object \"weight_map\"", index_path);
  }
  std::map<std::string, std::string> shard_of;
  std::map<std::string, bool> shards;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    if (!file.is_string()) fail("{}: weight_map \"{}\" must be a file name", index_path, printable(tensor));
    const auto& name = file.get_ref<const std::string&>();
    if (name.empty() || name == "." || name == ".." ||
        name.find_first_of(std::string("/\0", 2)) != name.npos) {
      fail("{}: weight_map \"{}\" names the file \"{}\", which must be a file of the same folder", index_path,
           printable(tensor), printable(name));
    }
    shard_of[tensor] = name;
    shards[name] = true;
  }
  for (const auto& [name, unused] : shards) add_file((fs::path(folder) / name).string());

  for (const auto& [tensor, name] : shard_of) {
    const Entry* entry = find(tensor);
    if (entry == nullptr || fs::path(entry->file->path()).filename() != name) {
      fail("{}: tensor \"{}\" should be in {}, but it is {}", index_path, printable(tensor), name,
           entry == nullptr ? "in no shard" : "in " + fs::path(entry->file->path()).filename().string());
    }
  }
  for (const Entry& entry : entries_) {
    if (!shard_of.contains(entry.tensor->name)) {
      fail("{}: tensor \"{}\" is not in weight_map of {}", entry.file->path(), printable(entry.tensor->name),
           index_path);
    }
  }
}

const SafetensorsFolder::Entry* SafetensorsFolder::find(const std::string& name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &entries_[found->second];
}

void SafetensorsFolder::add_file(const std::string& path) {
  files_.push_back(std::make_unique<SafetensorsFile>(path));
  for (const TensorInfo& tensor : files_.back()->tensors()) {
    if (const auto [it, fresh] = by_name_.emplace(tensor.name, entries_.size()); !fresh) {
      fail("{}: tensor \"{}\" is also in {}", path, printable(tensor.name),
           entries_[it->second].file->path());
    }
    entries_.push_back({files_.back().get(), &tensor});
  }
}

}  // namespace topk_sft
