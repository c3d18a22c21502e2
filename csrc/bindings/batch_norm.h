// Batch norm on tensors, as the native module and torch's dispatcher call it.
#pragma once

#include <optional>
#include <tuple>

#include "bindings/tensors.h"

namespace batchnorm_ext::bindings {

// Normalises input; in training also updates the running statistics. Returns (output, mean, inv_std).
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                                           const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                           bool training, std::optional<double> momentum, double eps,
                                           bool skip_nonfinite);

// Gradients of forward: (dx, dweight, dbias), undefined where not asked for.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const OptionalTensor& input,
                                            const OptionalTensor& weight, const Tensor& mean, const Tensor& inv_std,
                                            bool training, bool need_dx, std::optional<at::ScalarType> dweight_dtype,
                                            std::optional<at::ScalarType> dbias_dtype);

}  // namespace batchnorm_ext::bindings
