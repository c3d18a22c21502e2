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

// A whole vector as one value of the memory system.
template <class T, int kVector>
__device__ __forceinline__ uint4 bits_of(const Pack<T, kVector>& pack) {
  static_assert(sizeof(pack) == kVectorBytes);
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  return bits;
}
template <class T, int kVector>
__device__ __forceinline__ void set_bits(Pack<T, kVector>& pack, const uint4& bits) {
  static_assert(sizeof(pack) == kVectorBytes);
  memcpy(&pack, &bits, sizeof(bits));
}

// What no one will want soon is marked to leave the second-level cache first.
enum class Reuse { soon, none };

template <bool kWhole, Reuse kReuse, class T, int kVector>
__device__ __forceinline__ void load(Pack<T, kVector>& pack, const T* tensor, const Slot& slot) {
  if constexpr (kWhole && kVector * sizeof(T) == kVectorBytes) {
    const uint4* const address = reinterpret_cast<const uint4*>(tensor + slot.offset);
    set_bits(pack, kReuse == Reuse::none ? __ldcs(address) : __ldg(address));
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      pack.values[e] = kWhole || slot.holds(e) ? tensor[slot.offset + e] : T{};
    }
  }
}

// The same slots of each of several tensors: all loads are issued before any is waited for.
template <bool kWhole, Reuse kReuse, class T, int kVector, int kInputs, int kUnroll>
__device__ __forceinline__ void load(Pack<T, kVector> (&packs)[kInputs][kUnroll], const T* const (&tensors)[kInputs],
                                     const Slot (&slots)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) load<kWhole, kReuse>(packs[i][u], tensors[i], slots[u]);
  }
}

template <bool kWhole, class T, int kVector>
__device__ __forceinline__ void store(const Pack<T, kVector>& pack, T* tensor, const Slot& slot, Reuse reuse) {
  if constexpr (kWhole && kVector * sizeof(T) == kVectorBytes) {
    const uint4 bits = bits_of(pack);
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
