// Sums of the gradients of a channel: the operation that `reduce` runs as the step gradient_sums, and their end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/formulas.h"
#include "core/params.h"
#include "cuda/primitives/group_sum.cuh"
#include "cuda/primitives/pack.cuh"
#include "cuda/primitives/views.h"

namespace batchnorm_ext::cuda {

template <class V, class At>
__device__ __forceinline__ GradientPartial<V> fold_gradient_sums(At&& at, int items, int lane, int width) {
  GradientPartial<V> total{V(0), V(0)};
  for_lane(items, lane, width, [&](int i) {
    const auto part = at(i);
    total.sum_dy += static_cast<V>(part.sum_dy);
    total.sum_dy_xmu += static_cast<V>(part.sum_dy_xmu);
  });
  return {group_sum(total.sum_dy, width), group_sum(total.sum_dy_xmu, width)};
}

template <class T>
struct FinalizeGradients {
  using A = accumulate_t<T>;

  Shape shape;
  ChannelVector weight;
  const A* mean;
  const A* inv_std;
  MutableChannelVector dweight, dbias;
  bool input_gradient_follows;  // and wants the channel's coefficients
  JoinedSums joined;            // not null: the sums that the input gradient follows from

  // The channel's coefficients go to *coefficients, and where it `saves`, the gradients to their places.
  __device__ __forceinline__ void operator()(int64_t channel, const GradientPartial<double>& sums, bool saves,
                                             InputGradientCoefficients<A>* coefficients) const {
    // All that is read, before the first of it is waited for.
    const uint64_t weight_bits = weight.bits(channel);
    const A channel_mean = mean[channel], channel_inv_std = inv_std[channel];
    const auto coefficients_of = [&](double sum_dy, double sum_dy_xhat, int64_t samples) {
      return input_gradient_coefficients<A>(channel_mean, channel_inv_std, weight.value(weight_bits, A(1)), sum_dy,
                                            sum_dy_xhat, samples);
    };
    if (joined.count != nullptr) {
      *coefficients =
          coefficients_of(joined.sum_dy[channel], joined.sum_dy_xhat[channel], static_cast<int64_t>(*joined.count));
      return;
    }
    const double sum_dy_xhat = sums.sum_dy_xmu * static_cast<double>(channel_inv_std);
    if (saves) {
      dweight.store(channel, sum_dy_xhat);
      dbias.store(channel, sums.sum_dy);
    }
    if (input_gradient_follows) *coefficients = coefficients_of(sums.sum_dy, sum_dy_xhat, shape.samples());
  }
};

// One warp for each channel: adds its splits' sums, partials[channel][split], in double. No splits: an empty batch,
// or joined sums.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    finalize_gradients(const FinalizeGradients<T> finalize, const GradientPartial<accumulate_t<T>>* partials,
                       int64_t splits, InputGradientCoefficients<accumulate_t<T>>* coefficients) {
  const int64_t channel = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (channel >= finalize.shape.channels) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto* const parts = partials + channel * splits;
  const auto sums = fold_gradient_sums<double>([&](int i) { return parts[i]; }, static_cast<int>(splits), lane, kWarp);
  if (lane == 0) finalize(channel, sums, true, finalize.input_gradient_follows ? coefficients + channel : nullptr);
}

// With kInputGradient also dx of evaluation mode, which needs no sum first: dx = dy * dy_scale.
template <class T_, bool kInputGradient>
struct GradientSums {
  using T = T_;
  using A = accumulate_t<T>;
  using Item = GradientPartial<A>;
  using Coefficients = InputGradientCoefficients<A>;
  static constexpr bool kEpilogue = false, kEpilogueInSums = false;
  static constexpr int kInputs = 2;
  static constexpr int kUnroll = 2, kMapUnroll = 1;
  static constexpr Reuse kReuse = kInputGradient ? Reuse::none : Reuse::soon;

  const T* inputs[kInputs];  // dy, x
  FinalizeGradients<T> finalize;
  Item* partials;  // [channel][split]; unused when there is one split, whose sums are final
  int64_t splits;
  Coefficients* coefficients;
  T* dx;
  Reuse dx_reuse;

  struct Accumulator {
    A mean, sum_dy, sum_dy_xmu;
    A dy_scale;
  };

  struct Channel {
    A mean, inv_std;
    uint64_t weight_bits;
  };

  __device__ __forceinline__ Channel read(int64_t channel) const {
    if constexpr (!kInputGradient) return {finalize.mean[channel], A(0), 0};
    return {finalize.mean[channel], finalize.inv_std[channel], finalize.weight.bits(channel)};
  }
  __device__ __forceinline__ Accumulator begin(const Channel& of) const {
    const A scale = kInputGradient ? of.inv_std * finalize.weight.value(of.weight_bits, A(1)) : A(0);
    return {of.mean, A(0), A(0), scale};
  }

  template <int kVector, int kSums>
  __device__ __forceinline__ void accumulate(Accumulator (&sums)[kSums], Pack<T, kVector> (&packs)[kInputs][kUnroll],
                                             const Slot (&slots)[kUnroll], bool) const {
    const auto zero = [](int) { return T{}; };  // which adds zero
    fill_unmeant(packs[0], slots, zero);
    fill_unmeant(packs[1], slots, zero);
#pragma unroll
    for (int a = 0; a < kSums; ++a) {
      constexpr int kElements = kVector / kSums;
      A sum_dy[kUnroll], sum_dy_xmu[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        sum_dy[u] = sum_dy_xmu[u] = A(0);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const int e = kSums == 1 ? i : a;
          const A gradient = widen(packs[0][u].values[e]);
          sum_dy[u] += gradient;
          sum_dy_xmu[u] = multiply_add(gradient, widen(packs[1][u].values[e]) - sums[a].mean, sum_dy_xmu[u]);
        }
      }
      static_assert(kUnroll == 2);
      sums[a].sum_dy += sum_dy[0] + sum_dy[1];
      sums[a].sum_dy_xmu += sum_dy_xmu[0] + sum_dy_xmu[1];
    }
    if constexpr (kInputGradient) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        A values[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) values[e] = widen(packs[0][u].values[e]) * sums[kSums == 1 ? 0 : e].dy_scale;
        narrow_all(packs[0][u], values);
      }
      store(packs[0], dx, slots, dx_reuse);
    }
  }

  __device__ __forceinline__ void keep(const Accumulator&, Item&) const {}
  __device__ __forceinline__ Item item(const Accumulator& sums, int64_t, const Item&) const {
    return {sums.sum_dy, sums.sum_dy_xmu};
  }

  template <class V, class At>
  __device__ __forceinline__ GradientPartial<V> fold(At&& at, int items, int lane, int width) const {
    return fold_gradient_sums<V>(at, items, lane, width);
  }

  // Where all of a channel was summed. One block of those that call it for a channel `saves`.
  template <class V>
  __device__ __forceinline__ void complete(int64_t channel, const GradientPartial<V>& total, bool active, bool saves,
                                           Coefficients* to) const {
    if (!active) return;
    finalize(channel, {static_cast<double>(total.sum_dy), static_cast<double>(total.sum_dy_xmu)}, saves, to);
  }

  __device__ __forceinline__ void finish(int64_t channel, int64_t split, const Item& total, bool active) const {
    if (splits == 1) {
      complete(channel, total, active, true, finalize.input_gradient_follows ? coefficients + channel : nullptr);
    } else if (active) {
      partials[channel * splits + split] = total;
    }
  }
};

}  // namespace batchnorm_ext::cuda
