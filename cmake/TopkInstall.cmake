# Install rules of every target, in one place. Under the prefix (a site-packages folder) the package becomes
#
#   topk_attn/lib/libtopk_attn.so              the operators              component topk_ops
#   topk_attn/_C.<abi>.so, _build_info.py      the Python module          component topk_python
#   topk_attn/bin/topk-{sft,generate,parity}   the native programs      component topk_trainer
#   topk_attn/include/topk_attn/*.h            the C++ headers            component topk_devel
#   topk_attn/lib/cmake/topk_attn/*.cmake      find_package(topk_attn)    component topk_devel
#
# The targets inplace_python, inplace_trainer and inplace put the native files beside the Python sources, where
# PYTHONPATH=python finds them.
include(CMakePackageConfigHelpers)

set(_prefix topk_attn)
# The torch beside the installed package comes first; the torch of the build serves environments that keep torch in
# another folder (system site-packages, editable installs).
set(_torch_rpath "$ORIGIN/../../torch/lib" "${TOPK_TORCH_DIR}/lib")

set_target_properties(topk_attn PROPERTIES INSTALL_RPATH "${_torch_rpath}")
install(TARGETS topk_contract topk_attn EXPORT topk_attn-targets
  LIBRARY DESTINATION ${_prefix}/lib COMPONENT topk_ops
  INCLUDES DESTINATION ${_prefix}/include)

set(_programs)
foreach(_program topk-sft topk-generate topk-parity)
  if(TARGET ${_program})
    list(APPEND _programs ${_program})
    set_target_properties(${_program} PROPERTIES INSTALL_RPATH "$ORIGIN/../lib;${_torch_rpath}")
    install(TARGETS ${_program} RUNTIME DESTINATION ${_prefix}/bin COMPONENT topk_trainer)
  endif()
endforeach()

set(_cuda_archs "")  # the items of a Python tuple
if(TOPK_CUDA_ENABLED)
  foreach(_arch ${TOPK_CUDA_ARCHS})
    string(APPEND _cuda_archs "\"${_arch}\", ")
  endforeach()
  string(STRIP "${_cuda_archs}" _cuda_archs)
endif()
configure_file(${CMAKE_CURRENT_SOURCE_DIR}/cmake/_build_info.py.in ${CMAKE_CURRENT_BINARY_DIR}/_build_info.py @ONLY)
if(TARGET _C)
  set_target_properties(_C PROPERTIES INSTALL_RPATH "$ORIGIN/lib;$ORIGIN/../torch/lib;${TOPK_TORCH_DIR}/lib")
  install(TARGETS _C LIBRARY DESTINATION ${_prefix} COMPONENT topk_python)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build_info.py DESTINATION ${_prefix} COMPONENT topk_python)
endif()

# Shared libraries that came from the Python environment of the build, which may be gone at run time (TopkDeps.cmake).
get_property(_bundled GLOBAL PROPERTY TOPK_BUNDLED_LIBRARIES)
if(_programs)
  foreach(_library ${_bundled})
    install(FILES $<TARGET_FILE:${_library}> RENAME $<TARGET_SONAME_FILE_NAME:${_library}>
      DESTINATION ${_prefix}/lib COMPONENT topk_trainer)
  endforeach()
endif()

install(DIRECTORY csrc/include/topk_attn DESTINATION ${_prefix}/include COMPONENT topk_devel
  FILES_MATCHING PATTERN "*.h")
install(EXPORT topk_attn-targets NAMESPACE topk_attn:: DESTINATION ${_prefix}/lib/cmake/topk_attn COMPONENT topk_devel)
configure_package_config_file(cmake/topk_attn-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/topk_attn-config.cmake
  INSTALL_DESTINATION lib/cmake/topk_attn  # relative to the package: PACKAGE_PREFIX_DIR is topk_attn/
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/topk_attn-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/topk_attn-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/topk_attn-config-version.cmake
  cmake/TopkTorch.cmake DESTINATION ${_prefix}/lib/cmake/topk_attn COMPONENT topk_devel)

# topk_inplace(<target> COMPONENTS <component>... DEPENDS <target>...)
function(topk_inplace name)
  cmake_parse_arguments(PARSE_ARGV 1 _arg "" "" "COMPONENTS;DEPENDS")
  add_custom_target(${name} DEPENDS ${_arg_DEPENDS} COMMENT "Placing native files in python/topk_attn" VERBATIM)
  foreach(_component ${_arg_COMPONENTS})
    add_custom_command(TARGET ${name} POST_BUILD COMMAND "${CMAKE_COMMAND}" --install "${CMAKE_BINARY_DIR}" --prefix
      "${CMAKE_CURRENT_SOURCE_DIR}/python" --component ${_component} VERBATIM)
  endforeach()
endfunction()

add_custom_target(inplace)
# The library is placed by one target alone: two at a time would write the same file.
topk_inplace(inplace_ops COMPONENTS topk_ops DEPENDS topk_attn)
if(TARGET _C)
  topk_inplace(inplace_python COMPONENTS topk_python DEPENDS _C)
  add_dependencies(inplace_python inplace_ops)
  add_dependencies(inplace inplace_python)
endif()
if(_programs)
  topk_inplace(inplace_trainer COMPONENTS topk_trainer DEPENDS ${_programs})
  add_dependencies(inplace_trainer inplace_ops)
  add_dependencies(inplace inplace_trainer)
endif()
