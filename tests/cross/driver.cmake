# The kernels in a program without Python, for instruction sets that this machine lacks; included
# by the project's CMakeLists.txt. See docs/sanitizers.md.

set(cross ${CMAKE_CURRENT_LIST_DIR})

# AVX-512 through SIMDe's portable intrinsics: the same sources, without the processor's.
foreach(set IN LISTS sets)
  get_target_property(options kernels_${set} COMPILE_OPTIONS)
  if(options MATCHES "-mavx512")
    list(TRANSFORM options REPLACE "^-mavx512" "-DEMULATE_")
    list(APPEND options -Wno-psabi -I${cross}/avx512 -include immintrin.h)
    set_target_properties(kernels_${set} PROPERTIES COMPILE_OPTIONS "${options}")
    set_source_files_properties(csrc/cpu/dispatch.cpp PROPERTIES COMPILE_OPTIONS
                                "-include;${cross}/every_set.h")
  endif()
endforeach()

add_executable(driver ${sources} ${cross}/driver.cpp)
target_include_directories(driver PRIVATE ${cross})
target_link_libraries(driver PRIVATE ${libraries})
if(NOT COMPRESS_SANITIZE)
  target_link_options(driver PRIVATE -static) # an emulator finds no libraries
endif()
