// The command line of topk-sft. Torch-free.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace topk_sft {

// A command line that cannot be understood: printed with a hint at --help, exit status 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct CommandLine {
  enum class Action { kTrain, kEvaluate, kDryRun, kHelp, kHelpRecipe, kHelpRecipeMarkdown, kVersion };
  Action action = Action::kTrain;
  std::string recipe;
  std::vector<std::string> overrides;  // "section.key=value", in order; --resume is one of them
  std::string profile;                 // file for a Chrome trace; empty: none
};

// arguments: without the program's name. Throws UsageError.
CommandLine parse_command_line(const std::vector<std::string>& arguments);

const char* usage_text();

}  // namespace topk_sft
