// The backend's interface: the element type picks the instance.
#include "cuda/launch/backend.h"

namespace batchnorm_ext::cuda {

template <class T>
void forward_steps(const ForwardParams&, const DeviceLimits&, void*, cudaStream_t);
template <class T>
void backward_steps(const BackwardParams&, const DeviceLimits&, void*, cudaStream_t);

size_t forward_workspace_bytes(const ForwardParams& params, const DeviceLimits& limits) {
  return plan_forward(params, limits).workspace_bytes;
}

size_t backward_workspace_bytes(const BackwardParams& params, const DeviceLimits& limits) {
  return plan_backward(params, limits).workspace_bytes;
}

void forward(const ForwardParams& params, const DeviceLimits& limits, void* workspace, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::float64:
      return forward_steps<double>(params, limits, workspace, stream);
    case DType::float32:
      return forward_steps<float>(params, limits, workspace, stream);
    case DType::float16:
      return forward_steps<float16>(params, limits, workspace, stream);
    case DType::bfloat16:
      return forward_steps<bfloat16>(params, limits, workspace, stream);
  }
}

void backward(const BackwardParams& params, const DeviceLimits& limits, void* workspace, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::float64:
      return backward_steps<double>(params, limits, workspace, stream);
    case DType::float32:
      return backward_steps<float>(params, limits, workspace, stream);
    case DType::float16:
      return backward_steps<float16>(params, limits, workspace, stream);
    case DType::bfloat16:
      return backward_steps<bfloat16>(params, limits, workspace, stream);
  }
}

}  // namespace batchnorm_ext::cuda
