// The block's shared memory, sized at launch.
#pragma once

#include <cuda_runtime.h>

namespace batchnorm_ext::cuda {

// The only way to shared memory: where kernels run on a CPU, several blocks are alive at once, and a variable of the
// language could not be one for each of them.
template <class V>
__device__ __forceinline__ V* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<V*>(bytes);
#else
  return reinterpret_cast<V*>(emulation::shared_memory());
#endif
}

// Where items lie of which each thread has kSums neighbours, a power of two. Within these they change places from one
// line of the banks to the next: else the threads of a warp, which read or write the same one of theirs at once, share
// few banks.
template <int kSums, class Item>
__device__ __forceinline__ int banked(int item) {
  constexpr int kLineBytes = 128, kThreadBytes = kSums * static_cast<int>(sizeof(Item));
  constexpr int kPowerOfTwo = kThreadBytes & -kThreadBytes;                              // the largest that divides it
  constexpr int kLineThreads = kPowerOfTwo < kLineBytes ? kLineBytes / kPowerOfTwo : 1;  // whose places start apart
  const auto place = static_cast<unsigned>(item);
  return static_cast<int>(place ^ place / (kSums * kLineThreads) % kSums);
}

}  // namespace batchnorm_ext::cuda
