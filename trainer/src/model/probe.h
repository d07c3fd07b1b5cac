// What attention looks like while a model trains: of a few query rows a layer, the entropy of the dense
// softmax over all visible keys, and the share of it that the kept keys hold.
//
// Cost: kRows rows of scores a layer, never a square; a probed step's forward pass takes R H T floats more.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "model/attention.h"
#include "topk_attn/topk_attn.h"

namespace topk_sft {

struct AttentionProbeResult {
  std::vector<double> entropy;    // a layer: in nats, the mean over rows and heads
  std::vector<double> kept_mass;  // a layer: from 0 to 1; empty without a budget
};

class AttentionProbe {
 public:
  static constexpr int64_t kRows = 16;

  // `budget`: how keys are selected, whether or not attention does; none: entropies only.
  explicit AttentionProbe(std::optional<topk_attn::Options> budget);

  // A forward pass over documents of these bounds begins: evenly spaced rows of it are looked at.
  void begin(const std::vector<int64_t>& bounds, int64_t layers, at::Device device);
  // The first call for a layer counts; recomputed layers call again.
  void record(int64_t layer, const at::Tensor& q, const at::Tensor& k);
  // Waits for the device.
  AttentionProbeResult result() const;

 private:
  // Visible keys of the sampled rows: [begin, end).
  struct Row {
    int64_t begin, end;
  };
  std::optional<topk_attn::Options> budget_;
  std::vector<Row> rows_;
  at::Tensor queries_;  // int64 (R): the rows' positions
  std::vector<at::Tensor> entropy_, kept_mass_;
};

// `attention`, whose heads the probe sees as `layer`.
std::shared_ptr<const PackedAttention> probed_attention(std::shared_ptr<const PackedAttention> attention,
                                                        std::shared_ptr<AttentionProbe> probe, int64_t layer);

}  // namespace topk_sft
