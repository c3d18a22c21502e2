// The kernels for AVX2 with FMA and F16C.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define BN_CPU_ISA avx2
#define BN_CPU_VECTOR_BYTES 32
#define BN_CPU_HAS_CONVERSIONS
#include "cpu/simd.h"

namespace batchnorm_ext::cpu::avx2 {

BN_HOST_DEVICE F32 multiply_add(F32 a, F32 b, F32 c) {
  return F32(_mm256_fmadd_ps(a.v, b.v, c.v));
}
BN_HOST_DEVICE F64 multiply_add(F64 a, F64 b, F64 c) {
  return F64(_mm256_fmadd_pd(a.v, b.v, c.v));
}

BN_HOST_DEVICE uint32_t to_bits(Flags<float> flags) {
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)flags.v));
}
BN_HOST_DEVICE uint32_t to_bits(Flags<double> flags) {
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)flags.v));
}

BN_HOST_DEVICE F32 load(const float16* p) {
  return F32(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
BN_HOST_DEVICE F32 load(const bfloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return F32(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
BN_HOST_DEVICE void store(float16* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace batchnorm_ext::cpu::avx2

#include "cpu/batch_norm_steps.h"
#include "cpu/kernel_table_definition.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
