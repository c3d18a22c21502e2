// The CUDA backend's whole interface: asynchronous calls on a stream of the current device. No host synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "core/params.h"
#include "cuda/launch/launch_plan.h"

namespace batchnorm_ext::cuda {

// Limits of the current device, read once and cached by the caller.
DeviceLimits device_limits(int device);

// Bytes of scratch memory, aligned to 256, that the call needs in the order of the stream; zero is common.
size_t forward_workspace_bytes(const ForwardParams& params, const DeviceLimits& limits);
size_t backward_workspace_bytes(const BackwardParams& params, const DeviceLimits& limits);

// Throws std::runtime_error, naming the step, when a launch fails.
void forward(const ForwardParams& params, const DeviceLimits& limits, void* workspace, cudaStream_t stream);
void backward(const BackwardParams& params, const DeviceLimits& limits, void* workspace, cudaStream_t stream);
void join_statistics(const JoinParams& params, cudaStream_t stream);

}  // namespace batchnorm_ext::cuda
