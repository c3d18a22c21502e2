// Runs __global__ functions on a CPU, so that kernels and the host code that launches them are tested without a GPU.
//
// Threads of a block are fibers; several blocks are alive at once and take turns. A thread runs until it waits at a
// barrier or a shuffle, or ends; which one runs next is the chosen order: ascending, descending or shuffled by a seed.
// Code that lacks a barrier gives other results in another order. What is reported at once, as EmulationError: threads
// that wait for ever, that meet at different barriers, or that end while others of their warp still wait for them.
// Shared memory is a block's own, filled with rubbish, and its bounds are AddressSanitizer's to watch; it is reached
// through emulation::shared_memory(), since a __shared__ variable could not be one for each living block. Blocks of a
// cluster, and all of a cooperative launch, are alive together; a block's shared memory is freed when it ends.
// What cannot be seen here: the order in which memory becomes visible between blocks, bank conflicts, speed.
#pragma once

#include <algorithm>
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

// Stands for a device of compute capability 9.0 with few multiprocessors.
struct Device {
  int multiprocessors = 4;
  int64_t shared_bytes_per_block = 232448, shared_bytes_per_multiprocessor = 233472;
  int code = 90;  // the compute capability that the kernels were compiled for
};
inline Device device;

// Of the last launches, for tests of how much is launched.
struct Counters {
  int64_t launches = 0;
  int64_t blocks = 0;
  int64_t copies = 0;  // asynchronous ones
};
inline Counters counters;

// The running thread's lane of its warp, and its block's shared memory.
inline unsigned lane;
inline unsigned char* block_shared_memory;

inline unsigned char* shared_memory() {
  return block_shared_memory;
}

// The engine, in cuda_emulation.cpp. `site` tells one barrier of the source from another.
struct Together {
  unsigned cluster = 1;      // blocks of a cluster, which start together
  bool cooperative = false;  // all blocks start together
};
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Together together, const std::function<void()>& thread);
void sync_block(int site);
void sync_warp(unsigned mask, int site);
void copy_async(void* to, const void* from, size_t bytes);  // done when waited for; rubbish until then
void commit_copies();
void wait_for_copies(unsigned pending);
void sync_grid();
void arrive_at_cluster();
void wait_for_cluster();
unsigned char* shared_memory_of(unsigned rank);  // of a block of the cluster
void yield();                                    // for loops that wait for another block
// 16 bytes of each lane of the warp, of two sets in turn: who writes to a set again has met all who read it before.
using ExchangeSlots = unsigned char (*)[16];
ExchangeSlots exchange_slots();

template <class V>
V shuffle(unsigned mask, V value, unsigned source, int site) {
  static_assert(sizeof(V) <= 16 && std::is_trivially_copyable_v<V>);
  const ExchangeSlots slots = exchange_slots();
  memcpy(slots[lane], &value, sizeof(V));
  sync_warp(mask, site);
  V result;
  memcpy(&result, slots[source], sizeof(V));
  return result;
}

inline unsigned ballot(unsigned mask, bool predicate, int site) {
  const ExchangeSlots slots = exchange_slots();
  const unsigned bit = predicate ? 1u : 0u;
  memcpy(slots[lane], &bit, sizeof(bit));
  sync_warp(mask, site);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    unsigned other;
    memcpy(&other, slots[i], sizeof(other));
    result |= other << i;
  }
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
inline int __popc(unsigned value) {
  return __builtin_popcount(value);
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
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline void __threadfence() {}

// ---- The runtime's interface, as far as the backend uses it

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorInvalidClusterSize = 912
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                          ? "no error"
         : error == cudaErrorInvalidConfiguration      ? "invalid configuration argument"
         : error == cudaErrorCooperativeLaunchTooLarge ? "too many blocks in cooperative launch"
                                                       : "unspecified launch failure";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrClusterLaunch,
};
struct cudaFuncAttributes {
  int ptxVersion;
};
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  attributes->ptxVersion = emulation::device.code;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulation::Device& device = emulation::device;
  const int values[] = {device.multiprocessors,
                        2048,
                        static_cast<int>(device.shared_bytes_per_block),
                        static_cast<int>(device.shared_bytes_per_multiprocessor),
                        1 << 20,
                        1,
                        1};
  *value = values[attribute];
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };

namespace emulation {
struct Consent {
  size_t shared_bytes = 48 * 1024;
  unsigned cluster = 8;
};
inline std::map<const void*, Consent> consents;  // of kernels that asked for more than any may have

// Blocks that a multiprocessor can hold at once.
inline int64_t blocks_at_once(unsigned threads, size_t shared_bytes) {
  return std::min<int64_t>(2048 / threads,
                           device.shared_bytes_per_multiprocessor / static_cast<int64_t>(shared_bytes + 1024));
}
}  // namespace emulation

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  emulation::Consent& consent = emulation::consents[reinterpret_cast<const void*>(kernel)];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    consent.cluster = value ? 16 : 8;
  } else {
    if (value < 0 || value > emulation::device.shared_bytes_per_block) return cudaErrorInvalidValue;
    consent.shared_bytes = static_cast<size_t>(value);
  }
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulation {
inline Together together_of(const cudaLaunchConfig_t& config) {
  Together together;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) together.cooperative = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension) together.cluster = attribute.val.clusterDim.x;
  }
  return together;
}
}  // namespace emulation

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  const emulation::Together together = emulation::together_of(*config);
  if (together.cluster > emulation::consents[reinterpret_cast<const void*>(kernel)].cluster) {
    return cudaErrorInvalidConfiguration;
  }
  const int64_t at_once = emulation::blocks_at_once(config->blockDim.x, config->dynamicSmemBytes);
  *clusters = static_cast<int>(at_once * emulation::device.multiprocessors / together.cluster);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  const emulation::Consent consent = emulation::consents[reinterpret_cast<const void*>(kernel)];
  const emulation::Together together = emulation::together_of(*config);
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || config->dynamicSmemBytes > consent.shared_bytes || together.cluster == 0 ||
      together.cluster > consent.cluster || grid.x % together.cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  const int64_t at_once = emulation::blocks_at_once(block.x, config->dynamicSmemBytes);
  if (together.cooperative && blocks > at_once * emulation::device.multiprocessors) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  if (together.cluster > at_once * emulation::device.multiprocessors) return cudaErrorInvalidClusterSize;
  if (emulation::settings.fail_launch >= 0 && emulation::settings.fail_launch-- == 0) return cudaErrorLaunchFailure;
  ++emulation::counters.launches;
  emulation::counters.blocks += blocks;
  emulation::run_grid(grid, block, config->dynamicSmemBytes, together, [&] { kernel(arguments...); });
  return cudaSuccess;
}
