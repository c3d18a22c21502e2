// Residual and activation in the kernels of batch norm: what follows normalize, and what precedes the backward steps.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/activation.h"
#include "core/formulas.h"
#include "core/params.h"
#include "cuda/kernels/channel_statistics.cuh"
#include "cuda/kernels/gradient_sums.cuh"
#include "cuda/kernels/normalize.cuh"
#include "cuda/primitives/pack.cuh"

namespace batchnorm_ext::cuda {

// Which activation is one branch for each slot, the same for all threads: kernels for each would be six times as many.

// Slots at a time: as many loads in flight as there are registers for.
template <class T>
constexpr int kForwardUnroll = sizeof(T) == 8 ? 1 : 2;
template <class T>
constexpr int kBackwardUnroll = sizeof(T) == 2 ? 2 : 1;

// What slots are read with besides x, or dy and x: those of the residual, and bytes of the mask. None reads as zero.
template <class T, int kVector, int kUnroll>
struct Beside {
  Pack<T, kVector> residuals[kUnroll];
  unsigned bits[kUnroll];
};

template <Reuse kReuse, int kVector, class T, int kUnroll>
__device__ __forceinline__ Beside<T, kVector, kUnroll> read_beside(const T* residual, const uint8_t* mask,
                                                                   const Slot (&slots)[kUnroll]) {
  Beside<T, kVector, kUnroll> beside{};
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (residual != nullptr) load<kReuse>(beside.residuals[u], residual, slots[u]);
    if (mask != nullptr && !slots[u].is_empty()) beside.bits[u] = mask[slots[u].number];
  }
  return beside;
}

// From x to y = activation(u), u = batch_norm(x) + residual.
template <class T>
struct ForwardEpilogue {
  using A = accumulate_t<T>;

  Activation activation;
  A negative_slope;
  const T* residual;
  uint8_t* mask;
  A* shift;

  __device__ __forceinline__ void save(int64_t channel, const NormalizeCoefficients<A>& coefficients) const {
    if (shift != nullptr) shift[channel] = coefficients.shift;
  }

  template <int kVector, int kUnroll>
  __device__ __forceinline__ Beside<T, kVector, kUnroll> read_slots(const Slot (&slots)[kUnroll]) const {
    return read_beside<Reuse::none, kVector>(residual, nullptr, slots);
  }

  template <int kVector, int kUnroll, int kSets>
  __device__ __forceinline__ void operator()(Pack<T, kVector> (&x)[kUnroll], const Beside<T, kVector, kUnroll>& beside,
                                             const NormalizeCoefficients<A> (&coefficients)[kSets],
                                             const Slot (&slots)[kUnroll], T* y, Reuse reuse) const {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      A u[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        u[e] = coefficients[kSets == 1 ? 0 : e](widen(x[i].values[e])) + widen(beside.residuals[i].values[e]);
      }
      if (mask != nullptr && !slots[i].is_empty()) {
        static_assert(kVector == 8);
        unsigned bits = 0;
#pragma unroll
        for (int e = 0; e < kVector; ++e) bits |= blocked(u[e], activation) ? 0u : 1u << e;
        mask[slots[i].number] = static_cast<uint8_t>(bits & slots[i].flags);
      }
      with_activation(activation, [&](auto which) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) u[e] = activate<decltype(which)::value>(u[e], negative_slope);
      });
      narrow_all(x[i], u);
    }
    store(x, y, slots, reuse);
  }
};

// The step normalize with an epilogue.
template <class T_>
struct NormalizeActivate : Normalize<T_> {
  using T = T_;
  using Coefficients = typename Normalize<T>::Coefficients;
  static constexpr bool kEpilogue = true;
  static constexpr int kUnroll = kForwardUnroll<T>;

  ForwardEpilogue<T> epilogue;

  __device__ __forceinline__ Coefficients coefficients(int64_t channel, bool first) const {
    const Coefficients of_channel = Normalize<T>::coefficients(channel, first);
    if (first) epilogue.save(channel, of_channel);
    return of_channel;
  }

  template <int kVector, int kSets>
  __device__ __forceinline__ void map_and_store(Pack<T, kVector> (&packs)[1][kUnroll],
                                                const Coefficients (&coefficients)[kSets], const Slot (&slots)[kUnroll],
                                                T* output, Reuse reuse) const {
    epilogue(packs[0], epilogue.template read_slots<kVector>(slots), coefficients, slots, output, reuse);
  }
};

// Slots have twice the bytes here for float.
template <class T>
constexpr int kStatisticsUnroll = sizeof(T) == 2 ? 4 : 2;

// All steps of forward with an epilogue, as `resident` runs them.
template <class T_>
struct StatisticsActivate : ChannelStatistics<T_, kStatisticsUnroll<T_>> {
  using T = T_;
  using Base = ChannelStatistics<T, kStatisticsUnroll<T>>;
  using Coefficients = typename Base::Coefficients;
  static constexpr bool kEpilogue = true;
  static constexpr int kMapUnroll = 1;  // what is kept needs no loads in flight
  static constexpr bool kReadsAhead = true;

  ForwardEpilogue<T> epilogue;

  template <class V>
  __device__ __forceinline__ void complete(int64_t channel, const Moments<V>& total, bool active, bool saves,
                                           Coefficients* to) const {
    Base::complete(channel, total, active, saves, to);
    if (active && saves) epilogue.save(channel, *to);
  }

  template <int kVector>
  __device__ __forceinline__ auto read_to_map(const Slot (&slots)[kMapUnroll]) const {
    return epilogue.template read_slots<kVector>(slots);
  }
  template <int kVector, int kSets>
  __device__ __forceinline__ void map_and_store(Pack<T, kVector> (&packs)[1][kMapUnroll],
                                                const Beside<T, kVector, kMapUnroll>& beside,
                                                const Coefficients (&coefficients)[kSets],
                                                const Slot (&slots)[kMapUnroll], T* output, Reuse reuse) const {
    epilogue(packs[0], beside, coefficients, slots, output, reuse);
  }
};

// From dy to the gradients with respect to u, which are those of residual, and to what x deviates from its mean by.
template <class T>
struct BackwardEpilogue {
  using A = accumulate_t<T>;

  Activation activation;
  A negative_slope;
  bool x_is_output;
  const T* residual;
  const uint8_t* mask;
  const A* mean;
  const A* inv_std;
  const A* shift;
  ChannelVector weight;

  struct Channel {
    A mean, inv_std, shift;
    uint64_t weight_bits;
  };

  __device__ __forceinline__ Channel read(int64_t channel) const {
    return {mean[channel], inv_std[channel], shift == nullptr ? A(0) : shift[channel], weight.bits(channel)};
  }
  // Those of forward, to the bit.
  __device__ __forceinline__ NormalizeCoefficients<A> coefficients(const Channel& of) const {
    return {of.mean, normalize_scale(of.inv_std, weight.value(of.weight_bits, 1.0)), of.shift};
  }

  // What is read besides dy and x is read again where it is needed twice: of a mask that is little, and a residual kept
  // on the chip would take from dy and x, whose second reading costs twice as much.
  template <Reuse kReuse, int kVector, int kUnroll>
  __device__ __forceinline__ Beside<T, kVector, kUnroll> read_slots(const Slot (&slots)[kUnroll]) const {
    return read_beside<kReuse, kVector>(residual, mask, slots);
  }

  // Calls use(i, gradients, deviations) for each slot i of `packs`, dy and x. Gradients are stored to `dresidual`, if
  // not null.
  template <int kVector, int kUnroll, int kSets, class Use>
  __device__ __forceinline__ void operator()(const Pack<T, kVector> (&packs)[2][kUnroll],
                                             const Beside<T, kVector, kUnroll>& beside,
                                             const NormalizeCoefficients<A> (&coefficients)[kSets],
                                             const Slot (&slots)[kUnroll], T* dresidual, Use&& use) const {
    static_assert(kVector == 8);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      A u[kVector], deviations[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const auto& c = coefficients[kSets == 1 ? 0 : e];
        u[e] = widen(packs[1][i].values[e]);
        deviations[e] = u[e] - c.mean;
      }
      if (x_is_output) {
        with_activation(activation, [&](auto which) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) u[e] = activation_inverse<decltype(which)::value>(u[e], negative_slope);
        });
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const auto& c = coefficients[kSets == 1 ? 0 : e];
          deviations[e] = c.scale == A(0) ? A(0) : (u[e] - c.shift) / c.scale;  // a weight of zero hides x from y
        }
      } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          u[e] = coefficients[kSets == 1 ? 0 : e](u[e]) + widen(beside.residuals[i].values[e]);
        }
      }
      if (mask != nullptr) {
        const A otherwise = activation == Activation::leaky_relu ? negative_slope : A(0);
#pragma unroll
        for (int e = 0; e < kVector; ++e) u[e] = (beside.bits[i] >> e & 1u) != 0 ? A(1) : otherwise;
      } else {
        with_activation(activation, [&](auto which) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) u[e] = activation_derivative<decltype(which)::value>(u[e], negative_slope);
        });
      }
      A(&gradients)[kVector] = u;
#pragma unroll
      for (int e = 0; e < kVector; ++e) gradients[e] = widen(packs[0][i].values[e]) * u[e];
      if (dresidual != nullptr) {
        Pack<T, kVector> pack;
        narrow_all(pack, gradients);
        store(pack, dresidual, slots[i], Reuse::soon);
      }
      use(i, gradients, deviations);
    }
  }
};

// Maps dy and x to dx and dresidual, each if not null. `frozen`: with running statistics.
template <class T, int kVector, int kUnroll, int kSets>
__device__ __forceinline__ void map_gradients(
    const BackwardEpilogue<T>& epilogue, bool frozen, Pack<T, kVector> (&packs)[2][kUnroll],
    const Beside<T, kVector, kUnroll>& beside,
    const ActivatedGradientCoefficients<accumulate_t<T>> (&coefficients)[kSets], const Slot (&slots)[kUnroll], T* dx,
    T* dresidual, Reuse reuse) {
  using A = accumulate_t<T>;
  NormalizeCoefficients<A> normalize[kSets];
#pragma unroll
  for (int a = 0; a < kSets; ++a) normalize[a] = coefficients[a].normalize;
  epilogue(packs, beside, normalize, slots, dresidual,
           [&](int i, const A(&gradients)[kVector], const A(&deviations)[kVector]) {
             A values[kVector];
#pragma unroll
             for (int e = 0; e < kVector; ++e) {
               const auto& c = coefficients[kSets == 1 ? 0 : e];
               values[e] = frozen ? c.input_gradient(gradients[e]) : c.input_gradient(gradients[e], deviations[e]);
             }
             narrow_all(packs[0][i], values);
           });
  if (dx != nullptr) store(packs[0], dx, slots, reuse);
}

// The step gradient_sums behind an epilogue, and all steps of backward as `resident` runs them; kSlots at a time.
template <class T_, int kSlots>
struct ActivatedGradientSums {
  using T = T_;
  using A = accumulate_t<T>;
  using Item = GradientPartial<A>;
  using Coefficients = ActivatedGradientCoefficients<A>;
  static constexpr bool kEpilogue = true, kEpilogueInSums = true;
  static constexpr int kInputs = 2;
  static constexpr int kUnroll = kSlots, kMapUnroll = 1;
  static constexpr bool kReadsAhead = sizeof(T) == 2;  // a slot of float has no registers left for the next one
  static constexpr Reuse kReuse = Reuse::soon;

  const T* inputs[kInputs];  // dy, x
  BackwardEpilogue<T> epilogue;
  GradientSums<T, false> sums;  // whose inputs are not used
  T* summing_dx;                // of evaluation mode, and dresidual, where no step follows this one: else null
  T* summing_dresidual;
  T* dresidual;  // of `resident`
  Reuse reuse;

  struct Accumulator {
    NormalizeCoefficients<A> normalize;
    A sum_dy, sum_dy_xmu;
  };

  using Channel = typename BackwardEpilogue<T>::Channel;

  __device__ __forceinline__ Channel read(int64_t channel) const { return epilogue.read(channel); }
  __device__ __forceinline__ Accumulator begin(const Channel& of) const {
    return {epilogue.coefficients(of), A(0), A(0)};
  }

  template <int kVector>
  __device__ __forceinline__ auto read_to_sum(const Slot (&slots)[kUnroll]) const {
    return epilogue.template read_slots<Reuse::soon, kVector>(slots);
  }
  template <int kVector, int kSums>
  __device__ __forceinline__ void accumulate(Accumulator (&accumulators)[kSums],
                                             Pack<T, kVector> (&packs)[kInputs][kUnroll], const Slot (&slots)[kUnroll],
                                             bool first) const {
    accumulate(accumulators, packs, read_to_sum<kVector>(slots), slots, first);
  }
  template <int kVector, int kSums>
  __device__ __forceinline__ void accumulate(Accumulator (&accumulators)[kSums],
                                             Pack<T, kVector> (&packs)[kInputs][kUnroll],
                                             Beside<T, kVector, kUnroll> beside, const Slot (&slots)[kUnroll],
                                             bool) const {
    const auto zero = [](int) { return T{}; };  // with a dy of which the others add zero, if they are finite
    fill_unmeant(packs[0], slots, zero);
    fill_unmeant(packs[1], slots, zero);
    fill_unmeant(beside.residuals, slots, zero);
    NormalizeCoefficients<A> normalize[kSums];
#pragma unroll
    for (int a = 0; a < kSums; ++a) normalize[a] = accumulators[a].normalize;
    epilogue(packs, beside, normalize, slots, summing_dresidual,
             [&](int i, const A(&gradients)[kVector], const A(&deviations)[kVector]) {
               A values[kVector];
#pragma unroll
               for (int e = 0; e < kVector; ++e) {
                 Accumulator& of = accumulators[kSums == 1 ? 0 : e];
                 of.sum_dy += gradients[e];
                 of.sum_dy_xmu = multiply_add(gradients[e], deviations[e], of.sum_dy_xmu);
                 values[e] = gradients[e] * of.normalize.scale;
               }
               narrow_all(packs[0][i], values);
             });
    if (summing_dx != nullptr) store(packs[0], summing_dx, slots, reuse);
  }

  __device__ __forceinline__ void keep(const Accumulator&, Item&) const {}
  __device__ __forceinline__ Item item(const Accumulator& accumulator, int64_t, const Item&) const {
    return {accumulator.sum_dy, accumulator.sum_dy_xmu};
  }

  template <class V, class At>
  __device__ __forceinline__ GradientPartial<V> fold(At&& at, int items, int lane, int width) const {
    return fold_gradient_sums<V>(at, items, lane, width);
  }

  template <class V>
  __device__ __forceinline__ void complete(int64_t channel, const GradientPartial<V>& total, bool active, bool saves,
                                           Coefficients* to) const {
    if (!active) return;
    const Channel of = epilogue.read(channel);
    InputGradientCoefficients<A> of_channel{};
    sums.complete(channel, total, true, saves, &of_channel);
    *to = {epilogue.coefficients(of), of_channel.mean_dy, of_channel.x_scale};
  }

  __device__ __forceinline__ void finish(int64_t channel, int64_t split, const Item& total, bool active) const {
    sums.finish(channel, split, total, active);
  }

  template <int kVector>
  __device__ __forceinline__ auto read_to_map(const Slot (&slots)[kMapUnroll]) const {
    return epilogue.template read_slots<Reuse::none, kVector>(slots);
  }
  template <int kVector, int kSets>
  __device__ __forceinline__ void map_and_store(Pack<T, kVector> (&packs)[kInputs][kMapUnroll],
                                                const Beside<T, kVector, kMapUnroll>& beside,
                                                const Coefficients (&coefficients)[kSets],
                                                const Slot (&slots)[kMapUnroll], T* dx, Reuse dx_reuse) const {
    map_gradients(epilogue, false, packs, beside, coefficients, slots, dx, dresidual, dx_reuse);
  }
};

// The step input_gradient behind an epilogue; with running statistics, or for dresidual alone, `finalized` is null.
template <class T_>
struct ActivatedInputGradient {
  using T = T_;
  using A = accumulate_t<T>;
  using Coefficients = ActivatedGradientCoefficients<A>;
  static constexpr bool kEpilogue = true;
  static constexpr int kInputs = 2;
  static constexpr int kUnroll = kBackwardUnroll<T>;

  const T* inputs[kInputs];  // dy, x
  T* output;                 // dx
  Reuse output_reuse;
  const InputGradientCoefficients<A>* finalized;
  BackwardEpilogue<T> epilogue;
  T* dresidual;

  __device__ __forceinline__ Coefficients coefficients(int64_t channel, bool) const {
    Coefficients of_channel{epilogue.coefficients(epilogue.read(channel)), A(0), A(0)};
    if (finalized != nullptr) {
      of_channel.mean_dy = finalized[channel].mean_dy;
      of_channel.x_scale = finalized[channel].x_scale;
    }
    return of_channel;
  }

  template <int kVector, int kSets>
  __device__ __forceinline__ void map_and_store(Pack<T, kVector> (&packs)[kInputs][kUnroll],
                                                const Coefficients (&coefficients)[kSets], const Slot (&slots)[kUnroll],
                                                T* dx, Reuse dx_reuse) const {
    const auto beside = epilogue.template read_slots<Reuse::none, kVector>(slots);
    map_gradients(epilogue, finalized == nullptr, packs, beside, coefficients, slots, dx, dresidual, dx_reuse);
  }
};

}  // namespace batchnorm_ext::cuda
