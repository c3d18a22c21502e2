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

}  // namespace batchnorm_ext::cuda
