// What AVX-512 does better than the compiler's vectors: fused multiply-add, conversions and masked ends of runs; with
// BN_CPU_HAS_BFLOAT16_CONVERSION, bfloat16 by its own conversion and dot products.
#pragma once

#define BN_CPU_VECTOR_BYTES 64
#define BN_CPU_HAS_CONVERSIONS
#define BN_CPU_HAS_MASKS
#include "cpu/simd.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

BN_HOST_DEVICE F32 multiply_add(F32 a, F32 b, F32 c) {
  return F32(_mm512_fmadd_ps(a.v, b.v, c.v));
}
BN_HOST_DEVICE F64 multiply_add(F64 a, F64 b, F64 c) {
  return F64(_mm512_fmadd_pd(a.v, b.v, c.v));
}

template <class A>
struct Flags;
template <>
struct Flags<float> {
  __mmask16 v;
};
template <>
struct Flags<double> {
  __mmask8 v;
};

BN_HOST_DEVICE Flags<float> less_equal(F32 a, F32 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
}
BN_HOST_DEVICE Flags<double> less_equal(F64 a, F64 b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)};
}
BN_HOST_DEVICE F32 select(Flags<float> flags, F32 yes, F32 no) {
  return F32(_mm512_mask_blend_ps(flags.v, no.v, yes.v));
}
BN_HOST_DEVICE F64 select(Flags<double> flags, F64 yes, F64 no) {
  return F64(_mm512_mask_blend_pd(flags.v, no.v, yes.v));
}
BN_HOST_DEVICE uint32_t to_bits(Flags<float> flags) {
  return flags.v;
}
BN_HOST_DEVICE uint32_t to_bits(Flags<double> flags) {
  return flags.v;
}
BN_HOST_DEVICE void from_bits(uint32_t bits, Flags<float>& flags) {
  flags.v = static_cast<__mmask16>(bits);
}
BN_HOST_DEVICE void from_bits(uint32_t bits, Flags<double>& flags) {
  flags.v = static_cast<__mmask8>(bits);
}

// GCC 12 warns of the undefined lanes in the unmasked forms of these conversions.
constexpr __mmask16 all_lanes = 0xffff;

BN_HOST_DEVICE F32 load(const float16* p) {
  return F32(_mm512_maskz_cvtph_ps(all_lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
BN_HOST_DEVICE __m256i narrow_float16(F32 a) {
  return _mm512_maskz_cvtps_ph(all_lanes, a.v, _MM_FROUND_TO_NEAREST_INT);
}
BN_HOST_DEVICE void store(float16* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_float16(a));
}

constexpr __mmask32 upper_halves = 0xaaaaaaaa;

// One permutation puts each element in the upper half of a lane above zeros.
BN_HOST_DEVICE F32 widen_bfloat16(__m256i bits) {
  const __m512i order = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                         3, 0, 2, 0, 1, 0, 0, 0);
  return F32(_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(upper_halves, order, _mm512_castsi256_si512(bits))));
}
BN_HOST_DEVICE F32 load(const bfloat16* p) {
  return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

BN_HOST_DEVICE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

BN_HOST_DEVICE F32 load_first(const float* p, int64_t count, F32 rest) {
  return F32(_mm512_mask_loadu_ps(rest.v, first_lanes(count), p));
}
BN_HOST_DEVICE F64 load_first(const double* p, int64_t count, F64 rest) {
  return F64(_mm512_mask_loadu_pd(rest.v, static_cast<__mmask8>(first_lanes(count)), p));
}
BN_HOST_DEVICE F32 load_first(const float16* p, int64_t count, F32 rest) {
  const __mmask16 mask = first_lanes(count);
  return F32(_mm512_mask_cvtph_ps(rest.v, mask, _mm256_maskz_loadu_epi16(mask, p)));
}
BN_HOST_DEVICE F32 load_first(const bfloat16* p, int64_t count, F32 rest) {
  const __mmask16 mask = first_lanes(count);
  const F32 widened = widen_bfloat16(_mm256_maskz_loadu_epi16(mask, p));
  return F32(_mm512_mask_mov_ps(rest.v, mask, widened.v));
}

BN_HOST_DEVICE void store_first(float* p, int64_t count, F32 a) {
  _mm512_mask_storeu_ps(p, first_lanes(count), a.v);
}
BN_HOST_DEVICE void store_first(double* p, int64_t count, F64 a) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(count)), a.v);
}
BN_HOST_DEVICE void store_first(float16* p, int64_t count, F32 a) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), narrow_float16(a));
}

#if defined(BN_CPU_HAS_BFLOAT16_CONVERSION)
// Unlike core/dtype.h's, the instruction flushes float's subnormal numbers to zero.
BN_HOST_DEVICE __m256i narrow_bfloat16_bits(F32 a) {
  return (__m256i)_mm512_cvtneps_pbh(a.v);
}
BN_HOST_DEVICE void store_two(bfloat16* p, F32 a, F32 b) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
}

template <>
constexpr int stored_bytes<bfloat16> = 64;

// Two elements a lane, of which dot products are added up without widening them. Subnormal numbers are zero to them.
template <>
constexpr bool has_dot_products<bfloat16> = true;

struct BFloat16Pairs {
  __m512i v;
};

BN_HOST_DEVICE BFloat16Pairs load_pairs(const bfloat16* p) {
  return {_mm512_loadu_si512(p)};
}
// The first `count` < 2 * lanes elements, and bfloat16 values from `rest` behind them.
BN_HOST_DEVICE BFloat16Pairs load_first_pairs(const bfloat16* p, int64_t count, F32 rest) {
  const UInt32s high = (UInt32s)rest.v;
  const __m512i twice = (__m512i)(high | high >> 16);
  return {_mm512_mask_loadu_epi16(twice, static_cast<__mmask32>((uint64_t(1) << count) - 1), p)};
}
// One element of each of two rows a lane.
BN_HOST_DEVICE BFloat16Pairs load_pairs(const bfloat16* row, const bfloat16* next) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next));
  return {_mm512_permutex2var_epi16(_mm512_castsi256_si512(first), order, _mm512_castsi256_si512(second))};
}
// Adds the elements to s and their squares to q.
BN_HOST_DEVICE void add_pairs(BFloat16Pairs x, F32& s, F32& q) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  s.v = _mm512_dpbf16_ps(s.v, (__m512bh)x.v, (__m512bh)ones);
  q.v = _mm512_dpbf16_ps(q.v, (__m512bh)x.v, (__m512bh)x.v);
}
#else
BN_HOST_DEVICE __m256i narrow_bfloat16_bits(F32 a) {
  return _mm512_maskz_cvtepi32_epi16(all_lanes, (__m512i)(round_to_upper_half(a) >> 16));
}
BN_HOST_DEVICE void store_two(bfloat16* p, F32 a, F32 b) {
  const __m512i order = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm512_storeu_si512(
      p, _mm512_permutex2var_epi16((__m512i)round_to_upper_half(a), order, (__m512i)round_to_upper_half(b)));
}

template <>
constexpr int stored_bytes<bfloat16> = 64;

// Even and odd elements are already the halves of lanes.
template <>
constexpr bool prefers_even_odd<bfloat16> = true;

BN_HOST_DEVICE void load_even_odd(const bfloat16* p, F32& even, F32& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd.v = _mm512_castsi512_ps(_mm512_maskz_mov_epi16(upper_halves, both));
}
BN_HOST_DEVICE void store_even_odd(bfloat16* p, F32 even, F32 odd) {
  const __m512i low = (__m512i)(round_to_upper_half(even) >> 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(upper_halves, low, (__m512i)round_to_upper_half(odd)));
}
BN_HOST_DEVICE void to_even_odd(F32& a, F32& b) {
  const Int32s lanes = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const __m512 both = a.v;
  a.v = _mm512_permutex2var_ps(both, (__m512i)lanes, b.v);
  b.v = _mm512_permutex2var_ps(both, (__m512i)(lanes + 1), b.v);
}
#endif
BN_HOST_DEVICE void store(bfloat16* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16_bits(a));
}
BN_HOST_DEVICE void store_first(bfloat16* p, int64_t count, F32 a) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), narrow_bfloat16_bits(a));
}

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
