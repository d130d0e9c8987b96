# Third parties, and where each may appear: see ARCHITECTURE.md.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(MPI REQUIRED COMPONENTS C)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson>=2.10)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8>=10.30)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
if(BUILD_TESTING)
    pkg_check_modules(CMOCKA REQUIRED IMPORTED_TARGET cmocka)
endif()

# CUDA needs nvcc, not a GPU. nvcc is looked for in the PATH and where NVIDIA's packages put it. Kernels that need no
# Hopper instruction are compiled for LR_CUDA_ARCHITECTURES: sm_80 for every Ampere and Ada, compute_80 for what comes
# after Hopper (the driver compiles it when it is first loaded), sm_90a beside the Hopper kernels.
option(LR_CUDA "Build the CUDA backend (kernels/cuda)" OFF)
if(LR_CUDA)
    set(LR_CUDA_ARCHITECTURES "80;90a-real" CACHE STRING "Architectures of the portable CUDA kernels; add e.g. 100-real")
    find_program(LR_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin REQUIRED)
    set(CMAKE_CUDA_COMPILER ${LR_NVCC})
    set(CMAKE_CUDA_ARCHITECTURES ${LR_CUDA_ARCHITECTURES})
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
endif()
