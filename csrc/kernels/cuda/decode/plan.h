// Which scan serves a decode call: one pure function of the call, the GPU and what the user asked for.
//
//   exact      reads K (docs/decode.md, "The steps")
//   certified  reads the int8 codes of K (certified.h); needs them
//
// Both keep the same sets. A scan that was asked for is not replaced: the plan then fails with the reason.
// Lengths are on the device, so the room of the cache stands for them: W / n is that of a full cache.
#pragma once

#include <string>

#include "params.h"

namespace topk_attn::cuda::decode {

enum class Scan { kExact, kCertified };
const char* name_of(Scan scan);

// Where the certified scan was faster on an H100 (docs/decode.md): share of the keys that are kept, since
// what survives is read twice; and keys of all sequences and KV heads, since it has more launches.
inline constexpr int kCertifiedPercent = 6;
inline constexpr int64_t kCertifiedLeastKeys = int64_t{1} << 19;

// What the user asked for.
struct DecodeWish {
  std::string scan;       // exact or certified; empty: no wish
  int32_t list_room = 0;  // entries that a row's list has at most, for tests of the fallback; 0: as it is
};

struct DecodePlan {
  std::string problem;  // not empty: the request cannot be served, and why; the rest is then meaningless
  Scan scan = Scan::kExact;
  std::string reason;
};

// `arch`: compute capability, 10 * major + minor. `codes`: whether the call has key codes.
DecodePlan plan(const DecodeCall& call, bool codes, int arch, const DecodeWish& wish);

}  // namespace topk_attn::cuda::decode
