// The kernels for any processor: 16-byte vectors of the compiler, SSE2 on x86-64.
#include <cmath>
#include <cstdint>
#include <new>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/kernel_table.h"

#define BN_CPU_ISA baseline
#define BN_CPU_VECTOR_BYTES 16
#include "cpu/batch_norm_steps.h"
#include "cpu/kernel_table_definition.h"
