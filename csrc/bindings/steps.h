// The steps of batch norm one by one on tensors, for callers that exchange sums between them.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "bindings/tensors.h"

namespace batchnorm_ext::bindings {

// This process's part of a batch as a record: float64 {signature, count, means, m2s}. The signature stands for the
// number of channels and the dtype. `counted`, bool and of the shape of input without its channels, says which samples
// it is of.
Tensor channel_statistics(const Tensor& input, const OptionalTensor& counted);

// Merges the rows of `records` in their order and updates the running statistics. Returns float64 (mean, variance,
// count).
std::tuple<Tensor, Tensor, Tensor> finalize_statistics(const Tensor& records, const OptionalTensor& running_mean,
                                                       const OptionalTensor& running_var,
                                                       const OptionalTensor& num_batches_tracked,
                                                       std::optional<double> momentum, bool skip_nonfinite,
                                                       int64_t correction);

// Normalises input with float64 mean and variance. Returns (output, mean, inv_std).
std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& input, const OptionalTensor& weight,
                                             const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                             double eps);

// The same of a fused call. Returns (output, mean, inv_std, shift, mask), the mask undefined where not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_act(const Tensor& input, const OptionalTensor& residual,
                                                                 const OptionalTensor& weight,
                                                                 const OptionalTensor& bias, const Tensor& mean,
                                                                 const Tensor& variance, double eps,
                                                                 std::string_view activation, double negative_slope,
                                                                 bool with_mask);

// dx, for float64 sums over the `count` samples of the batch that input is a part of. gradient_sums is `backward`
// without dx.
Tensor input_gradient(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& mean,
                      const Tensor& inv_std, const Tensor& sum_dy, const Tensor& sum_dy_xhat, const Tensor& count);

// The same of a fused call. gradient_sums is then `backward_act` without dx.
Tensor input_gradient_act(const Tensor& grad_output, const Tensor& input, const OptionalTensor& residual,
                          const OptionalTensor& weight, const Tensor& mean, const Tensor& inv_std, const Tensor& shift,
                          const OptionalTensor& mask, const Tensor& sum_dy, const Tensor& sum_dy_xhat,
                          const Tensor& count, std::string_view activation, double negative_slope);

void define_steps(pybind11::module_& module);
void register_step_operators();

}  // namespace batchnorm_ext::bindings
