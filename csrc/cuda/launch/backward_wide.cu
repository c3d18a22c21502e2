// The backward kernels of the element types that are summed in themselves.
#include "cuda/launch/backward_launch.cuh"

namespace batchnorm_ext::cuda {

template void backward_steps<double>(const BackwardParams&, const DeviceLimits&, void*, cudaStream_t);
template void backward_steps<float>(const BackwardParams&, const DeviceLimits&, void*, cudaStream_t);

}  // namespace batchnorm_ext::cuda
