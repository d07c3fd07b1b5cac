// The topk_attention block of config.json: the contract's argument names, checked by the contract's rules.
#include <algorithm>
#include <set>

#include "io/error.h"
#include "model/config.h"
#include "model/json_reader.h"

namespace topk_sft {
namespace {
constexpr int64_t kBlockVersion = 1;
}

void check_sparsity(const SparsityConfig& sparsity, int64_t num_layers, const std::string& where) {
  if (sparsity.topk.has_value() == sparsity.ratio.has_value()) {
    fail("{}: exactly one of topk and ratio must be given, {}", where,
         sparsity.topk ? "both are" : "none is");
  }
  if (sparsity.topk && *sparsity.topk < 1)
    fail("{}: topk is {}: it must be at least 1", where, *sparsity.topk);
  if (sparsity.ratio && !(*sparsity.ratio > 0.0 && *sparsity.ratio <= 1.0)) {
    fail("{}: ratio is {}: it must be above 0 and at most 1", where, *sparsity.ratio);
  }
  if (sparsity.min_keys < 1) fail("{}: min_keys is {}: it must be at least 1", where, sparsity.min_keys);
  if (sparsity.max_keys && *sparsity.max_keys < sparsity.min_keys) {
    fail("{}: max_keys is {}: it must be at least min_keys, which is {}", where, *sparsity.max_keys,
         sparsity.min_keys);
  }
  if (sparsity.select != "head" && sparsity.select != "kv_group") {
    fail("{}: select is \"{}\": it must be \"head\" or \"kv_group\"", where, printable(sparsity.select));
  }
  if (sparsity.sink < 0) fail("{}: sink is {}: it must be at least 0", where, sparsity.sink);
  if (sparsity.recent < 0) fail("{}: recent is {}: it must be at least 0", where, sparsity.recent);
  std::set<int64_t> seen;
  for (const int64_t layer : sparsity.dense_layers) {
    if (layer < 0 || layer >= num_layers) {
      fail("{}: dense_layers has {}: the model has layers 0 to {}", where, layer, num_layers - 1);
    }
    if (!seen.insert(layer).second) fail("{}: dense_layers has {} twice", where, layer);
  }
}

OrderedJson sparsity_to_json(const SparsityConfig& sparsity) {
  const SparsityConfig defaults;
  OrderedJson json = {{"version", kBlockVersion}};
  if (sparsity.topk) json["topk"] = *sparsity.topk;
  if (sparsity.ratio) json["ratio"] = *sparsity.ratio;
  if (sparsity.min_keys != defaults.min_keys) json["min_keys"] = sparsity.min_keys;
  if (sparsity.max_keys) json["max_keys"] = *sparsity.max_keys;
  if (sparsity.select != defaults.select) json["select"] = sparsity.select;
  if (sparsity.sink != defaults.sink) json["sink"] = sparsity.sink;
  if (sparsity.recent != defaults.recent) json["recent"] = sparsity.recent;
  if (sparsity.deterministic != defaults.deterministic) json["deterministic"] = sparsity.deterministic;
  if (!sparsity.dense_layers.empty()) json["dense_layers"] = sparsity.dense_layers;
  if (sparsity.prefill_dense) json["prefill"] = "dense";
  return json;
}

SparsityConfig sparsity_from_json(const Json& json, int64_t num_layers, const std::string& where) {
  const JsonReader block(json, where, "topk_attention.");
  block.only({"version", "topk", "ratio", "min_keys", "max_keys", "select", "sink", "recent", "deterministic",
              "dense_layers", "prefill"});
  block.required_integer("version", kBlockVersion, kBlockVersion);
  SparsityConfig sparsity;
  sparsity.topk = block.integer("topk", 1, INT64_MAX);
  sparsity.ratio = block.number("ratio", 0.0, 1.0);
  sparsity.min_keys = block.integer("min_keys", 1, INT64_MAX).value_or(sparsity.min_keys);
  sparsity.max_keys = block.integer("max_keys", 1, INT64_MAX);
  sparsity.select = block.string("select").value_or(sparsity.select);
  sparsity.sink = block.integer("sink", 0, INT64_MAX).value_or(sparsity.sink);
  sparsity.recent = block.integer("recent", 0, INT64_MAX).value_or(sparsity.recent);
  sparsity.deterministic = block.boolean("deterministic").value_or(sparsity.deterministic);
  sparsity.dense_layers = block.integers("dense_layers", 0, INT64_MAX).value_or(sparsity.dense_layers);
  const std::string prefill = block.string("prefill").value_or("topk");
  if (prefill != "topk" && prefill != "dense") block.bad("prefill", "\"topk\" or \"dense\"");
  sparsity.prefill_dense = prefill == "dense";
  check_sparsity(sparsity, num_layers, where + ": topk_attention");
  return sparsity;
}

std::optional<SparsityConfig> own_sparsity(const ModelConfig& config, const std::string& where) {
  const bool named = config.attn_implementation == "topk_attn";
  if (config.topk_attention && !named) {
    fail(
        "{}: has topk_attention, but attn_implementation is {}, so transformers would run this model dense: "
        "set "
        "\"attn_implementation\": \"topk_attn\", or remove topk_attention",
        where,
        config.attn_implementation.empty() ? "absent" : '"' + printable(config.attn_implementation) + '"');
  }
  if (named && !config.topk_attention) {
    fail("{}: attn_implementation is \"topk_attn\", but topk_attention, which holds the budget, is absent",
         where);
  }
  return config.topk_attention;
}

}  // namespace topk_sft
