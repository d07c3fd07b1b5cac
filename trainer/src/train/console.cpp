#include "train/console.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>

namespace topk_sft {

Console::Console(const std::string& mode)
    : bar_(mode == "bar" || (mode == "auto" && isatty(STDOUT_FILENO) != 0)), silent_(mode == "silent") {}

Console::~Console() {
  if (!drawn_.empty()) put("\n");
}

void Console::put(const std::string& bytes) {
  // A reader that went away must not end a run: write errors of the screen are not looked at.
  std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  std::fflush(stdout);
}

void Console::line(const std::string& text) {
  if (silent_) return;
  if (drawn_.empty()) {
    put(text + "\n");
  } else {
    put("\r\x1b[K" + text + "\n" + drawn_);
  }
}

void Console::progress(double done, double total, const std::string& text) {
  if (!bar_) return;
  winsize size = {};
  const bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  const int columns = known ? size.ws_col : 80;
  const int room = std::clamp(columns - static_cast<int>(text.size()) - 10, 10, 40);
  const double share = total > 0 ? std::clamp(done / total, 0.0, 1.0) : 0.0;
  const int filled = static_cast<int>(share * room);
  std::string bar = fmt::format("{:3.0f}% [{}{}] {}", 100 * share, std::string(filled, '#'),
                                std::string(room - filled, '.'), text);
  // A bar wider than the terminal would wrap, and could then not be redrawn.
  drawn_ = bar.substr(0, static_cast<size_t>(std::max(1, columns - 1)));
  put("\r\x1b[K" + drawn_);
}

std::string duration_text(double seconds) {
  const auto s = static_cast<long long>(std::clamp(seconds, 0.0, 1e9) + 0.5);
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m{:02}s", s / 60, s % 60);
  if (s < 86400) return fmt::format("{}h{:02}m", s / 3600, s % 3600 / 60);
  return fmt::format("{}d{:02}h", s / 86400, s % 86400 / 3600);
}

std::string bytes_text(double bytes) {
  constexpr double kMiB = 1024.0 * 1024.0;
  if (bytes < kMiB) return fmt::format("{:.0f} KiB", bytes / 1024.0);
  if (bytes < 1024 * kMiB) return fmt::format("{:.0f} MiB", bytes / kMiB);
  return fmt::format("{:.2f} GiB", bytes / (1024 * kMiB));
}

std::string count_text(long long count) {
  std::string digits = std::to_string(count);
  const size_t sign = count < 0 ? 1 : 0;
  for (size_t at = digits.size(); at > sign + 3; at -= 3) digits.insert(at - 3, ",");
  return digits;
}

double resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  double total_pages = 0, resident_pages = 0;
  statm >> total_pages >> resident_pages;
  return resident_pages * static_cast<double>(sysconf(_SC_PAGESIZE));
}

double peak_resident_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::stod(line.substr(6)) * 1024.0;
  }
  return resident_bytes();
}

}  // namespace topk_sft
