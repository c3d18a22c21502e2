// The steps of a forward call for one element type, in order.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels/channel_statistics.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/finalize_statistics.cuh"
#include "cuda/kernels/normalize.cuh"
#include "cuda/launch/launch_plan.h"
#include "cuda/launch/launcher.cuh"

namespace batchnorm_ext::cuda {

template <class T>
void forward_steps(const ForwardParams& params, const DeviceLimits& limits, void* workspace, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const Shape& shape = params.shape;
  int64_t* const counter = params.batch_statistics ? params.running.num_batches_tracked : nullptr;
  if (shape.elements() == 0) {
    if (counter != nullptr) launch("count_batch", stream, count_batch<T>, 1, 1, 1, 0, counter);
    return;
  }
  const ForwardPlan plan = plan_forward(params, limits);
  const T* const x = static_cast<const T*>(params.x);
  A* const mean = static_cast<A*>(params.mean);
  A* const inv_std = static_cast<A*>(params.inv_std);
  const Reuse reuse = output_reuse(shape, params.dtype, limits);
  NormalizeCoefficients<A>* coefficients = nullptr;
  const bool has_epilogue = cuda::has_epilogue(params);
  const ForwardEpilogue<T> epilogue{params.epilogue.activation, static_cast<A>(params.epilogue.negative_slope),
                                    static_cast<const T*>(params.epilogue.residual), params.mask,
                                    static_cast<A*>(params.shift)};

  if (params.batch_statistics) {
    auto* const partials = static_cast<Moments<A>*>(workspace);
    coefficients =
        reinterpret_cast<NormalizeCoefficients<A>*>(static_cast<char*>(workspace) + plan.coefficients_offset);
    const FinalizeStatistics<T> finalize{shape,      x,    params.weight, params.bias,   params.running,
                                         params.eps, mean, inv_std,       params.record, params.signature};
    const int64_t splits = plan.statistics.splits;
    if (plan.resident.fits) {
      const Groups& groups = plan.resident.groups;
      const int64_t saving = groups.count * int64_t(groups.each_merges ? 1 : groups.size);
      const bool too_many = params.running.cumulative && saving > kMostReaders;
      const BatchCounter counted{too_many ? nullptr : counter,
                                 params.running.cumulative ? static_cast<unsigned>(saving) : 0};
      bool launched = false;
      const auto run = [&](const auto& op) {
        launched =
            launch_resident("forward", plan.resident, op, static_cast<T*>(params.y), reuse, counted, workspace, stream);
      };
      if constexpr (resident_has_epilogue(DTypeOf<T>::value)) {
        if (has_epilogue) run(StatisticsActivate<T>{{{x}, finalize, nullptr, 1, nullptr}, epilogue});
      }
      if (!has_epilogue) run(ChannelStatistics<T>{{x}, finalize, nullptr, 1, nullptr});
      if (launched && too_many && counter != nullptr)
        launch("count_batch", stream, count_batch<T>, 1, 1, 1, 0, counter);
      if (launched) return;
    }
    const ChannelStatistics<T> statistics{{x}, finalize, partials, splits, coefficients};
    launch_reduce<true>("channel_statistics", plan.statistics, statistics, stream);
    if (splits > 1) {
      launch_finalize("finalize_statistics", stream, finalize_statistics<T, kFinalizeThreads>, shape.channels, finalize,
                      partials, splits, coefficients);
    }
  }

  if (params.record != nullptr) return;

  const Normalize<T> normalize{{x},           static_cast<T*>(params.y),
                               reuse,         coefficients,
                               counter,       params.running,
                               params.weight, params.bias,
                               params.eps,    mean,
                               inv_std};
  if (has_epilogue) {
    launch_pointwise("normalize", plan.normalize, NormalizeActivate<T>{normalize, epilogue}, stream);
  } else {
    launch_pointwise("normalize", plan.normalize, normalize, stream);
  }
}

}  // namespace batchnorm_ext::cuda
