// A function of each element and its channel's coefficients, in the planes and the columns view. The Map operation is:
//   Map::inputs, Map::coefficients       how many tensors and how many values per channel it reads
//   Map::outputs                         how many tensors it writes; of two, either may be missing
//   Map::mask                            whether it reads or writes a mask
//   Map::heavy                           whether its code is to stand once in a loop
//   apply(k, in, is_blocked, out)        the results for one vector; k are the coefficients, one vector each
#pragma once

#include "cpu/blocking.h"
#include "cpu/operations.h"
#include "cpu/simd.h"
#include "cpu/sums.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

template <class E>
constexpr int64_t line_elements = cache_line / static_cast<int64_t>(sizeof(E));

// Two vectors one behind the other. Instruction sets may overload it.
template <class E>
BN_HOST_DEVICE void store_two(E* p, Vec<accumulate_t<E>> a, Vec<accumulate_t<E>> b) {
  store(p, a);
  store(p + Vec<accumulate_t<E>>::lanes, b);
}

template <class E, int count>
struct Outputs {
  static constexpr bool streamed = false;

  E* of[count];

  BN_HOST_DEVICE bool has(int n) const { return count == 1 || of[n] != nullptr; }

  // How many elements behind a multiple of `aligned` the first of them begins that is there; -1 if not all do so.
  BN_HOST_DEVICE int64_t skew(int64_t aligned) const {
    int64_t common = -1;
    for (int n = 0; n < count; ++n) {
      if (!has(n)) continue;
      const int64_t own = static_cast<int64_t>(reinterpret_cast<uintptr_t>(of[n]) / sizeof(E)) % aligned;
      if (common >= 0 && own != common) return -1;
      common = own;
    }
    return common;
  }

  template <int inputs>
  BN_HOST_DEVICE bool takes_place_of(const Inputs<E, inputs>& in) const {
    bool same = false;
    for (int n = 0; n < count; ++n) {
      for (int i = 0; i < inputs; ++i) same = same || (has(n) && of[n] == in.of[i]);
    }
    return same;
  }

  BN_HOST_DEVICE Outputs at(int64_t offset) const {
    Outputs moved;
    for (int n = 0; n < count; ++n) moved.of[n] = has(n) ? of[n] + offset : nullptr;
    return moved;
  }

  template <class A>
  BN_HOST_DEVICE void store_vectors(int64_t offset, int64_t some, const Vec<A>* v) const {
    for (int n = 0; n < count; ++n) {
      if (!has(n)) continue;
      if (some == Vec<A>::lanes) {
        store(of[n] + offset, v[n]);
      } else {
        store_first(of[n] + offset, some, v[n]);
      }
    }
  }

  template <bool even_odd, class A>
  BN_HOST_DEVICE void store_two_vectors(int64_t offset, const Vec<A>* v, const Vec<A>* next) const {
    for (int n = 0; n < count; ++n) {
      if (!has(n)) continue;
      if constexpr (even_odd) {
        store_even_odd(of[n] + offset, v[n], next[n]);
      } else {
        store_two(of[n] + offset, v[n], next[n]);
      }
    }
  }
};

// Outputs of which two vectors at a time go past the caches. They begin at multiples of a line then, or where whole
// registers do.
template <class E, int count>
struct StreamedOutputs : Outputs<E, count> {
  static constexpr bool streamed = true;

  explicit StreamedOutputs(Outputs<E, count> out) : Outputs<E, count>(out) {}

  BN_HOST_DEVICE StreamedOutputs at(int64_t offset) const { return StreamedOutputs(Outputs<E, count>::at(offset)); }

  // A vector that is a whole line is streamed too: a store through the caches in between costs more than both.
  template <class A>
  BN_HOST_DEVICE void store_vectors(int64_t offset, int64_t some, const Vec<A>* v) const {
    if constexpr (sizeof(E) * Vec<A>::lanes == cache_line) {
      if (some == Vec<A>::lanes && this->at(offset).skew(line_elements<E>) == 0) {
        for (int n = 0; n < count; ++n) {
          if (this->has(n)) stream<cache_line>(this->of[n] + offset, &v[n]);
        }
        return;
      }
    }
    Outputs<E, count>::store_vectors(offset, some, v);
  }

  template <bool even_odd, class A>
  BN_HOST_DEVICE void store_two_vectors(int64_t offset, const Vec<A>* v, const Vec<A>* next) const {
    alignas(cache_line) E stored[2 * Vec<A>::lanes];
    for (int n = 0; n < count; ++n) {
      if (!this->has(n)) continue;
      if constexpr (even_odd) {
        store_even_odd(stored, v[n], next[n]);
      } else {
        store_two(stored, v[n], next[n]);
      }
      stream<sizeof(stored), stored_bytes<E>>(this->of[n] + offset, stored);
    }
  }
};

// As read_mask. A row's vectors are written from first to last, since several may share a byte.
template <class Operation, class A>
BN_HOST_DEVICE void write_mask(uint8_t* row, int64_t at, int64_t some, Flags<A> is_blocked) {
  if constexpr (Operation::mask == MaskUse::write) {
    if (row == nullptr) return;
    uint32_t passing = ~to_bits(is_blocked) & ((1u << some) - 1u);
    if (Vec<A>::lanes < 8 && (at & 7) != 0) passing = passing << (at & 7) | row[at >> 3];
    row[at >> 3] = static_cast<uint8_t>(passing);
    if (Vec<A>::lanes > 8 && some > 8) row[(at >> 3) + 1] = static_cast<uint8_t>(passing >> 8);
  }
}

template <class Map, class E, class Out, class A>
BN_HOST_DEVICE void map_vector(const Map& map, const Vec<A>* k, Inputs<E, Map::inputs> in, Out out, int64_t offset,
                               uint8_t* mask, int64_t at, int64_t some) {
  Vec<A> v[Map::inputs], results[Map::outputs];
  if (some == Vec<A>::lanes) {
    in.load_vectors(offset + at, v);
  } else {
    in.load_vectors(offset + at, some, Vec<A>(A(0)), v);
  }
  Flags<A> is_blocked = read_mask<Map>(mask, at, some, v[0]);
  map.apply(k, v, is_blocked, results);
  write_mask<Map>(mask, at, some, is_blocked);
  out.store_vectors(offset + at, some, results);
}

// Two vectors one behind the other, which 16-bit results are narrowed in. If they are even and odd elements, so are the
// coefficients.
template <class Map, class E, class Out, class A>
BN_HOST_DEVICE void map_two_vectors(const Map& map, const Vec<A>* k, const Vec<A>* next_k, Inputs<E, Map::inputs> in,
                                    Out out, int64_t offset, uint8_t* mask, int64_t at) {
  constexpr int64_t lanes = Vec<A>::lanes;
  constexpr bool even_odd = is_even_odd<Map, E>;
  Vec<A> v[2][Map::inputs], results[2][Map::outputs];
  if constexpr (even_odd) in.load_even_odd_vectors(offset + at, v[0], v[1]);
  for (int p = 0; p < 2; ++p) {
    if constexpr (!even_odd) in.load_vectors(offset + at + p * lanes, v[p]);
    Flags<A> is_blocked = read_mask<Map>(mask, at + p * lanes, lanes, v[p][0]);
    map.apply(p == 0 ? k : next_k, v[p], is_blocked, results[p]);
    write_mask<Map>(mask, at + p * lanes, lanes, is_blocked);
  }
  out.template store_two_vectors<even_odd>(offset + at, results[0], results[1]);
}

// One contiguous run of a channel, and its bits of the mask; `whole` as in sum_run.
template <class Map, int whole, class E, class Out, class A = accumulate_t<E>>
BN_HOST_DEVICE void map_run(const Map& map, Inputs<E, Map::inputs> in, Out out, uint8_t* mask, int64_t count,
                            const Coefficients<A>& coefficients, int64_t channel) {
  constexpr int64_t lanes = Vec<A>::lanes;
  constexpr int unroll = 4;
  Vec<A> k[Map::coefficients];
  for (int n = 0; n < Map::coefficients; ++n) k[n] = Vec<A>(coefficients.of[n][channel]);
  // The elements from `at` on, less than a vector.
  const auto map_last = [&](int64_t at) {
    if constexpr (ends_in_whole_vectors<E> && Map::mask == MaskUse::none && !Out::streamed) {
      if (count >= lanes && !out.takes_place_of(in)) {
        return map_vector(map, k, in, out, 0, mask, count - lanes, lanes);
      }
    }
    map_vector(map, k, in, out, 0, mask, at, count - at);
  };
  int64_t i = 0;
  if constexpr (Map::heavy) {
    for (; i < count; i += lanes) map_vector(map, k, in, out, 0, mask, i, min(lanes, count - i));
    return;
  }
  static_assert(whole < 4 && unroll % 2 == 0);
  if constexpr (whole >= 0) {
    if constexpr (whole >= 2) map_two_vectors(map, k, k, in, out, 0, mask, 0);
    if constexpr (whole % 2 == 1) map_vector(map, k, in, out, 0, mask, (whole - 1) * lanes, lanes);
    if (count > whole * lanes) map_last(whole * lanes);
    return;
  }
  if constexpr (Out::streamed || (sizeof(E) == sizeof(A) && Map::mask == MaskUse::none)) {
    // What follows stores whole lines then. Narrowed vectors are half a line, and gain nothing unless they are
    // streamed.
    const int64_t aligned = Out::streamed ? line_elements<E> : lanes;
    const int64_t skew = out.skew(aligned);
    if (skew > 0 && count >= unroll * lanes) {
      for (const int64_t head = min(count, aligned - skew); i < head;) {
        const int64_t some = min(lanes, head - i);
        map_vector(map, k, in, out, 0, mask, i, some);
        i += some;
      }
    }
  }
  for (; i + unroll * lanes <= count; i += unroll * lanes) {
    for (int u = 0; u < unroll; u += 2) map_two_vectors(map, k, k, in, out, 0, mask, i + u * lanes);
  }
  if constexpr (Out::streamed || is_even_odd<Map, E>) {
    for (; i + 2 * lanes <= count; i += 2 * lanes) map_two_vectors(map, k, k, in, out, 0, mask, i);
  }
  for (; i + lanes <= count; i += lanes) map_vector(map, k, in, out, 0, mask, i, lanes);
  if (i < count) map_last(i);
}

// A run of `count` in each of the channels, which are `pitch` elements and `mask_pitch` bytes of the mask apart. All
// arguments are values: what is behind a reference would be read again after each store.
template <class Map, class E, class Out, class A>
inline void map_runs(Map map, Inputs<E, Map::inputs> in, Out out, uint8_t* mask, int64_t count, int64_t pitch,
                     int64_t mask_pitch, Range channels, Coefficients<A> coefficients) {
  const auto walk = [&](auto whole) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      map_run<Map, decltype(whole)::value>(map, in, out, mask, count, coefficients, c);
      in = in.at(pitch);
      out = out.at(pitch);
      mask = move_mask<Map>(mask, mask_pitch);
    }
  };
  if constexpr (!Map::heavy && !Out::streamed) {
    if (count < 4 * Vec<A>::lanes) return with_constant(count / Vec<A>::lanes, walk);
  }
  walk(Constant<-1>{});
}

// `rows` rows of `wide` vectors of columns, whose coefficients stay in registers meanwhile. Rows of the tensors are
// `pitch` elements apart, and of the mask `mask_pitch` bytes. Of a single vector, only the first `some` columns may be
// there.
template <class Map, int wide, class E, class Out, class A>
BN_HOST_DEVICE void map_tile(const Map& map, Inputs<E, Map::inputs> in, Out out, int64_t rows, int64_t pitch,
                             uint8_t* mask, int64_t mask_pitch, int64_t column, int64_t some,
                             const Coefficients<A>& coefficients) {
  constexpr int64_t lanes = Vec<A>::lanes;
  Vec<A> k[wide][Map::coefficients];
  for (int w = 0; w < wide; ++w) {
    for (int n = 0; n < Map::coefficients; ++n) k[w][n] = load(coefficients.of[n] + column + w * lanes);
  }
  if constexpr (is_even_odd<Map, E>) {
    for (int w = 0; w + 1 < wide; w += 2) {
      for (int n = 0; n < Map::coefficients; ++n) to_even_odd(k[w][n], k[w + 1][n]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* const bits = move_mask<Map>(mask, r * mask_pitch);
    static_assert(wide == 1 || wide % 2 == 0);
    for (int w = 0; w + 1 < wide; w += 2) {
      map_two_vectors(map, k[w], k[w + 1], in, out, r * pitch, bits, column + w * lanes);
    }
    if constexpr (wide == 1) map_vector(map, k[0], in, out, r * pitch, bits, column, some);
  }
}

// `rows` rows, `tile_rows` of them at a time.
template <class Map, class E, class Out, class A = accumulate_t<E>>
BN_CPU_NOINLINE void map_rows(const Map& map, Inputs<E, Map::inputs> in, Out out, int64_t rows, int64_t tile_rows,
                              int64_t pitch, uint8_t* mask, int64_t mask_pitch, int64_t columns,
                              const Coefficients<A>& coefficients) {
  constexpr int64_t lanes = Vec<A>::lanes;
  constexpr int wide = Map::heavy ? 1 : Map::coefficients > 4 ? 2 : 4;
  for (int64_t row = 0; row < rows; row += tile_rows) {
    const int64_t together = min(tile_rows, rows - row);
    const auto from = in.at(row * pitch);
    const auto to = out.at(row * pitch);
    uint8_t* const bits = move_mask<Map>(mask, row * mask_pitch);
    int64_t j = 0;
    if constexpr (wide > 1) {
      for (; j + wide * lanes <= columns; j += wide * lanes) {
        map_tile<Map, wide>(map, from, to, together, pitch, bits, mask_pitch, j, lanes, coefficients);
      }
    }
    if constexpr (wide > 2 && (Out::streamed || is_even_odd<Map, E>)) {
      for (; j + 2 * lanes <= columns; j += 2 * lanes) {
        map_tile<Map, 2>(map, from, to, together, pitch, bits, mask_pitch, j, lanes, coefficients);
      }
    }
    for (; j < columns; j += lanes) {
      map_tile<Map, 1>(map, from, to, together, pitch, bits, mask_pitch, j, min(lanes, columns - j), coefficients);
    }
  }
}

// Collects results of short runs in the first-level cache and writes them past the caches in whole lines. Little is
// collected at a time: memory is then read and written at once, which is what makes it fast.
template <class E>
class LineWriter {
 public:
  static constexpr int64_t line = line_elements<E>;
  static constexpr int64_t piece = 16 * line;  // the most elements that may be added at once

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
    if (filled_ == skipped_) return;
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
    for (; at + line <= filled_; at += line) stream<cache_line>(out_ + at, lines_ + at);
    copy(lines_, lines_ + at, line);
    out_ += at;
    filled_ -= at;
  }

  alignas(cache_line) E lines_[piece + 2 * line];
  E* out_ = nullptr;     // of lines_[0], the beginning of a line
  int64_t filled_ = 0;   // elements of lines_ in use
  int64_t skipped_ = 0;  // of which the first are not results
};

// One for each result of a map.
template <class E, int count>
class LineWriters {
 public:
  static constexpr int64_t piece = LineWriter<E>::piece;

  // What goes to `out` from now on; what came before is written.
  void start(Outputs<E, count> out) {
    finish();
    started_ = out;
    for (int n = 0; n < count; ++n) {
      if (out.has(n)) writers_[n].start(out.of[n]);
    }
  }

  Outputs<E, count> next() {
    Outputs<E, count> to;
    for (int n = 0; n < count; ++n) to.of[n] = started_.has(n) ? writers_[n].next() : nullptr;
    return to;
  }

  void add(int64_t elements) {
    for (int n = 0; n < count; ++n) {
      if (started_.has(n)) writers_[n].add(elements);
    }
  }

  void finish() {
    for (LineWriter<E>& writer : writers_) writer.finish();
  }

 private:
  LineWriter<E> writers_[count];
  Outputs<E, count> started_{};
};

// action(chunk) for the chunks of `samples`, from last to first if `backwards`. Within a chunk it goes forwards, since
// memory is read ahead in that direction only.
template <class Action>
inline void for_each_chunk(const Shape& shape, bool backwards, Range samples, int64_t sample_bytes, int64_t unit,
                           const Action& action) {
  if (!backwards) return action(samples);
  constexpr int64_t chunk_bytes = 256 << 10;
  const int64_t chunk = max(1, chunk_bytes / (sample_bytes * unit)) * unit;
  const int64_t chunks = (samples.size() + chunk - 1) / chunk;
  for (int64_t n = chunks - 1; n >= 0; --n) {
    const auto boundary = [&](int64_t index) {
      return index == 0 ? samples.begin : byte_boundary(shape, samples.begin + index * chunk);
    };
    action(Range{boundary(n), n + 1 == chunks ? samples.end : boundary(n + 1)});
  }
}

// Runs as long as this are streamed as they are computed, but for the lines that they begin and end in.
constexpr int64_t shortest_streamed_run = 8 << 10;

// How results get to memory.
enum class Writes { cached, streamed, collected };

// Of runs that lie `pitch` elements apart. Those that are not `long_runs` must begin at lines to be streamed, and where
// there is a mask, all must: its bits are those of vectors from a run's beginning.
template <class Map, class E>
inline Writes writes(bool stream, const Outputs<E, Map::outputs>& out, int64_t pitch, bool long_runs) {
  if (!stream) return Writes::cached;
  const int64_t skew = out.skew(line_elements<E>);
  const bool at_lines = skew == 0 && pitch % line_elements<E> == 0;
  const bool anywhere = skew >= 0 && long_runs && Map::mask == MaskUse::none;
  return !Map::heavy && (at_lines || anywhere) ? Writes::streamed : Writes::collected;
}

template <class Map, class E, class A>
BN_CPU_NOINLINE void map_planes(const Map& map, const Shape& shape, bool backwards, bool stream,
                                Inputs<E, Map::inputs> in, Outputs<E, Map::outputs> out, uint8_t* mask, Range channels,
                                Range samples, const Coefficients<A>& coefficients) {
  constexpr int64_t longest_whole_plane = 65536;
  LineWriters<E, Map::outputs> writers;
  const int64_t sample_bytes = channels.size() * static_cast<int64_t>(sizeof(E));
  const int64_t unit = shape.inner <= longest_whole_plane ? shape.inner : 4096;
  const int64_t mask_row = mask_row_bytes(shape.inner);
  const bool long_runs = shape.inner * static_cast<int64_t>(sizeof(E)) >= shortest_streamed_run;
  const Writes how = writes<Map>(stream, out, shape.inner, long_runs);
  for_each_chunk(shape, backwards, samples, sample_bytes, unit, [&](Range chunk) {
    for (int64_t sample = chunk.begin; sample < chunk.end;) {
      const int64_t outer = sample / shape.inner, inner = sample % shape.inner;
      const int64_t count = min(shape.inner - inner, chunk.end - sample);
      sample += count;
      const auto map_all = [&](auto to) {
        const int64_t plane = outer * shape.channels + channels.begin, at = plane * shape.inner + inner;
        map_runs(map, in.at(at), to.at(at), move_mask<Map>(mask, plane * mask_row + inner / 8), count, shape.inner,
                 mask_row, channels, coefficients);
      };
      if (how == Writes::cached) {
        map_all(out);
        continue;
      }
      if constexpr (!Map::heavy) {
        if (how == Writes::streamed) {
          map_all(StreamedOutputs<E, Map::outputs>(out));
          continue;
        }
      }
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const int64_t plane = outer * shape.channels + c, at = plane * shape.inner + inner;
        uint8_t* const bits = move_mask<Map>(mask, plane * mask_row + inner / 8);
        if (c == channels.begin || count < shape.inner) writers.start(out.at(at));
        for (int64_t i = 0; i < count; i += writers.piece) {
          const int64_t some = min(count - i, writers.piece);
          map_run<Map, -1>(map, in.at(at + i), writers.next(), move_mask<Map>(bits, i / 8), some, coefficients, c);
          writers.add(some);
        }
      }
    }
  });
  writers.finish();
}

// From the first row of a tile to its last, at most: half of what a first-level cache has of one set after another.
constexpr int64_t spread_of_rows = 8 << 10;
// What a third-level cache hands out as fast in any order, at most.
constexpr int64_t held_bytes = 20 << 20;

template <class Map, class E, class A>
BN_CPU_NOINLINE void map_columns(const Map& map, const Shape& shape, int64_t repeat, bool backwards, bool stream,
                                 Inputs<E, Map::inputs> in, Outputs<E, Map::outputs> out, uint8_t* mask, Range channels,
                                 Range samples, const Coefficients<A>& coefficients) {
  const ColumnCoefficients<Map::coefficients, A> of_columns(shape, repeat, channels, coefficients);
  const Coefficients<A> per_column = of_columns.from(0);
  const int64_t row_columns = channels.size() * shape.inner;
  const int64_t columns = row_columns * repeat;
  const int64_t pitch = shape.channels * shape.inner * repeat, mask_pitch = mask_row_bytes(pitch);
  const int64_t sample_bytes = channels.size() * static_cast<int64_t>(sizeof(E));
  // A tile reads coefficients once for all its rows, but memory is read best in its order. Up to what the caches hold,
  // and for elements that are converted, more rows are worth it, as long as these do not fall on the same cache sets.
  const int64_t pitch_bytes = pitch * static_cast<int64_t>(sizeof(E));
  const int64_t together = min(rows_together, max(1, spread_of_rows / pitch_bytes));
  const int64_t moved_bytes = shape.elements() * static_cast<int64_t>(sizeof(E)) * (Map::inputs + Map::outputs);
  // Of two inputs and a result, the rows of a tile are more than a core reads ahead.
  const bool many_streams = Map::inputs == 2 && Map::outputs == 1 && columns == pitch && 2 * moved_bytes > held_bytes;
  const bool worth_order = many_streams || (pitch_bytes >= 1024 && sizeof(E) == sizeof(A));
  const bool in_order = pitch_bytes >= 512 && (moved_bytes > held_bytes || worth_order);
  const int64_t tile_rows = in_order ? 1 : together;
  const Writes how = writes<Map>(stream, out.at(channels.begin * shape.inner), pitch, false);
  LineWriters<E, Map::outputs> writers;
  for_each_chunk(shape, backwards, samples, sample_bytes, shape.inner * repeat, [&](Range chunk) {
    const int64_t begin = chunk.begin / shape.inner, rows = chunk.size() / shape.inner;
    const int64_t base = (begin * shape.channels + channels.begin) * shape.inner;
    const int64_t whole = rows / repeat, rest = rows % repeat * row_columns;
    const auto bits_of = [&](int64_t row, int64_t column) {
      return move_mask<Map>(mask, (begin / repeat + row) * mask_pitch + (channels.begin * shape.inner + column) / 8);
    };
    const auto map_all = [&](auto to, int64_t rows_of_tile) {
      map_rows(map, in.at(base), to.at(base), whole, rows_of_tile, pitch, bits_of(0, 0), mask_pitch, columns,
               per_column);
      if (rest > 0) {
        const int64_t at = base + whole * pitch;
        map_rows(map, in.at(at), out.at(at), 1, 1, pitch, bits_of(whole, 0), mask_pitch, rest, per_column);
      }
    };
    if (how == Writes::cached) return map_all(out, tile_rows);
    if constexpr (!Map::heavy) {
      if (how == Writes::streamed) return map_all(StreamedOutputs<E, Map::outputs>(out), 1);
    }
    for (int64_t row = 0; row < whole + (rest > 0 ? 1 : 0); ++row) {
      const int64_t at = base + row * pitch, width = row < whole ? columns : rest;
      if (row == 0 || columns < pitch) writers.start(out.at(at));
      for (int64_t j = 0; j < width; j += writers.piece) {
        const int64_t some = min(width - j, writers.piece);
        map_rows(map, in.at(at + j), writers.next(), 1, 1, pitch, bits_of(row, j), mask_pitch, some,
                 of_columns.from(j));
        writers.add(some);
      }
    }
  });
  writers.finish();
}

template <class Map, class E, class A>
inline void map_samples(const Map& map, const Shape& shape, const Blocking& blocking, Inputs<E, Map::inputs> in,
                        Outputs<E, Map::outputs> out, uint8_t* mask, Range channels, Range samples,
                        const Coefficients<A>& coefficients) {
  if (blocking.columns) {
    map_columns(map, shape, blocking.repeat, blocking.backwards, blocking.stream, in, out, mask, channels, samples,
                coefficients);
  } else {
    map_planes(map, shape, blocking.backwards, blocking.stream, in, out, mask, channels, samples, coefficients);
  }
  if (blocking.stream) finish_streaming();
}

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
