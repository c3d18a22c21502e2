// The forward kernels of the 16-bit element types.
#include "cuda/launch/forward_launch.cuh"

namespace batchnorm_ext::cuda {

template void forward_steps<float16>(const ForwardParams&, const DeviceLimits&, void*, cudaStream_t);
template void forward_steps<bfloat16>(const ForwardParams&, const DeviceLimits&, void*, cudaStream_t);

}  // namespace batchnorm_ext::cuda
