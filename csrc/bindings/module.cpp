// The native module: the tensor functions for Python and for torch's dispatcher, and what the module was built for.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <tuple>

#include "bindings/autograd.h"
#include "bindings/batch_norm.h"
#include "bindings/steps.h"
#include "build_stamp.h"  // written by the build
#include "cpu/backend.h"

#ifdef BATCHNORM_EXT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace batchnorm_ext::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> backward_operator(const Tensor& grad_output, const OptionalTensor& input,
                                                     const OptionalTensor& weight, const Tensor& mean,
                                                     const Tensor& inv_std, bool training, bool need_dx,
                                                     std::optional<at::ScalarType> dweight_dtype,
                                                     std::optional<at::ScalarType> dbias_dtype) {
  auto results = backward(grad_output, input, weight, mean, inv_std, training, need_dx, dweight_dtype, dbias_dtype);
  std::apply([&](auto&... gradients) { define(grad_output, gradients...); }, results);
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_act_operator(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    bool training, std::optional<double> momentum, double eps, bool skip_nonfinite, int64_t correction,
    std::string_view activation, double negative_slope, bool with_mask) {
  auto results = forward_act(input, residual, weight, bias, running_mean, running_var, num_batches_tracked, training,
                             momentum, eps, skip_nonfinite, correction, activation, negative_slope, with_mask);
  define(input, std::get<4>(results));
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_act_operator(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& residual,
    const OptionalTensor& weight, const Tensor& mean, const Tensor& inv_std, const Tensor& shift,
    const OptionalTensor& mask, at::IntArrayRef strides, bool training, bool need_dx, bool need_dresidual,
    std::optional<at::ScalarType> dweight_dtype, std::optional<at::ScalarType> dbias_dtype, std::string_view activation,
    double negative_slope) {
  auto results = backward_act(grad_output, input, residual, weight, mean, inv_std, shift, mask, strides, training,
                              need_dx, need_dresidual, dweight_dtype, dbias_dtype, activation, negative_slope);
  std::apply([&](auto&... gradients) { define(grad_output, gradients...); }, results);
  return results;
}

// A process can load two builds of this module, but an operator is defined once: the first one serves both.
void register_operators() {
  constexpr auto namespace_name = "batchnorm_ext";
  if (c10::Dispatcher::singleton().findSchema({"batchnorm_ext::forward", ""})) return;
  static torch::Library library(torch::Library::DEF, namespace_name, std::nullopt, __FILE__, __LINE__);
  library.def(
      "forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, bool skip_nonfinite, int "
      "correction) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor mean, Tensor inv_std, bool training, "
      "bool need_dx, ScalarType? dweight_dtype, ScalarType? dbias_dtype) -> (Tensor, Tensor, Tensor)");
  library.def(
      "forward_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
      "bool skip_nonfinite, int correction, str activation, float negative_slope, bool with_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "backward_act(Tensor grad_output, Tensor? input, Tensor? residual, Tensor? weight, Tensor mean, Tensor inv_std, "
      "Tensor shift, Tensor? mask, SymInt[] strides, bool training, bool need_dx, bool need_dresidual, "
      "ScalarType? dweight_dtype, ScalarType? dbias_dtype, str activation, float negative_slope) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) {
    library.impl("forward", torch::dispatch(key, TORCH_FN(forward)));
    library.impl("backward", torch::dispatch(key, TORCH_FN(backward_operator)));
    library.impl("forward_act", torch::dispatch(key, TORCH_FN(forward_act_operator)));
    library.impl("backward_act", torch::dispatch(key, TORCH_FN(backward_act_operator)));
  }
  register_step_operators();
}

#define BATCHNORM_EXT_QUOTE_TOKENS(...) #__VA_ARGS__
#define BATCHNORM_EXT_QUOTE(...) BATCHNORM_EXT_QUOTE_TOKENS(__VA_ARGS__)

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = BATCHNORM_EXT_QUOTE(BATCHNORM_EXT_VERSION);
  info["torch"] = BATCHNORM_EXT_QUOTE(BATCHNORM_EXT_TORCH);
#ifdef BATCHNORM_EXT_WITH_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION / 10 % 100);
#else
  info["cuda"] = "";
#endif
  info["arch_list"] = BATCHNORM_EXT_QUOTE(BATCHNORM_EXT_ARCH_LIST);
  info["instruction_set"] = cpu::instruction_set();
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = BATCHNORM_EXT_QUOTE(_MSC_FULL_VER);
#endif
  info["source_hash"] = BATCHNORM_EXT_QUOTE(BATCHNORM_EXT_SOURCE_HASH);
  return info;
}

}  // namespace
}  // namespace batchnorm_ext::bindings

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  namespace bindings = batchnorm_ext::bindings;
  bindings::register_operators();
  m.doc() = "Native batch norm kernels; the Python package batchnorm_ext is the public interface.";
  m.def("forward", &bindings::forward, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("running_mean"),
        py::arg("running_var"), py::arg("num_batches_tracked"), py::arg("training"), py::arg("momentum"),
        py::arg("eps"), py::arg("skip_nonfinite"), py::arg("correction"), py::call_guard<py::gil_scoped_release>(),
        "Normalise input; in training also update the running statistics. Returns (output, mean, inv_std).");
  m.def("backward", &bindings::backward, py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("mean"),
        py::arg("inv_std"), py::arg("training"), py::arg("need_dx"), py::arg("dweight_dtype"), py::arg("dbias_dtype"),
        py::call_guard<py::gil_scoped_release>(),
        "Gradients of forward. Returns (dx, dweight, dbias), None where not asked for.");
  m.def("fast_path", &bindings::fast_path, py::arg("input"), py::arg("running_mean"), py::arg("running_var"),
        py::arg("weight"), py::arg("bias"), py::arg("num_batches_tracked"), py::arg("training"), py::arg("momentum"),
        py::arg("eps"), py::arg("skip_nonfinite"), py::arg("correction"), py::arg("parts") = 1,
        "One whole call with autograd, or None where Python must look closer.");
  m.def("forward_act", &bindings::forward_act, py::arg("input"), py::arg("residual"), py::arg("weight"),
        py::arg("bias"), py::arg("running_mean"), py::arg("running_var"), py::arg("num_batches_tracked"),
        py::arg("training"), py::arg("momentum"), py::arg("eps"), py::arg("skip_nonfinite"), py::arg("correction"),
        py::arg("activation"), py::arg("negative_slope"), py::arg("with_mask"),
        py::call_guard<py::gil_scoped_release>(),
        "forward, then add residual and apply the activation. Returns (output, mean, inv_std, shift, mask), the mask "
        "None where not asked for.");
  m.def("backward_act", &bindings::backward_act, py::arg("grad_output"), py::arg("input"), py::arg("residual"),
        py::arg("weight"), py::arg("mean"), py::arg("inv_std"), py::arg("shift"), py::arg("mask"), py::arg("strides"),
        py::arg("training"), py::arg("need_dx"), py::arg("need_dresidual"), py::arg("dweight_dtype"),
        py::arg("dbias_dtype"), py::arg("activation"), py::arg("negative_slope"),
        py::call_guard<py::gil_scoped_release>(),
        "Gradients of forward_act. Returns (dx, dresidual, dweight, dbias), None where not asked for.");
  m.def("fast_path_act", &bindings::fast_path_act, py::arg("input"), py::arg("residual"), py::arg("running_mean"),
        py::arg("running_var"), py::arg("weight"), py::arg("bias"), py::arg("num_batches_tracked"), py::arg("training"),
        py::arg("momentum"), py::arg("eps"), py::arg("skip_nonfinite"), py::arg("correction"), py::arg("activation"),
        py::arg("negative_slope"), py::arg("inplace"),
        "One whole fused call with autograd, or None where Python must look closer.");
  bindings::define_steps(m);
  m.def("build_info", &bindings::build_info, "Versions, architectures and instruction set this module was built for.");
}
