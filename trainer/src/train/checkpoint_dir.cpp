#include "train/checkpoint_dir.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>

#include "io/atomic_file.h"
#include "io/error.h"
#include "io/sha256.h"

namespace topk_sft {

namespace {

namespace fs = std::filesystem;

constexpr const char* kLockName = ".topk-sft.lock";
constexpr const char* kFormat = "topk-sft-checkpoint";

// N of "step-N"; nothing for any other name.
std::optional<int64_t> step_of(const std::string& name) {
  if (name.rfind("step-", 0) != 0 || name.size() == 5 || name[5] == '-') return std::nullopt;
  int64_t step = 0;
  const char* end = name.data() + name.size();
  const auto result = std::from_chars(name.data() + 5, end, step);
  if (result.ec != std::errc() || result.ptr != end) return std::nullopt;
  return step;
}

}  // namespace

std::vector<CheckpointEntry> list_checkpoints(const std::string& output_dir) {
  std::vector<CheckpointEntry> entries;
  std::error_code error;
  for (fs::directory_iterator it(output_dir, error), end; !error && it != end; it.increment(error)) {
    const auto step = step_of(it->path().filename().string());
    if (!step || !fs::is_directory(it->path())) continue;
    entries.push_back({*step, it->path().string(), fs::exists(it->path() / kCompleteMarker)});
  }
  if (error && error != std::errc::no_such_file_or_directory) fail("{}: {}", output_dir, error.message());
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  return entries;
}

void mark_complete(const std::string& path, int64_t step) {
  Json files = Json::object();
  std::vector<fs::path> names;
  for (const auto& entry : fs::directory_iterator(path)) names.push_back(entry.path());
  std::sort(names.begin(), names.end());
  for (const fs::path& name : names) {
    if (name.filename() == kCompleteMarker) continue;
    files[name.filename().string()] = {{"bytes", fs::file_size(name)},
                                       {"sha256", sha256_file(name.string())}};
  }
  const Json marker = {{"format", kFormat}, {"version", 1}, {"step", step}, {"files", files}};
  write_file_atomic((fs::path(path) / kCompleteMarker).string(), marker.dump(2) + "\n");
}

std::string checkpoint_fault(const std::string& path, bool hashes) {
  if (!fs::is_directory(path)) return fmt::format("{} is not a folder", path);
  const fs::path marker_path = fs::path(path) / kCompleteMarker;
  if (!fs::exists(marker_path))
    return fmt::format("{} has no {} marker: it was never finished", path, kCompleteMarker);
  try {
    const Json marker = read_json_file(marker_path.string());
    if (!marker.is_object() || marker.value("format", "") != kFormat || marker.value("version", 0) != 1) {
      return fmt::format("{} is not the marker of a checkpoint that this program writes",
                         marker_path.string());
    }
    const Json& files = marker.at("files");
    if (!files.is_object() || files.empty()) return fmt::format("{} names no files", marker_path.string());
    for (const auto& [name, expected] : files.items()) {
      const fs::path file = fs::path(path) / fs::path(name).filename();
      if (!fs::is_regular_file(file)) return fmt::format("{} is missing", file.string());
      const auto bytes = expected.at("bytes").get<uint64_t>();
      if (fs::file_size(file) != bytes) {
        return fmt::format("{} has {} bytes instead of {}", file.string(), fs::file_size(file), bytes);
      }
      if (hashes && sha256_file(file.string()) != expected.at("sha256").get<std::string>()) {
        return fmt::format("{} does not have the sha256 that was recorded when it was written",
                           file.string());
      }
    }
  } catch (const Json::exception& e) {
    return fmt::format("{} is not a valid marker: {}", marker_path.string(), e.what());
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

std::vector<std::string> prune_checkpoints(const std::string& output_dir, int64_t keep) {
  std::vector<CheckpointEntry> entries = list_checkpoints(output_dir);
  std::vector<std::string> removed;
  int64_t complete = 0;
  for (auto entry = entries.rbegin(); entry != entries.rend(); ++entry) {
    const bool whole = entry->marked && checkpoint_fault(entry->path, false).empty();
    complete += whole;
    // Whatever is not whole stays until a newer whole one exists: it may be all there is to look at.
    const bool superfluous = whole ? keep > 0 && complete > keep : !entry->marked && complete > 0;
    if (!superfluous) continue;
    std::error_code error;
    fs::remove(fs::path(entry->path) / kCompleteMarker, error);  // first: half a folder never looks whole
    fs::remove_all(entry->path, error);
    if (error) fail("{}: an old checkpoint cannot be removed: {}", entry->path, error.message());
    removed.push_back(entry->path);
  }
  return removed;
}

RunFolder::RunFolder(const std::string& output_dir, bool fresh) {
  std::error_code error;
  fs::create_directories(output_dir, error);
  if (!fs::is_directory(output_dir)) {
    fail("checkpoint.output_dir: {} cannot be made: {}", output_dir,
         error ? error.message() : "it is not a folder");
  }
  std::string found;  // something that is not the lock
  for (const auto& entry : fs::directory_iterator(output_dir)) {
    if (entry.path().filename() != kLockName) found = entry.path().filename().string();
  }
  const bool own = fs::exists(fs::path(output_dir) / kLockName) || !list_checkpoints(output_dir).empty();
  if (!found.empty() && fresh) {
    fail(
        "checkpoint.output_dir: {} is not empty (it holds {}): continue the run in it with --resume latest, "
        "or give a "
        "new folder",
        output_dir, found);
  }
  if (!found.empty() && !own) {
    fail("checkpoint.output_dir: {} holds {} and is not the folder of a run: give a new folder", output_dir,
         found);
  }
  const std::string lock_path = (fs::path(output_dir) / kLockName).string();
  lock_ = open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_ < 0) fail("{}: cannot be opened: {}", lock_path, std::strerror(errno));
  if (flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    close(lock_);
    fail("checkpoint.output_dir: another process is training in {}", output_dir);
  }
  // Leftovers of a run that was killed while it wrote a checkpoint or a file.
  for (const auto& entry : fs::directory_iterator(output_dir)) {
    const std::string name = entry.path().filename().string();
    if (name[0] == '.' && name.find(".tmp-") != std::string::npos) fs::remove_all(entry.path(), error);
  }
}

RunFolder::~RunFolder() {
  if (lock_ >= 0) close(lock_);
}

}  // namespace topk_sft
