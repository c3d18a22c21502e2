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

// A tensor is walked in one of two views.
//   planes:  each channel is a run of `inner` elements, and vectors run along it
//   columns: the tensor is a matrix whose rows are `repeat` times [channels][inner], and vectors run across channels;
//            repeat > 1 makes the row of a few channels a whole number of vectors
// Tasks own whole channels, or, when split_samples, a share of the samples of all channels.
struct Blocking {
  bool columns;
  int64_t repeat;
  bool split_samples;
  int64_t tasks;
  int64_t unit;            // task boundaries are multiples of this many channels, or samples
  int64_t block_channels;  // channels that a task takes through all steps at once
  bool stream;             // write past the caches
};

// The most channels of a block in the planes view, and columns of a block in the columns view: what fits beside the
// data in the first-level cache.
constexpr int64_t max_block_channels = 128;
constexpr int64_t max_columns = 2048;

// What a call does with the tensor: how many tensors it reads, whether it sums over the samples of a channel, whether
// the sums must be complete before it reads again, and whether it writes a tensor.
struct Traffic {
  int64_t inputs;
  bool sums;
  bool sums_first;
  bool writes;
};

Blocking choose_blocking(const Shape& shape, int64_t element_size, const Traffic& traffic, int64_t lanes,
                         int64_t threads);

}  // namespace batchnorm_ext::cpu
