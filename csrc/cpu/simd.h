// A vector of accumulators and its loads and stores, written once for any width. Included by one translation unit per
// instruction set, which defines BN_CPU_ISA (the namespace) and BN_CPU_VECTOR_BYTES and may overload what it does
// better.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/activation.h"
#include "core/dtype.h"
#include "core/formulas.h"

// Of functions that are called once a block or a few rows: inlined wherever they are called, they are most of the code.
#define BN_CPU_NOINLINE inline __attribute__((noinline))

namespace batchnorm_ext::cpu::BN_CPU_ISA {

template <class T, int count>
struct NativeVector {
  typedef T type __attribute__((vector_size(sizeof(T) * count)));
};

template <class A>
struct Vec {
  using Element = A;
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
BN_HOST_DEVICE Vec<A> operator/(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v / b.v);
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

// The integers that a vector's lanes are made of, and what core/activation.h's exponentials need to know of the type.
template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using Signed = Int32s;
  using Unsigned = UInt32s;
  static constexpr uint32_t one = 0x3f800000;  // the bits of 1.0, and below those of sqrt(0.5)
  static constexpr int mantissa_bits = 23;
  static constexpr float inverse_ln2 = 0x1.715476p0f, ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr float rounder = 0x1.8p23f;  // adding it rounds to an integer, which is in the last bits
  static constexpr float lowest = -105.0f, highest = 89.0f;  // their exponentials round to zero and infinity
  static constexpr int terms = 7;
  static constexpr uint32_t sqrt_half = 0x3f3504f3;
  static constexpr int log_terms = 5;
};
template <>
struct Lanes<double> {
  using Signed = NativeVector<int64_t, F64::lanes>::type;
  using Unsigned = NativeVector<uint64_t, F64::lanes>::type;
  static constexpr uint64_t one = 0x3ff0000000000000;
  static constexpr int mantissa_bits = 52;
  static constexpr double inverse_ln2 = 0x1.71547652b82fep0, ln2_high = 0x1.62e42feep-1,
                          ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double rounder = 0x1.8p52;
  static constexpr double lowest = -746.0, highest = 710.0;
  static constexpr int terms = 13;
  static constexpr uint64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr int log_terms = 11;
};

// The answer of a comparison for each lane, and what core/activation.h asks with it.
#if !defined(BN_CPU_HAS_MASKS)
template <class A>
struct Flags {
  typename Lanes<A>::Signed v;  // all bits set or none
};

template <class A>
BN_HOST_DEVICE Flags<A> less_equal(Vec<A> a, Vec<A> b) {
  return {(typename Lanes<A>::Signed)(a.v <= b.v)};
}
template <class A>
BN_HOST_DEVICE Vec<A> select(Flags<A> flags, Vec<A> yes, Vec<A> no) {
  return Vec<A>(flags.v ? yes.v : no.v);
}

// One bit a lane, the first lane in the lowest. What is above the lanes' bits is not looked at.
template <class A>
BN_HOST_DEVICE uint32_t to_bits(Flags<A> flags) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec<A>::lanes; ++i) bits |= static_cast<uint32_t>(flags.v[i] & 1) << i;
  return bits;
}
template <class A>
BN_HOST_DEVICE void from_bits(uint32_t bits, Flags<A>& flags) {
  using Signed = typename Lanes<A>::Signed;
  Signed own{};
  for (int i = 0; i < Vec<A>::lanes; ++i) own[i] = 1 << i;
  flags.v = (Signed)((((Signed{} + static_cast<int32_t>(bits)) & own) != 0));
}

template <class A>
struct ClearThenSet {
  using Lane = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

  Lane of[2 * Vec<A>::lanes];

  constexpr ClearThenSet() : of{} {
    for (int i = Vec<A>::lanes; i < 2 * Vec<A>::lanes; ++i) of[i] = -1;
  }
};
// The last `count` < lanes lanes of a vector.
template <class A>
BN_HOST_DEVICE Flags<A> last_lanes(Vec<A>, int64_t count) {
  static constexpr ClearThenSet<A> lanes;
  Flags<A> flags;
  __builtin_memcpy(&flags.v, lanes.of + count, sizeof(flags.v));
  return flags;
}
#endif

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

// Lanes whose upper halves, which are bfloat16, are rounded to even. NaN stays one whose lower half is clear, and there
// is no other (read() in batch_norm_steps.h).
BN_HOST_DEVICE UInt32s round_to_upper_half(F32 a) {
  const UInt32s bits = (UInt32s)a.v;
  return bits + ((bits >> 16 & 1u) + 0x7fffu);
}

#if !defined(BN_CPU_HAS_CONVERSIONS)
// The conversions of core/dtype.h, lane by lane.
BN_HOST_DEVICE UInt16s narrow_bfloat16(F32 a) {
  return __builtin_convertvector(round_to_upper_half(a) >> 16, UInt16s);
}
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
BN_HOST_DEVICE void store(bfloat16* p, F32 a) {
  const UInt16s bits = narrow_bfloat16(a);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
#endif

// The first `count` < lanes elements, the other lanes from `rest`. Instruction sets with conversions bring their own.
#if !defined(BN_CPU_HAS_CONVERSIONS)
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

// Whether the elements of a run that are no whole vector are sooner taken from its last vector, of which the others are
// left out or computed once more, than by themselves: where they are converted one by one.
template <class E>
constexpr bool ends_in_whole_vectors =
#if defined(BN_CPU_HAS_MASKS)
    false;
#else
    sizeof(E) < sizeof(accumulate_t<E>);
#endif

// Whether sums of E and of its squares can be added up in pairs; an instruction set that can brings load_pairs,
// load_first_pairs and add_pairs.
template <class E>
constexpr bool has_dot_products = false;

// Whether two vectors of E are sooner loaded and stored as the even and the odd elements; an instruction set where they
// are brings load_even_odd, store_even_odd and, for two vectors one behind the other, to_even_odd.
template <class E>
constexpr bool prefers_even_odd = false;

// What an instruction set stores of two vectors of E at once, in bytes.
template <class E>
constexpr int stored_bytes = static_cast<int>(Vec<accumulate_t<E>>::lanes * sizeof(E));

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

// exp(a) = first * second * (1 + rest): `first` and `second` are powers of two, kept apart because their product may be
// out of range, and `rest` is the Taylor series of what is left, at most ln(2) / 2, minus one. The reduction subtracts
// ln(2) in two parts, of which the products with the first are exact (Cody and Waite, 1980).
template <class A>
struct PowerOfE {
  Vec<A> first, second, rest;
};

template <int count, class A>
struct InverseFactorials {
  A of[count + 1];

  constexpr InverseFactorials() : of{} {
    double factorial = 1.0;
    for (int k = 0; k <= count; ++k) {
      factorial *= k > 0 ? k : 1;
      of[k] = static_cast<A>(1.0 / factorial);
    }
  }
};

template <class A>
BN_HOST_DEVICE PowerOfE<A> power_of_e(Vec<A> a) {
  using V = Vec<A>;
  using L = Lanes<A>;
  using Unsigned = typename L::Unsigned;
  constexpr InverseFactorials<L::terms, A> taylor;
  const V rounder(L::rounder);
  const auto power_of_two = [](V rounded) {
    return V((typename V::Native)(((Unsigned)rounded.v << L::mantissa_bits) + L::one));
  };
  a = select(less_equal(a, V(L::lowest)), V(L::lowest), select(less_equal(V(L::highest), a), V(L::highest), a));
  const V n = multiply_add(a, V(L::inverse_ln2), rounder) - rounder;
  const V r = multiply_add(n, V(-L::ln2_low), multiply_add(n, V(-L::ln2_high), a));
  V series(taylor.of[L::terms]);
  for (int k = L::terms - 1; k >= 2; --k) series = multiply_add(series, r, V(taylor.of[k]));
  const V half = n * V(A(0.5)) + rounder;
  return {power_of_two(half), power_of_two(n - (half - rounder) + rounder), multiply_add(r * r, series, r)};
}

template <class A>
BN_HOST_DEVICE Vec<A> exponential(Vec<A> a) {
  const PowerOfE<A> power = power_of_e(a);
  return multiply_add(power.first, power.rest, power.first) * power.second;
}

template <class A>
BN_HOST_DEVICE Vec<A> exponential_minus_one(Vec<A> a) {
  const Vec<A> one(A(1));
  const PowerOfE<A> power = power_of_e(a);
  const Vec<A> scale = power.first * power.second;
  const Vec<A> large = multiply_add(power.first, power.rest, power.first) * power.second - one;
  return select(less_equal(a, one), multiply_add(scale, power.rest, scale - one), large);
}

// Of finite a > -1. 1 + a = 2^k * m with m next to 1, and log(m) = 2 * artanh(s), s = (m - 1) / (m + 1), by its Taylor
// series; what rounding 1 + a dropped is added at the end. Where k is 0, m - 1 is a itself.
template <class A>
BN_HOST_DEVICE Vec<A> logarithm_of_one_plus(Vec<A> a) {
  using V = Vec<A>;
  using L = Lanes<A>;
  using Unsigned = typename L::Unsigned;
  using Bits = std::remove_const_t<decltype(L::one)>;
  constexpr Bits mantissa = (Bits(1) << L::mantissa_bits) - 1;
  const V one(A(1)), whole(A(Bits(1) << L::mantissa_bits));
  const V sum = one + a;
  const Unsigned moved = (Unsigned)sum.v + (L::one - L::sqrt_half);
  const V biased((typename V::Native)((moved >> L::mantissa_bits) | (Unsigned)whole.v));
  const V k = biased - (whole + V(A(L::one >> L::mantissa_bits)));
  const V m((typename V::Native)((moved & mantissa) + L::sqrt_half));
  const auto scaled = [&](V if_scaled, V if_not) { return select(less_equal(k * k, V(A(0))), if_not, if_scaled); };
  const V f = scaled(m - one, a);
  const V dropped = scaled((a - (sum - one)) / sum, V(A(0)));
  const V s = f / (f + V(A(2)));
  const V square = s * s;
  V series(A(2.0 / (2 * L::log_terms + 1)));
  for (int n = L::log_terms - 1; n >= 1; --n) series = multiply_add(series, square, V(A(2.0 / (2 * n + 1))));
  // 2 * s = f - s * f, and f is exact.
  const V log_m = f - s * (f - square * series);
  return multiply_add(k, V(L::ln2_high), log_m + multiply_add(k, V(L::ln2_low), dropped));
}

constexpr int64_t cache_line = 64;

// Copies `bytes` past the caches, by registers of `at_once` bytes, so that memory is not read before it is written.
// `to` begins at a multiple of the registers.
template <int bytes, int at_once = BN_CPU_VECTOR_BYTES>
BN_HOST_DEVICE void stream(void* to, const void* from) {
#if defined(__SSE2__)
  char* const dst = static_cast<char*>(to);
  const char* const src = static_cast<const char*>(from);
#if BN_CPU_VECTOR_BYTES >= 64
  if constexpr (at_once >= 64) {
    for (int i = 0; i < bytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_loadu_si512(src + i));
    }
    return;
  }
#endif
#if BN_CPU_VECTOR_BYTES >= 32
  if constexpr (at_once >= 32) {
    for (int i = 0; i < bytes; i += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
    }
    return;
  }
#endif
  for (int i = 0; i < bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
  }
#else
  __builtin_memcpy(to, from, bytes);
#endif
}

// Streamed stores become visible to other threads.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
