// Batch norm as a node of autograd's graph, for eager calls on plain tensors.
#include "bindings/autograd.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <string>
#include <vector>

#include "bindings/batch_norm.h"
#include "bindings/in_place.h"

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

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

bool requires_grad(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

std::optional<at::ScalarType> type_of(const OptionalTensor& tensor) {
  return tensor ? std::optional(tensor->scalar_type()) : std::nullopt;
}

// Which gradients a backward pass asks for. Autograd numbers the tensors that it was given; absent ones do not count.
class WantedGradients {
 public:
  explicit WantedGradients(const AutogradContext& context) : context_(context) {}

  bool next() { return context_.needs_input_grad(edge_++); }
  // The dtype of the gradient of a parameter whose dtype, or absence, was saved.
  std::optional<at::ScalarType> next(const c10::IValue& type) {
    if (type.isNone() || !next()) return std::nullopt;
    return type.toScalarType();
  }

 private:
  const AutogradContext& context_;
  size_t edge_ = 0;
};

// The formulas of gradients that can be differentiated stand once, in Python, made of torch's operations.
template <size_t kGradients, class... Arguments>
std::array<Tensor, kGradients> differentiable(const char* function, const Arguments&... arguments) {
  const py::gil_scoped_acquire gil;
  const py::object results = py::module_::import("batchnorm_ext.autograd").attr(function)(arguments...);
  std::array<Tensor, kGradients> gradients;
  for (size_t i = 0; i < kGradients; ++i) {
    const auto gradient = results[py::int_(i)].cast<OptionalTensor>();
    gradients[i] = gradient.value_or(Tensor());
  }
  return gradients;
}

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Settings& call) {
    auto [output, mean, inv_std] =
        bindings::forward(input, weight, bias, call.running_mean, call.running_var, call.num_batches_tracked,
                          call.training, call.momentum, call.eps, call.skip_nonfinite);
    const bool need_dx = input.requires_grad();
    const bool need_dweight = requires_grad(weight);
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

    WantedGradients wanted(*context);
    const bool need_dx = wanted.next();
    const auto dweight_type = wanted.next(call->elements()[2]);
    const auto dbias_type = wanted.next(call->elements()[3]);

    const OptionalTensor input = optional(saved[0]), weight = optional(saved[1]);
    const Tensor &mean = saved[2], &inv_std = saved[3];
    if (at::GradMode::is_enabled() || !is_plain(grad_output.key_set())) {
      auto [dx, dweight, dbias] = differentiable<3>("differentiable_backward", grad_output, input, weight, mean,
                                                    inv_std, training, eps, need_dx, dweight_type, dbias_type);
      return {std::move(dx), std::move(dweight), std::move(dbias), Tensor()};
    }
    auto [dx, dweight, dbias] =
        bindings::backward(grad_output, input, weight, mean, inv_std, training, need_dx, dweight_type, dbias_type);
    return {std::move(dx), std::move(dweight), std::move(dbias), Tensor()};
  }
};

struct FusedSettings : Settings {
  Activation activation;
  std::string_view activation_name;
  double negative_slope;
  bool in_place;
};

// As BatchNormActFunction in Python, and in place where that was asked for and can be inverted.
class BatchNormAct : public torch::autograd::Function<BatchNormAct> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias, const FusedSettings& call) {
    const bool need_dx = input.requires_grad();
    const bool need_deviation = requires_grad(weight) || (call.training && need_dx);
    const bool one_bit = has_one_bit_derivative(call.activation);
    const bool smooth = !one_bit && call.activation != Activation::identity;
    const bool need_x = need_deviation || smooth;
    const bool in_place = call.in_place && may_overwrite(input, residual, true) &&
                          (!need_x || (!residual && is_invertible(input, weight, bias, call.activation,
                                                                  call.negative_slope, call.training)));
    const bool inverted = in_place && need_x;
    const Fusion fusion{call.activation, call.negative_slope, residual,
                        one_bit && (residual.has_value() || !need_deviation), in_place};
    auto [output, mean, inv_std, shift, mask] =
        forward_call(input, weight, bias, call.running_mean, call.running_var, call.num_batches_tracked, call.training,
                     call.momentum, call.eps, call.skip_nonfinite, &fusion);
    if (in_place) context->mark_dirty({input});
    context->save_for_backward({need_x ? (inverted ? output : input) : Tensor(),
                                smooth && residual ? *residual : Tensor(),
                                weight && (need_dx || need_x) ? *weight : Tensor(), smooth && bias ? *bias : Tensor(),
                                std::move(mean), std::move(inv_std), std::move(shift), std::move(mask)});
    context->saved_data["call"] = c10::ivalue::Tuple::create(
        {call.training, call.eps, residual.has_value(), type_of(weight), type_of(bias),
         std::string(call.activation_name), call.negative_slope, output.strides().vec(), inverted});
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const Tensor& grad_output = grad_outputs[0];
    const variable_list saved = context->get_saved_variables();
    const auto call = context->saved_data["call"].toTuple();
    const bool training = call->elements()[0].toBool();
    const double eps = call->elements()[1].toDouble();
    const bool has_residual = call->elements()[2].toBool();
    const std::string& activation_name = call->elements()[5].toStringRef();
    const double negative_slope = call->elements()[6].toDouble();
    const std::vector<int64_t> strides = call->elements()[7].toIntVector();
    const bool inverted = call->elements()[8].toBool();
    const Activation activation = *activation_of(activation_name);

    WantedGradients wanted(*context);
    const bool need_dx = wanted.next();
    const bool need_dresidual = has_residual && wanted.next();
    const auto dweight_type = wanted.next(call->elements()[3]);
    const auto dbias_type = wanted.next(call->elements()[4]);

    OptionalTensor input = optional(saved[0]);
    const OptionalTensor residual = optional(saved[1]), weight = optional(saved[2]), bias = optional(saved[3]);
    const Tensor &mean = saved[4], &inv_std = saved[5], &shift = saved[6];
    const OptionalTensor mask = optional(saved[7]);
    if (at::GradMode::is_enabled() || !is_plain(grad_output.key_set())) {
      if (inverted) input = inverse(*input, weight, mean, inv_std, shift, activation_name, negative_slope);
      auto [dx, dresidual, dweight, dbias] = differentiable<4>(
          "differentiable_backward_act", grad_output, input, residual, weight, bias, mean, inv_std, shift, mask,
          strides, training, eps, need_dx, need_dresidual, dweight_type, dbias_type, activation_name, negative_slope);
      return {std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias), Tensor()};
    }
    if (activation == Activation::identity && !inverted) {
      auto [dx, dweight, dbias] =
          bindings::backward(grad_output, input, weight, mean, inv_std, training, need_dx, dweight_type, dbias_type);
      return {std::move(dx), need_dresidual ? grad_output : Tensor(), std::move(dweight), std::move(dbias), Tensor()};
    }
    const FusedBackward fusion{activation, negative_slope, residual, shift, mask, strides, need_dresidual, inverted};
    auto [dx, dresidual, dweight, dbias] =
        backward_call(grad_output, input, weight, mean, inv_std, training, need_dx, dweight_type, dbias_type, &fusion);
    return {std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias), Tensor()};
  }

 private:
  // The input that the output of an in-place call took the place of, with the input's place in autograd's graph.
  static Tensor inverse(const Tensor& output, const OptionalTensor& weight, const Tensor& mean, const Tensor& inv_std,
                        const Tensor& shift, const std::string& activation, double negative_slope) {
    Tensor input;
    {
      const at::NoGradGuard no_grad;
      const py::gil_scoped_acquire gil;
      input = py::module_::import("batchnorm_ext._reference")
                  .attr("inverse")(output, weight, mean, inv_std, shift, activation, negative_slope)
                  .cast<Tensor>();
    }
    const auto node = torch::autograd::get_current_node();
    if (node && node->next_edge(0).is_valid()) torch::autograd::impl::set_gradient_edge(input, node->next_edge(0));
    return input;
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

bool accepted(const Tensor& input, const Settings& call) {
  if (input.dim() < 2 || !has_kernels(input.scalar_type()) || !(call.eps > 0.0)) return false;
  if (requires_grad(call.running_mean) || requires_grad(call.running_var)) return false;
  if (!call.training) return call.running_mean && call.running_var;
  const int64_t channels = input.size(1);
  return call.running_mean.has_value() == call.running_var.has_value() && (channels == 0 || input.numel() != channels);
}

bool like(const Tensor& residual, const Tensor& input) {
  return residual.sizes() == input.sizes() && residual.scalar_type() == input.scalar_type() &&
         residual.device() == input.device();
}

// A forward pass inside a backward pass is activation checkpointing's, and the statistics know this batch already.
void leave_statistics_when_recomputing(Settings& call) {
  if (call.training && torch::autograd::get_current_graph_task_id() != -1) {
    call.running_mean = call.running_var = call.num_batches_tracked = std::nullopt;
  }
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
  leave_statistics_when_recomputing(call);
  Tensor output;
  {
    const py::gil_scoped_release no_gil;
    RECORD_FUNCTION("batchnorm_ext::forward", c10::ArrayRef<const c10::IValue>());
    if (at::GradMode::is_enabled() && (input->requires_grad() || requires_grad(weight) || requires_grad(bias))) {
      output = BatchNorm::apply(*input, weight, bias, call);
    } else {
      output = std::get<0>(bindings::forward(*input, weight, bias, call.running_mean, call.running_var,
                                             call.num_batches_tracked, training, momentum, eps, skip_nonfinite));
    }
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
}

py::object fast_path_act(py::handle input_arg, py::handle residual_arg, py::handle running_mean, py::handle running_var,
                         py::handle weight_arg, py::handle bias_arg, py::handle num_batches_tracked, bool training,
                         std::optional<double> momentum, double eps, bool skip_nonfinite, std::string_view activation,
                         double negative_slope, bool inplace) {
  Arguments arguments;
  const OptionalTensor input = arguments.take(input_arg), residual = arguments.take(residual_arg);
  const OptionalTensor weight = arguments.take(weight_arg), bias = arguments.take(bias_arg);
  const auto known_activation = activation_of(activation);
  FusedSettings call{{arguments.take(running_mean), arguments.take(running_var), arguments.take(num_batches_tracked),
                      training, momentum, eps, skip_nonfinite},
                     known_activation.value_or(Activation::identity),
                     activation,
                     negative_slope,
                     inplace};
  if (!input || !arguments.plain() || !accepted(*input, call) || !known_activation) return py::none();
  if (residual && !like(*residual, *input)) return py::none();
  const bool needs_grad = at::GradMode::is_enabled() && (input->requires_grad() || requires_grad(residual) ||
                                                         requires_grad(weight) || requires_grad(bias));
  if (inplace &&
      (!has_inverse(call.activation, negative_slope) || (needs_grad && input->requires_grad() && input->is_leaf()))) {
    return py::none();
  }
  leave_statistics_when_recomputing(call);
  Tensor output;
  {
    const py::gil_scoped_release no_gil;
    RECORD_FUNCTION("batchnorm_ext::forward_act", c10::ArrayRef<const c10::IValue>());
    if (needs_grad) {
      output = BatchNormAct::apply(*input, residual, weight, bias, call);
    } else {
      const bool in_place = inplace && may_overwrite(*input, residual, false);
      const Fusion fusion{call.activation, negative_slope, residual, /*with_mask=*/false, in_place};
      output = forward_call(*input, weight, bias, call.running_mean, call.running_var, call.num_batches_tracked,
                            training, momentum, eps, skip_nonfinite, &fusion)
                   .output;
      if (in_place) UpdatedBuffer(*input).publish();
    }
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
}

}  // namespace batchnorm_ext::bindings
