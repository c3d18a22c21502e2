// A vector of accumulators and its loads and stores, written once for any width. Included by one translation unit per
// instruction set, which defines BN_CPU_ISA (the namespace) and BN_CPU_VECTOR_BYTES and may overload what it does
// better.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/formulas.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

template <class T, int count>
struct NativeVector {
  typedef T type __attribute__((vector_size(sizeof(T) * count)));
};

template <class A>
struct Vec {
  static constexpr int lanes = BN_CPU_VECTOR_BYTES / sizeof(A);
  using Native = typename NativeVector<A, lanes>::type;

  Native v;

  Vec() = default;
  BN_HOST_DEVICE explicit Vec(Native native) : v(native) {}
  BN_HOST_DEVICE explicit Vec(A value) : v(value - Native{}) {}  // subtracting zero keeps the sign of zero

  BN_HOST_DEVICE Vec& operator+=(Vec b) {
    v += b.v;
    return *this;
  }
};

template <class A>
BN_HOST_DEVICE Vec<A> operator+(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v + b.v);
}
template <class A>
BN_HOST_DEVICE Vec<A> operator-(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v - b.v);
}
template <class A>
BN_HOST_DEVICE Vec<A> operator*(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v * b.v);
}
template <class A>
BN_HOST_DEVICE Vec<A> multiply_add(Vec<A> a, Vec<A> b, Vec<A> c) {
  return Vec<A>(a.v * b.v + c.v);
}

using F32 = Vec<float>;
using F64 = Vec<double>;
using Int32s = NativeVector<int32_t, F32::lanes>::type;
using UInt32s = NativeVector<uint32_t, F32::lanes>::type;
using UInt16s = NativeVector<uint16_t, F32::lanes>::type;

template <class To, class From>
BN_HOST_DEVICE To read_as(const From* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}

BN_HOST_DEVICE F64 load(const double* p) {
  return F64(read_as<F64::Native>(p));
}
BN_HOST_DEVICE F32 load(const float* p) {
  return F32(read_as<F32::Native>(p));
}
BN_HOST_DEVICE void store(double* p, F64 a) {
  __builtin_memcpy(p, &a.v, sizeof(a.v));
}
BN_HOST_DEVICE void store(float* p, F32 a) {
  __builtin_memcpy(p, &a.v, sizeof(a.v));
}

// The conversions of core/dtype.h, lane by lane.
BN_HOST_DEVICE UInt16s narrow_bfloat16(F32 a) {
  const UInt32s bits = (UInt32s)a.v;
  const UInt32s rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return __builtin_convertvector(a.v == a.v ? rounded : (UInt32s{} + 0x7fc0u), UInt16s);
}

#if !defined(BN_CPU_HAS_CONVERSIONS)
BN_HOST_DEVICE F32 widen_bfloat16(UInt16s bits) {
  return F32((F32::Native)(__builtin_convertvector(bits, UInt32s) << 16));
}

BN_HOST_DEVICE F32 widen_float16(UInt16s half) {
  const UInt32s bits = __builtin_convertvector(half, UInt32s);
  const UInt32s sign = (bits & 0x8000u) << 16;
  const UInt32s magnitude = (bits & 0x7fffu) << 13;
  const UInt32s finite = (UInt32s)((F32::Native)magnitude * 0x1p112f);
  // Signed comparisons: SSE2 has no unsigned ones.
  return F32((F32::Native)(sign | ((Int32s)magnitude >= (0x7c00 << 13) ? (magnitude | 0x7f800000u) : finite)));
}

BN_HOST_DEVICE UInt16s narrow_float16(F32 a) {
  const UInt32s bits = (UInt32s)a.v;
  const UInt32s sign = bits >> 16 & 0x8000u;
  const UInt32s magnitude = bits & 0x7fffffffu;
  const UInt32s normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  const UInt32s subnormal = (UInt32s)((F32::Native)magnitude + 0.5f) - 0x3f000000u;
  UInt32s result = (Int32s)magnitude < 0x38800000 ? subnormal : normal;
  result = (Int32s)magnitude >= 0x477ff000 ? UInt32s{} + 0x7c00u : result;
  result = (Int32s)magnitude > 0x7f800000 ? UInt32s{} + 0x7e00u : result;
  return __builtin_convertvector(sign | result, UInt16s);
}

BN_HOST_DEVICE F32 load(const bfloat16* p) {
  return widen_bfloat16(read_as<UInt16s>(p));
}
BN_HOST_DEVICE F32 load(const float16* p) {
  return widen_float16(read_as<UInt16s>(p));
}
BN_HOST_DEVICE void store(float16* p, F32 a) {
  const UInt16s bits = narrow_float16(a);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
#endif

#if !defined(BN_CPU_HAS_BFLOAT16_CONVERSION)
BN_HOST_DEVICE void store(bfloat16* p, F32 a) {
  const UInt16s bits = narrow_bfloat16(a);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
#endif

// The first `count` < lanes elements, the other lanes from `rest`.
#if !defined(BN_CPU_HAS_MASKS)
template <class E>
BN_HOST_DEVICE Vec<accumulate_t<E>> load_first(const E* p, int64_t count, Vec<accumulate_t<E>> rest) {
  using A = accumulate_t<E>;
  alignas(BN_CPU_VECTOR_BYTES) A values[Vec<A>::lanes];
  store(values, rest);
  for (int64_t i = 0; i < count; ++i) values[i] = widen(p[i]);
  return load(values);
}

template <class E>
BN_HOST_DEVICE void store_first(E* p, int64_t count, Vec<accumulate_t<E>> a) {
  using A = accumulate_t<E>;
  alignas(BN_CPU_VECTOR_BYTES) A values[Vec<A>::lanes];
  store(values, a);
  for (int64_t i = 0; i < count; ++i) p[i] = narrow<E>(values[i]);
}
#endif

// Pairwise: half the lanes are added to the other half until one is left.
template <class A, int count>
BN_HOST_DEVICE A sum_of_native(typename NativeVector<A, count>::type v) {
  if constexpr (count == 2) {
    return v[0] + v[1];
  } else {
    using Half = typename NativeVector<A, count / 2>::type;
    const Half low = read_as<Half>(&v), high = read_as<Half>(reinterpret_cast<const char*>(&v) + sizeof(Half));
    return sum_of_native<A, count / 2>(low + high);
  }
}
template <class A>
BN_HOST_DEVICE A sum_of_lanes(Vec<A> a) {
  return sum_of_native<A, Vec<A>::lanes>(a.v);
}

constexpr int64_t cache_line = 64;

// Copies one line past the caches, so that memory is not read before it is written. Both ends begin a line.
BN_HOST_DEVICE void stream_line(void* to, const void* from) {
#if defined(__SSE2__)
  for (int i = 0; i < cache_line; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + i),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + i)));
  }
#else
  __builtin_memcpy(to, from, cache_line);
#endif
}

// Streamed stores become visible to other threads.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
