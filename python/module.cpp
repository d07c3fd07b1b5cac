// The Python module topk_attn._C. Linking libtopk_attn.so is its main job: importing it registers
// torch.ops.topk_attn.*. Besides that it exposes the budget rule and facts about the build; everything that
// an operator can do is left to the operator.
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "params.h"
#include "topk_attn/topk_attn.h"

namespace py = pybind11;

namespace {

// W for a row that sees n keys. The C++ function checks the budget; its c10::Error becomes a ValueError.
int64_t budget(int64_t n, std::optional<int64_t> topk, std::optional<double> ratio, int64_t min_keys,
               std::optional<int64_t> max_keys) {
  if (n < 0) throw py::value_error("n is " + std::to_string(n) + ": it must be >= 0");
  topk_attn::Options options;
  options.topk = topk;
  options.ratio = ratio;
  options.min_keys = min_keys;
  options.max_keys = max_keys;
  try {
    return topk_attn::budget(n, options);
  } catch (const c10::Error& error) {
    throw py::value_error(error.what_without_backtrace());
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = TOPK_VERSION;
  info["torch"] = TOPK_TORCH_VERSION;
  info["torch_cuda"] = TOPK_TORCH_CUDA;
  info["compiler"] = TOPK_COMPILER;
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  info["cpu_isa"] = topk_attn::cpu_isa();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of topk_attn: loads the operators, exposes the budget rule and build facts.";
  m.def("budget", &budget, py::arg("n"), py::kw_only(), py::arg("topk") = py::none(),
        py::arg("ratio") = py::none(), py::arg("min_keys") = 1, py::arg("max_keys") = py::none());
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return topk_attn::cpu_isa(); });
}
