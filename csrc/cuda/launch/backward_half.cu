// The backward kernels of the 16-bit element types.
#include "cuda/launch/backward_launch.cuh"

namespace batchnorm_ext::cuda {

template void backward_steps<float16>(const BackwardParams&, const DeviceLimits&, void*, cudaStream_t);
template void backward_steps<bfloat16>(const BackwardParams&, const DeviceLimits&, void*, cudaStream_t);

}  // namespace batchnorm_ext::cuda
