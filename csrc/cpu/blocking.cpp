// The heuristics behind Blocking. Cache sizes are those of a server core; they bound speed, not correctness.
#include "cpu/blocking.h"

#include <algorithm>
#include <numeric>

namespace batchnorm_ext::cpu {
namespace {

constexpr int64_t cache_line = 64;
constexpr int64_t private_cache = 512 << 10;  // half of a 1 MB second-level cache
constexpr int64_t shared_cache = 16 << 20;    // half of a 32 MB third-level cache
constexpr int64_t shortest_run = 1 << 10;     // contiguous bytes below which DRAM is read inefficiently
constexpr int64_t parallel_bytes = 64 << 10;  // a task must move this much to be worth a thread
constexpr int64_t shortest_plane = 16;        // elements of a channel below which vectors run across channels

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

Range split(int64_t size, int64_t unit, int64_t tasks, int64_t task) {
  const int64_t units = ceil_div(size, unit);
  const auto boundary = [&](int64_t index) { return std::min(size, units * index / tasks * unit); };
  return {boundary(task), boundary(task + 1)};
}

Blocking choose_blocking(const Shape& shape, int64_t element_size, const Traffic& traffic, int64_t lanes,
                         int64_t threads) {
  Blocking blocking{};
  const int64_t row_elements = shape.channels * shape.inner;
  const int64_t tensor_bytes = shape.elements() * element_size;
  const int64_t channel_bytes = shape.samples() * element_size * traffic.inputs;
  const int64_t run_bytes = shape.inner * element_size;  // of one channel
  blocking.columns = shape.inner < shortest_plane;
  blocking.stream = traffic.writes && tensor_bytes > shared_cache;

  const int64_t widest = blocking.columns ? max_columns / shape.inner : max_block_channels;
  const int64_t affordable =
      std::max<int64_t>(1, tensor_bytes * (traffic.inputs + (traffic.writes ? 1 : 0)) / parallel_bytes);
  const int64_t tasks = std::min(threads, affordable);

  // Whole channels per task keep the second reading in the cache, if enough contiguous channels fit at once.
  const int64_t fitting = std::max<int64_t>(1, private_cache / std::max<int64_t>(1, channel_bytes));
  const int64_t contiguous = ceil_div(shortest_run, run_bytes);
  const int64_t unit = blocking.columns ? std::max<int64_t>(1, cache_line / run_bytes) : 1;
  int64_t block = std::min({std::max(fitting, contiguous), widest, shape.channels});
  if (block > unit) block -= block % unit;
  const int64_t share = ceil_div(ceil_div(shape.channels, unit), tasks) * unit;  // channels of the largest task
  const bool balanced = share * tasks * 3 <= shape.channels * 4;
  const bool resident = !traffic.sums_first || tensor_bytes * traffic.inputs <= shared_cache ||
                        std::min(block, share) * channel_bytes * tasks <= shared_cache;
  const bool long_runs = std::min(block, share) * run_bytes >= shortest_run || tensor_bytes <= shared_cache / 4;

  blocking.split_samples = !(tasks == 1 && resident && long_runs) && !(balanced && resident && long_runs);
  blocking.repeat = 1;
  if (!blocking.split_samples && !(blocking.columns && tasks == 1 && block == shape.channels)) {
    blocking.tasks = std::min(tasks, ceil_div(shape.channels, unit));
    blocking.unit = unit;
    blocking.block_channels = block;
    return blocking;
  }

  // The whole row is walked at once, so a few rows of few channels may be seen as one row of whole vectors.
  blocking.split_samples = true;
  blocking.block_channels = std::min(widest, shape.channels);
  if (blocking.columns && blocking.block_channels == shape.channels) {
    const int64_t period = lanes / std::gcd(row_elements, lanes);
    if (period * row_elements <= max_columns / 2) blocking.repeat = period;
    while (blocking.repeat * row_elements < 64 && blocking.repeat * 16 < shape.outer) blocking.repeat *= 2;
  }
  const bool whole_rows = blocking.columns || shape.outer >= 4 * tasks;
  blocking.unit = whole_rows ? shape.inner * blocking.repeat : cache_line;
  blocking.tasks = std::min(tasks, ceil_div(shape.samples(), blocking.unit));
  return blocking;
}

}  // namespace batchnorm_ext::cpu
