// The one place that launches a kernel, and the choice of a kernel's view and vector width from a plan.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/kernels/pointwise.cuh"
#include "cuda/kernels/reduce.cuh"
#include "cuda/kernels/resident.cuh"
#include "cuda/launch/launch_plan.h"

namespace batchnorm_ext::cuda {

inline void check(cudaError_t status, const char* step) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call to ask, torch's perhaps, would report it again
  throw std::runtime_error(std::string("batchnorm_ext: CUDA step ") + step + " failed: " + cudaGetErrorString(status));
}

constexpr size_t kSharedBytesWithoutConsent = 48 * 1024;

// A parameter's type is the kernel's; arguments only convert to it.
template <class V>
struct Identity {
  using type = V;
};
template <class V>
using Exactly = typename Identity<V>::type;

inline cudaLaunchConfig_t launch_config(int64_t grid_x, int64_t grid_y, int threads, size_t shared_bytes,
                                        cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return config;
}

template <class... Parameters>
void launch(const char* step, cudaStream_t stream, void (*kernel)(Parameters...), int64_t grid_x, int64_t grid_y,
            int threads, size_t shared_bytes, const Exactly<Parameters>&... arguments) {
  const cudaLaunchConfig_t config = launch_config(grid_x, grid_y, threads, shared_bytes, stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), step);
}

// With what lets the blocks of a group wait for each other. False where the device has no room for all of them at once,
// although the plan says so: it may be shared, or a tool may have given the kernel more registers. Only where groups
// may be refused: there, the steps are planned too.
template <class... Parameters>
bool launch_groups(const char* step, const Groups& groups, size_t most_shared_bytes, cudaLaunchConfig_t config,
                   void (*kernel)(Parameters...), const Exactly<Parameters>&... arguments) {
  if (config.dynamicSmemBytes > kSharedBytesWithoutConsent) {
    // The same for all launches: another thread's call may come between this and the launch.
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared_bytes)),
        step);
  }
  cudaLaunchAttribute attribute{};
  config.attrs = &attribute;
  config.numAttrs = groups.exchange == Exchange::none ? 0 : 1;
  if (groups.exchange == Exchange::cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(groups.size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    if (groups.size > kPortableCluster) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), step);
    }
  } else if (groups.exchange == Exchange::grid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  const bool has_no_room = status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorInvalidClusterSize ||
                           status == cudaErrorLaunchOutOfResources;
  if (has_no_room && may_be_refused(groups)) {
    cudaGetLastError();  // or the next call to ask would report it
    return false;
  }
  check(status, step);
  return true;
}

// use(view, width): the plan's view, and its vector width as a constant. Steps on one tensor always have whole vectors,
// and those with an epilogue slots of one width.
template <class Op, bool kOneTensor, class Use>
void with_view(const StepPlan& plan, Use&& use) {
  constexpr int kWide = Op::kEpilogue ? kEpilogueVector : kVectorBytes / sizeof(typename Op::T);
  const auto with_width = [&](const auto& view) {
    if constexpr (!kOneTensor && !Op::kEpilogue) {
      if (plan.vector != kWide) return use(view, std::integral_constant<int, 1>{});
    }
    use(view, std::integral_constant<int, kWide>{});
  };
  if (plan.rows) {
    with_width(plan.row_view);
  } else {
    with_width(plan.column_view);
  }
}

template <bool kOneTensor, class Op>
void launch_reduce(const char* step, const StepPlan& plan, const Op& op, cudaStream_t stream) {
  with_view<Op, kOneTensor>(plan, [&](const auto& view, auto width) {
    using View = std::decay_t<decltype(view)>;
    constexpr int kWidth = decltype(width)::value;
    constexpr size_t kSharedBytes = kBlockThreads * kChannelsPerThread<View, kWidth> * sizeof(typename Op::Item);
    static_assert(kSharedBytes <= kSharedBytesWithoutConsent);
    launch(step, stream, reduce<Op, View, kWidth, kBlockThreads>, plan.tiles, plan.splits, kBlockThreads, kSharedBytes,
           view, op);
  });
}

template <class Op>
void launch_pointwise(const char* step, const StepPlan& plan, const Op& op, cudaStream_t stream) {
  with_view<Op, false>(plan, [&](const auto& view, auto width) {
    using View = std::decay_t<decltype(view)>;
    const size_t shared_bytes = static_cast<size_t>(plan.coefficient_places()) * sizeof(typename Op::Coefficients);
    launch(step, stream, pointwise<Op, View, decltype(width)::value, kBlockThreads>, plan.tiles, plan.splits,
           kBlockThreads, shared_bytes, view, op);
  });
}

// As launch_groups: false where the device has no room.
template <class Op>
bool launch_resident(const char* step, const ResidentPlan& plan, const Op& op, typename Op::T* output,
                     Reuse output_reuse, const BatchCounter& counter, void* workspace, cudaStream_t stream) {
  static_assert((Op::kInputs == 1 ? kForwardChunk : kBackwardChunk) % Op::kUnroll == 0);
  Groups groups = plan.groups;
  groups.workspace = workspace;
  bool launched = false;
  with_view<Op, true>(plan.step, [&](const auto& view, auto width) {
    using View = std::decay_t<decltype(view)>;
    constexpr int kWidth = decltype(width)::value;
    const auto run = [&](auto* kernel) {
      return launch_groups(
          step, groups, plan.most_shared_bytes,
          launch_config(int64_t(groups.count) * groups.size, 1, kBlockThreads, plan.shared_bytes, stream), kernel, view,
          op, groups, static_cast<int>(plan.thread_vectors), static_cast<int>(plan.step.tile_channels()), output,
          output_reuse, counter);
    };
    launched = plan.streams ? run(resident<Op, View, kWidth, kBlockThreads, true>)
                            : run(resident<Op, View, kWidth, kBlockThreads, false>);
  });
  return launched;
}

// A warp for each channel.
template <class... Parameters>
void launch_finalize(const char* step, cudaStream_t stream, void (*kernel)(Parameters...), int64_t channels,
                     const Exactly<Parameters>&... arguments) {
  constexpr int kChannelsPerBlock = kFinalizeThreads / kWarp;
  launch(step, stream, kernel, (channels + kChannelsPerBlock - 1) / kChannelsPerBlock, 1, kFinalizeThreads, 0,
         arguments...);
}

inline Reuse output_reuse(const Shape& shape, DType dtype, const DeviceLimits& limits) {
  return streams_past_l2(shape, dtype, limits) ? Reuse::none : Reuse::soon;
}

}  // namespace batchnorm_ext::cuda
