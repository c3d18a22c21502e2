// The heuristics behind Blocking. Cache sizes are those of a server core; they bound speed, not correctness.
#include "cpu/blocking.h"

#include <algorithm>
#include <numeric>

namespace batchnorm_ext::cpu {
namespace {

constexpr int64_t cache_line = 64;
constexpr int64_t private_cache = 512 << 10;  // half of a 1 MB second-level cache
constexpr int64_t shared_cache = 16 << 20;    // half of a 32 MB third-level cache
// What a call may move before results are better written past a third-level cache of 32 MB: what is read once has room
// beside them, what is read again should not be pushed out, least of all several tensors.
constexpr int64_t held_once = 48 << 20, held_input = 27 << 20, held_inputs = 24 << 20;
// Contiguous bytes below which a block is read slower than it saves: from a core's own cache, and from memory, of all
// inputs.
constexpr int64_t shortest_near_run = 256, shortest_runs = 16 << 10;
constexpr int64_t parallel_bytes = 64 << 10;  // a task must move this much to be worth a thread
// Vectors run across channels instead of along planes of less than one vector, or two if so many rows share what that
// takes: the coefficients of each column. Planes of exactly one vector take less.
constexpr int64_t rows_for_two_vectors = 4;
// Sums have one coefficient and write nothing, so that their vectors run across channels also where planes are longer,
// if so many rows share what adding up the columns of each channel takes.
constexpr int64_t shortest_summed_plane = 64, rows_for_summed_planes = 64;
constexpr int64_t page = 4 << 10;  // cores fetch the lines behind those they use, but not across pages

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

Range split(int64_t size, int64_t unit, int64_t tasks, int64_t task) {
  const int64_t units = ceil_div(size, unit);
  const auto boundary = [&](int64_t index) { return std::min(size, units * index / tasks * unit); };
  return {boundary(task), boundary(task + 1)};
}

Range own_samples(const Shape& shape, const Blocking& blocking, int64_t task) {
  const Range share = split(shape.samples(), blocking.sample_unit, blocking.tasks, task);
  const int64_t last = shape.samples();
  return {byte_boundary(shape, share.begin), share.end == last ? last : byte_boundary(shape, share.end)};
}

int64_t used_mask_bytes(const Shape& shape, const Blocking& blocking) {
  const int64_t row_elements = shape.channels * shape.inner;
  if (!blocking.columns) return shape.outer * shape.channels * mask_row_bytes(shape.inner);
  return shape.outer / blocking.repeat * mask_row_bytes(row_elements * blocking.repeat) +
         mask_row_bytes(shape.outer % blocking.repeat * row_elements);
}

MaskBit mask_bit(const Shape& shape, const Blocking& blocking, int64_t outer, int64_t channel, int64_t inner) {
  const int64_t plane = outer * shape.channels + channel;
  if (!blocking.columns) return {plane * mask_row_bytes(shape.inner) + inner / 8, inner % 8};
  const int64_t row_elements = shape.channels * shape.inner * blocking.repeat;
  const int64_t in_row = (plane * shape.inner + inner) % row_elements;
  return {outer / blocking.repeat * mask_row_bytes(row_elements) + in_row / 8, in_row % 8};
}

Blocking choose_blocking(const Shape& shape, int64_t element_size, const Traffic& traffic, int64_t lanes,
                         int64_t threads) {
  Blocking blocking{};
  const int64_t row_elements = shape.channels * shape.inner;
  const int64_t tensor_bytes = shape.elements() * element_size;
  const int64_t channel_bytes = shape.samples() * element_size * traffic.inputs;
  const int64_t run_bytes = shape.inner * element_size;  // of one channel
  const int64_t shortest = shape.outer >= rows_for_two_vectors ? 2 * lanes : lanes;
  blocking.columns = shape.inner < shortest && (shape.inner != lanes || traffic.masked);
  const bool summed_by_many = shape.outer >= rows_for_summed_planes && !traffic.masked_sums;  // the mask has one view
  blocking.sums_by_columns = shape.inner < (summed_by_many ? std::max(shortest, shortest_summed_plane) : shortest);
  if (traffic.summed_in_runs && shape.inner > 1) blocking.sums_by_columns = false;
  const bool masked_columns = blocking.columns && traffic.masked;
  const bool columns = traffic.sums ? blocking.sums_by_columns : blocking.columns;
  const int64_t tensors = traffic.inputs + traffic.late_inputs + traffic.outputs;
  const bool reads_more = traffic.inputs + traffic.late_inputs > traffic.outputs;
  const int64_t cached = !traffic.sums_first ? held_once : reads_more ? held_inputs : held_input;
  blocking.backwards = traffic.sums_first;
  blocking.stream = traffic.outputs > 0 && !traffic.in_place && tensor_bytes * tensors > cached;

  const int64_t widest = columns ? max_columns / shape.inner : traffic.sums ? max_block_channels : shape.channels;
  const int64_t affordable = std::max<int64_t>(1, tensor_bytes * tensors / parallel_bytes);
  const int64_t tasks = std::min(threads, affordable);

  // Tasks that own whole channels read the sums' input again from their cache, if enough contiguous channels fit there.
  const bool whole_bytes = row_elements % 8 == 0;  // of each row of the columns view
  int64_t unit = columns ? std::max<int64_t>(1, cache_line / run_bytes) : 1;
  if (masked_columns) unit = ceil_div(unit, 8) * 8;
  const int64_t share = ceil_div(ceil_div(shape.channels, unit), tasks) * unit;  // channels of the largest task
  const bool balanced = share * tasks * 3 <= shape.channels * 4;
  const int64_t fitting = std::max<int64_t>(1, private_cache / channel_bytes);
  int64_t block = std::min({fitting, widest, share});
  if (block > unit) block -= block % unit;
  // Of the lines of a row, a share of the columns is always the same ones, which fall on a part of the cache's sets.
  const bool near = share * channel_bytes <= (columns ? private_cache / 2 : private_cache);
  // What the shared cache holds is sooner read twice in memory's order than once out of it.
  const bool whole_rows = columns || shape.outer >= 4 * tasks;  // else shares of the samples begin within planes
  const bool held = tensor_bytes * traffic.inputs <= shared_cache && whole_rows;
  const bool long_runs =
      near ? block * run_bytes >= shortest_near_run : !held && block * run_bytes * traffic.inputs >= shortest_runs;
  const bool resident = block * channel_bytes * tasks <= shared_cache;
  const bool few_samples = shape.outer < 2 * tasks;  // too few to share evenly
  if (!traffic.sums_first) block = std::min(widest, share);
  if (masked_columns) block = std::max(unit, block - block % unit);
  blocking.split_samples = traffic.sums_first ? !(balanced && long_runs && resident) : !(balanced && few_samples);
  // Rows with bits left over have theirs seen in one way only, which is that of shared samples.
  if (masked_columns && !whole_bytes) blocking.split_samples = true;
  blocking.repeat = 1;
  blocking.result_channels = blocking.columns ? std::min(widest, shape.channels) : shape.channels;
  if (masked_columns && widest < shape.channels) blocking.result_channels -= widest % 8;
  if (!blocking.split_samples) {
    blocking.tasks = std::min(tasks, ceil_div(shape.channels, unit));
    blocking.channel_unit = unit;
    blocking.sample_unit = shape.inner;
    blocking.block_channels = block;
    // Where parts of rows end within a page, one core is supposed to fetch ahead what another is writing. Sums only
    // read, and results read again what the caches hold.
    blocking.split_results = traffic.sums_first && blocking.tasks > 1 && share * run_bytes < page &&
                             share * channel_bytes <= private_cache && tensor_bytes > parallel_bytes;
    return blocking;
  }

  // The whole row is walked at once, so a few rows of few channels may be seen as one row of whole vectors.
  blocking.split_results = true;
  blocking.block_channels = std::min(widest, blocking.result_channels);
  if (columns && blocking.block_channels == shape.channels) {
    const int64_t period = lanes / std::gcd(row_elements, lanes);
    if (period * row_elements <= max_columns / 2) blocking.repeat = period;
    while (blocking.repeat * row_elements < 64 && blocking.repeat * 16 < shape.outer) blocking.repeat *= 2;
  }
  blocking.channel_unit = cache_line;
  blocking.sample_unit = whole_rows ? shape.inner * blocking.repeat : cache_line;
  blocking.tasks = std::min(tasks, ceil_div(shape.samples(), blocking.sample_unit));
  return blocking;
}

}  // namespace batchnorm_ext::cpu
