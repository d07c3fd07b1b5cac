// SIGTERM and SIGINT: the first asks the run to save and stop, the second ends the program at once.
#pragma once

namespace topk_sft {

// SIGTERM may come twice: from the launcher of several ranks and from whoever sent it to the launcher. With
// `several_ranks` a second signal counts only some seconds after the first, and only rank 0 (`speak`) says
// so.
//
// Installs the handlers, and ignores SIGPIPE and SIGXFSZ so that a closed pipe or a file-size limit shows as
// a failed write instead of killing a run.
void install_signal_handlers(bool several_ranks = false, bool speak = true);

// The signal that asked the run to stop, or 0.
int stop_signal();

// "SIGTERM", "SIGINT".
const char* signal_name(int signal);

}  // namespace topk_sft
