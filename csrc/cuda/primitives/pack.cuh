// Loads and stores of a vector of elements, whole or in part.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace batchnorm_ext::cuda {

constexpr int kVectorBytes = 16;

// A vector's place in a tensor and which of its elements are meant: [low, high).
struct Slot {
  int64_t offset;  // in elements; below zero where the first vector reaches over the front of the tensor
  int low, high;

  __device__ __forceinline__ bool holds(int element) const { return element >= low && element < high; }
};

template <class T, int kVector>
struct Pack {
  T values[kVector];
};

// Everything is loaded for the last time or from a pass that no other thread repeats soon: evict first, so that what
// the second-level cache holds is what a later pass will want.
enum class Reuse { soon, none };

template <bool kWhole, Reuse kReuse, class T, int kVector>
__device__ __forceinline__ void load(Pack<T, kVector>& pack, const T* tensor, const Slot& slot) {
  if constexpr (kWhole && kVector * sizeof(T) == kVectorBytes) {
    const uint4* const address = reinterpret_cast<const uint4*>(tensor + slot.offset);
    const uint4 bits = kReuse == Reuse::none ? __ldcs(address) : __ldg(address);
    memcpy(&pack, &bits, sizeof(pack));
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      pack.values[e] = kWhole || slot.holds(e) ? tensor[slot.offset + e] : T{};
    }
  }
}

template <bool kWhole, class T, int kVector>
__device__ __forceinline__ void store(const Pack<T, kVector>& pack, T* tensor, const Slot& slot, Reuse reuse) {
  if constexpr (kWhole && kVector * sizeof(T) == kVectorBytes) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(pack));
    uint4* const address = reinterpret_cast<uint4*>(tensor + slot.offset);
    if (reuse == Reuse::none) {
      __stcs(address, bits);
    } else {
      *address = bits;
    }
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (kWhole || slot.holds(e)) tensor[slot.offset + e] = pack.values[e];
    }
  }
}

}  // namespace batchnorm_ext::cuda
