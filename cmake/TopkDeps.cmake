# Third-party C++ that is not torch's, as imported targets, from the system or from PyPI packages in the Python
# environment (which need no root): TopkDeps::yaml_cpp, TopkDeps::json, TopkDeps::catch2.
#
# topk_dep_yaml_cpp(), topk_dep_json() and topk_dep_catch2() make the target or stop with the one line that says
# which package to install. fmt and pybind11 come with torch's headers (TopkTorch.cmake) and are never looked up.

# Folders of the Python environment that PyPI's C++ packages install into: <site>/cmeel.prefix and the prefix itself.
function(_topk_python_prefixes out)
  if(NOT DEFINED CACHE{TOPK_PYTHON_PREFIXES})
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
              "import sys; print(';'.join([p + '/cmeel.prefix' for p in sys.path if p] + [sys.prefix]))"
      OUTPUT_VARIABLE _prefixes OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    set(TOPK_PYTHON_PREFIXES "${_prefixes}" CACHE INTERNAL "Where PyPI's C++ packages live")
  endif()
  set(${out} "$CACHE{TOPK_PYTHON_PREFIXES}" PARENT_SCOPE)
endfunction()

option(TOPK_STATIC_YAML_CPP "Link yaml-cpp into the programs, which then run on machines without it" OFF)

# yaml-cpp: the system's, else PyPI's cmeel-yaml-cpp, whose shared library then becomes part of the package. The target
# is `yaml-cpp` (0.7) or `yaml-cpp::yaml-cpp` (0.8). With TOPK_STATIC_YAML_CPP it is the archive of either.
function(topk_dep_yaml_cpp)
  if(TARGET TopkDeps::yaml_cpp)
    return()
  endif()
  find_package(yaml-cpp QUIET)
  if(NOT yaml-cpp_FOUND)
    _topk_python_prefixes(_prefixes)
    find_package(yaml-cpp QUIET PATHS ${_prefixes} NO_DEFAULT_PATH)
    set(_bundle TRUE)
  endif()
  if(NOT yaml-cpp_FOUND)
    message(FATAL_ERROR "yaml-cpp was not found: install the system package libyaml-cpp-dev, or, without root, "
                        "`${Python_EXECUTABLE} -m pip install cmeel-yaml-cpp`.")
  endif()
  message(STATUS "yaml-cpp ${yaml-cpp_VERSION}: ${yaml-cpp_DIR}")
  set(_target yaml-cpp)
  if(TARGET yaml-cpp::yaml-cpp)
    set(_target yaml-cpp::yaml-cpp)
  endif()
  # GLOBAL, so that the install rules may ask for its file.
  set_target_properties(${_target} PROPERTIES IMPORTED_GLOBAL TRUE)
  add_library(TopkDeps::yaml_cpp INTERFACE IMPORTED GLOBAL)
  if(TOPK_STATIC_YAML_CPP)
    # The packages name the shared library only; the archive lies beside the folder of their CMake files.
    find_library(TOPK_YAML_CPP_ARCHIVE libyaml-cpp.a PATHS "${yaml-cpp_DIR}/../.." NO_DEFAULT_PATH)
    if(NOT TOPK_YAML_CPP_ARCHIVE)
      message(FATAL_ERROR "TOPK_STATIC_YAML_CPP is ON, but there is no libyaml-cpp.a beside ${yaml-cpp_DIR}: install "
                          "the system package libyaml-cpp-dev.")
    endif()
    target_include_directories(TopkDeps::yaml_cpp SYSTEM INTERFACE
      $<TARGET_PROPERTY:${_target},INTERFACE_INCLUDE_DIRECTORIES>)
    target_link_libraries(TopkDeps::yaml_cpp INTERFACE "${TOPK_YAML_CPP_ARCHIVE}")
    return()
  endif()
  target_link_libraries(TopkDeps::yaml_cpp INTERFACE ${_target})
  get_target_property(_type ${_target} TYPE)
  if(_bundle AND _type STREQUAL "SHARED_LIBRARY")
    set_property(GLOBAL APPEND PROPERTY TOPK_BUNDLED_LIBRARIES ${_target})
  endif()
endfunction()

# nlohmann-json (headers only): the system's, else PyPI's nlohmann-json.
function(topk_dep_json)
  if(TARGET TopkDeps::json)
    return()
  endif()
  find_path(TOPK_JSON_INCLUDE_DIR nlohmann/json.hpp)
  if(NOT TOPK_JSON_INCLUDE_DIR)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
              "import importlib.metadata as m; d = m.distribution('nlohmann-json'); print(next(str(d.locate_file(f).resolve().parents[1]) for f in d.files if f.match('nlohmann/json.hpp')))"
      OUTPUT_VARIABLE _json OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(_json)
      set(TOPK_JSON_INCLUDE_DIR "${_json}" CACHE PATH "Folder that holds nlohmann/json.hpp" FORCE)
    endif()
  endif()
  if(NOT TOPK_JSON_INCLUDE_DIR)
    message(FATAL_ERROR "nlohmann/json.hpp was not found: install the system package nlohmann-json3-dev, or, without "
                        "root, `${Python_EXECUTABLE} -m pip install nlohmann-json`.")
  endif()
  message(STATUS "nlohmann-json: ${TOPK_JSON_INCLUDE_DIR}")
  add_library(TopkDeps::json INTERFACE IMPORTED GLOBAL)
  target_include_directories(TopkDeps::json SYSTEM INTERFACE "${TOPK_JSON_INCLUDE_DIR}")
endfunction()

# Catch2, 2 or 3, for the C++ tests: the system's only. tests/cpp/catch_shim.h hides which one it is.
function(topk_dep_catch2)
  if(TARGET TopkDeps::catch2)
    return()
  endif()
  find_package(Catch2 QUIET)
  if(NOT Catch2_FOUND)
    message(FATAL_ERROR "Catch2 was not found: install the system package catch2, or set -DTOPK_BUILD_TESTS=OFF.")
  endif()
  message(STATUS "Catch2 ${Catch2_VERSION}: ${Catch2_DIR}")
  add_library(TopkDeps::catch2 INTERFACE IMPORTED GLOBAL)
  target_link_libraries(TopkDeps::catch2 INTERFACE Catch2::Catch2)
endfunction()
