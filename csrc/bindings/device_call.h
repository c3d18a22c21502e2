// Runs a call's params on the device its tensors live on: torch's thread pool for the CPU, the current stream for CUDA.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "cpu/backend.h"

#ifdef BATCHNORM_EXT_WITH_CUDA
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <mutex>
#include <vector>

#include "cuda/launch/backend.h"
#endif

namespace batchnorm_ext::bindings {

inline cpu::Executor torch_executor() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(),
          [](int64_t tasks, const std::function<void(int64_t)>& task) {
            at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          }};
}

#ifdef BATCHNORM_EXT_WITH_CUDA
// Of the current device. Read at its first call: to read them takes up memory of the device.
inline const cuda::DeviceLimits& cached_device_limits(int device) {
  struct Entry {
    std::once_flag once;
    cuda::DeviceLimits limits;
  };
  static std::vector<Entry> entries(c10::cuda::device_count());
  Entry& entry = entries.at(device);
  std::call_once(entry.once, [&] { entry.limits = cuda::device_limits(device); });
  return entry.limits;
}

// The workspace is freed to the caching allocator while the kernels may still run, which is safe: it is reused in the
// order of this stream only.
template <class Params>
void run_on_cuda(const Params& params, const at::Tensor& input,
                 size_t (*workspace_bytes)(const Params&, const cuda::DeviceLimits&),
                 void (*call)(const Params&, const cuda::DeviceLimits&, void*, cudaStream_t)) {
  const c10::cuda::CUDAGuard guard(input.device());
  const cuda::DeviceLimits& limits = cached_device_limits(input.device().index());
  at::Tensor workspace;
  if (const size_t bytes = workspace_bytes(params, limits); bytes > 0) {
    workspace = at::empty({static_cast<int64_t>(bytes)}, input.options().dtype(at::kByte));
  }
  void* const memory = workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
  call(params, limits, memory, c10::cuda::getCurrentCUDAStream());
}
#endif

inline void check_device(const at::Tensor& input) {
#ifdef BATCHNORM_EXT_WITH_CUDA
  TORCH_CHECK(input.is_cpu() || input.is_cuda(), "input must be on the CPU or a CUDA device, got ", input.device());
#else
  TORCH_CHECK(input.is_cpu(), "input is on ", input.device(),
              ", but batchnorm_ext was built for the CPU only; `python -m batchnorm_ext` says how to change that");
#endif
}

inline void run(const ForwardParams& params, const at::Tensor& input) {
#ifdef BATCHNORM_EXT_WITH_CUDA
  if (input.is_cuda()) return run_on_cuda(params, input, cuda::forward_workspace_bytes, cuda::forward);
#endif
  cpu::forward(params, torch_executor());
}

inline void run(const JoinParams& params, const at::Tensor& records) {
#ifdef BATCHNORM_EXT_WITH_CUDA
  if (records.is_cuda()) {
    const c10::cuda::CUDAGuard guard(records.device());
    return cuda::join_statistics(params, c10::cuda::getCurrentCUDAStream());
  }
#endif
  cpu::join_statistics(params, torch_executor());
}

inline void run(const BackwardParams& params, const at::Tensor& input) {
#ifdef BATCHNORM_EXT_WITH_CUDA
  if (input.is_cuda()) return run_on_cuda(params, input, cuda::backward_workspace_bytes, cuda::backward);
#endif
  cpu::backward(params, torch_executor());
}

}  // namespace batchnorm_ext::bindings
