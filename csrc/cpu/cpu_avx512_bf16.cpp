// The kernels for AVX-512 with what it has for bfloat16: conversion and dot products.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <new>
#include <type_traits>

#include "cpu/blocking.h"
#include "cpu/kernel_table.h"

// From here on, and not before: inline functions of the standard headers must stay compiled for any processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define BN_CPU_ISA avx512_bf16
#define BN_CPU_HAS_BFLOAT16_CONVERSION
#include "cpu/avx512_vectors.h"
#include "cpu/batch_norm_steps.h"
#include "cpu/kernel_table_definition.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
