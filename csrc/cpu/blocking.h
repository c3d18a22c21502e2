// How one CPU call is cut into tasks and cache-sized blocks: pure functions of shape, element size and thread count.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace batchnorm_ext::cpu {

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// The part of [0, size) that task `task` of `tasks` owns; inner boundaries fall on multiples of `unit`.
Range split(int64_t size, int64_t unit, int64_t tasks, int64_t task);

// The last sample up to this one at which a byte of a plane's mask begins, and, if elements are aligned, a cache line.
constexpr int64_t byte_boundary(const Shape& shape, int64_t sample) {
  return sample - sample % shape.inner % 64;
}

constexpr int64_t mask_row_bytes(int64_t elements) {
  return (elements + 7) / 8;
}

// A tensor is walked in one of two views.
//   planes:  each channel is a run of `inner` elements, and vectors run along it
//   columns: the tensor is a matrix whose rows are `repeat` times [channels][inner], and vectors run across channels;
//            repeat > 1, a power of two, makes the row of a few channels a whole number of vectors
// Tasks own whole channels, or, when split_samples, a share of the samples of all channels. When split_results, results
// are by samples also where sums are by channels.
struct Blocking {
  bool columns, sums_by_columns;  // the view of results and masks, and of sums
  int64_t repeat;
  bool split_samples, split_results;
  int64_t tasks;
  int64_t channel_unit, sample_unit;  // task boundaries are multiples of this many
  int64_t block_channels;             // channels that a task takes through all steps, or sums, at once
  int64_t result_channels;            // and when split_results, of which it computes results
  bool stream;                        // write past the caches
  bool backwards;  // results from the last samples to the first: what was summed last is still in the cache
};

// The samples of task `task`, where tasks share the samples.
Range own_samples(const Shape& shape, const Blocking& blocking, int64_t task);

// Bytes of the mask that are used; mask_bytes(shape) at most.
int64_t used_mask_bytes(const Shape& shape, const Blocking& blocking);

// Where the bit of one element is.
struct MaskBit {
  int64_t byte, shift;
};
MaskBit mask_bit(const Shape& shape, const Blocking& blocking, int64_t outer, int64_t channel, int64_t inner);

// The most channels of a block in the planes view, and columns of a block in the columns view: what fits beside the
// data in the first-level cache.
constexpr int64_t max_block_channels = 128;
constexpr int64_t max_columns = 1024;

// What a call does with tensors of one shape: how many it reads, whether it sums over the samples of a channel, whether
// the sums must be complete before it reads again; how many more it reads only then, how many it writes, and of these,
// whether they are others than what it reads; whether a mask goes with results, and with sums; whether sums are of runs
// of samples, which begin anywhere.
struct Traffic {
  int64_t inputs;
  bool sums;
  bool sums_first;
  int64_t outputs;
  int64_t late_inputs = 0;
  bool in_place = false;
  bool masked = false, masked_sums = false;
  bool summed_in_runs = false;
};

// Where calls have a mask, its rows of bits are the planes, or the rows of the columns view, each padded to whole
// bytes. Two calls with the same shape and lanes agree on them, whatever else they do: both have the same rows, or such
// whose bits lie one after the other without padding. Tasks and blocks begin at whole bytes.
Blocking choose_blocking(const Shape& shape, int64_t element_size, const Traffic& traffic, int64_t lanes,
                         int64_t threads);

}  // namespace batchnorm_ext::cpu
