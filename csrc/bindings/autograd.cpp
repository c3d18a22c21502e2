// Batch norm as a node of autograd's graph, for eager calls on plain tensors.
#include "bindings/autograd.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include "bindings/batch_norm.h"

namespace batchnorm_ext::bindings {
namespace {

namespace py = pybind11;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What stands between a call and its kernel in torch's dispatcher when there is nothing special about it. Autocast is
// not special: it has no rule for batch norm.
bool is_plain(c10::DispatchKeySet keys) {
  constexpr c10::DispatchKeySet plain(
      {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU,
#ifdef BATCHNORM_EXT_WITH_CUDA
       c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA,
#endif
       c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (((keys | local.included_) - local.excluded_).raw_repr() & ~plain.raw_repr()) == 0;
}

bool has_tangent(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->autograd_meta() != nullptr && tensor._fw_grad(/*level=*/0).defined();
}

// What a call needs besides the tensors that gradients flow to.
struct Settings {
  OptionalTensor running_mean, running_var, num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  bool skip_nonfinite;
};

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Settings& call) {
    auto [output, mean, inv_std] =
        bindings::forward(input, weight, bias, call.running_mean, call.running_var, call.num_batches_tracked,
                          call.training, call.momentum, call.eps, call.skip_nonfinite);
    const bool need_dx = input.requires_grad();
    const bool need_dweight = weight && weight->requires_grad();
    const bool need_x = need_dweight || (call.training && need_dx);
    context->save_for_backward(
        {need_x ? input : Tensor(), weight && need_dx ? *weight : Tensor(), std::move(mean), std::move(inv_std)});
    context->saved_data["call"] = c10::ivalue::Tuple::create(call.training, call.eps, type_of(weight), type_of(bias));
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const Tensor& grad_output = grad_outputs[0];
    const variable_list saved = context->get_saved_variables();
    const auto call = context->saved_data["call"].toTuple();
    const bool training = call->elements()[0].toBool();
    const double eps = call->elements()[1].toDouble();
    const c10::IValue &weight_type = call->elements()[2], &bias_type = call->elements()[3];

    // Autograd numbers the tensors that it was given.
    size_t edge = 0;
    const auto wanted = [&](const c10::IValue& type) -> std::optional<at::ScalarType> {
      if (type.isNone() || !context->needs_input_grad(edge++)) return std::nullopt;
      return type.toScalarType();
    };
    const bool need_dx = context->needs_input_grad(edge++);
    const auto dweight_type = wanted(weight_type);
    const auto dbias_type = wanted(bias_type);

    const OptionalTensor input = optional(saved[0]), weight = optional(saved[1]);
    const Tensor &mean = saved[2], &inv_std = saved[3];
    if (at::GradMode::is_enabled() || !is_plain(grad_output.key_set())) {
      return differentiable_backward(grad_output, input, weight, mean, inv_std, training, eps, need_dx, dweight_type,
                                     dbias_type);
    }
    auto [dx, dweight, dbias] =
        bindings::backward(grad_output, input, weight, mean, inv_std, training, need_dx, dweight_type, dbias_type);
    return {std::move(dx), std::move(dweight), std::move(dbias), Tensor()};
  }

 private:
  static OptionalTensor optional(const Tensor& tensor) {
    return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
  }

  static std::optional<at::ScalarType> type_of(const OptionalTensor& tensor) {
    return tensor ? std::optional(tensor->scalar_type()) : std::nullopt;
  }

  // The formulas stand once, in Python, made of torch's operations.
  static variable_list differentiable_backward(const Tensor& grad_output, const OptionalTensor& input,
                                               const OptionalTensor& weight, const Tensor& mean, const Tensor& inv_std,
                                               bool training, double eps, bool need_dx,
                                               std::optional<at::ScalarType> dweight_type,
                                               std::optional<at::ScalarType> dbias_type) {
    const py::gil_scoped_acquire gil;
    const py::object backward = py::module_::import("batchnorm_ext.autograd").attr("differentiable_backward");
    const auto gradients =
        backward(grad_output, input, weight, mean, inv_std, training, eps, need_dx, dweight_type, dbias_type)
            .cast<std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>>();
    const auto tensor = [](const OptionalTensor& gradient) { return gradient.value_or(Tensor()); };
    return {tensor(std::get<0>(gradients)), tensor(std::get<1>(gradients)), tensor(std::get<2>(gradients)), Tensor()};
  }
};

// Reads a Python argument as a tensor or None, and notes whether it is more than a plain tensor.
class Arguments {
 public:
  OptionalTensor take(py::handle argument) {
    if (argument.is_none()) return std::nullopt;
    if (!THPVariable_CheckExact(argument.ptr())) {
      plain_ = false;
      return std::nullopt;
    }
    const Tensor& tensor = THPVariable_Unpack(argument.ptr());
    keys_ = keys_ | tensor.key_set();
    plain_ = plain_ && !has_tangent(tensor);
    return tensor;
  }

  bool plain() const { return plain_ && bindings::is_plain(keys_); }

 private:
  c10::DispatchKeySet keys_;
  bool plain_ = true;
};

bool has_kernels(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

bool requires_grad(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

bool accepted(const Tensor& input, const Settings& call) {
  if (input.dim() < 2 || !has_kernels(input.scalar_type()) || !(call.eps > 0.0)) return false;
  if (requires_grad(call.running_mean) || requires_grad(call.running_var)) return false;
  if (!call.training) return call.running_mean && call.running_var;
  const int64_t channels = input.size(1);
  return call.running_mean.has_value() == call.running_var.has_value() && (channels == 0 || input.numel() != channels);
}

}  // namespace

py::object fast_path(py::handle input_arg, py::handle running_mean, py::handle running_var, py::handle weight_arg,
                     py::handle bias_arg, py::handle num_batches_tracked, bool training, std::optional<double> momentum,
                     double eps, bool skip_nonfinite) {
  Arguments arguments;
  const OptionalTensor input = arguments.take(input_arg);
  const OptionalTensor weight = arguments.take(weight_arg), bias = arguments.take(bias_arg);
  Settings call{arguments.take(running_mean),
                arguments.take(running_var),
                arguments.take(num_batches_tracked),
                training,
                momentum,
                eps,
                skip_nonfinite};
  if (!input || !arguments.plain() || !accepted(*input, call)) return py::none();
  // A forward pass inside a backward pass is activation checkpointing's, and the statistics know this batch already.
  if (training && torch::autograd::get_current_graph_task_id() != -1) {
    call.running_mean = call.running_var = call.num_batches_tracked = std::nullopt;
  }
  Tensor output;
  {
    const py::gil_scoped_release no_gil;
    RECORD_FUNCTION("batchnorm_ext::forward", c10::ArrayRef<const c10::IValue>());
    const bool needs_grad =
        at::GradMode::is_enabled() && (input->requires_grad() || requires_grad(weight) || requires_grad(bias));
    if (needs_grad) {
      output = BatchNorm::apply(*input, weight, bias, call);
    } else {
      output = std::get<0>(bindings::forward(*input, weight, bias, call.running_mean, call.running_var,
                                             call.num_batches_tracked, training, momentum, eps, skip_nonfinite));
    }
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
}

}  // namespace batchnorm_ext::bindings
