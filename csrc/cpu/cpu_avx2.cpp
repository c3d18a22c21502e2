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

// ---- 16-bit elements: 8 of them in half a vector ----

BN_HOST_DEVICE F32 widen_bits(__m128i bits, float16) {
  return F32(_mm256_cvtph_ps(bits));
}
BN_HOST_DEVICE F32 widen_bits(__m128i bits, bfloat16) {
  return F32(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
}
BN_HOST_DEVICE __m128i narrow_bits(F32 a, float16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
}
// Packing takes 128 bits of each in turn.
BN_HOST_DEVICE __m256i pack_upper_halves(__m256i a, __m256i b) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
BN_HOST_DEVICE __m128i narrow_bits(F32 a, bfloat16) {
  const __m256i rounded = (__m256i)round_to_upper_half(a);
  return _mm256_castsi256_si128(pack_upper_halves(rounded, rounded));
}

template <class E>
BN_HOST_DEVICE F32 load_half_vector(const E* p) {
  return widen_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), E{});
}
BN_HOST_DEVICE F32 load(const float16* p) {
  return load_half_vector(p);
}
BN_HOST_DEVICE F32 load(const bfloat16* p) {
  return load_half_vector(p);
}
BN_HOST_DEVICE void store(float16* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bits(a, float16{}));
}
BN_HOST_DEVICE void store(bfloat16* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bits(a, bfloat16{}));
}
BN_HOST_DEVICE void store_two(bfloat16* p, F32 a, F32 b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      pack_upper_halves((__m256i)round_to_upper_half(a), (__m256i)round_to_upper_half(b)));
}
template <>
constexpr int stored_bytes<bfloat16> = 32;

// Even and odd elements are already the halves of lanes.
template <>
constexpr bool prefers_even_odd<bfloat16> = true;

BN_HOST_DEVICE void load_even_odd(const bfloat16* p, F32& even, F32& odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even.v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  odd.v = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
BN_HOST_DEVICE void store_even_odd(bfloat16* p, F32 even, F32 odd) {
  const __m256i low = _mm256_srli_epi32((__m256i)round_to_upper_half(even), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, (__m256i)round_to_upper_half(odd), 0xaa));
}
BN_HOST_DEVICE void to_even_odd(F32& a, F32& b) {
  const auto halves = [&](__m256 pairs) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8));
  };
  const __m256 even = _mm256_shuffle_ps(a.v, b.v, 0x88), odd = _mm256_shuffle_ps(a.v, b.v, 0xdd);
  a.v = halves(even);
  b.v = halves(odd);
}

// ---- Ends of runs ----

// Lanes of 4 or 8 bytes, of which the first `count` are set.
BN_HOST_DEVICE __m256i first_lanes(int64_t count, int64_t lane_bytes) {
  alignas(32) static constexpr int32_t set_then_clear[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(set_then_clear + 8 - count * lane_bytes / 4));
}

BN_HOST_DEVICE F32 load_first(const float* p, int64_t count, F32 rest) {
  const __m256i mask = first_lanes(count, 4);
  return F32(_mm256_blendv_ps(rest.v, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask)));
}
BN_HOST_DEVICE F64 load_first(const double* p, int64_t count, F64 rest) {
  const __m256i mask = first_lanes(count, 8);
  return F64(_mm256_blendv_pd(rest.v, _mm256_maskload_pd(p, mask), _mm256_castsi256_pd(mask)));
}

// Masked stores are slow on many processors, so that a vector is stored in shrinking pieces.
BN_HOST_DEVICE void store_first(float* p, int64_t count, F32 a) {
  __m128 piece = _mm256_castps256_ps128(a.v);
  if ((count & 4) != 0) {
    _mm_storeu_ps(p, piece);
    piece = _mm256_extractf128_ps(a.v, 1);
    p += 4;
  }
  if ((count & 2) != 0) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), piece);
    piece = _mm_movehl_ps(piece, piece);
    p += 2;
  }
  if ((count & 1) != 0) _mm_store_ss(p, piece);
}
BN_HOST_DEVICE void store_first(double* p, int64_t count, F64 a) {
  __m128d piece = _mm256_castpd256_pd128(a.v);
  if ((count & 2) != 0) {
    _mm_storeu_pd(p, piece);
    piece = _mm256_extractf128_pd(a.v, 1);
    p += 2;
  }
  if ((count & 1) != 0) _mm_store_sd(p, piece);
}

// Up to 4 elements of 16 bits in one word.
BN_HOST_DEVICE uint64_t load_word(const void* p, int64_t count) {
  const char* const bytes = static_cast<const char*>(p);
  if (count == 4) return read_as<uint64_t>(bytes);
  const uint64_t pair = (count & 2) != 0 ? read_as<uint32_t>(bytes) : 0;
  if ((count & 1) == 0) return pair;
  const uint64_t last = read_as<uint16_t>(bytes + 2 * (count - 1));
  return count == 3 ? pair | last << 32 : last;
}
BN_HOST_DEVICE void store_word(void* p, int64_t count, uint64_t word) {
  char* bytes = static_cast<char*>(p);
  if (count == 4) __builtin_memcpy(bytes, &word, 8);
  if ((count & 2) != 0) {
    __builtin_memcpy(bytes, &word, 4);
    bytes += 4;
    word >>= 32;
  }
  if ((count & 1) != 0) __builtin_memcpy(bytes, &word, 2);
}

template <class E>
BN_HOST_DEVICE F32 load_first(const E* p, int64_t count, F32 rest) {
  const int64_t low = count < 4 ? count : 4;
  const __m128i bits =
      _mm_set_epi64x(static_cast<int64_t>(load_word(p + low, count - low)), static_cast<int64_t>(load_word(p, low)));
  return F32(_mm256_blendv_ps(rest.v, widen_bits(bits, E{}).v, _mm256_castsi256_ps(first_lanes(count, 4))));
}
template <class E>
BN_HOST_DEVICE void store_first(E* p, int64_t count, F32 a) {
  const __m128i bits = narrow_bits(a, E{});
  const int64_t low = count < 4 ? count : 4;
  store_word(p, low, static_cast<uint64_t>(_mm_cvtsi128_si64(bits)));
  store_word(p + low, count - low, static_cast<uint64_t>(_mm_extract_epi64(bits, 1)));
}

}  // namespace batchnorm_ext::cpu::avx2

#include "cpu/batch_norm_steps.h"
#include "cpu/kernel_table_definition.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
