#include "train/base_weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>
#include <vector>

#include "io/error.h"
#include "io/sha256.h"

namespace topk_sft {

namespace {

namespace fs = std::filesystem;

constexpr int64_t kPieceBytes = int64_t{16} << 20;

struct Piece {
  fs::path path;
  int64_t begin, bytes;
  std::string digest;
};

void hash_piece(Piece& piece, std::vector<char>& buffer) {
  buffer.resize(static_cast<size_t>(piece.bytes));
  std::ifstream file(piece.path, std::ios::binary);
  file.seekg(piece.begin);
  if (!file.read(buffer.data(), piece.bytes)) fail("{} cannot be read", piece.path.string());
  piece.digest = sha256({buffer.data(), buffer.size()});
}

}  // namespace

std::string weights_fingerprint(const std::string& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  std::vector<Piece> pieces;
  std::string text;
  for (const fs::path& path : files) {
    const auto bytes = static_cast<int64_t>(fs::file_size(path));
    text += fmt::format("{} {}\n", path.filename().string(), bytes);
    for (int64_t begin = 0; begin < bytes; begin += kPieceBytes) {
      pieces.push_back({path, begin, std::min(kPieceBytes, bytes - begin), ""});
    }
  }

  std::atomic<size_t> next = 0;
  std::exception_ptr error;
  std::mutex error_lock;
  const auto work = [&] {
    try {
      std::vector<char> buffer;
      for (size_t i = next++; i < pieces.size(); i = next++) hash_piece(pieces[i], buffer);
    } catch (...) {
      const std::lock_guard lock(error_lock);
      error = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    const size_t cores = std::max(1U, std::thread::hardware_concurrency());
    for (size_t i = 1; i < std::min(cores, pieces.size()); ++i) threads.emplace_back(work);
    work();
  }
  if (error) std::rethrow_exception(error);
  for (const Piece& piece : pieces) text += piece.digest + "\n";
  return sha256(text);
}

}  // namespace topk_sft
