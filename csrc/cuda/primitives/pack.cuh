// Loads and stores of a vector of elements, whole or in part.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace batchnorm_ext::cuda {

constexpr int kVectorBytes = 16;

// A vector's place in a tensor, and which of its elements are meant. The others, if it is read at once, are a
// neighbour's, which may be written meanwhile: what they read as must not matter.
struct Slot {
  int64_t offset;  // in elements; below zero where the first vector reaches over the front of the tensor
  unsigned flags;  // a bit for each element that is meant, and kAtOnce; none: there is no such slot
  int64_t number;  // among the slots of eight elements that cover a tensor: its byte of a mask

  // It has an element that is meant, starts at a vector boundary and lies in the tensor.
  static constexpr unsigned kAtOnce = 1u << 16;

  // The flags of elements [low, high).
  __device__ __forceinline__ static constexpr unsigned elements(int low, int high) {
    return high <= low ? 0u : (1u << high) - (1u << low);
  }

  __device__ __forceinline__ bool holds(int element) const { return (flags >> element & 1u) != 0; }
  __device__ __forceinline__ bool is_empty() const { return flags == 0; }
};

// The flags that all slots have.
template <int kUnroll>
__device__ __forceinline__ unsigned common_flags(const Slot (&slots)[kUnroll]) {
  unsigned flags = slots[0].flags;
#pragma unroll
  for (int u = 1; u < kUnroll; ++u) flags &= slots[u].flags;
  return flags;
}

__device__ __forceinline__ bool has_flags(unsigned flags, unsigned wanted) {
  return (flags & wanted) == wanted;
}

template <class T, int kVector>
struct Pack {
  T values[kVector];
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

// Each value rounded to the type of the pack: two by one instruction, where there is one.
template <class T, int kVector>
__device__ __forceinline__ void narrow_all(Pack<T, kVector>& pack, const accumulate_t<T> (&values)[kVector]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2 && kVector > 1) {
#pragma unroll
    for (int e = 0; e < kVector; e += 2) {
      uint32_t pair;
      if constexpr (DTypeOf<T>::value == DType::bfloat16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values[e + 1]), "f"(values[e]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values[e + 1]), "f"(values[e]));
      }
      memcpy(pack.values + e, &pair, sizeof(pair));
    }
    return;
  }
#endif
#pragma unroll
  for (int e = 0; e < kVector; ++e) pack.values[e] = narrow<T>(values[e]);
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

template <Reuse kReuse, class T, int kVector>
__device__ __forceinline__ void load_at_once(Pack<T, kVector>& pack, const T* tensor, int64_t offset) {
  if constexpr (kWords<T, kVector> > 0) {
    const uint4* const address = reinterpret_cast<const uint4*>(tensor + offset);
#pragma unroll
    for (int w = 0; w < kWords<T, kVector>; ++w) set_word(pack, w, load_word<kReuse>(address + w));
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) pack.values[e] = tensor[offset + e];
  }
}

template <Reuse kReuse, class T, int kVector>
__device__ __forceinline__ void load(Pack<T, kVector>& pack, const T* tensor, const Slot& slot) {
  if (has_flags(slot.flags, Slot::kAtOnce)) {
    load_at_once<kReuse>(pack, tensor, slot.offset);
  } else {
    pack = {};
    if (slot.is_empty()) return;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (slot.holds(e)) pack.values[e] = tensor[slot.offset + e];
    }
  }
}

// The same slots of each of several tensors: all loads are issued before any is waited for.
template <Reuse kReuse, class T, int kVector, int kInputs, int kUnroll>
__device__ __forceinline__ void load(Pack<T, kVector> (&packs)[kInputs][kUnroll], const T* const (&tensors)[kInputs],
                                     const Slot (&slots)[kUnroll]) {
  const auto each = [&](auto&& load_slot) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kInputs; ++i) load_slot(packs[i][u], tensors[i], slots[u]);
    }
  };
  if (has_flags(common_flags(slots), Slot::kAtOnce)) {
    each([](auto& pack, const T* tensor, const Slot& slot) { load_at_once<kReuse>(pack, tensor, slot.offset); });
  } else {
    each([](auto& pack, const T* tensor, const Slot& slot) { load<kReuse>(pack, tensor, slot); });
  }
}

// Elements of the packs that are not meant become value(element).
template <class T, int kVector, int kUnroll, class Value>
__device__ __forceinline__ void fill_unmeant(Pack<T, kVector> (&packs)[kUnroll], const Slot (&slots)[kUnroll],
                                             Value&& value) {
  if (has_flags(common_flags(slots), Slot::elements(0, kVector))) return;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const T other = value(e);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!slots[u].holds(e)) packs[u].values[e] = other;
    }
  }
}

template <class T, int kVector>
__device__ __forceinline__ void store_at_once(const Pack<T, kVector>& pack, T* tensor, int64_t offset, Reuse reuse) {
  if constexpr (kWords<T, kVector> > 0) {
    uint4* const address = reinterpret_cast<uint4*>(tensor + offset);
#pragma unroll
    for (int w = 0; w < kWords<T, kVector>; ++w) store_word(address + w, word_of(pack, w), reuse);
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) tensor[offset + e] = pack.values[e];
  }
}

template <class T, int kVector>
__device__ __forceinline__ void store(const Pack<T, kVector>& pack, T* tensor, const Slot& slot, Reuse reuse) {
  if (has_flags(slot.flags, Slot::elements(0, kVector) | Slot::kAtOnce)) {
    store_at_once(pack, tensor, slot.offset, reuse);
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (slot.holds(e)) tensor[slot.offset + e] = pack.values[e];
    }
  }
}

template <class T, int kVector, int kUnroll>
__device__ __forceinline__ void store(const Pack<T, kVector> (&packs)[kUnroll], T* tensor, const Slot (&slots)[kUnroll],
                                      Reuse reuse) {
  if (has_flags(common_flags(slots), Slot::elements(0, kVector) | Slot::kAtOnce)) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) store_at_once(packs[u], tensor, slots[u].offset, reuse);
  } else {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) store(packs[u], tensor, slots[u], reuse);
  }
}

}  // namespace batchnorm_ext::cuda
