// The step normalize, as the operation that `pointwise` runs, and the count of batches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/formulas.h"
#include "core/params.h"
#include "cuda/primitives/pack.cuh"

namespace batchnorm_ext::cuda {

// With batch statistics the coefficients come from finalize_statistics, and this step counts the batch, after all who
// read the counter. Else they come from the running statistics, and this step saves mean and inv_std.
template <class T_>
struct Normalize {
  using T = T_;
  using A = accumulate_t<T>;
  using Coefficients = NormalizeCoefficients<A>;
  static constexpr bool kEpilogue = false;
  static constexpr int kInputs = 1;
  static constexpr int kUnroll = 4;

  const T* inputs[kInputs];  // x
  T* output;                 // y
  Reuse output_reuse;
  const Coefficients* finalized;
  int64_t* num_batches_tracked;
  RunningStatistics running;
  ChannelVector weight, bias;
  double eps;
  A* mean;
  A* inv_std;

  // Called once for each channel of each block; `first` in one block of a channel.
  __device__ __forceinline__ Coefficients coefficients(int64_t channel, bool first) const {
    if (finalized != nullptr) {
      if (first && channel == 0 && num_batches_tracked != nullptr) *num_batches_tracked += 1;
      return finalized[channel];
    }
    const RunningBits bits = read_running_statistics(running, channel);
    const uint64_t weight_bits = weight.bits(channel), bias_bits = bias.bits(channel);
    const double running_mean = running.mean.read_only().value(bits.mean, 0.0);
    const double running_inv_std = inverse_std(running.variance.read_only().value(bits.variance, 1.0), eps);
    if (first) {
      mean[channel] = static_cast<A>(running_mean);
      inv_std[channel] = static_cast<A>(running_inv_std);
    }
    return normalize_coefficients<A>(running_mean, running_inv_std, weight.value(weight_bits, 1.0),
                                     bias.value(bias_bits, 0.0));
  }
};

// An empty batch has nothing to normalise, but it counts.
template <class T>
__global__ void count_batch(int64_t* num_batches_tracked) {
  *num_batches_tracked += 1;
}

}  // namespace batchnorm_ext::cuda
