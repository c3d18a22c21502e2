// Count, mean and sum of squared deviations of a set of values, and how two sets merge.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace batchnorm_ext {

template <class A>
struct Moments {
  A mean, m2;
  int64_t count;
};

// Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances". An empty
// side leaves the other unchanged to the bit, and two sets with equal means keep that mean exactly. The mean of values
// one of which is infinite is infinite.
template <class A>
BN_HOST_DEVICE Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const int64_t count = a.count + b.count;
  const A delta = b.mean - a.mean;
  const A b_share = static_cast<A>(b.count) / static_cast<A>(count);
  const A mean = a.mean + delta * b_share;
  return {mean == mean ? mean : a.mean + b.mean, a.m2 + b.m2 + delta * delta * (static_cast<A>(a.count) * b_share),
          count};
}

// Moments of `count` values from the sums of (value - pivot) and of (value - pivot)^2 around any pivot. Exact in the
// mean when all values equal the pivot; used where the pivot is one of the values, so that nothing large cancels.
template <class A>
BN_HOST_DEVICE Moments<A> moments_from_sums(A pivot, A sum, A sum_of_squares, int64_t count) {
  if (count == 0) return {A(0), A(0), 0};
  const A offset = sum / static_cast<A>(count);
  const A m2 = sum_of_squares - offset * sum;
  return {pivot + offset, m2 > A(0) ? m2 : (m2 == m2 ? A(0) : m2), count};
}

}  // namespace batchnorm_ext
