// From a channel's moments to what normalises it, what is saved for backward, and the running statistics.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/formulas.h"
#include "core/params.h"
#include "core/welford.h"
#include "cuda/primitives/group_sum.cuh"

namespace batchnorm_ext::cuda {

// A channel's moments are kept around its pivot, which a mean far larger than the deviation must not swallow: the
// median of three of its elements, since one of them may be unlike all others. Any finite value would do: an infinite
// one would spoil the mean.
template <class T>
__device__ __forceinline__ accumulate_t<T> channel_pivot(const T* x, const Shape& shape, int64_t channel) {
  const auto at = [&](int64_t outer, int64_t inner) {
    return widen(x[(outer * shape.channels + channel) * shape.inner + inner]);
  };
  const accumulate_t<T> a = at(0, 0), b = at(shape.outer / 2, shape.inner / 2),
                        c = at(shape.outer - 1, shape.inner - 1);
  const accumulate_t<T> median = std::fmax(std::fmin(a, b), std::fmin(std::fmax(a, b), c));
  return median - median == 0 ? median : accumulate_t<T>(0);
}

// Whether squares of finite elements, or their sums, can exceed the accumulate type. Those of double are not redone:
// there is nothing wider.
template <class T>
constexpr bool kSquaresOverflow = std::is_same_v<T, float> || std::is_same_v<T, bfloat16>;

// The counter of batches, of which a launch counts one more. Where blocks of the launch read it, none may see it
// changed: above kBatchBits they then count themselves, each when it reads no more, and the last one takes that away
// again and counts the batch. So nothing need be zeroed, and no block waits.
constexpr int kBatchBits = 55;  // counts beyond what double holds exactly make no difference to an average
constexpr int64_t kMostReaders = int64_t(1) << (64 - kBatchBits);

__device__ __forceinline__ int64_t batches_of(int64_t counter) {
  return static_cast<int64_t>(static_cast<uint64_t>(counter) << (64 - kBatchBits)) >> (64 - kBatchBits);
}
// By one load, whole: other blocks may be counting themselves.
__device__ __forceinline__ int64_t read_batches(const int64_t* counter) {
  return batches_of(*static_cast<const volatile int64_t*>(counter));
}

struct BatchCounter {
  int64_t* batches = nullptr;  // null: there is nothing to count
  unsigned readers = 0;        // blocks of this launch that read it

  // Called by all threads of each block, after a barrier behind what they read.
  __device__ __forceinline__ void count(bool is_reader) const {
    if (batches == nullptr || threadIdx.x != 0) return;
    if (readers == 0) {
      if (blockIdx.x == 0) *batches += 1;
      return;
    }
    if (!is_reader) return;
    auto* const counter = reinterpret_cast<unsigned long long*>(batches);
    constexpr unsigned long long kReader = 1ull << kBatchBits;
    __threadfence();
    const unsigned long long before = atomicAdd(counter, kReader);
    const auto own = static_cast<unsigned long long>(batches_of(static_cast<int64_t>(before)));
    if ((before - own) / kReader + 1 == readers) atomicAdd(counter, 1 - readers * kReader);
  }
};

// Moments summed in double by one warp, slowly: for values whose squares overflow the accumulate type.
template <class T>
__device__ Moments<double> moments_in_double(const T* x, Shape shape, int64_t channel) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t samples = shape.samples();
  const auto element = [&](int64_t i) {
    const int64_t outer = i / shape.inner;
    return static_cast<double>(widen(x[(outer * shape.channels + channel) * shape.inner + (i - outer * shape.inner)]));
  };
  double sum = 0, squares = 0;
  for (int64_t i = lane; i < samples; i += kWarp) sum += element(i);
  const double mean = group_sum(sum, kWarp) / static_cast<double>(samples);
  if (mean - mean != 0) return {mean, mean - mean, samples};
  for (int64_t i = lane; i < samples; i += kWarp) squares += (element(i) - mean) * (element(i) - mean);
  return {mean, group_sum(squares, kWarp), samples};
}

template <class T>
struct FinalizeStatistics {
  using A = accumulate_t<T>;

  Shape shape;
  const T* x;
  ChannelVector weight, bias;
  RunningStatistics running;  // the counter does not yet count this batch
  double eps;
  A* mean;
  A* inv_std;
  double* record;  // not null: where the moments go, and nothing else is written
  double signature;

  // Called by whole warps; `moments` are around the channel's pivot and matter in active threads only. The channel's
  // coefficients go to *coefficients, and where it `saves`, all else to its place.
  __device__ __forceinline__ void operator()(int64_t channel, Moments<double> moments, bool active, bool saves,
                                             NormalizeCoefficients<A>* coefficients) const {
    bool around_pivot = true;
    if constexpr (kSquaresOverflow<T>) {
      unsigned redo = __ballot_sync(kWholeWarp, active && moments.m2 - moments.m2 != 0);
      while (redo != 0) {
        const int owner = __ffs(static_cast<int>(redo)) - 1;
        const auto redone = moments_in_double(x, shape, __shfl_sync(kWholeWarp, channel, owner));
        if (static_cast<int>(threadIdx.x) % kWarp == owner) {
          moments = redone;
          around_pivot = false;
        }
        redo &= redo - 1;
      }
    }
    if (!active) return;
    // All that is read, before the first of it is waited for.
    const uint64_t weight_bits = weight.bits(channel), bias_bits = bias.bits(channel);
    const RunningBits running_bits = saves ? read_running_statistics(running, channel) : RunningBits{};
    const bool reads_counter = saves && running.cumulative && running.num_batches_tracked != nullptr;
    const int64_t batches = reads_counter ? read_batches(running.num_batches_tracked) + 1 : 1;
    if (around_pivot) moments.mean += channel_pivot(x, shape, channel);
    if (record != nullptr) {
      if (channel == 0) {
        record[0] = signature;
        record[1] = static_cast<double>(moments.count);
      }
      record[2 + channel] = moments.mean;
      record[2 + shape.channels + channel] = moments.m2;
      return;
    }
    const double channel_inv_std = inverse_std(variance_of(moments), eps);
    *coefficients = normalize_coefficients<A>(moments.mean, channel_inv_std, weight.value(weight_bits, 1.0),
                                              bias.value(bias_bits, 0.0));
    if (!saves) return;
    mean[channel] = static_cast<A>(moments.mean);
    inv_std[channel] = static_cast<A>(channel_inv_std);
    if (running.mean.data == nullptr && running.variance.data == nullptr) return;
    update_running_statistics(running, channel, running_bits, moments, running_momentum(running, batches));
  }
};

// The moments of several sets, summed in two passes over them: no division for each, and nothing large cancels. What
// the first pass rounded off the mean, the second finds.
template <class V, class At>
__device__ __forceinline__ Moments<V> fold_moments(At&& at, int items, int lane, int width) {
  int64_t count = 0;
  V weighted = 0;
  for_lane(items, lane, width, [&](int i) {
    const auto part = at(i);
    count += part.count;
    weighted += static_cast<V>(part.count) * static_cast<V>(part.mean);
  });
  count = group_sum(count, width);
  weighted = group_sum(weighted, width);
  const V mean = count == 0 ? V(0) : weighted / static_cast<V>(count);
  V deviations = 0, squares = 0;
  for_lane(items, lane, width, [&](int i) {
    const auto part = at(i);
    const V deviation = static_cast<V>(part.mean) - mean;
    const V weighted_deviation = static_cast<V>(part.count) * deviation;
    deviations += weighted_deviation;
    squares += multiply_add(weighted_deviation, deviation, static_cast<V>(part.m2));
  });
  deviations = group_sum(deviations, width);
  if (deviations - deviations != 0) deviations = 0;  // an infinite mean stays one
  return moments_from_sums(mean, deviations, group_sum(squares, width), count);
}

// One warp for each channel: merges its splits' moments, partials[channel][split], in double.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    finalize_statistics(const FinalizeStatistics<T> finalize, const Moments<accumulate_t<T>>* partials, int64_t splits,
                        NormalizeCoefficients<accumulate_t<T>>* coefficients) {
  const int64_t channel = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (channel >= finalize.shape.channels) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto* const parts = partials + channel * splits;
  finalize(channel, fold_moments<double>([&](int i) { return parts[i]; }, static_cast<int>(splits), lane, kWarp),
           lane == 0, true, coefficients + channel);
}

}  // namespace batchnorm_ext::cuda
