// Copies from memory to shared memory that a thread issues in groups and waits for later, its own only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/primitives/pack.cuh"

namespace batchnorm_ext::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAsyncCopies = false;
#else
constexpr bool kAsyncCopies = true;
#endif

// Of 16 bytes. What no one will want soon is marked to leave the second-level cache first.
template <Reuse kReuse>
__device__ __forceinline__ void copy_async(uint4* shared, const uint4* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kReuse == Reuse::soon) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(address)
        : "memory");
    return;
  }
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(address), "l"(policy)
               : "memory");
#elif !defined(__CUDACC__)
  emulation::copy_async(shared, address, sizeof(uint4));
#endif
}

// What was issued since the last call is a group.
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::commit_copies();
#endif
}

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif !defined(__CUDACC__)
  emulation::wait_for_copies(kPending);
#endif
}

// Until no more than the last `pending` groups are under way. The instruction has the number in it: beyond some it is
// rounded down, and waits for more.
__device__ __forceinline__ void wait_for_copies(int pending) {
  if (pending >= 16) {
    wait_for_copies<16>();
  } else if (pending >= 8) {
    wait_for_copies<8>();
  } else if (pending >= 4) {
    wait_for_copies<4>();
  } else if (pending >= 2) {
    wait_for_copies<2>();
  } else if (pending >= 1) {
    wait_for_copies<1>();
  } else {
    wait_for_copies<0>();
  }
}

}  // namespace batchnorm_ext::cuda
