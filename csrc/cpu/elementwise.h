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

// `rows` rows of `wide` vectors of columns, whose coefficients stay in registers meanwhile. Rows of `in` and `out` are
// `pitch` elements apart.
template <class Map, int rows, int wide, class E, class A>
BN_HOST_DEVICE void map_tile(Inputs<E> in, int64_t pitch, E* out, const Coefficients<A>& coefficients, int64_t column) {
  constexpr int64_t lanes = Vec<A>::lanes;
  Vec<A> k[wide][Map::coefficients];
  for (int w = 0; w < wide; ++w) {
    for (int n = 0; n < Map::coefficients; ++n) k[w][n] = load(coefficients.of[n] + column + w * lanes);
  }
  for (int r = 0; r < rows; ++r) {
    for (int w = 0; w < wide; ++w) {
      const int64_t at = r * pitch + column + w * lanes;
      const Vec<A> first = load(in.first + at);
      Vec<A> second = first;
      if constexpr (Map::inputs == 2) second = load(in.second + at);
      store(out + at, Map::apply(k[w], first, second));
    }
  }
}

template <class Map, int rows, class E, class A = accumulate_t<E>>
inline void map_rows(Inputs<E> in, int64_t pitch, E* out, int64_t columns, const Coefficients<A>& coefficients) {
  constexpr int64_t lanes = Vec<A>::lanes;
  constexpr int wide = 4;
  int64_t j = 0;
  for (; j + wide * lanes <= columns; j += wide * lanes) {
    map_tile<Map, rows, wide>(in, pitch, out, coefficients, j);
  }
  for (; j + lanes <= columns; j += lanes) map_tile<Map, rows, 1>(in, pitch, out, coefficients, j);
  if (j < columns) {
    const Vec<A> zero(A(0));
    Vec<A> k[Map::coefficients];
    for (int n = 0; n < Map::coefficients; ++n) k[n] = load(coefficients.of[n] + j);
    for (int r = 0; r < rows; ++r) {
      const Vec<A> first = load_first(in.first + r * pitch + j, columns - j, zero);
      Vec<A> second = first;
      if constexpr (Map::inputs == 2) second = load_first(in.second + r * pitch + j, columns - j, zero);
      store_first(out + r * pitch + j, columns - j, Map::apply(k, first, second));
    }
  }
}

// Collects results in the first-level cache and writes them past the caches in whole lines. Little is collected at a
// time: memory is then read and written at once, which is what makes it fast.
template <class E>
class LineWriter {
 public:
  static constexpr int64_t line = cache_line / static_cast<int64_t>(sizeof(E));
  static constexpr int64_t piece = 16 * line;  // the most elements that may be added at once

  explicit LineWriter(E* out) { start(out); }

  void start(E* out) {
    skipped_ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % cache_line / sizeof(E));
    out_ = out - skipped_;
    filled_ = skipped_;
  }

  // Where the next `count` <= piece results go.
  E* next() { return lines_ + filled_; }

  void add(int64_t count) {
    filled_ += count;
    if (filled_ >= line) flush();
  }

  void finish() {
    copy(out_ + skipped_, lines_ + skipped_, filled_ - skipped_);
    out_ += filled_;
    filled_ = skipped_ = 0;
  }

 private:
  void copy(E* to, const E* from, int64_t count) { __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(E)); }

  void flush() {
    int64_t at = 0;
    if (skipped_ > 0) {  // the line that the results begin in is not theirs alone
      copy(out_ + skipped_, lines_ + skipped_, line - skipped_);
      skipped_ = 0;
      at = line;
    }
    for (; at + line <= filled_; at += line) stream_line(out_ + at, lines_ + at);
    copy(lines_, lines_ + at, line);
    out_ += at;
    filled_ -= at;
  }

  alignas(cache_line) E lines_[piece + 2 * line];
  E* out_;           // of lines_[0], the beginning of a line
  int64_t filled_;   // elements of lines_ in use
  int64_t skipped_;  // of which the first are not results
};

// action(chunk) for the chunks of `samples` from last to first: the sums went forwards, so that the end is still in the
// cache. Within a chunk it goes forwards, since memory is read ahead in that direction only.
template <class Action>
inline void for_each_chunk_backwards(Range samples, int64_t sample_bytes, int64_t unit, const Action& action) {
  constexpr int64_t chunk_bytes = 256 << 10;
  const int64_t chunk = max(1, chunk_bytes / (sample_bytes * unit)) * unit;
  const int64_t chunks = (samples.size() + chunk - 1) / chunk;
  for (int64_t n = chunks - 1; n >= 0; --n) {
    const int64_t begin = samples.begin + n * chunk;
    action(Range{begin, min(samples.end, begin + chunk)});
  }
}

template <class Map, class E, class A>
inline void map_planes(const Shape& shape, bool stream, Inputs<E> in, E* out, Range channels, Range samples,
                       const Coefficients<A>& coefficients) {
  constexpr int64_t longest_whole_plane = 65536;
  LineWriter<E> writer(out);
  const int64_t sample_bytes = channels.size() * static_cast<int64_t>(sizeof(E));
  const int64_t unit = shape.inner <= longest_whole_plane ? shape.inner : 4096;
  for_each_chunk_backwards(samples, sample_bytes, unit, [&](Range chunk) {
    for (int64_t sample = chunk.begin; sample < chunk.end;) {
      const int64_t outer = sample / shape.inner, inner = sample % shape.inner;
      const int64_t count = min(shape.inner - inner, chunk.end - sample);
      const int64_t base = outer * shape.channels * shape.inner + inner;
      sample += count;
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const int64_t at = base + c * shape.inner;
        if (!stream) {
          map_run<Map>(in.at(at), out + at, count, coefficients, c);
          continue;
        }
        if (c == channels.begin || count < shape.inner) {
          writer.finish();
          writer.start(out + at);
        }
        for (int64_t i = 0; i < count; i += LineWriter<E>::piece) {
          const int64_t some = min(count - i, LineWriter<E>::piece);
          map_run<Map>(in.at(at + i), writer.next(), some, coefficients, c);
          writer.add(some);
        }
      }
    }
  });
  writer.finish();
}

template <class Map, class E, class A>
inline void map_columns(const Shape& shape, int64_t repeat, bool stream, Inputs<E> in, E* out, Range channels,
                        Range samples, const Coefficients<A>& coefficients) {
  constexpr int64_t padded = max_columns + Vec<A>::lanes;
  constexpr int together = 8;
  alignas(cache_line) A column_values[Map::coefficients][padded];
  Coefficients<A> per_column;
  for (int n = 0; n < Map::coefficients; ++n) {
    per_column.of[n] = column_values[n];
    spread(shape, repeat, channels, coefficients.of[n], column_values[n]);
  }
  const auto columns_from = [&](int64_t column) {
    Coefficients<A> from;
    for (int n = 0; n < Map::coefficients; ++n) from.of[n] = column_values[n] + column;
    return from;
  };

  const int64_t row_columns = channels.size() * shape.inner;
  const int64_t columns = row_columns * repeat;
  const int64_t pitch = shape.channels * shape.inner * repeat;
  const int64_t sample_bytes = channels.size() * static_cast<int64_t>(sizeof(E));
  LineWriter<E> writer(out);
  for_each_chunk_backwards(samples, sample_bytes, shape.inner * repeat, [&](Range chunk) {
    const int64_t begin = chunk.begin / shape.inner, rows = chunk.size() / shape.inner;
    const int64_t base = (begin * shape.channels + channels.begin) * shape.inner;
    const int64_t whole = rows / repeat, rest = rows % repeat * row_columns;
    if (!stream) {
      int64_t row = 0;
      for (; row + together <= whole; row += together) {
        map_rows<Map, together>(in.at(base + row * pitch), pitch, out + base + row * pitch, columns, per_column);
      }
      for (; row < whole; ++row) {
        map_rows<Map, 1>(in.at(base + row * pitch), pitch, out + base + row * pitch, columns, per_column);
      }
      if (rest > 0) map_rows<Map, 1>(in.at(base + row * pitch), pitch, out + base + row * pitch, rest, per_column);
      return;
    }
    for (int64_t row = 0; row < whole + (rest > 0 ? 1 : 0); ++row) {
      const int64_t at = base + row * pitch, width = row < whole ? columns : rest;
      if (row == 0 || columns < pitch) {
        writer.finish();
        writer.start(out + at);
      }
      for (int64_t j = 0; j < width; j += LineWriter<E>::piece) {
        const int64_t some = min(width - j, LineWriter<E>::piece);
        map_rows<Map, 1>(in.at(at + j), pitch, writer.next(), some, columns_from(j));
        writer.add(some);
      }
    }
  });
  writer.finish();
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
