// The plan of a run in words, and the first micro-batch with its loss mask.
#include <fmt/format.h>

#include <cstdio>
#include <vector>

#include "train/sampling.h"
#include "train/trainer.h"

namespace topk_sft {

namespace {

// One document of the batch: its tokens in runs of equal mask. A token carries loss if it is to be predicted.
std::string describe_piece(const RunPlan& plan, const Piece& piece, const TextOfIds& text) {
  const Document& document = plan.train_data.document(piece.document);
  const auto carries_loss = [&](int64_t t) {
    return t > piece.begin && document.loss_mask[static_cast<size_t>(t)] != 0;
  };
  const int64_t end = piece.begin + piece.length;
  std::string out = fmt::format("  document {}, tokens {} to {} of {}\n", piece.document, piece.begin,
                                end - 1, document.ids.size());
  for (int64_t begin = piece.begin; begin < end;) {
    const bool loss = carries_loss(begin);
    int64_t stop = begin + 1;
    while (stop < end && carries_loss(stop) == loss) ++stop;
    const auto run = document.ids.subspan(static_cast<size_t>(begin), static_cast<size_t>(stop - begin));
    const std::vector<int64_t> ids(run.begin(), run.end());
    out += fmt::format("    {:<8} {:>5} tokens: {}\n", loss ? "loss" : "no loss", stop - begin, text(ids));
    begin = stop;
  }
  return out;
}

}  // namespace

void print_dry_run(const RunPlan& plan, const std::vector<std::string>& notes) {
  std::string out;
  for (const std::string& note : notes) out += "note: " + note + "\n";
  for (const std::string& note : plan.notes) out += "note: " + note + "\n";
  const TextOfIds text(plan.recipe.model.base_model);
  if (!text.notice().empty()) out += "note: " + text.notice() + "\n";
  out += "plan\n" + describe_plan(plan);
  if (const auto prompts = load_sample_prompts(plan); !prompts.empty()) {
    out += fmt::format("  {:<10} {} prompts of {}\n", "samples", prompts.size(),
                       plan.recipe.train.sample_prompts);
  }
  const std::vector<int64_t> first = plan.make_sampler().next_step().front();
  int64_t documents = 0;
  for (const int64_t sequence : first)
    documents += static_cast<int64_t>(plan.train.bins[static_cast<size_t>(sequence)].size());
  out += fmt::format("first micro-batch: {} tokens, {} of them targets, {} documents\n",
                     plan.train.tokens(first), plan.train.targets(first), documents);
  for (const int64_t sequence : first) {
    for (const int64_t piece : plan.train.bins[static_cast<size_t>(sequence)]) {
      out += describe_piece(plan, plan.train.plan.pieces[static_cast<size_t>(piece)], text);
    }
  }
  std::fwrite(out.data(), 1, out.size(), stdout);
}

}  // namespace topk_sft
