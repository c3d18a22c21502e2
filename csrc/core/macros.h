// Function qualifiers that let one header serve the host compilers and nvcc.
#pragma once

#if defined(__CUDACC__)
#define BN_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define BN_HOST_DEVICE __forceinline
#else
#define BN_HOST_DEVICE inline __attribute__((always_inline))
#endif
