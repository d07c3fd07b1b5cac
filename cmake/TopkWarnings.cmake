# topk_target_defaults(<target>): the warnings and sanitizers that every target of ours is built with. Only the C++
# files of a target are meant: nvcc has its own words for all of this (topk_cuda_defaults).
function(topk_target_defaults target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall$<SEMICOLON>-Wextra>)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # False positives of GCC 12 on std::string's operator+ (GCC bug 105651).
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
  endif()
  if(TOPK_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
  if(TOPK_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${TOPK_SANITIZE} -fno-omit-frame-pointer -g)
    target_link_options(${target} PRIVATE -fsanitize=${TOPK_SANITIZE})
  endif()
endfunction()
