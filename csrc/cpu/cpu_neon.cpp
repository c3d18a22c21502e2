// The kernels for 64-bit ARM, all of which have NEON with fused multiply-add and float16 conversion.
#if defined(__aarch64__)

#include <arm_neon.h>

#include <cmath>
#include <cstdint>
#include <new>
#include <type_traits>

#include "cpu/kernel_table.h"

#define BN_CPU_ISA neon
#define BN_CPU_VECTOR_BYTES 16
#define BN_CPU_HAS_CONVERSIONS
#include "cpu/simd.h"

namespace batchnorm_ext::cpu::neon {

// Clang keeps the vectors of arm_neon.h apart from the compiler's own.
BN_HOST_DEVICE F32 from_neon(float32x4_t v) {
  return F32((F32::Native)v);
}
BN_HOST_DEVICE F64 from_neon(float64x2_t v) {
  return F64((F64::Native)v);
}
BN_HOST_DEVICE float32x4_t to_neon(F32 a) {
  return (float32x4_t)a.v;
}
BN_HOST_DEVICE float64x2_t to_neon(F64 a) {
  return (float64x2_t)a.v;
}

BN_HOST_DEVICE F32 multiply_add(F32 a, F32 b, F32 c) {
  return from_neon(vfmaq_f32(to_neon(c), to_neon(a), to_neon(b)));
}
BN_HOST_DEVICE F64 multiply_add(F64 a, F64 b, F64 c) {
  return from_neon(vfmaq_f64(to_neon(c), to_neon(a), to_neon(b)));
}

BN_HOST_DEVICE uint32_t to_bits(Flags<float> flags) {
  const uint32x4_t own = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32((uint32x4_t)flags.v, own));
}
BN_HOST_DEVICE uint32_t to_bits(Flags<double> flags) {
  const uint64x2_t own = {1, 2};
  return static_cast<uint32_t>(vaddvq_u64(vandq_u64((uint64x2_t)flags.v, own)));
}

// ---- 16-bit elements: 4 of them in half a vector ----

BN_HOST_DEVICE F32 widen_bits(uint16x4_t bits, float16) {
  return from_neon(vcvt_f32_f16(vreinterpret_f16_u16(bits)));
}
BN_HOST_DEVICE F32 widen_bits(uint16x4_t bits, bfloat16) {
  return from_neon(vreinterpretq_f32_u32(vshll_n_u16(bits, 16)));
}
BN_HOST_DEVICE uint16x4_t narrow_bits(F32 a, float16) {
  return vreinterpret_u16_f16(vcvt_f16_f32(to_neon(a)));
}
BN_HOST_DEVICE uint16x4_t narrow_bits(F32 a, bfloat16) {
  return vshrn_n_u32((uint32x4_t)round_to_upper_half(a), 16);
}

BN_HOST_DEVICE const uint16_t* bits_of(const void* p) {
  return static_cast<const uint16_t*>(p);
}
BN_HOST_DEVICE uint16_t* bits_of(void* p) {
  return static_cast<uint16_t*>(p);
}

BN_HOST_DEVICE F32 load(const float16* p) {
  return widen_bits(vld1_u16(bits_of(p)), float16{});
}
BN_HOST_DEVICE F32 load(const bfloat16* p) {
  return widen_bits(vld1_u16(bits_of(p)), bfloat16{});
}
BN_HOST_DEVICE void store(float16* p, F32 a) {
  vst1_u16(bits_of(p), narrow_bits(a, float16{}));
}
BN_HOST_DEVICE void store(bfloat16* p, F32 a) {
  vst1_u16(bits_of(p), narrow_bits(a, bfloat16{}));
}
BN_HOST_DEVICE void store_two(bfloat16* p, F32 a, F32 b) {
  const uint16x8_t first = vreinterpretq_u16_u32((uint32x4_t)round_to_upper_half(a));
  const uint16x8_t second = vreinterpretq_u16_u32((uint32x4_t)round_to_upper_half(b));
  vst1q_u16(bits_of(p), vuzp2q_u16(first, second));
}

// ---- Ends of runs ----

BN_HOST_DEVICE F32 load_first(const float* p, int64_t count, F32 rest) {
  const float32x4_t v = to_neon(rest);
  if (count == 1) return from_neon(vld1q_lane_f32(p, v, 0));
  const float32x4_t two = vcombine_f32(vld1_f32(p), vget_high_f32(v));
  return from_neon(count == 3 ? vld1q_lane_f32(p + 2, two, 2) : two);
}
BN_HOST_DEVICE F64 load_first(const double* p, int64_t, F64 rest) {
  return from_neon(vld1q_lane_f64(p, to_neon(rest), 0));
}
BN_HOST_DEVICE void store_first(float* p, int64_t count, F32 a) {
  const float32x4_t v = to_neon(a);
  if (count == 1) return vst1q_lane_f32(p, v, 0);
  vst1_f32(p, vget_low_f32(v));
  if (count == 3) vst1q_lane_f32(p + 2, v, 2);
}
BN_HOST_DEVICE void store_first(double* p, int64_t, F64 a) {
  vst1q_lane_f64(p, to_neon(a), 0);
}

template <class E>
BN_HOST_DEVICE F32 load_first(const E* p, int64_t count, F32 rest) {
  const uint16_t* const from = bits_of(p);
  uint16x4_t bits = vld1_lane_u16(from, vdup_n_u16(0), 0);
  if (count > 1) bits = vld1_lane_u16(from + 1, bits, 1);
  if (count > 2) bits = vld1_lane_u16(from + 2, bits, 2);
  const int32x4_t lane = {0, 1, 2, 3};
  const uint32x4_t is_first = vcltq_s32(lane, vdupq_n_s32(static_cast<int32_t>(count)));
  return from_neon(vbslq_f32(is_first, to_neon(widen_bits(bits, E{})), to_neon(rest)));
}
template <class E>
BN_HOST_DEVICE void store_first(E* p, int64_t count, F32 a) {
  uint16_t* const to = bits_of(p);
  const uint16x4_t bits = narrow_bits(a, E{});
  vst1_lane_u16(to, bits, 0);
  if (count > 1) vst1_lane_u16(to + 1, bits, 1);
  if (count > 2) vst1_lane_u16(to + 2, bits, 2);
}

}  // namespace batchnorm_ext::cpu::neon

#include "cpu/batch_norm_steps.h"
#include "cpu/kernel_table_definition.h"

#endif
