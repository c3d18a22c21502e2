// Reads the limits of a device.
#include "cuda/launch/backend.h"
#include "cuda/launch/launcher.cuh"

namespace batchnorm_ext::cuda {
namespace {

// Takes as much of a multiprocessor as a block of `resident` may.
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks) half_of_a_multiprocessor() {}

// Zero where the device has no such clusters, or too few multiprocessors beside each other.
int active_clusters(int size, const DeviceLimits& limits) {
  const int64_t shared_bytes = resident_shared_bytes(limits);
  if (shared_bytes <= 0) return 0;
  const bool allowed =
      size <= kPortableCluster ||
      cudaFuncSetAttribute(half_of_a_multiprocessor, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  check(cudaFuncSetAttribute(half_of_a_multiprocessor, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "device_limits");
  cudaLaunchConfig_t config = launch_config(size, 1, kBlockThreads, static_cast<size_t>(shared_bytes), nullptr);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(size);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (allowed && cudaOccupancyMaxActiveClusters(&clusters, half_of_a_multiprocessor, &config) == cudaSuccess) {
    return clusters;
  }
  cudaGetLastError();  // or the next call would report it
  return 0;
}

}  // namespace

DeviceLimits device_limits(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device_limits");
    return value;
  };
  DeviceLimits limits{};
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  limits.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  limits.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.shared_bytes_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  limits.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  cudaFuncAttributes compiled{};
  check(cudaFuncGetAttributes(&compiled, half_of_a_multiprocessor), "device_limits");
  limits.compute_capability = compiled.ptxVersion;
  if (attribute(cudaDevAttrClusterLaunch) != 0 && limits.compute_capability >= kClusterCapability) {
    for (int i = 0; i < kClusterSizes; ++i) limits.active_clusters[i] = active_clusters(2 << i, limits);
  }
  return limits;
}

}  // namespace batchnorm_ext::cuda
