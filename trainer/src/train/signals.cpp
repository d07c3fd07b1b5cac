#include "train/signals.h"

#include <unistd.h>

#include <csignal>
#include <ctime>

namespace topk_sft {

namespace {

volatile std::sig_atomic_t g_signal = 0;
volatile std::time_t g_time = 0;  // of the first signal
std::time_t g_patience = 0;       // seconds in which a second one is the same wish
bool g_speak = true;

extern "C" void on_stop_signal(int signal) {
  if (g_signal != 0) {
    if (std::time(nullptr) - g_time < g_patience) return;
    _exit(128 + signal);
  }
  g_time = std::time(nullptr);
  g_signal = signal;
  if (!g_speak) return;
  constexpr char kText[] = "\ntopk-sft: stopping: saving a checkpoint; a second signal exits at once\n";
  [[maybe_unused]] const auto written = write(STDERR_FILENO, kText, sizeof kText - 1);
}

}  // namespace

void install_signal_handlers(bool several_ranks, bool speak) {
  g_patience = several_ranks ? 5 : 0;
  g_speak = speak;
  struct sigaction action = {};
  action.sa_handler = on_stop_signal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
}

int stop_signal() {
  return g_signal;
}

const char* signal_name(int signal) {
  return signal == SIGINT ? "SIGINT" : "SIGTERM";
}

}  // namespace topk_sft
