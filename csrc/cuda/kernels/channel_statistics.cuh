// The sums behind a channel's mean and variance: the operation that `reduce` runs as the step channel_statistics.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels/finalize_statistics.cuh"
#include "cuda/primitives/pack.cuh"

namespace batchnorm_ext::cuda {

template <class T_, int kSlots = 4>
struct ChannelStatistics {
  using T = T_;
  using A = accumulate_t<T>;
  using Item = Moments<A>;  // around the channel's pivot
  using Coefficients = NormalizeCoefficients<A>;
  static constexpr bool kEpilogue = false, kEpilogueInSums = false;
  static constexpr int kInputs = 1;
  static constexpr int kUnroll = kSlots, kMapUnroll = 1;
  static constexpr Reuse kReuse = Reuse::soon;

  const T* inputs[kInputs];  // x
  FinalizeStatistics<T> finalize;
  Moments<A>* partials;  // [channel][split]; unused when there is one split, whose moments are final
  int64_t splits;
  Coefficients* coefficients;

  // Sums of (x - pivot) and its square. The thread's pivot is the mean of the first elements it sees: close to what
  // follows even where the channel's first element is not, so the squares carry no large offset.
  struct Accumulator {
    A pivot, sum, squares;
  };

  using Channel = A;  // its pivot

  __device__ __forceinline__ Channel read(int64_t channel) const {
    return channel_pivot(inputs[0], finalize.shape, channel);
  }
  __device__ __forceinline__ Accumulator begin(Channel pivot) const { return {pivot, A(0), A(0)}; }

  template <int kVector, int kSums>
  __device__ __forceinline__ void accumulate(Accumulator (&sums)[kSums], Pack<T, kVector> (&packs)[kInputs][kUnroll],
                                             const Slot (&slots)[kUnroll], bool first) const {
    // Elements that are not meant read as the pivot, which is a value of T, and add zero.
    const auto fill = [&] {
      fill_unmeant(packs[0], slots, [&](int e) { return narrow<T>(sums[kSums == 1 ? 0 : e].pivot); });
    };
    // Of the chunk's elements, those of the sum's channel.
    constexpr int kElements = kVector / kSums;
    const auto deviation = [&](int a, int u, int i) {
      return widen(packs[0][u].values[kSums == 1 ? i : a]) - sums[a].pivot;
    };
    fill();
    if (first) {
#pragma unroll
      for (int a = 0; a < kSums; ++a) {
        A sum = 0;
        int count = 0;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          count += kSums == 1 ? __popc(slots[u].flags & Slot::elements(0, kVector)) : slots[u].holds(a);
#pragma unroll
          for (int i = 0; i < kElements; ++i) sum += deviation(a, u, i);
        }
        const A shift = count == 0 ? A(0) : sum / static_cast<A>(count);
        if (shift - shift == 0) sums[a].pivot = widen(narrow<T>(sums[a].pivot + shift));
      }
      fill();
    }
#pragma unroll
    for (int a = 0; a < kSums; ++a) {
      // Several short chains of additions, then their sum: faster, and more exact, than one long one.
      A sum[kUnroll], squares[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        sum[u] = squares[u] = A(0);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const A d = deviation(a, u, i);
          sum[u] += d;
          squares[u] = multiply_add(d, d, squares[u]);
        }
      }
      // Pairwise.
#pragma unroll
      for (int distance = 1; distance < kUnroll; distance *= 2) {
#pragma unroll
        for (int u = 0; u + distance < kUnroll; u += 2 * distance) {
          sum[u] += sum[u + distance];
          squares[u] += squares[u + distance];
        }
      }
      sums[a].sum += sum[0];
      sums[a].squares += squares[0];
    }
  }

  __device__ __forceinline__ void keep(const Accumulator& sums, Item& place) const { place.mean = sums.pivot; }
  __device__ __forceinline__ Item item(const Accumulator& sums, int64_t samples, const Item& place) const {
    return moments_from_sums(sums.pivot - place.mean, sums.sum, sums.squares, samples);
  }

  template <class V, class At>
  __device__ __forceinline__ Moments<V> fold(At&& at, int items, int lane, int width) const {
    return fold_moments<V>(at, items, lane, width);
  }

  // Called by whole warps, where all of a channel was summed. One block of those that call it for a channel `saves`.
  template <class V>
  __device__ __forceinline__ void complete(int64_t channel, const Moments<V>& total, bool active, bool saves,
                                           Coefficients* to) const {
    finalize(channel, {static_cast<double>(total.mean), static_cast<double>(total.m2), total.count}, active, saves, to);
  }

  // Called by whole warps.
  __device__ __forceinline__ void finish(int64_t channel, int64_t split, const Item& total, bool active) const {
    if (splits == 1) {
      complete(channel, total, active, true, coefficients + channel);
    } else if (active) {
      partials[channel * splits + split] = total;
    }
  }
};

}  // namespace batchnorm_ext::cuda
