// KVCache as a torch class: torch.classes.topk_attn.KVCache in Python, without a Python symbol in this
// library. python/topk_attn/kv_cache.py is its face there.

#include <torch/custom_class.h>
#include <torch/library.h>

#include "topk_attn/kv_cache.h"

namespace topk_attn {
namespace {

using at::Tensor;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct KVCacheClass : torch::CustomClassHolder {
  KVCacheClass(const Tensor& k_pages, const Tensor& v_pages, int64_t max_length, bool key_codes)
      : cache(k_pages, v_pages, max_length, key_codes) {}

  KVCache cache;
};

using Self = c10::intrusive_ptr<KVCacheClass>;

// The settings of an attention call, one by one in the class's methods.
struct Settings {
  std::optional<int64_t> topk;
  std::optional<double> ratio;
  int64_t min_keys;
  std::optional<int64_t> max_keys;
  std::string select;
  int64_t sink;
  int64_t recent;
  std::optional<double> softmax_scale;
  bool causal;

  Options options() const {
    Options o;
    o.causal = causal;
    o.topk = topk;
    o.ratio = ratio;
    o.min_keys = min_keys;
    o.max_keys = max_keys;
    o.select = select;
    o.sink = sink;
    o.recent = recent;
    o.softmax_scale = softmax_scale;
    return o;
  }
};

Results results(const CacheAttention& a) {
  return {a.out, a.lse, a.indices, a.slots, a.threshold, a.tie_index};
}

Results append_and_attend(const Self& self, int64_t layer, const Tensor& q, const Tensor& k, const Tensor& v,
                          const std::optional<Tensor>& cache_leftpad, bool return_indices,
                          std::optional<int64_t> topk, std::optional<double> ratio, int64_t min_keys,
                          std::optional<int64_t> max_keys, const std::string& select, int64_t sink,
                          int64_t recent, std::optional<double> softmax_scale, bool causal) {
  const Settings s{topk, ratio, min_keys, max_keys, select, sink, recent, softmax_scale, causal};
  return results(self->cache.append_and_attend(layer, q, k, v, s.options(), cache_leftpad, return_indices));
}

Results attend(const Self& self, int64_t layer, const Tensor& q, const std::optional<Tensor>& cache_leftpad,
               bool return_indices, std::optional<int64_t> topk, std::optional<double> ratio,
               int64_t min_keys, std::optional<int64_t> max_keys, const std::string& select, int64_t sink,
               int64_t recent, std::optional<double> softmax_scale, bool causal) {
  const Settings s{topk, ratio, min_keys, max_keys, select, sink, recent, softmax_scale, causal};
  return results(self->cache.attend(layer, q, s.options(), cache_leftpad, return_indices));
}

std::vector<int64_t> memory(const Self& self) {
  const KVCacheMemory m = self->cache.memory();
  return {m.k_bytes,    m.v_bytes,      m.code_bytes, m.table_bytes, m.pages,
          m.used_pages, m.shared_pages, m.free_pages, m.sequences,   m.tokens};
}

TORCH_LIBRARY_FRAGMENT(topk_attn, m) {
  using Handles = std::vector<int64_t>;
  m.class_<KVCacheClass>("KVCache")
      .def(torch::init<const Tensor&, const Tensor&, int64_t, bool>())
      .def("max_length", [](const Self& self) { return self->cache.max_length(); })
      .def("add", [](const Self& self) { return self->cache.add(); })
      .def("fork", [](const Self& self, int64_t sequence,
                      int64_t length) { return self->cache.fork(sequence, length); })
      .def("truncate",
           [](const Self& self, int64_t sequence, int64_t length) { self->cache.truncate(sequence, length); })
      .def("remove", [](const Self& self, int64_t sequence) { self->cache.remove(sequence); })
      .def("clear", [](const Self& self) { self->cache.clear(); })
      .def("reorder", [](const Self& self, const Handles& sequences,
                         const Handles& order) { self->cache.reorder(sequences, order); })
      .def("length", [](const Self& self, int64_t sequence) { return self->cache.length(sequence); })
      .def("sequences", [](const Self& self) { return self->cache.pool().handles(); })
      .def("pages_of",
           [](const Self& self, int64_t sequence) {
             const std::vector<int32_t>& pages = self->cache.pool().table(sequence);
             return Handles(pages.begin(), pages.end());
           })
      .def("reserve", [](const Self& self, const Handles& sequences,
                         int64_t rows) { self->cache.reserve(sequences, rows); })
      .def("batch", [](const Self& self) { return self->cache.batch(); })
      .def("reserved_rows", [](const Self& self) { return self->cache.reserved_rows(); })
      .def("block_table", [](const Self& self) { return self->cache.block_table(); })
      .def("lengths", [](const Self& self) { return self->cache.lengths(); })
      .def("append_and_attend", &append_and_attend)
      .def("attend", &attend)
      .def("append", [](const Self& self, int64_t layer, const Tensor& k,
                        const Tensor& v) { self->cache.append(layer, k, v); })
      .def("advance",
           [](const Self& self, int64_t rows, bool on_device) { self->cache.advance(rows, on_device); })
      .def("key_codes", [](const Self& self, int64_t layer) { return self->cache.key_codes(layer); })
      .def("calibrate", [](const Self& self) { self->cache.calibrate(); })
      .def("k_pages", [](const Self& self, int64_t layer) { return self->cache.k_pages(layer); })
      .def("v_pages", [](const Self& self, int64_t layer) { return self->cache.v_pages(layer); })
      .def("rows",
           [](const Self& self, int64_t layer, int64_t length) {
             auto [k, v] = self->cache.rows(layer, length);
             return std::tuple<Tensor, Tensor>(k, v);
           })
      .def("check", [](const Self& self) { self->cache.pool().check(); })
      .def("memory", &memory);
}

}  // namespace
}  // namespace topk_attn
