// The steps of a backward call for one element type, in order.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/gradient_sums.cuh"
#include "cuda/kernels/input_gradient.cuh"
#include "cuda/launch/launch_plan.h"
#include "cuda/launch/launcher.cuh"

namespace batchnorm_ext::cuda {

template <class T>
void backward_steps(const BackwardParams& params, const DeviceLimits& limits, void* workspace, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const Shape& shape = params.shape;
  const BackwardPlan plan = plan_backward(params, limits);
  const T* const dy = static_cast<const T*>(params.dy);
  const T* const x = static_cast<const T*>(params.x);
  T* const dx = static_cast<T*>(params.dx);
  const A* const inv_std = static_cast<const A*>(params.inv_std);
  const Reuse reuse = output_reuse(shape, params.dtype, limits);
  auto* const coefficients =
      reinterpret_cast<InputGradientCoefficients<A>*>(static_cast<char*>(workspace) + plan.coefficients_offset);
  const bool input_gradient_follows = plan.needs_input_gradient && dx != nullptr && params.batch_statistics;
  const FinalizeGradients<T> finalize{shape,
                                      params.weight,
                                      static_cast<const A*>(params.mean),
                                      inv_std,
                                      params.dweight,
                                      params.dbias,
                                      input_gradient_follows,
                                      params.joined};
  auto* const partials = static_cast<GradientPartial<A>*>(workspace);
  const int64_t splits = plan.sums.splits;

  if (shape.elements() == 0) {
    if (shape.channels > 0 && (params.dweight.data != nullptr || params.dbias.data != nullptr)) {
      launch_finalize("finalize_gradients", stream, finalize_gradients<T, kFinalizeThreads>, shape.channels, finalize,
                      partials, 0, coefficients);
    }
    return;
  }

  // Where x is not needed, dy stands in for it: its second read hits the first-level cache, and no one looks at what
  // becomes of it.
  const T* const x_or_dy = x == nullptr ? dy : x;
  const bool has_epilogue = cuda::has_epilogue(params);
  const BackwardEpilogue<T> epilogue{params.epilogue.activation,
                                     static_cast<A>(params.epilogue.negative_slope),
                                     params.x_is_output,
                                     static_cast<const T*>(params.epilogue.residual),
                                     params.mask,
                                     static_cast<const A*>(params.mean),
                                     inv_std,
                                     static_cast<const A*>(params.shift),
                                     params.weight};
  T* const dresidual = static_cast<T*>(params.dresidual);

  if (plan.resident.fits) {
    bool launched = false;
    const auto run = [&](const auto& op) {
      launched = launch_resident("backward", plan.resident, op, dx, reuse, BatchCounter{}, workspace, stream);
    };
    const GradientSums<T, false> sums{{dy, x}, finalize, nullptr, 1, nullptr, nullptr, reuse};
    if constexpr (resident_has_epilogue(DTypeOf<T>::value)) {
      if (has_epilogue) run(ActivatedGradientSums<T, 1>{{dy, x}, epilogue, sums, nullptr, nullptr, dresidual, reuse});
    }
    if (!has_epilogue) run(sums);
    if (launched) return;
  }
  if (plan.needs_sums) {
    if (has_epilogue) {
      const bool last = !plan.needs_input_gradient;
      const GradientSums<T, false> sums{{dy, x_or_dy}, finalize, partials, splits, coefficients, nullptr, reuse};
      launch_reduce<false>(
          "gradient_sums", plan.sums,
          ActivatedGradientSums<T, kBackwardUnroll<T>>{
              {dy, x_or_dy}, epilogue, sums, last ? dx : nullptr, last ? dresidual : nullptr, nullptr, reuse},
          stream);
    } else if (dx != nullptr && !plan.needs_input_gradient) {
      const GradientSums<T, true> sums{{dy, x_or_dy}, finalize, partials, splits, nullptr, dx, reuse};
      launch_reduce<false>("gradient_sums", plan.sums, sums, stream);
    } else {
      const GradientSums<T, false> sums{{dy, x_or_dy}, finalize, partials, splits, coefficients, nullptr, reuse};
      launch_reduce<false>("gradient_sums", plan.sums, sums, stream);
    }
    if (splits > 1) {
      launch_finalize("finalize_gradients", stream, finalize_gradients<T, kFinalizeThreads>, shape.channels, finalize,
                      partials, splits, coefficients);
    }
  }
  if (!plan.needs_input_gradient) return;
  if (params.joined.count != nullptr && input_gradient_follows) {
    launch_finalize("finalize_gradients", stream, finalize_gradients<T, kFinalizeThreads>, shape.channels, finalize,
                    partials, 0, coefficients);
  }
  if (has_epilogue) {
    launch_pointwise(
        "input_gradient", plan.input_gradient,
        ActivatedInputGradient<T>{
            {dy, x_or_dy}, dx, reuse, input_gradient_follows ? coefficients : nullptr, epilogue, dresidual},
        stream);
  } else if (params.batch_statistics) {
    launch_pointwise("input_gradient", plan.input_gradient, InputGradient<T>{{dy, x}, dx, reuse, coefficients}, stream);
  } else {
    launch_pointwise("input_gradient", plan.input_gradient,
                     FrozenInputGradient<T>{{dy}, dx, reuse, params.weight, inv_std}, stream);
  }
}

}  // namespace batchnorm_ext::cuda
