// The backend's interface: the element type picks the instance.
#include "cuda/launch/backend.h"

namespace batchnorm_ext::cuda {

template <class T>
void forward_steps(const ForwardParams&, const DeviceLimits&, void*, cudaStream_t);
template <class T>
void backward_steps(const BackwardParams&, const DeviceLimits&, void*, cudaStream_t);

namespace {

// In front of a call's other workspace: the kernels hand statistics on in memory, whether or not they are kept.
size_t statistics_bytes(const ForwardParams& params) {
  if (params.mean != nullptr || params.record != nullptr) return 0;
  constexpr size_t kLine = 256;
  return (2 * static_cast<size_t>(params.shape.channels) * sizeof(double) + kLine - 1) / kLine * kLine;
}

}  // namespace

size_t forward_workspace_bytes(const ForwardParams& params, const DeviceLimits& limits) {
  return statistics_bytes(params) + plan_forward(params, limits).workspace_bytes;
}

size_t backward_workspace_bytes(const BackwardParams& params, const DeviceLimits& limits) {
  return plan_backward(params, limits).workspace_bytes;
}

void forward(const ForwardParams& params, const DeviceLimits& limits, void* workspace, cudaStream_t stream) {
  ForwardParams call = params;
  if (const size_t bytes = statistics_bytes(params); bytes > 0) {
    call.mean = workspace;
    call.inv_std = static_cast<double*>(workspace) + params.shape.channels;
    workspace = static_cast<char*>(workspace) + bytes;
  }
  switch (params.dtype) {
    case DType::float64:
      return forward_steps<double>(call, limits, workspace, stream);
    case DType::float32:
      return forward_steps<float>(call, limits, workspace, stream);
    case DType::float16:
      return forward_steps<float16>(call, limits, workspace, stream);
    case DType::bfloat16:
      return forward_steps<bfloat16>(call, limits, workspace, stream);
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
