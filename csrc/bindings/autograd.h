// Batch norm as a node of autograd's graph, for eager calls on plain tensors.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string_view>

namespace batchnorm_ext::bindings {

// One whole call of batch norm, recorded for autograd where a gradient is needed; None where anything but the kernels
// and autograd has a part in it (tensor subclasses, modes, transforms, tracing, forward-mode derivatives) or an
// argument is refused, and Python must look closer. Nothing is written before that is decided. `parts` are those of
// ForwardArguments.
pybind11::object fast_path(pybind11::handle input, pybind11::handle running_mean, pybind11::handle running_var,
                           pybind11::handle weight, pybind11::handle bias, pybind11::handle num_batches_tracked,
                           bool training, std::optional<double> momentum, double eps, bool skip_nonfinite,
                           int64_t correction, int64_t parts);

// The same of a fused call. `inplace` is a permission: the input is overwritten where its gradients can do without it.
pybind11::object fast_path_act(pybind11::handle input, pybind11::handle residual, pybind11::handle running_mean,
                               pybind11::handle running_var, pybind11::handle weight, pybind11::handle bias,
                               pybind11::handle num_batches_tracked, bool training, std::optional<double> momentum,
                               double eps, bool skip_nonfinite, int64_t correction, std::string_view activation,
                               double negative_slope, bool inplace);

}  // namespace batchnorm_ext::bindings
