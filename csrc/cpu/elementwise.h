// A function of each element and its channel's coefficients, in the planes and the columns view. The Map operation is:
//   Map::inputs, Map::coefficients       how many tensors and how many values per channel it reads
//   Map::apply(k, v0, v1)                the result for one vector; k are the coefficients, one vector each
#pragma once

#include "cpu/blocking.h"
#include "cpu/simd.h"
#include "cpu/sums.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

constexpr int max_coefficients = 4;

// coefficient[k][channel]
template <class A>
struct Coefficients {
  A* of[max_coefficients];
};

template <class Map, class E, class A = accumulate_t<E>>
inline void map_run(Inputs<E> in, E* out, int64_t count, const Coefficients<A>& coefficients, int64_t channel) {
  constexpr int64_t lanes = Vec<A>::lanes;
  constexpr int unroll = 4;
  Vec<A> k[Map::coefficients];
  for (int n = 0; n < Map::coefficients; ++n) k[n] = Vec<A>(coefficients.of[n][channel]);
  const auto step = [&](int64_t i) {
    const Vec<A> first = load(in.first + i);
    Vec<A> second = first;
    if constexpr (Map::inputs == 2) second = load(in.second + i);
    store(out + i, Map::apply(k, first, second));
  };
  int64_t i = 0;
  for (; i + unroll * lanes <= count; i += unroll * lanes) {
    for (int u = 0; u < unroll; ++u) step(i + u * lanes);
  }
  for (; i + lanes <= count; i += lanes) step(i);
  if (i < count) {
    const Vec<A> zero(A(0));
    const Vec<A> first = load_first(in.first + i, count - i, zero);
    Vec<A> second = first;
    if constexpr (Map::inputs == 2) second = load_first(in.second + i, count - i, zero);
    store_first(out + i, count - i, Map::apply(k, first, second));
  }
}

template <class Map, int rows, class E, class A = accumulate_t<E>>
inline void map_rows(Inputs<E> in, int64_t pitch, E* out, int64_t out_pitch, int64_t columns,
                     const Coefficients<A>& coefficients) {
  constexpr int64_t lanes = Vec<A>::lanes;
  int64_t j = 0;
  Vec<A> k[Map::coefficients];
  for (; j + lanes <= columns; j += lanes) {
    for (int n = 0; n < Map::coefficients; ++n) k[n] = load(coefficients.of[n] + j);
    for (int r = 0; r < rows; ++r) {
      const Vec<A> first = load(in.first + r * pitch + j);
      Vec<A> second = first;
      if constexpr (Map::inputs == 2) second = load(in.second + r * pitch + j);
      store(out + r * out_pitch + j, Map::apply(k, first, second));
    }
  }
  if (j < columns) {
    const Vec<A> zero(A(0));
    for (int n = 0; n < Map::coefficients; ++n) k[n] = load(coefficients.of[n] + j);
    for (int r = 0; r < rows; ++r) {
      const Vec<A> first = load_first(in.first + r * pitch + j, columns - j, zero);
      Vec<A> second = first;
      if constexpr (Map::inputs == 2) second = load_first(in.second + r * pitch + j, columns - j, zero);
      store_first(out + r * out_pitch + j, columns - j, Map::apply(k, first, second));
    }
  }
}

// Streamed results are made here first: small enough for the first-level cache, long enough that the partial lines at
// the ends of a copy do not count.
constexpr int64_t staging_bytes = 8 << 10;

// Planes and pieces of planes go backwards: the sums went forwards, so the end of the range is still in the cache.
template <class Map, class E, class A>
inline void map_planes(const Shape& shape, bool stream, Inputs<E> in, E* out, Range channels, Range samples,
                       const Coefficients<A>& coefficients) {
  constexpr int64_t staged = staging_bytes / static_cast<int64_t>(sizeof(E));
  alignas(cache_line) E staging[staged];
  for (int64_t end = samples.end; end > samples.begin;) {
    const int64_t outer = (end - 1) / shape.inner;
    const int64_t begin = max(samples.begin, outer * shape.inner);
    const int64_t count = end - begin;
    const int64_t base = outer * shape.channels * shape.inner + (begin - outer * shape.inner);
    end = begin;
    if (stream && count == shape.inner && count * 2 <= staged) {
      for (int64_t c = channels.begin; c < channels.end;) {
        const int64_t together = min(channels.end - c, staged / count);
        for (int64_t n = 0; n < together; ++n) {
          map_run<Map>(in.at(base + (c + n) * count), staging + n * count, count, coefficients, c + n);
        }
        stream_copy(out + base + c * count, staging, together * count * static_cast<int64_t>(sizeof(E)));
        c += together;
      }
      continue;
    }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t at = base + c * shape.inner;
      for (int64_t piece_end = count; piece_end > 0;) {
        const int64_t piece = max(0, piece_end - staged);
        map_run<Map>(in.at(at + piece), stream ? staging : out + at + piece, piece_end - piece, coefficients, c);
        if (stream) stream_copy(out + at + piece, staging, (piece_end - piece) * static_cast<int64_t>(sizeof(E)));
        piece_end = piece;
      }
    }
  }
}

template <int number>
struct Constant {
  static constexpr int value = number;
};

template <class Map, class E, class A>
inline void map_columns(const Shape& shape, int64_t repeat, bool stream, Inputs<E> in, E* out, Range channels,
                        Range samples, const Coefficients<A>& coefficients) {
  constexpr int64_t padded = max_columns + Vec<A>::lanes;
  constexpr int together = 4;
  alignas(cache_line) A column_values[Map::coefficients][padded];
  alignas(cache_line) E staging[together * max_columns];
  Coefficients<A> per_column;
  for (int n = 0; n < Map::coefficients; ++n) {
    per_column.of[n] = column_values[n];
    spread(shape, repeat, channels, coefficients.of[n], column_values[n]);
  }

  const int64_t row_columns = channels.size() * shape.inner;
  const int64_t columns = row_columns * repeat;
  const int64_t pitch = shape.channels * shape.inner * repeat;
  const int64_t begin = samples.begin / shape.inner, rows = samples.size() / shape.inner;
  const int64_t base = (begin * shape.channels + channels.begin) * shape.inner;
  in = in.at(base);
  out += base;

  const auto map_some = [&](auto row_count, int64_t row, int64_t width) {
    E* const to = out + row * pitch;
    if (!stream) {
      map_rows<Map, row_count.value>(in.at(row * pitch), pitch, to, pitch, width, per_column);
      return;
    }
    map_rows<Map, row_count.value>(in.at(row * pitch), pitch, staging, width, width, per_column);
    const int64_t width_bytes = width * static_cast<int64_t>(sizeof(E));
    if (width == pitch) {
      stream_copy(to, staging, row_count.value * width_bytes);
    } else {
      for (int r = 0; r < row_count.value; ++r) stream_copy(to + r * pitch, staging + r * width, width_bytes);
    }
  };
  int64_t row = rows / repeat;
  if (rows % repeat != 0) map_some(Constant<1>{}, row, rows % repeat * row_columns);
  for (; row % together != 0; --row) map_some(Constant<1>{}, row - 1, columns);
  for (; row > 0; row -= together) map_some(Constant<together>{}, row - together, columns);
}

template <class Map, class E, class A>
inline void map_samples(const Shape& shape, const Blocking& blocking, Inputs<E> in, E* out, Range channels,
                        Range samples, const Coefficients<A>& coefficients) {
  if (blocking.columns) {
    map_columns<Map>(shape, blocking.repeat, blocking.stream, in, out, channels, samples, coefficients);
  } else {
    map_planes<Map>(shape, blocking.stream, in, out, channels, samples, coefficients);
  }
  if (blocking.stream) finish_streaming();
}

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
