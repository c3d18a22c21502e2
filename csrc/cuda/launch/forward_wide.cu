// The forward kernels of the element types that are summed in themselves.
#include "cuda/launch/forward_launch.cuh"

namespace batchnorm_ext::cuda {

template void forward_steps<double>(const ForwardParams&, const DeviceLimits&, void*, cudaStream_t);
template void forward_steps<float>(const ForwardParams&, const DeviceLimits&, void*, cudaStream_t);

}  // namespace batchnorm_ext::cuda
