#include "train/cli.h"

#include <optional>

namespace topk_sft {

const char* usage_text() {
  return "usage: topk-sft recipe.yaml [section.key=value ...] [--dry-run] [--evaluate] "
         "[--resume PATH|latest]\n"
         "                [--profile FILE]\n"
         "\n"
         "Fine-tunes a causal language model with dense or exact top-k attention, as the recipe says.\n"
         "\n"
         "  section.key=value         overrides a key of the recipe\n"
         "  --dry-run                 checks everything and prints the plan, a memory estimate and the "
         "first\n"
         "                            batch with its loss mask; nothing is computed or written\n"
         "  --evaluate                measures the held-out loss of model.base_model as it is, trains "
         "nothing\n"
         "  --resume PATH|latest      continues from that checkpoint, or from the newest one of the run's "
         "folder\n"
         "  --profile FILE            writes a Chrome trace of three steps, past the first ones\n"
         "  --help-recipe[=markdown]  prints every key of a recipe\n"
         "  --version                 prints the version\n"
         "  --help                    prints this text\n"
         "\n"
         "SIGTERM and SIGINT (Ctrl-C) save a checkpoint and exit with status 0; a second one exits at once.\n"
         "Exit status: 0 done or stopped by a signal, 1 error, 2 wrong usage.\n";
}

CommandLine parse_command_line(const std::vector<std::string>& arguments) {
  CommandLine line;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      line.action = CommandLine::Action::kHelp;
      return line;
    }
    if (argument == "--version") {
      line.action = CommandLine::Action::kVersion;
      return line;
    }
    if (argument == "--help-recipe" || argument == "--help-recipe=text") {
      line.action = CommandLine::Action::kHelpRecipe;
      return line;
    }
    if (argument == "--help-recipe=markdown") {
      line.action = CommandLine::Action::kHelpRecipeMarkdown;
      return line;
    }
    if (argument == "--dry-run" || argument == "--evaluate") {
      if (line.action != CommandLine::Action::kTrain)
        throw UsageError("only one of --dry-run and --evaluate");
      line.action = argument == "--dry-run" ? CommandLine::Action::kDryRun : CommandLine::Action::kEvaluate;
    } else if (argument == "--resume" || argument.rfind("--resume=", 0) == 0) {
      std::string value;
      if (argument != "--resume") {
        value = argument.substr(9);
      } else if (++i < arguments.size()) {
        value = arguments[i];
      }
      if (value.empty()) throw UsageError("--resume needs a checkpoint folder, or latest");
      line.overrides.push_back("checkpoint.resume_from_checkpoint=" + value);
    } else if (argument == "--profile" || argument.rfind("--profile=", 0) == 0) {
      if (argument != "--profile") {
        line.profile = argument.substr(10);
      } else if (++i < arguments.size()) {
        line.profile = arguments[i];
      }
      if (line.profile.empty()) throw UsageError("--profile needs a file for the trace");
    } else if (argument.rfind("-", 0) == 0) {
      throw UsageError("unknown option '" + argument + "'");
    } else if (line.recipe.empty() && argument.find('=') == std::string::npos) {
      line.recipe = argument;
    } else if (argument.find('=') != std::string::npos) {
      line.overrides.push_back(argument);
    } else {
      throw UsageError("'" + argument + "' is neither an option nor section.key=value; the recipe is '" +
                       line.recipe + "'");
    }
  }
  if (line.recipe.empty()) throw UsageError("a recipe is needed");
  return line;
}

}  // namespace topk_sft
