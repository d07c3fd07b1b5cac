// topk-sft: fine-tunes a causal language model as a recipe says.
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "dist/layout.h"
#include "dist/store.h"
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

// Of several ranks; it outlives an error, to tell the others.
std::unique_ptr<topk_sft::RankStore> store;

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
  const topk_sft::Launch launch = topk_sft::launch_from_environment();
  if (line.action == CommandLine::Action::kTrain && launch.world > 1) {
    store = std::make_unique<topk_sft::RankStore>(launch);
  }
  const topk_sft::ParsedRecipe parsed = topk_sft::load_recipe(line.recipe, line.overrides);
  if (store != nullptr) store->set_timeout(parsed.recipe.train.rank_timeout);
  const topk_sft::RunPlan plan = topk_sft::make_plan(parsed.recipe, launch);
  if (line.action == CommandLine::Action::kDryRun) {
    if (launch.rank == 0) topk_sft::print_dry_run(plan, parsed.notes);
  } else if (line.action == CommandLine::Action::kEvaluate) {
    topk_sft::install_signal_handlers();
    topk_sft::run_evaluation(plan, parsed.notes);
  } else {
    topk_sft::install_signal_handlers(/*several_ranks=*/launch.world > 1, /*speak=*/launch.rank == 0);
    topk_sft::run_training(plan, parsed.notes, line.profile, store.get());
  }
  return 0;
}

// One message, whichever of the ranks fail.
void report(const std::string& text) {
  if (store == nullptr) {
    std::fprintf(stderr, "topk-sft: error: %s\n", text.c_str());
  } else {
    store->report(text);
  }
}

int guarded(const std::vector<std::string>& arguments) {
  try {
    return run(topk_sft::parse_command_line(arguments));
  } catch (const topk_sft::UsageError& e) {
    std::fprintf(stderr, "topk-sft: error: %s\n%s", e.what(), topk_sft::usage_text());
    return 2;
  } catch (const std::bad_alloc&) {
    report("out of memory");
    return 1;
  } catch (const std::exception& e) {
    std::string text = e.what();
    // Errors of the tensor library carry a stack trace behind the first line.
    if (const size_t end = text.find("\nException raised from"); end != std::string::npos) text.resize(end);
    report(text);
    return 1;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int status = guarded(std::vector<std::string>(argv + 1, argv + argc));
  store.reset();  // its thread must not outlive main
  return status;
}
