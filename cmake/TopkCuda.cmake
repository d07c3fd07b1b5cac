# Decides whether this build has CUDA kernels and, if so, enables the CUDA language. Nothing else here asks for CUDA:
# a machine without a CUDA toolkit builds everything but the kernels.
#
# In: TOPK_CUDA (AUTO, ON, OFF), the lists below, TOPK_TORCH_CUDA (TopkTorch.cmake). Out: TOPK_CUDA_ENABLED; when true
# also TOPK_CUDA_VERSION (nvcc's, 13.0), TOPK_CUDA_PORTABLE_ARCHS (CUDA_ARCHITECTURES of the kernels that every GPU
# since sm_80 runs), TOPK_CUDA_SM90 (whether the sm_90a kernels are built) and the functions of the last part.
set(TOPK_CUDA AUTO CACHE STRING "CUDA kernels: AUTO (if torch has CUDA and a matching nvcc is found), ON or OFF")
set_property(CACHE TOPK_CUDA PROPERTY STRINGS AUTO ON OFF)
set(TOPK_CUDA_ARCHS "80;90a" CACHE STRING "GPUs to build for, of 80;86;90a; 8.9 runs the code of 80, newer ones the PTX of the lowest")
set(TOPK_CUDA_DTYPES "bf16;fp16" CACHE STRING "16-bit types of the tensor-core kernels: bf16, fp16 or both")
set(TOPK_CUDA_HEAD_DIMS "64;128;256" CACHE STRING "Head dims of the tensor-core kernels; others are padded to the next")

set(TOPK_CUDA_ENABLED FALSE)
set(TOPK_CUDA_VERSION "")
set(TOPK_CUDA_SM90 FALSE)

# nvcc of the CUDA major version `major`: the one that is named by CMAKE_CUDA_COMPILER or CUDACXX, else the first that
# fits in PATH, CUDA_HOME, CUDA_PATH and the usual folders. Sets <out>, <out>_VERSION and, when none fits, <out>_PROBLEM.
function(_topk_find_nvcc out major)
  set(_candidates)
  if(CMAKE_CUDA_COMPILER)
    set(_candidates "${CMAKE_CUDA_COMPILER}")
  elseif(DEFINED ENV{CUDACXX})
    set(_candidates "$ENV{CUDACXX}")
  else()
    file(TO_CMAKE_PATH "$ENV{PATH}" _folders)
    foreach(_root "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}" /usr/local/cuda /usr/local/cuda-${major} /opt/cuda)
      list(APPEND _folders "${_root}/bin")
    endforeach()
    foreach(_folder ${_folders})
      if(EXISTS "${_folder}/nvcc")
        list(APPEND _candidates "${_folder}/nvcc")
      endif()
    endforeach()
  endif()
  set(_problem "no nvcc was found: install the CUDA ${major} toolkit, or name its nvcc by CUDACXX")
  set(_nvcc "")
  set(_version "")
  foreach(_candidate ${_candidates})
    execute_process(COMMAND "${_candidate}" --version OUTPUT_VARIABLE _text ERROR_QUIET RESULT_VARIABLE _rc)
    if(NOT _rc EQUAL 0 OR NOT _text MATCHES "release ([0-9]+)\\.([0-9]+)")
      set(_problem "'${_candidate}' is not a working nvcc")
      continue()
    endif()
    set(_version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    if(CMAKE_MATCH_1 STREQUAL major)
      set(_nvcc "${_candidate}")
      break()
    endif()
    set(_problem "'${_candidate}' is of CUDA ${_version}, but torch was built with CUDA ${TOPK_TORCH_CUDA}: the major versions must be equal; name another nvcc by CUDACXX")
  endforeach()
  set(${out} "${_nvcc}" PARENT_SCOPE)
  set(${out}_VERSION "${_version}" PARENT_SCOPE)
  set(${out}_PROBLEM "${_problem}" PARENT_SCOPE)
endfunction()

# --- the decision -----------------------------------------------------------------------------------------------------
string(TOUPPER "${TOPK_CUDA}" _mode)
if(_mode MATCHES "^(1|YES|TRUE)$")
  set(_mode ON)
elseif(_mode MATCHES "^(0|NO|FALSE)$")
  set(_mode OFF)
elseif(NOT _mode MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TOPK_CUDA is '${TOPK_CUDA}': it must be AUTO, ON or OFF.")
endif()

set(_reason "")
if(_mode STREQUAL "OFF")
  set(_reason "asked for")
elseif(NOT TOPK_TORCH_CUDA)
  set(_reason "torch ${TOPK_TORCH_VERSION} in '${TOPK_TORCH_DIR}' was built without CUDA")
elseif(TOPK_SANITIZE)
  set(_reason "TOPK_SANITIZE is for builds without CUDA")
else()
  string(REGEX MATCH "^[0-9]+" _major "${TOPK_TORCH_CUDA}")
  _topk_find_nvcc(_nvcc "${_major}")
  if(NOT _nvcc)
    set(_reason "${_nvcc_PROBLEM}")
  endif()
endif()
if(_reason AND _mode STREQUAL "ON")
  message(FATAL_ERROR "TOPK_CUDA is ON, but ${_reason}.")
elseif(_reason)
  message(STATUS "CUDA kernels: off (TOPK_CUDA=${_mode}: ${_reason})")
  return()
endif()

# --- what is built ----------------------------------------------------------------------------------------------------
# _topk_check_list(<variable> <regular expression of an item> <what it must hold>)
function(_topk_check_list variable pattern rule)
  if(NOT ${variable})
    message(FATAL_ERROR "${variable} is empty: it must hold ${rule}.")
  endif()
  foreach(_item ${${variable}})
    if(NOT _item MATCHES "^(${pattern})$")
      message(FATAL_ERROR "${variable} holds '${_item}': it must hold ${rule}.")
    endif()
  endforeach()
endfunction()
_topk_check_list(TOPK_CUDA_ARCHS "[89][0-9]a?|1[0-9][0-9][af]?" "GPU architectures of at least 80, e.g. 80;90a")
_topk_check_list(TOPK_CUDA_DTYPES "bf16|fp16" "bf16, fp16 or both")
_topk_check_list(TOPK_CUDA_HEAD_DIMS "64|128|256" "some of 64, 128, 256")

# The portable kernels: machine code for each architecture in the list and PTX of the lowest for those that are not.
string(REGEX REPLACE "[af]" "" _plain_archs "${TOPK_CUDA_ARCHS}")
list(REMOVE_DUPLICATES _plain_archs)
list(SORT _plain_archs COMPARE NATURAL)
list(GET _plain_archs 0 _lowest)
list(TRANSFORM _plain_archs APPEND "-real" OUTPUT_VARIABLE TOPK_CUDA_PORTABLE_ARCHS)
list(APPEND TOPK_CUDA_PORTABLE_ARCHS "${_lowest}-virtual")
if("90a" IN_LIST TOPK_CUDA_ARCHS)
  set(TOPK_CUDA_SM90 TRUE)
endif()

set(TOPK_CUDA_ENABLED TRUE)
set(TOPK_CUDA_VERSION "${_nvcc_VERSION}")
set(CMAKE_CUDA_COMPILER "${_nvcc}" CACHE FILEPATH "nvcc")
# Every target sets its own; this one is for CMake's check of the compiler, whose default nvcc 13 no longer knows.
set(CMAKE_CUDA_ARCHITECTURES "${_lowest}")
# The C++ compiler is also nvcc's, unless another is named.
if(NOT CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}" CACHE FILEPATH "C++ compiler that nvcc calls")
endif()
# Left unset, both would be taken from C++, and CMake 3.25 would refuse: see topk_cuda_defaults.
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED OFF)
# The static runtime (CMake's default, said aloud): nothing here is linked against the driver, so a build with CUDA
# loads where there is none.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
if(CMAKE_CXX_COMPILER_LAUNCHER AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${CMAKE_CXX_COMPILER_LAUNCHER}")
endif()
enable_language(CUDA)
string(REPLACE ";" ", " _archs "${TOPK_CUDA_ARCHS}")
string(REPLACE ";" ", " _dtypes "${TOPK_CUDA_DTYPES}")
string(REPLACE ";" ", " _dims "${TOPK_CUDA_HEAD_DIMS}")
message(STATUS "CUDA kernels: on (TOPK_CUDA=${_mode}: torch has CUDA ${TOPK_TORCH_CUDA}, ${CMAKE_CUDA_COMPILER} is "
               "${TOPK_CUDA_VERSION}); architectures ${_archs}; ${_dtypes}; head dims ${_dims}")

# --- functions --------------------------------------------------------------------------------------------------------
# topk_cuda_defaults(<target>): what every target with .cu files is built with. C++20 is asked for by hand too: CMake
# 3.25 knows no such flag for nvcc 13 and adds none. Register spills are errors.
function(topk_cuda_defaults target)
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;-lineinfo;-Xptxas=-warn-spills,-Werror;-Xcompiler=-Wall,-Wextra>")
  if(TOPK_WERROR)
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>")
  endif()
  target_include_directories(${target} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  topk_target_defaults(${target})
endfunction()

# topk_cuda_instances(<target> <header.cuh> <instantiation>... [NAME <name>] [DTYPES <dtype>...] [HEAD_DIMS <dim>...])
#
# Adds to the target, for each 16-bit type and head dim of the build (of those named, if any are), one source in the
# build folder that includes the header (relative to csrc/kernels/cuda) and instantiates, inside namespace
# topk_attn::cuda, each <instantiation>, in which @T@ is the C++ type and @D@ the head dim, without the semicolon. NAME
# tells several calls for one header apart (default: the header's own name).
#
#   topk_cuda_instances(topk_kernels_cuda portable/forward.cuh
#     "template cudaError_t forward_instance<@T@, @D@>(const ForwardCall&, cudaStream_t)")
function(topk_cuda_instances target header)
  cmake_parse_arguments(PARSE_ARGV 2 _arg "" "NAME" "DTYPES;HEAD_DIMS")
  set(_type_bf16 __nv_bfloat16)
  set(_type_fp16 __half)
  foreach(_list DTYPES HEAD_DIMS)
    if(NOT _arg_${_list})
      set(_arg_${_list} ${TOPK_CUDA_${_list}})
    endif()
  endforeach()
  if(NOT _arg_NAME)
    string(REGEX REPLACE "\\.cuh$" "" _arg_NAME "${header}")
  endif()
  list(TRANSFORM _arg_UNPARSED_ARGUMENTS APPEND "\;")
  list(JOIN _arg_UNPARSED_ARGUMENTS "\n" _lines)
  foreach(_dtype ${TOPK_CUDA_DTYPES})
    foreach(_dim ${TOPK_CUDA_HEAD_DIMS})
      if(_dtype IN_LIST _arg_DTYPES AND _dim IN_LIST _arg_HEAD_DIMS)
        string(REPLACE "@T@" "${_type_${_dtype}}" TOPK_INSTANTIATIONS "${_lines}")
        string(REPLACE "@D@" "${_dim}" TOPK_INSTANTIATIONS "${TOPK_INSTANTIATIONS}")
        set(TOPK_HEADER "cuda/${header}")
        set(_file "${CMAKE_CURRENT_BINARY_DIR}/instances/${_arg_NAME}_${_dtype}_${_dim}.cu")
        configure_file("${PROJECT_SOURCE_DIR}/cmake/cuda_instance.cu.in" "${_file}" @ONLY)
        target_sources(${target} PRIVATE "${_file}")
      endif()
    endforeach()
  endforeach()
endfunction()
