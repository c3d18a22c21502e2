// Two sums per channel over a range of samples, in the planes and the columns view. What is summed is the Sum
// operation:
//   Sum::inputs, Sum::coefficients       how many tensors and how many values per channel it reads
//   Sum::mask, Sum::heavy, Sum::pairs    as operations.h has them
//   add(k, in, is_blocked, s, q)         adds one vector of samples to the two sums; k are the coefficients, one vector
//                                        each, and k[0] is what sums are taken around
// Sums are short (accumulate type) and handed over in arrays with one value a channel, to be merged in double.
#pragma once

#include "cpu/blocking.h"
#include "cpu/operations.h"
#include "cpu/simd.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// The tensors that an operation reads. The third may be missing, and reads as zero then.
template <class E, int count>
struct Inputs {
  const E* of[count];

  BN_HOST_DEVICE bool has(int n) const { return n < 2 || of[n] != nullptr; }

  BN_HOST_DEVICE Inputs at(int64_t offset) const {
    Inputs moved;
    for (int n = 0; n < count; ++n) moved.of[n] = has(n) ? of[n] + offset : nullptr;
    return moved;
  }

  // One vector of each, or its first `some` elements and the rest from `rest`.
  template <class A>
  BN_HOST_DEVICE void load_vectors(int64_t offset, Vec<A>* v) const {
    for (int n = 0; n < count; ++n) v[n] = has(n) ? load(of[n] + offset) : Vec<A>(A(0));
  }
  template <class A>
  BN_HOST_DEVICE void load_even_odd_vectors(int64_t offset, Vec<A>* even, Vec<A>* odd) const {
    for (int n = 0; n < count; ++n) {
      if (has(n)) {
        load_even_odd(of[n] + offset, even[n], odd[n]);
      } else {
        even[n] = odd[n] = Vec<A>(A(0));
      }
    }
  }
  template <class A>
  BN_HOST_DEVICE void load_vectors(int64_t offset, int64_t some, Vec<A> rest, Vec<A>* v) const {
    for (int n = 0; n < count; ++n) v[n] = has(n) ? load_first(of[n] + offset, some, rest) : Vec<A>(A(0));
  }
};

// of[k][channel]
constexpr int max_coefficients = 8;
template <class A>
struct Coefficients {
  const A* of[max_coefficients];
};

// Whether two vectors hold the even and the odd elements of their run.
template <class Operation, class E>
constexpr bool is_even_odd = prefers_even_odd<E> && Operation::mask == MaskUse::none;

// `mask` moved on, if the operation has one.
template <class Operation, class Byte>
BN_HOST_DEVICE Byte* move_mask(Byte* mask, int64_t bytes) {
  return Operation::mask == MaskUse::none || mask == nullptr ? nullptr : mask + bytes;
}

// The bits of the vector that begins at element `at` of a row of the mask, or of its first `some` elements. Vectors
// begin at multiples of the lanes.
template <class Operation, class A>
BN_HOST_DEVICE Flags<A> read_mask(const uint8_t* row, int64_t at, int64_t some, Vec<A>) {
  Flags<A> is_blocked{};
  if constexpr (Operation::mask == MaskUse::read) {
    uint32_t passing = row[at >> 3];
    if (Vec<A>::lanes < 8) passing >>= at & 7;
    if (Vec<A>::lanes > 8 && some > 8) passing |= static_cast<uint32_t>(row[(at >> 3) + 1]) << 8;
    from_bits(~passing, is_blocked);
  }
  return is_blocked;
}

template <class A>
struct SumPair {
  Vec<A> s, q;
};

// How much of a channel is added up in the accumulate type before it is merged in double: a few hundred additions to
// one lane, so that rounding stays near that of the lanes' own sum.
constexpr int accumulators = 4;
template <class A>
constexpr int64_t samples_per_sum = 128 * accumulators * Vec<A>::lanes;
constexpr int64_t planes_per_sum = 128;
constexpr int64_t rows_per_sum = 512;

template <int count>
struct Constant {
  static constexpr int value = count;
};

// action(Constant<count>) where count < 4, so that loops over so many vectors are none.
template <class Action>
BN_HOST_DEVICE void with_constant(int64_t count, const Action& action) {
  switch (count) {
    case 0:
      return action(Constant<0>{});
    case 1:
      return action(Constant<1>{});
    case 2:
      return action(Constant<2>{});
    default:
      return action(Constant<3>{});
  }
}

// Sums around a center by dot products, which take the elements as they are: s and q begin with what `pairs` pairs of
// the center would take from them, and centered() turns q into the sum of squared deviations. The squares of bfloat16
// have 16 bits. So a lane's sum of 8 that lie within a factor of 32, as where the mean is large, is exact in float; of
// others, each addition rounds a sum of at most 8 squares.
constexpr int64_t longest_chain = 4;
template <class A>
BN_HOST_DEVICE SumPair<A> chain_around(Vec<A> center, int64_t pairs) {
  const Vec<A> s = center * Vec<A>(static_cast<A>(-2 * pairs));
  return {s, center * s};
}
template <class A>
BN_HOST_DEVICE SumPair<A> centered(Vec<A> center, SumPair<A> chain) {
  return {chain.s, multiply_add(center * Vec<A>(A(-2)), chain.s, chain.q)};
}

// As sum_run, for which `whole` counts vectors of pairs.
template <int whole, class E, class A = accumulate_t<E>>
BN_HOST_DEVICE void sum_run_of_pairs(const E* x, int64_t count, Vec<A> center, SumPair<A>& sums) {
  constexpr int64_t step = 2 * Vec<A>::lanes;
  constexpr int unroll = accumulators;
  const auto add = [&](SumPair<A> chain) {
    const SumPair<A> found = centered(center, chain);
    sums.s += found.s;
    sums.q += found.q;
  };
  int64_t i = 0;
  if constexpr (whole < 0) {
    while (count - i >= unroll * step) {
      const int64_t pairs = min(longest_chain, (count - i) / (unroll * step));
      SumPair<A> partial[unroll];
      for (auto& chain : partial) chain = chain_around(center, pairs);
      for (const int64_t end = i + pairs * unroll * step; i < end; i += unroll * step) {
        for (int u = 0; u < unroll; ++u) add_pairs(load_pairs(x + i + u * step), partial[u].s, partial[u].q);
      }
      add({(partial[0].s + partial[1].s) + (partial[2].s + partial[3].s),
           (partial[0].q + partial[1].q) + (partial[2].q + partial[3].q)});
    }
  }
  const int64_t left = whole >= 0 ? whole : (count - i) / step;
  const int64_t some = count - i - left * step;
  SumPair<A> chain = chain_around(center, left + (some > 0 ? 1 : 0));
  for (int64_t w = 0; w < left; ++w) add_pairs(load_pairs(x + i + w * step), chain.s, chain.q);
  if (some > 0) add_pairs(load_first_pairs(x + i + left * step, some, center), chain.s, chain.q);
  add(chain);
}

// One contiguous run of a channel, and its bits of the mask. If `whole` is not negative, the run is of so many whole
// vectors and less than one more.
template <class Sum, int whole, class E, class A = accumulate_t<E>>
BN_HOST_DEVICE void sum_run(const Sum& sum, Inputs<E, Sum::inputs> in, const uint8_t* mask, int64_t count,
                            const Coefficients<A>& coefficients, int64_t channel, SumPair<A>& sums) {
  constexpr int64_t lanes = Vec<A>::lanes;
  constexpr int unroll = accumulators;
  Vec<A> k[Sum::coefficients];
  for (int n = 0; n < Sum::coefficients; ++n) k[n] = Vec<A>(coefficients.of[n][channel]);
  if constexpr (Sum::pairs) return sum_run_of_pairs<whole>(in.of[0], count, k[0], sums);
  const auto add = [&](int64_t at, int64_t some, SumPair<A>& to) {
    Vec<A> v[Sum::inputs];
    if (some == lanes) {
      in.load_vectors(at, v);
    } else {
      in.load_vectors(at, some, Sum::neutral(k[0]), v);
    }
    sum.add(k, v, read_mask<Sum>(mask, at, some, k[0]), to.s, to.q);
  };
  const auto add_two = [&](int64_t at, SumPair<A>& to, SumPair<A>& next_to) {
    if constexpr (is_even_odd<Sum, E>) {
      Vec<A> even[Sum::inputs], odd[Sum::inputs];
      in.load_even_odd_vectors(at, even, odd);
      sum.add(k, even, Flags<A>{}, to.s, to.q);
      sum.add(k, odd, Flags<A>{}, next_to.s, next_to.q);
    } else {
      add(at, lanes, to);
      add(at + lanes, lanes, next_to);
    }
  };
  // The elements from `at` on, less than a vector.
  const auto add_last = [&](int64_t at) {
    if constexpr (ends_in_whole_vectors<E> && Sum::mask == MaskUse::none) {
      if (count >= lanes) {
        Vec<A> v[Sum::inputs];
        in.load_vectors(count - lanes, v);
        for (Vec<A>& one : v) one = select(last_lanes(one, count - at), one, Sum::neutral(k[0]));
        sum.add(k, v, Flags<A>{}, sums.s, sums.q);
        return;
      }
    }
    add(at, count - at, sums);
  };
  int64_t i = 0;
  if constexpr (Sum::heavy) {
    for (; i < count; i += lanes) add(i, min(lanes, count - i), sums);
    return;
  }
  if constexpr (whole >= 0) {
    if constexpr (whole >= 2) add_two(0, sums, sums);
    if constexpr (whole % 2 == 1) add((whole - 1) * lanes, lanes, sums);
    if (count > whole * lanes) add_last(whole * lanes);
    return;
  }
  if (count >= unroll * lanes) {
    SumPair<A> partial[unroll];
    for (auto& pair : partial) pair = {Vec<A>(A(0)), Vec<A>(A(0))};
    for (; i + unroll * lanes <= count; i += unroll * lanes) {
      for (int u = 0; u < unroll; u += 2) add_two(i + u * lanes, partial[u], partial[u + 1]);
    }
    sums.s += (partial[0].s + partial[1].s) + (partial[2].s + partial[3].s);
    sums.q += (partial[0].q + partial[1].q) + (partial[2].q + partial[3].q);
  }
  if constexpr (is_even_odd<Sum, E>) {
    for (; i + 2 * lanes <= count; i += 2 * lanes) add_two(i, sums, sums);
  }
  for (; i + lanes <= count; i += lanes) add(i, lanes, sums);
  if (i < count) add_last(i);
}

// `rows` rows added to the sums of `wide` vectors of columns, which stay in registers meanwhile. Of a single vector,
// only the first `some` columns may be there.
template <class Sum, int wide, class E, class A>
BN_HOST_DEVICE void sum_tile(const Sum& sum, Inputs<E, Sum::inputs> in, int64_t rows, int64_t pitch,
                             const uint8_t* mask, int64_t mask_pitch, int64_t column, int64_t some,
                             const Coefficients<A>& coefficients, A* s, A* q) {
  constexpr int64_t lanes = Vec<A>::lanes;
  Vec<A> k[wide][Sum::coefficients];
  SumPair<A> sums[wide];
  for (int w = 0; w < wide; ++w) {
    for (int n = 0; n < Sum::coefficients; ++n) k[w][n] = load(coefficients.of[n] + column + w * lanes);
    sums[w] = {Vec<A>(A(0)), Vec<A>(A(0))};
  }
  int64_t r = 0;
  if constexpr (Sum::pairs && wide > 1) {
    for (int w = 0; w < wide; ++w) sums[w] = chain_around(k[w][0], rows / 2);
    for (; r + 2 <= rows; r += 2) {
      for (int w = 0; w < wide; ++w) {
        const E* const x = in.of[0] + r * pitch + column + w * lanes;
        add_pairs(load_pairs(x, x + pitch), sums[w].s, sums[w].q);
      }
    }
    for (int w = 0; w < wide; ++w) sums[w] = centered(k[w][0], sums[w]);
  }
  for (; r < rows; ++r) {
    for (int w = 0; w < wide; ++w) {
      const int64_t at = column + w * lanes;
      Vec<A> v[Sum::inputs];
      if (wide > 1 || some == lanes) {
        in.load_vectors(r * pitch + at, v);
      } else {
        in.load_vectors(r * pitch + at, some, Sum::neutral(k[w][0]), v);
      }
      sum.add(k[w], v, read_mask<Sum>(move_mask<Sum>(mask, r * mask_pitch), at, some, k[w][0]), sums[w].s, sums[w].q);
    }
  }
  for (int w = 0; w < wide; ++w) {
    A *const s_at = s + column + w * lanes, *const q_at = q + column + w * lanes;
    store(s_at, load(s_at) + sums[w].s);
    store(q_at, load(q_at) + sums[w].q);
  }
}

// `rows` rows added to per-column sums.
template <class Sum, class E, class A = accumulate_t<E>>
BN_CPU_NOINLINE void sum_rows(const Sum& sum, Inputs<E, Sum::inputs> in, int64_t rows, int64_t pitch,
                              const uint8_t* mask, int64_t mask_pitch, int64_t columns,
                              const Coefficients<A>& coefficients, A* s, A* q) {
  constexpr int64_t lanes = Vec<A>::lanes;
  constexpr int wide = Sum::heavy ? 1 : Sum::coefficients > 1 ? 2 : 4;
  int64_t j = 0;
  if constexpr (wide > 1) {
    for (; j + wide * lanes <= columns; j += wide * lanes) {
      sum_tile<Sum, wide>(sum, in, rows, pitch, mask, mask_pitch, j, lanes, coefficients, s, q);
    }
  }
  for (; j < columns; j += lanes) {
    sum_tile<Sum, 1>(sum, in, rows, pitch, mask, mask_pitch, j, min(lanes, columns - j), coefficients, s, q);
  }
}

// A run of `count` in each of the channels, which are `pitch` elements and `mask_pitch` bytes of the mask apart. All
// arguments are values: what is behind a reference would be read again after each store.
template <class Sum, class E, class A>
inline void sum_runs(Sum sum, Inputs<E, Sum::inputs> in, const uint8_t* mask, int64_t count, int64_t pitch,
                     int64_t mask_pitch, Range channels, Coefficients<A> coefficients, SumPair<A>* sums) {
  const auto walk = [&](const auto& one_run) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      one_run(c);
      in = in.at(pitch);
      mask = move_mask<Sum>(mask, mask_pitch);
    }
  };
  constexpr int64_t step = (Sum::pairs ? 2 : 1) * Vec<A>::lanes;
  if (!Sum::heavy && count < accumulators * step) {
    return with_constant(count / step, [&](auto whole) {
      walk([&](int64_t c) { sum_run<Sum, decltype(whole)::value>(sum, in, mask, count, coefficients, c, *sums++); });
    });
  }
  walk([&](int64_t c) { sum_run<Sum, -1>(sum, in, mask, count, coefficients, c, *sums++); });
}

// Samples [slab.begin, slab.end) of channels [channels.begin, channels.end): merge(s, q) with the channels' sums.
template <class Sum, class E, class A, class Merge>
BN_CPU_NOINLINE void sum_planes(const Sum& sum, const Shape& shape, Inputs<E, Sum::inputs> in, const uint8_t* mask,
                                Range channels, Range slab, const Coefficients<A>& coefficients, Merge merge) {
  SumPair<A> sums[max_block_channels];
  for (int64_t c = 0; c < channels.size(); ++c) sums[c] = {Vec<A>(A(0)), Vec<A>(A(0))};
  const int64_t mask_row = mask_row_bytes(shape.inner);
  for (int64_t sample = slab.begin; sample < slab.end;) {
    const int64_t outer = sample / shape.inner, inner = sample % shape.inner;
    const int64_t count = min(shape.inner - inner, slab.end - sample);
    const int64_t plane = outer * shape.channels + channels.begin;
    sum_runs(sum, in.at(plane * shape.inner + inner), move_mask<Sum>(mask, plane * mask_row + inner / 8), count,
             shape.inner, mask_row, channels, coefficients, sums);
    sample += count;
  }
  A s[max_block_channels], q[max_block_channels];
  for (int64_t c = 0; c < channels.size(); ++c) {
    s[c] = sum_of_lanes(sums[c].s);
    q[c] = sum_of_lanes(sums[c].q);
  }
  merge(s, q);
}

// Values of a channel vector spread over the columns of a block, and one vector more, which partial vectors read.
template <class A>
inline void spread(const Shape& shape, int64_t repeat, Range channels, const A* per_channel, A* per_column) {
  constexpr int64_t lanes = Vec<A>::lanes;
  for (int64_t r = 0; r < repeat; ++r) {
    if (shape.inner == 1) {
      for (int64_t c = 0; c < channels.size(); ++c) per_column[c] = per_channel[channels.begin + c];
      per_column += channels.size();
      continue;
    }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      // Stores past the channel's columns are overwritten by the next channel's.
      for (int64_t i = 0; i < shape.inner; i += lanes) store(per_column + i, Vec<A>(per_channel[c]));
      per_column += shape.inner;
    }
  }
  store(per_column, Vec<A>(A(0)));
}

// The sum of contiguous values.
template <class A>
inline A sum_of(const A* values, int64_t count) {
  constexpr int64_t lanes = Vec<A>::lanes;
  Vec<A> sum(A(0));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum += load(values + i);
  if (i < count) sum += load_first(values + i, count - i, Vec<A>(A(0)));
  return sum_of_lanes(sum);
}

// A channel vector of an operation for each column of a block.
template <int count, class A>
struct ColumnCoefficients {
  alignas(cache_line) A values[count][max_columns + Vec<A>::lanes];

  ColumnCoefficients(const Shape& shape, int64_t repeat, Range channels, const Coefficients<A>& coefficients) {
    for (int n = 0; n < count; ++n) spread(shape, repeat, channels, coefficients.of[n], values[n]);
  }

  Coefficients<A> from(int64_t column) const {
    Coefficients<A> coefficients{};
    for (int n = 0; n < count; ++n) coefficients.of[n] = values[n] + column;
    return coefficients;
  }
};

// The most rows of a tile.
constexpr int64_t rows_together = 8;

template <class Sum, class E, class A, class Merge>
BN_CPU_NOINLINE void sum_columns(const Sum& sum, const Shape& shape, int64_t repeat, Inputs<E, Sum::inputs> in,
                                 const uint8_t* mask, Range channels, Range slab, const Coefficients<A>& coefficients,
                                 Merge merge) {
  constexpr int64_t padded = max_columns + Vec<A>::lanes;
  alignas(cache_line) A s[padded], q[padded];
  const ColumnCoefficients<Sum::coefficients, A> of_columns(shape, repeat, channels, coefficients);
  const Coefficients<A> per_column = of_columns.from(0);
  const int64_t row_columns = channels.size() * shape.inner;
  const int64_t columns = row_columns * repeat;
  for (int64_t j = 0; j < columns + Vec<A>::lanes; ++j) s[j] = q[j] = A(0);

  const int64_t pitch = shape.channels * shape.inner * repeat, mask_pitch = mask_row_bytes(pitch);
  const int64_t begin = slab.begin / shape.inner, rows = slab.size() / shape.inner;
  in = in.at((begin * shape.channels + channels.begin) * shape.inner);
  mask = move_mask<Sum>(mask, begin / repeat * mask_pitch + channels.begin * shape.inner / 8);
  const auto add = [&](int64_t row, int64_t count, int64_t width) {
    sum_rows(sum, in.at(row * pitch), count, pitch, move_mask<Sum>(mask, row * mask_pitch), mask_pitch, width,
             per_column, s, q);
  };
  const int64_t whole = rows / repeat;
  for (int64_t row = 0; row < whole; row += rows_together) add(row, min(rows_together, whole - row), columns);
  if (rows % repeat != 0) add(whole, 1, rows % repeat * row_columns);

  for (int64_t half = columns / 2; half >= row_columns; half /= 2) {
    for (int64_t j = 0; j < half; ++j) {
      s[j] += s[half + j];
      q[j] += q[half + j];
    }
  }
  if (shape.inner > 1) {  // the sums of a channel take the place of its first column or one before it
    for (int64_t c = 0; c < channels.size(); ++c) {
      s[c] = sum_of(s + c * shape.inner, shape.inner);
      q[c] = sum_of(q + c * shape.inner, shape.inner);
    }
  }
  merge(s, q);
}

// The end of the slab that starts at sample `begin`: as much as is summed before merging in double.
template <class A>
inline int64_t slab_end(const Shape& shape, const Blocking& blocking, int64_t begin, int64_t end) {
  if (blocking.sums_by_columns) return min(end, begin + rows_per_sum * blocking.repeat * shape.inner);
  const int64_t plane_begin = begin - begin % shape.inner;
  const int64_t planes = min(planes_per_sum, samples_per_sum<A> / shape.inner);
  if (planes == 0) return min(min(end, plane_begin + shape.inner), begin + samples_per_sum<A>);
  return min(end, plane_begin + planes * shape.inner);
}

template <class Sum, class E, class A, class Merge>
inline void sum_slab(const Sum& sum, const Shape& shape, const Blocking& blocking, Inputs<E, Sum::inputs> in,
                     const uint8_t* mask, Range channels, Range slab, const Coefficients<A>& coefficients,
                     Merge merge) {
  if (blocking.sums_by_columns) {
    sum_columns<Sum>(sum, shape, blocking.repeat, in, mask, channels, slab, coefficients, merge);
  } else {
    sum_planes<Sum>(sum, shape, in, mask, channels, slab, coefficients, merge);
  }
}

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
