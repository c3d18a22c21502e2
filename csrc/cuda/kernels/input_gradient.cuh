// The step input_gradient, as the operations that `pointwise` runs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/formulas.h"
#include "core/params.h"
#include "cuda/primitives/pack.cuh"

namespace batchnorm_ext::cuda {

// With batch statistics, after gradient_sums.
template <class T_>
struct InputGradient {
  using T = T_;
  using Coefficients = InputGradientCoefficients<accumulate_t<T>>;
  static constexpr bool kEpilogue = false;
  static constexpr int kInputs = 2;
  static constexpr int kUnroll = 2;

  const T* inputs[kInputs];  // dy, x
  T* output;                 // dx
  Reuse output_reuse;
  const Coefficients* finalized;

  __device__ __forceinline__ Coefficients coefficients(int64_t channel, bool) const { return finalized[channel]; }
};

// With running statistics, where neither x nor a sum is needed.
template <class T_>
struct FrozenInputGradient {
  using T = T_;
  using A = accumulate_t<T>;
  using Coefficients = InputGradientCoefficients<A>;
  static constexpr bool kEpilogue = false;
  static constexpr int kInputs = 1;
  static constexpr int kUnroll = 4;

  const T* inputs[kInputs];  // dy
  T* output;                 // dx
  Reuse output_reuse;
  ChannelVector weight;
  const A* inv_std;

  __device__ __forceinline__ Coefficients coefficients(int64_t channel, bool) const {
    return {A(0), inv_std[channel] * weight.load(channel, A(1)), A(0), A(0)};
  }
};

}  // namespace batchnorm_ext::cuda
