// Runs __global__ functions on a CPU, so that kernels and the host code that launches them are tested without a GPU.
//
// Threads of a block are fibers; several blocks are alive at once and take turns. A thread runs until it waits at a
// barrier or a shuffle, or ends; which one runs next is the chosen order: ascending, descending or shuffled by a seed.
// Code that lacks a barrier gives other results in another order. What is reported at once, as EmulationError: threads
// that wait for ever, that meet at different barriers, or that end while others of their warp still wait for them.
// Shared memory is a block's own, filled with rubbish, and its bounds are AddressSanitizer's to watch; it is reached
// through emulation::shared_memory(), since a __shared__ variable could not be one for each living block.
// What cannot be seen here: the order in which memory becomes visible between blocks, bank conflicts, speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <type_traits>

// ---- The language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
// Vectors are read from memory of any element type.
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};

// The running thread's place. Set by the engine whenever it switches.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

struct EmulationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { ascending, descending, shuffled };

struct Settings {
  Order order = Order::ascending;
  uint64_t seed = 0;         // of the shuffled order
  unsigned live_blocks = 3;  // that take turns; at most as many blocks are alive at once
  int fail_launch = -1;      // launches until one is refused; none when negative
};
inline Settings settings;

// Of the last launches, for tests of how much is launched.
struct Counters {
  int64_t launches = 0;
  int64_t blocks = 0;
};
inline Counters counters;

// The running thread's lane of its warp, and its block's shared memory.
inline unsigned lane;
inline unsigned char* block_shared_memory;

inline unsigned char* shared_memory() {
  return block_shared_memory;
}

// The engine, in cuda_emulation.cpp. `site` tells one barrier of the source from another.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
void sync_block(int site);
void sync_warp(unsigned mask, int site);
void yield();                         // for loops that wait for another block
void* exchange_slot(unsigned index);  // 16 bytes of each lane of the warp

template <class V>
V shuffle(unsigned mask, V value, unsigned source, int site) {
  static_assert(sizeof(V) <= 16 && std::is_trivially_copyable_v<V>);
  memcpy(exchange_slot(lane), &value, sizeof(V));
  sync_warp(mask, site);
  V result;
  memcpy(&result, exchange_slot(source), sizeof(V));
  sync_warp(mask, site);
  return result;
}

inline unsigned ballot(unsigned mask, bool predicate, int site) {
  const unsigned bit = predicate ? 1u : 0u;
  memcpy(exchange_slot(lane), &bit, sizeof(bit));
  sync_warp(mask, site);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    unsigned other;
    memcpy(&other, exchange_slot(i), sizeof(other));
    result |= other << i;
  }
  sync_warp(mask, site);
  return result;
}

}  // namespace emulation

// ---- Barriers, shuffles, atomics, memory

#define __syncthreads() ::emulation::sync_block(__LINE__)
#define __syncwarp(...) ::emulation::sync_warp(::emulation::mask_or_all(__VA_ARGS__), __LINE__)
#define __shfl_sync(mask, value, source) ::emulation::shuffle(mask, value, static_cast<unsigned>(source) % 32, __LINE__)
#define __shfl_xor_sync(mask, value, distance) \
  ::emulation::shuffle(mask, value, ::emulation::lane ^ static_cast<unsigned>(distance), __LINE__)
#define __shfl_down_sync(mask, value, distance) \
  ::emulation::shuffle(mask, value, ::emulation::lane_below(static_cast<unsigned>(distance)), __LINE__)
#define __ballot_sync(mask, predicate) ::emulation::ballot(mask, predicate, __LINE__)
#define __any_sync(mask, predicate) (::emulation::ballot(mask, predicate, __LINE__) != 0)
#define __nanosleep(nanoseconds) ::emulation::yield()

namespace emulation {
constexpr unsigned mask_or_all(unsigned mask = 0xffffffffu) {
  return mask;
}
inline unsigned lane_below(unsigned distance) {
  return lane + distance < 32 ? lane + distance : lane;
}
}  // namespace emulation

inline int __ffs(int value) {
  return __builtin_ffs(value);
}
template <class V>
V __ldg(const V* address) {
  return *address;
}
template <class V>
V __ldcs(const V* address) {
  return *address;
}
template <class V>
void __stcs(V* address, V value) {
  *address = value;
}
template <class V>
V atomicAdd(V* address, V value) {
  static_assert(std::is_integral_v<V>, "sums of floating-point numbers by atomics depend on the order of threads");
  const V before = *address;
  *address = static_cast<V>(before + value);
  return before;
}
inline void __threadfence() {}

// ---- The runtime's interface, as far as the backend uses it

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                     ? "no error"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "unspecified launch failure";
}

// Stands for a device of compute capability 9.0 with few multiprocessors.
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
  cudaDevAttrClusterLaunch,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int values[] = {9, 0, 4, 2048, 232448, 233472, 1 << 20, 1};
  *value = values[attribute];
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulation {
inline std::map<const void*, size_t> consented_shared_bytes;  // of kernels that asked for more than 48 KiB
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (value > 232448) return cudaErrorInvalidValue;
  emulation::consented_shared_bytes[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const auto consented = emulation::consented_shared_bytes.find(reinterpret_cast<const void*>(kernel));
  const size_t most = consented == emulation::consented_shared_bytes.end() ? 48 * 1024 : consented->second;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || config->dynamicSmemBytes > most) {
    return cudaErrorInvalidConfiguration;
  }
  if (emulation::settings.fail_launch >= 0 && emulation::settings.fail_launch-- == 0) return cudaErrorLaunchFailure;
  ++emulation::counters.launches;
  emulation::counters.blocks += int64_t(grid.x) * grid.y * grid.z;
  emulation::run_grid(grid, block, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
