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
  int64_t number;  // among the slots of eight elements that cover a tensor: its byte of a mask

  __device__ __forceinline__ bool holds(int element) const { return element >= low && element < high; }
};

template <class T, int kVector>
struct Pack {
  T values[kVector];
};

// A condition that is known when a kernel is compiled, and one that is not.
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};
struct Variable {
  bool value;
};

// Values of the memory system that make up a pack; none where it is smaller than one.
template <class T, int kVector>
constexpr int kWords = kVector * static_cast<int>(sizeof(T)) / kVectorBytes;

template <class T, int kVector>
__device__ __forceinline__ uint4 word_of(const Pack<T, kVector>& pack, int word) {
  uint4 bits;
  memcpy(&bits, reinterpret_cast<const char*>(&pack) + word * kVectorBytes, sizeof(bits));
  return bits;
}
template <class T, int kVector>
__device__ __forceinline__ void set_word(Pack<T, kVector>& pack, int word, const uint4& bits) {
  memcpy(reinterpret_cast<char*>(&pack) + word * kVectorBytes, &bits, sizeof(bits));
}

// Calls use(pack, u, i, word) for each word of each pack.
template <class T, int kVector, int kInputs, int kUnroll, class Use>
__device__ __forceinline__ void for_each_word(Pack<T, kVector> (&packs)[kInputs][kUnroll], Use&& use) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
#pragma unroll
      for (int w = 0; w < kWords<T, kVector>; ++w) use(packs[i][u], u, i, w);
    }
  }
}

// What no one will want soon is marked to leave the second-level cache first.
enum class Reuse { soon, none };

// 16 bytes by one instruction: a plain assignment may be compiled to four, each of a quarter of what it touches. None
// goes through the read-only path, since what a kernel reads it may write: y may be x, and dx be x or dy.
template <Reuse kReuse>
__device__ __forceinline__ uint4 load_word(const uint4* address) {
  if constexpr (kReuse == Reuse::none) return __ldcs(address);
#if defined(__CUDACC__)
  uint4 word;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(address)
               : "memory");
  return word;
#else
  return *address;
#endif
}

__device__ __forceinline__ void store_word(uint4* address, const uint4& word, Reuse reuse) {
  if (reuse == Reuse::none) {
    __stcs(address, word);
  } else {
#if defined(__CUDACC__)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word.x), "r"(word.y), "r"(word.z),
                 "r"(word.w)
                 : "memory");
#else
    *address = word;
#endif
  }
}

// `whole`: every element of the slot is meant, and it starts at a vector boundary.
template <Reuse kReuse, class Whole, class T, int kVector>
__device__ __forceinline__ void load(Whole whole, Pack<T, kVector>& pack, const T* tensor, const Slot& slot) {
  if (kWords<T, kVector> > 0 && whole.value) {
    const uint4* const address = reinterpret_cast<const uint4*>(tensor + slot.offset);
#pragma unroll
    for (int w = 0; w < kWords<T, kVector>; ++w) set_word(pack, w, load_word<kReuse>(address + w));
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      pack.values[e] = whole.value || slot.holds(e) ? tensor[slot.offset + e] : T{};
    }
  }
}

// The same slots of each of several tensors: all loads are issued before any is waited for.
template <Reuse kReuse, class Whole, class T, int kVector, int kInputs, int kUnroll>
__device__ __forceinline__ void load(Whole whole, Pack<T, kVector> (&packs)[kInputs][kUnroll],
                                     const T* const (&tensors)[kInputs], const Slot (&slots)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) load<kReuse>(whole, packs[i][u], tensors[i], slots[u]);
  }
}

template <class Whole, class T, int kVector>
__device__ __forceinline__ void store(Whole whole, const Pack<T, kVector>& pack, T* tensor, const Slot& slot,
                                      Reuse reuse) {
  if (kWords<T, kVector> > 0 && whole.value) {
    uint4* const address = reinterpret_cast<uint4*>(tensor + slot.offset);
#pragma unroll
    for (int w = 0; w < kWords<T, kVector>; ++w) store_word(address + w, word_of(pack, w), reuse);
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (whole.value || slot.holds(e)) tensor[slot.offset + e] = pack.values[e];
    }
  }
}

template <class Whole, class T, int kVector, int kUnroll>
__device__ __forceinline__ void store(Whole whole, const Pack<T, kVector> (&packs)[kUnroll], T* tensor,
                                      const Slot (&slots)[kUnroll], Reuse reuse) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) store(whole, packs[u], tensor, slots[u], reuse);
}

}  // namespace batchnorm_ext::cuda
