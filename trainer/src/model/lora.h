// Low-rank adapters (LoRA, arXiv 2106.09685): a frozen map W learns W + alpha / rank * B A, with A (rank, in)
// and B (out, rank). Torch-free.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace topk_sft {

// The maps of a layer that can have an adapter, by the names they have in Hugging Face's models.
inline constexpr std::array kLoraTargets = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                            "gate_proj", "up_proj", "down_proj"};

struct LoraOptions {
  int64_t rank = 16;
  double alpha = 32.0;
  std::vector<std::string> targets;  // of kLoraTargets, without repeats
  double scaling() const { return alpha / static_cast<double>(rank); }
};

}  // namespace topk_sft
