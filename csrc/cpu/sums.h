// Two sums per channel over a range of samples, in the planes and the columns view. What is summed is the Sum
// operation:
//   Sum::inputs                          how many tensors it reads, 1 or 2
//   Sum::add(v0, v1, center, s, q)       adds one vector of samples to the two sums
//   center[channel]                      the operation's constant of a channel, in the accumulate type
// Sums are short (accumulate type) and handed over in arrays with one value a channel, to be merged in double.
#pragma once

#include "cpu/blocking.h"
#include "cpu/simd.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

template <class E>
struct Inputs {
  const E* first;
  const E* second;  // equals first where only one tensor is read

  BN_HOST_DEVICE Inputs at(int64_t offset) const { return {first + offset, second + offset}; }
};

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

// One contiguous run of a channel.
template <class Sum, class E, class A = accumulate_t<E>>
inline void sum_run(Inputs<E> in, int64_t count, Vec<A> center, SumPair<A>& sums) {
  constexpr int64_t lanes = Vec<A>::lanes;
  constexpr int unroll = accumulators;
  int64_t i = 0;
  const auto load_second = [&](int64_t at, Vec<A> first) {
    if constexpr (Sum::inputs == 2)
      return load(in.second + at);
    else
      return first;
  };
  if (count >= unroll * lanes) {
    SumPair<A> partial[unroll];
    for (auto& pair : partial) pair = {Vec<A>(A(0)), Vec<A>(A(0))};
    for (; i + unroll * lanes <= count; i += unroll * lanes) {
      for (int u = 0; u < unroll; ++u) {
        const Vec<A> first = load(in.first + i + u * lanes);
        Sum::add(first, load_second(i + u * lanes, first), center, partial[u].s, partial[u].q);
      }
    }
    sums.s += (partial[0].s + partial[1].s) + (partial[2].s + partial[3].s);
    sums.q += (partial[0].q + partial[1].q) + (partial[2].q + partial[3].q);
  }
  for (; i + lanes <= count; i += lanes) {
    const Vec<A> first = load(in.first + i);
    Sum::add(first, load_second(i, first), center, sums.s, sums.q);
  }
  if (i < count) {
    const Vec<A> neutral = Sum::neutral(center);
    const Vec<A> first = load_first(in.first + i, count - i, neutral);
    Vec<A> second = first;
    if constexpr (Sum::inputs == 2) second = load_first(in.second + i, count - i, neutral);
    Sum::add(first, second, center, sums.s, sums.q);
  }
}

// `rows` rows added to the sums of `wide` vectors of columns, which stay in registers meanwhile. Only the first `count`
// columns of a single vector may be there.
template <class Sum, int rows, int wide, class E, class A, class Load>
BN_HOST_DEVICE void sum_tile(Inputs<E> in, int64_t pitch, const A* center, A* s, A* q, const Load& load_at) {
  constexpr int64_t lanes = Vec<A>::lanes;
  Vec<A> centers[wide];
  SumPair<A> sums[wide];
  for (int w = 0; w < wide; ++w) {
    centers[w] = load(center + w * lanes);
    sums[w] = {Vec<A>(A(0)), Vec<A>(A(0))};
  }
  for (int r = 0; r < rows; ++r) {
    for (int w = 0; w < wide; ++w) {
      const Vec<A> first = load_at(in.first + r * pitch + w * lanes, centers[w]);
      Vec<A> second = first;
      if constexpr (Sum::inputs == 2) second = load_at(in.second + r * pitch + w * lanes, centers[w]);
      Sum::add(first, second, centers[w], sums[w].s, sums[w].q);
    }
  }
  for (int w = 0; w < wide; ++w) {
    store(s + w * lanes, load(s + w * lanes) + sums[w].s);
    store(q + w * lanes, load(q + w * lanes) + sums[w].q);
  }
}

// `rows` rows added to per-column sums.
template <class Sum, int rows, class E, class A = accumulate_t<E>>
inline void sum_rows(Inputs<E> in, int64_t pitch, int64_t columns, const A* center, A* s, A* q) {
  constexpr int64_t lanes = Vec<A>::lanes;
  constexpr int wide = 4;
  const auto whole = [](const E* p, Vec<A>) { return load(p); };
  int64_t j = 0;
  for (; j + wide * lanes <= columns; j += wide * lanes) {
    sum_tile<Sum, rows, wide>(in.at(j), pitch, center + j, s + j, q + j, whole);
  }
  for (; j + lanes <= columns; j += lanes) {
    sum_tile<Sum, rows, 1>(in.at(j), pitch, center + j, s + j, q + j, whole);
  }
  if (j < columns) {
    sum_tile<Sum, rows, 1>(in.at(j), pitch, center + j, s + j, q + j,
                           [&](const E* p, Vec<A> c) { return load_first(p, columns - j, Sum::neutral(c)); });
  }
}

// Samples [slab.begin, slab.end) of channels [channels.begin, channels.end): merge(s, q) with the channels' sums.
template <class Sum, class E, class A, class Merge>
inline void sum_planes(const Shape& shape, Inputs<E> in, Range channels, Range slab, const A* center, Merge merge) {
  SumPair<A> sums[max_block_channels];
  for (int64_t c = 0; c < channels.size(); ++c) sums[c] = {Vec<A>(A(0)), Vec<A>(A(0))};
  for (int64_t sample = slab.begin; sample < slab.end;) {
    const int64_t outer = sample / shape.inner, inner = sample % shape.inner;
    const int64_t count = min(shape.inner - inner, slab.end - sample);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      sum_run<Sum>(in.at((outer * shape.channels + c) * shape.inner + inner), count, Vec<A>(center[c]),
                   sums[c - channels.begin]);
    }
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

template <class Sum, class E, class A, class Merge>
inline void sum_columns(const Shape& shape, int64_t repeat, Inputs<E> in, Range channels, Range slab, const A* center,
                        Merge merge) {
  constexpr int64_t padded = max_columns + Vec<A>::lanes;
  alignas(cache_line) A column_center[padded], s[padded], q[padded];
  spread(shape, repeat, channels, center, column_center);
  const int64_t row_columns = channels.size() * shape.inner;
  const int64_t columns = row_columns * repeat;
  for (int64_t j = 0; j < columns + Vec<A>::lanes; ++j) s[j] = q[j] = A(0);

  constexpr int together = 8;
  const int64_t pitch = shape.channels * shape.inner * repeat;
  const int64_t begin = slab.begin / shape.inner, rows = slab.size() / shape.inner;
  in = in.at((begin * shape.channels + channels.begin) * shape.inner);
  int64_t row = 0;
  for (; row + together <= rows / repeat; row += together) {
    sum_rows<Sum, together>(in.at(row * pitch), pitch, columns, column_center, s, q);
  }
  for (; row < rows / repeat; ++row) sum_rows<Sum, 1>(in.at(row * pitch), pitch, columns, column_center, s, q);
  if (rows % repeat != 0) {
    sum_rows<Sum, 1>(in.at(row * pitch), pitch, rows % repeat * row_columns, column_center, s, q);
  }

  for (int64_t r = 1; r < repeat; ++r) {
    for (int64_t j = 0; j < row_columns; ++j) {
      s[j] += s[r * row_columns + j];
      q[j] += q[r * row_columns + j];
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
  if (blocking.columns) return min(end, begin + rows_per_sum * blocking.repeat * shape.inner);
  const int64_t plane_begin = begin - begin % shape.inner;
  const int64_t planes = min(planes_per_sum, samples_per_sum<A> / shape.inner);
  if (planes == 0) return min(min(end, plane_begin + shape.inner), begin + samples_per_sum<A>);
  return min(end, plane_begin + planes * shape.inner);
}

template <class Sum, class E, class A, class Merge>
inline void sum_slab(const Shape& shape, const Blocking& blocking, Inputs<E> in, Range channels, Range slab,
                     const A* center, Merge merge) {
  if (blocking.columns) {
    sum_columns<Sum>(shape, blocking.repeat, in, channels, slab, center, merge);
  } else {
    sum_planes<Sum>(shape, in, channels, slab, center, merge);
  }
}

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
