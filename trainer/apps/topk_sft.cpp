// topk-sft: fine-tunes a causal language model as a recipe says.
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "recipe/recipe.h"
#include "train/cli.h"
#include "train/evaluate.h"
#include "train/plan.h"
#include "train/signals.h"
#include "train/trainer.h"

#ifndef TOPK_ATTN_VERSION
#define TOPK_ATTN_VERSION "0.1.0"
#endif

namespace {

using topk_sft::CommandLine;

int run(const CommandLine& line) {
  switch (line.action) {
    case CommandLine::Action::kHelp:
      std::fputs(topk_sft::usage_text(), stdout);
      return 0;
    case CommandLine::Action::kHelpRecipe:
      std::fputs(topk_sft::recipe_help().c_str(), stdout);
      return 0;
    case CommandLine::Action::kHelpRecipeMarkdown:
      std::fputs(topk_sft::recipe_markdown().c_str(), stdout);
      return 0;
    case CommandLine::Action::kVersion:
      std::puts("topk-sft " TOPK_ATTN_VERSION);
      return 0;
    case CommandLine::Action::kDryRun:
    case CommandLine::Action::kEvaluate:
    case CommandLine::Action::kTrain:
      break;
  }
  const topk_sft::ParsedRecipe parsed = topk_sft::load_recipe(line.recipe, line.overrides);
  const topk_sft::RunPlan plan = topk_sft::make_plan(parsed.recipe);
  if (line.action == CommandLine::Action::kDryRun) {
    topk_sft::print_dry_run(plan, parsed.notes);
  } else if (line.action == CommandLine::Action::kEvaluate) {
    topk_sft::install_signal_handlers();
    topk_sft::run_evaluation(plan, parsed.notes);
  } else {
    topk_sft::install_signal_handlers();
    topk_sft::run_training(plan, parsed.notes, line.profile);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(topk_sft::parse_command_line(std::vector<std::string>(argv + 1, argv + argc)));
  } catch (const topk_sft::UsageError& e) {
    std::fprintf(stderr, "topk-sft: error: %s\n%s", e.what(), topk_sft::usage_text());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fputs("topk-sft: error: out of memory\n", stderr);
    return 1;
  } catch (const std::exception& e) {
    std::string text = e.what();
    // Errors of the tensor library carry a stack trace behind the first line.
    if (const size_t end = text.find("\nException raised from"); end != std::string::npos) text.resize(end);
    std::fprintf(stderr, "topk-sft: error: %s\n", text.c_str());
    return 1;
  }
}
