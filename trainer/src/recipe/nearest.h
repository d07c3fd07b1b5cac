// The valid name closest to a mistyped one. Torch-free.
#pragma once

#include <string>
#include <vector>

namespace topk_sft {

// Edits (insert, delete, replace, swap of neighbours) from `a` to `b`; letters are compared without case.
size_t edit_distance(const std::string& a, const std::string& b);

// The candidate with the smallest distance to `name`, the first of equals; empty if there is none.
std::string nearest_name(const std::string& name, const std::vector<std::string>& candidates);

}  // namespace topk_sft
