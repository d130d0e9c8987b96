set(CMAKE_C_STANDARD 17)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)

if(NOT CMAKE_BUILD_TYPE)
    set(CMAKE_BUILD_TYPE RelWithDebInfo)
endif()

option(LR_WERROR "Treat warnings as errors" ON)
set(LR_SANITIZE "" CACHE STRING "Sanitizers for everything, for example address,undefined or thread")

# Contraction off everywhere: a*b+c is two roundings unless the source says fma. See docs/segments-and-bits.md.
# These are for C alone; nvcc's are below.
function(lr_c_options)
    foreach(option ${ARGN})
        add_compile_options($<$<COMPILE_LANGUAGE:C>:${option}>)
    endforeach()
endfunction()
lr_c_options(-Wall -Wextra -Wshadow -Wconversion -Wvla -ffp-contract=off -fno-math-errno)
add_compile_definitions($<$<COMPILE_LANGUAGE:C>:_GNU_SOURCE>)
if(LR_WERROR)
    lr_c_options(-Werror)
endif()
if(LR_SANITIZE)
    # -g1: names and lines; following variables through instrumented kernels takes minutes
    lr_c_options(-fsanitize=${LR_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all -g1)
    add_link_options(-fsanitize=${LR_SANITIZE})
endif()

# CUDA: device code contracts (fma) as the compiler likes; what must not says so with __dmul_rn and friends. Options with
# commas go to the host compiler.
if(LR_CUDA)
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_EXTENSIONS ON)
    set(lr_cuda_host_warnings -Wall,-Wextra,-Wshadow)
    if(LR_WERROR)
        string(APPEND lr_cuda_host_warnings ,-Werror)
        add_compile_options($<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
    endif()
    add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${lr_cuda_host_warnings}>"
                        $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo>)
endif()

# One static library per folder; its public headers are included as "folder/file.h".
function(lr_library name)
    add_library(${name} STATIC ${ARGN})
    target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
endfunction()

# One cmocka program per test file: lr_test(kernels test_gemm.c lr_kernels ...)
function(lr_test folder source)
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
    target_link_libraries(${name} PRIVATE ${ARGN} PkgConfig::CMOCKA m)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
    target_compile_options(${name} PRIVATE -Wno-conversion)
    add_test(NAME ${folder}/${name} COMMAND ${name} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
    set_tests_properties(${folder}/${name} PROPERTIES LABELS ${folder} TIMEOUT 600)
endfunction()
