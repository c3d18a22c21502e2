// Sums over groups of neighbouring threads of a warp, in a fixed order.
#pragma once

#include <cuda_runtime.h>

namespace batchnorm_ext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ int log2_of(int power_of_two) {
  return __ffs(power_of_two) - 1;
}

// Calls use(i) for each i below `items` that is a thread's with this lane of `width`, a power of two.
template <class Use>
__device__ __forceinline__ void for_lane(int items, int lane, int width, Use&& use) {
  const int rounds = (items - lane + width - 1) >> log2_of(width);
  for (int round = 0; round < rounds; ++round) use(lane + round * width);
}

// The sum over `width` threads, a power of two, the same to the bit in each of them. All threads of the warp call it.
template <class V>
__device__ __forceinline__ V group_sum(V value, int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

}  // namespace batchnorm_ext::cuda
