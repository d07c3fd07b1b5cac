# Imported targets for the user's torch: TopkTorch::torch (C++ API), TopkTorch::torch_cuda (its CUDA side, where torch has
# one; the headers of the CUDA toolkit are left to the caller) and TopkTorch::torch_python (Python modules).
# Also installed beside topk_attn-config.cmake, which includes it for projects that use find_package(topk_attn).
#
# find_package(Torch) is not used: with PyPI's torch it demands a CUDA toolkit even for CPU builds and chooses
# architectures by itself. In: TOPK_TORCH_DIR, the folder of the torch package (or of a LibTorch archive); when it is
# empty Python_EXECUTABLE is asked. Out: TOPK_TORCH_DIR, TOPK_TORCH_VERSION (2.11.0), TOPK_TORCH_MINOR (2.11) and
# TOPK_TORCH_CUDA (13.0, empty for a CPU-only torch); or TOPK_TORCH_PROBLEM, a sentence, and no targets.

set(TOPK_TORCH_PROBLEM "")
if(NOT TOPK_TORCH_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; s = u.find_spec('torch'); print((s.submodule_search_locations or [''])[0] if s else '')"
    OUTPUT_VARIABLE TOPK_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _topk_rc)
  if(_topk_rc OR NOT TOPK_TORCH_DIR)
    set(TOPK_TORCH_PROBLEM "torch was not found by '${Python_EXECUTABLE}': install torch >= 2.11 in that environment, or pass -DTOPK_TORCH_DIR=<folder of the torch package>.")
    return()
  endif()
endif()
if(NOT EXISTS "${TOPK_TORCH_DIR}/lib/libtorch_cpu.so" OR NOT EXISTS "${TOPK_TORCH_DIR}/include/ATen/core/Tensor.h")
  set(TOPK_TORCH_PROBLEM "TOPK_TORCH_DIR is '${TOPK_TORCH_DIR}', which is not a torch package: it must hold lib/libtorch_cpu.so and include/ATen.")
  return()
endif()

# version.py is the Python package's, build-version the LibTorch archive's.
set(_topk_version_line "")
set(_topk_cuda_line "")
if(EXISTS "${TOPK_TORCH_DIR}/version.py")
  file(STRINGS "${TOPK_TORCH_DIR}/version.py" _topk_version_line REGEX "^__version__")
  file(STRINGS "${TOPK_TORCH_DIR}/version.py" _topk_cuda_line REGEX "^cuda")
elseif(EXISTS "${TOPK_TORCH_DIR}/build-version")
  file(STRINGS "${TOPK_TORCH_DIR}/build-version" _topk_version_line)
  string(REGEX MATCH "\\+cu[0-9]+" _topk_cuda_line "${_topk_version_line}")
  string(REGEX REPLACE "\\+cu([0-9]+)([0-9])$" "\\1.\\2" _topk_cuda_line "${_topk_cuda_line}")
endif()
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" TOPK_TORCH_VERSION "${_topk_version_line}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" TOPK_TORCH_MINOR "${TOPK_TORCH_VERSION}")
string(REGEX MATCH "[0-9]+\\.[0-9]+" TOPK_TORCH_CUDA "${_topk_cuda_line}")
if(NOT TOPK_TORCH_VERSION OR TOPK_TORCH_VERSION VERSION_LESS 2.11)
  set(TOPK_TORCH_PROBLEM "torch in '${TOPK_TORCH_DIR}' is version '${TOPK_TORCH_VERSION}': it must be >= 2.11.")
  return()
endif()

if(NOT TARGET TopkTorch::torch)
  message(STATUS "torch ${TOPK_TORCH_VERSION} (CUDA: ${TOPK_TORCH_CUDA}): ${TOPK_TORCH_DIR}")
  add_library(TopkTorch::torch INTERFACE IMPORTED)
  set_target_properties(TopkTorch::torch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${TOPK_TORCH_DIR}/include;${TOPK_TORCH_DIR}/include/torch/csrc/api/include"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${TOPK_TORCH_DIR}/include;${TOPK_TORCH_DIR}/include/torch/csrc/api/include"
    # FMT_HEADER_ONLY: fmt is the copy among torch's headers; a system libfmt of another version must not be linked.
    INTERFACE_COMPILE_DEFINITIONS "USE_DISTRIBUTED;_GLIBCXX_USE_CXX11_ABI=1;FMT_HEADER_ONLY"
    INTERFACE_LINK_LIBRARIES
      "${TOPK_TORCH_DIR}/lib/libtorch.so;${TOPK_TORCH_DIR}/lib/libtorch_cpu.so;${TOPK_TORCH_DIR}/lib/libc10.so"
    # libtorch's operators and devices register themselves: --no-as-needed keeps the libraries linked. PyPI's libtorch
    # exports a std::filesystem of another libstdc++, which crashes (remove_all); -lstdc++ before it keeps ours first.
    INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed,-lstdc++,-rpath-link,${TOPK_TORCH_DIR}/lib")

  if(TOPK_TORCH_CUDA)
    add_library(TopkTorch::torch_cuda INTERFACE IMPORTED)
    set_target_properties(TopkTorch::torch_cuda PROPERTIES
      INTERFACE_LINK_LIBRARIES
        "${TOPK_TORCH_DIR}/lib/libtorch_cuda.so;${TOPK_TORCH_DIR}/lib/libc10_cuda.so;TopkTorch::torch")
  endif()

  add_library(TopkTorch::torch_python INTERFACE IMPORTED)
  set_target_properties(TopkTorch::torch_python PROPERTIES
    INTERFACE_LINK_LIBRARIES "${TOPK_TORCH_DIR}/lib/libtorch_python.so;TopkTorch::torch")
endif()
