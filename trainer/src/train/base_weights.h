// Which weights an adapter belongs to.
#pragma once

#include <string>

namespace topk_sft {

// The names, sizes and contents of the *.safetensors files of a folder as 64 hex digits: SHA-256 of the
// SHA-256 of pieces, so that all cores share the work.
std::string weights_fingerprint(const std::string& folder);

}  // namespace topk_sft
