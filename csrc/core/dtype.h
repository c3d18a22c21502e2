// The element types batch norm works on: names, storage, and conversion to the type sums are kept in.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace batchnorm_ext {

enum class DType : int32_t { float64, float32, float16, bfloat16 };

// 16-bit types are storage only: arithmetic is that of float.
struct alignas(2) float16 {
  uint16_t bits;
};
struct alignas(2) bfloat16 {
  uint16_t bits;
};
static_assert(sizeof(float16) == 2 && sizeof(bfloat16) == 2);

BN_HOST_DEVICE constexpr int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// The type in which values of type T are widened, summed and saved: float, or double for double.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateOf<T>::type;

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::float64;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct DTypeOf<float16> {
  static constexpr DType value = DType::float16;
};
template <>
struct DTypeOf<bfloat16> {
  static constexpr DType value = DType::bfloat16;
};

namespace detail {
template <class To, class From>
BN_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace detail

BN_HOST_DEVICE double widen(double value) {
  return value;
}
BN_HOST_DEVICE float widen(float value) {
  return value;
}

BN_HOST_DEVICE float widen(bfloat16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("mov.b32 %0, {0, %1};" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return detail::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
#endif
}

BN_HOST_DEVICE float widen(float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return detail::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 rebases the exponent and, in the same multiplication, normalises subnormal values.
  const float scaled = detail::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return detail::bit_cast<float>(sign | detail::bit_cast<uint32_t>(scaled));
#endif
}

// Rounds to nearest even, keeps infinities, and keeps NaN a NaN.
template <class T>
BN_HOST_DEVICE T narrow(accumulate_t<T> value);

template <>
BN_HOST_DEVICE double narrow<double>(double value) {
  return value;
}

template <>
BN_HOST_DEVICE float narrow<float>(float value) {
  return value;
}

template <>
BN_HOST_DEVICE bfloat16 narrow<bfloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = detail::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bfloat16{0x7fc0};
  return bfloat16{static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
BN_HOST_DEVICE float16 narrow<float16>(float value) {
#if defined(__CUDA_ARCH__)
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = detail::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return float16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return float16{static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 rounds to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 leaves its 10 bits, correctly rounded, at the bottom.
    const float shifted = detail::bit_cast<float>(magnitude) + 0.5f;
    return float16{static_cast<uint16_t>(sign | (detail::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return float16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

}  // namespace batchnorm_ext
