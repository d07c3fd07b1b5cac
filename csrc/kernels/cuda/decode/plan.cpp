#include "plan.h"

#include "certified.h"

namespace topk_attn::cuda::decode {

const char* name_of(Scan scan) {
  return scan == Scan::kExact ? "exact" : "certified";
}

DecodePlan plan(const DecodeCall& c, bool codes, int arch, const DecodeWish& wish) {
  DecodePlan p;
  if (!wish.scan.empty() && wish.scan != "exact" && wish.scan != "certified") {
    p.problem = "scan must be 'exact' or 'certified', got '" + wish.scan + "'";
    return p;
  }
  if (wish.scan == "exact") {
    p.reason = "asked for";
    return p;
  }
  const std::string missing = codes ? no_certified(c, largest_slab(c), arch) : "it needs key_codes";
  if (wish.scan == "certified") {
    if (missing.empty()) {
      p.scan = Scan::kCertified;
      p.reason = "asked for";
    } else {
      p.problem = "scan 'certified' cannot serve the call: " + missing;
    }
    return p;
  }
  const int64_t keys = int64_t{c.batch} * c.kv_heads * c.capacity;
  if (!missing.empty()) {
    p.reason = "the certified scan cannot serve the call: " + missing;
  } else if (c.capacity <= kShortKeys || keys < kCertifiedLeastKeys) {
    p.reason = "the certified scan is not faster where caches have room for up to " +
               std::to_string(kShortKeys) + " positions, or all of them and their KV heads for less than " +
               std::to_string(kCertifiedLeastKeys) + " keys, got " + std::to_string(c.capacity) + " and " +
               std::to_string(keys);
  } else if (c.kept_width * 100 > int64_t{kCertifiedPercent} * c.capacity) {
    p.reason = "the certified scan is not faster where more than " + std::to_string(kCertifiedPercent) +
               " % of the keys are kept, got W = " + std::to_string(c.kept_width) + " of " +
               std::to_string(c.capacity);
  } else {
    p.scan = Scan::kCertified;
    p.reason = "it reads half the bytes";
  }
  return p;
}

}  // namespace topk_attn::cuda::decode
