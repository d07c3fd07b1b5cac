// What a run shows: lines on standard output, and below them a progress bar when that is a terminal.
#pragma once

#include <string>

namespace topk_sft {

class Console {
 public:
  // mode: auto (bar on a terminal), bar, plain; silent shows nothing.
  explicit Console(const std::string& mode);
  ~Console();

  // Prints a line (or several) above the bar.
  void line(const std::string& text);
  // Redraws the bar: done / total units of work (0 <= done <= total), with a text beside it. Nothing in plain
  // mode.
  void progress(double done, double total, const std::string& text);
  bool has_bar() const { return bar_; }

 private:
  void put(const std::string& bytes);

  bool bar_;
  bool silent_;
  std::string drawn_;  // the bar on screen
};

// "45s", "3m07s", "2h05m", "3d04h".
std::string duration_text(double seconds);
// "512 MiB", "1.50 GiB".
std::string bytes_text(double bytes);
// "12,345,678".
std::string count_text(long long count);

// Resident memory of this process in bytes: now, and the highest so far.
double resident_bytes();
double peak_resident_bytes();

}  // namespace topk_sft
