// Batch norm as a node of autograd's graph, for eager calls on plain tensors.
#include "bindings/autograd.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <string>
#include <vector>

#include "bindings/batch_norm.h"
#include "bindings/call_node.h"
#include "bindings/in_place.h"

namespace batchnorm_ext::bindings {
namespace {

namespace py = pybind11;

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

// ---- The nodes ----

std::optional<at::ScalarType> type_of(const Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor.scalar_type()) : std::nullopt;
}

// The dtype of a parameter's gradient, if it is wanted.
std::optional<at::ScalarType> type_if(bool wanted, std::optional<at::ScalarType> type) {
  return wanted ? type : std::nullopt;
}

bool must_differentiate(const Tensor& grad_output) {
  return at::GradMode::is_enabled() || !is_plain(grad_output.key_set());
}

// The formulas of gradients that can be differentiated stand once, in Python, made of torch's operations.
template <class... Arguments>
variable_list differentiable(const char* function, const Arguments&... arguments) {
  const py::gil_scoped_acquire gil;
  const py::tuple results = py::module_::import("batchnorm_ext.autograd").attr(function)(arguments...);
  variable_list gradients;
  for (const auto gradient : results) gradients.push_back(or_undefined(gradient.cast<OptionalTensor>()));
  return gradients;
}

// As BatchNormFunction in Python.
struct BatchNorm {
  static constexpr const char* name = "batchnorm_ext::BatchNormBackward";
  enum Saved : size_t { saved_input, saved_weight, saved_statistics, saved };
  enum Gradient : size_t { to_input, to_weight, to_bias, gradients };

  bool training;
  double eps;
  std::optional<at::ScalarType> weight_type, bias_type;
  int64_t parts;

  template <class Self, class Action>
  static void visit(Self& call, const Action& action) {
    action(call.training), action(call.eps), action(call.weight_type), action(call.bias_type), action(call.parts);
  }

  static Tensor forward(const ForwardArguments& call) {
    const bool need_dx = call.input.requires_grad();
    const bool need_x = call.weight.requires_grad() || (call.training && need_dx);
    const auto node =
        make_node(BatchNorm{call.training, call.eps, type_of(call.weight), type_of(call.bias), call.parts}, call.input,
                  call.weight, call.bias);
    if (need_x) node->save(saved_input, call.input);
    if (need_dx) node->save(saved_weight, call.weight);
    const Tensor statistics = empty_statistics(call.input, 2, call.parts);
    Tensor output = forward_call(call, rows_to_keep(statistics), nullptr).output;
    node->save(saved_statistics, statistics);
    torch::autograd::set_history(output, node);
    return output;
  }

  variable_list backward(const std::array<Tensor, saved>& tensors, const Tensor& dy,
                         const std::array<bool, gradients>& wanted) const {
    const Tensor &input = tensors[saved_input], &weight = tensors[saved_weight];
    const Tensor& statistics = tensors[saved_statistics];
    const auto dweight_type = type_if(wanted[to_weight], weight_type), dbias_type = type_if(wanted[to_bias], bias_type);
    if (must_differentiate(dy)) {
      return differentiable("differentiable_backward", dy, optional(input), optional(weight), statistics.select(0, 0),
                            statistics.select(0, 1), training, eps, wanted[to_input], dweight_type, dbias_type);
    }
    auto [dx, dresidual, dweight, dbias] = backward_call({dy, input, weight, saved_rows(statistics, 2, dy, parts),
                                                          training, wanted[to_input], dweight_type, dbias_type, parts},
                                                         nullptr);
    return {std::move(dx), std::move(dweight), std::move(dbias)};
  }
};

struct FusedArguments {
  const Tensor& residual;
  Activation activation;
  std::string_view activation_name;
  double negative_slope;
  bool inplace;
};

// As BatchNormActFunction in Python, and in place where that was asked for and can be inverted.
struct BatchNormAct {
  static constexpr const char* name = "batchnorm_ext::BatchNormActBackward";
  enum Saved : size_t { saved_input, saved_residual, saved_weight, saved_bias, saved_statistics, saved_mask, saved };
  enum Gradient : size_t { to_input, to_residual, to_weight, to_bias, gradients };

  bool training;
  double eps;
  std::optional<at::ScalarType> weight_type, bias_type;
  std::string activation_name;
  double negative_slope;
  std::vector<int64_t> strides;  // of the output
  bool inverted;                 // what is saved as input is the output, which took its place

  template <class Self, class Action>
  static void visit(Self& call, const Action& action) {
    action(call.training), action(call.eps), action(call.weight_type), action(call.bias_type);
    action(call.activation_name), action(call.negative_slope), action(call.strides), action(call.inverted);
  }

  static Tensor forward(const ForwardArguments& call, const FusedArguments& fused) {
    const Tensor &input = call.input, &weight = call.weight, &bias = call.bias, &residual = fused.residual;
    const bool need_dx = input.requires_grad();
    const bool need_deviation = weight.requires_grad() || (call.training && need_dx);
    const bool one_bit = has_one_bit_derivative(fused.activation);
    const bool smooth = !one_bit && fused.activation != Activation::identity;
    const bool need_x = need_deviation || smooth;
    const bool in_place = fused.inplace && may_overwrite(input, residual, true) &&
                          (!need_x || (!residual.defined() && is_invertible(input, weight, bias, fused.activation,
                                                                            fused.negative_slope, call.training)));
    const bool inverted = in_place && need_x;
    const auto node =
        make_node(BatchNormAct{call.training, call.eps, type_of(weight), type_of(bias),
                               std::string(fused.activation_name), fused.negative_slope, /*strides=*/{}, inverted},
                  input, residual, weight, bias);
    if (need_x && !inverted) node->save(saved_input, input);
    if (smooth) node->save(saved_residual, residual);
    if (need_dx || need_x) node->save(saved_weight, weight);
    if (smooth) node->save(saved_bias, bias);

    const Tensor statistics = empty_statistics(input, 3);
    const Fusion fusion{fused.activation, fused.negative_slope, residual,
                        one_bit && (residual.defined() || !need_deviation), in_place};
    auto [output, mask] = forward_call(call, rows_to_keep(statistics), &fusion);
    node->call.strides = output.strides().vec();
    node->save(saved_statistics, statistics);
    node->save(saved_mask, mask);
    if (in_place) {
      torch::autograd::impl::bump_version(output);
      torch::autograd::rebase_history(output, node);
    } else {
      torch::autograd::set_history(output, node);
    }
    if (inverted) node->save(saved_input, output, /*is_output=*/true);
    return output;
  }

  variable_list backward(const std::array<Tensor, saved>& tensors, const Tensor& dy,
                         const std::array<bool, gradients>& wanted) const {
    const Tensor &residual = tensors[saved_residual], &weight = tensors[saved_weight], &bias = tensors[saved_bias];
    const Tensor &statistics = tensors[saved_statistics], &mask = tensors[saved_mask];
    Tensor input = tensors[saved_input];
    const bool need_dx = wanted[to_input], need_dresidual = wanted[to_residual];
    const auto dweight_type = type_if(wanted[to_weight], weight_type), dbias_type = type_if(wanted[to_bias], bias_type);
    if (must_differentiate(dy)) {
      const auto rows = statistics.unbind();
      if (inverted) input = inverse(input, weight, rows);
      return differentiable("differentiable_backward_act", dy, optional(input), optional(residual), optional(weight),
                            optional(bias), rows[0], rows[1], rows[2], optional(mask), strides, training, eps, need_dx,
                            need_dresidual, dweight_type, dbias_type, activation_name, negative_slope);
    }
    const Activation activation = *activation_of(activation_name);
    const BackwardArguments call{dy,       input,   weight,       saved_rows(statistics, 3, dy),
                                 training, need_dx, dweight_type, dbias_type};
    const FusedBackward fusion{activation, negative_slope, residual, mask, strides, need_dresidual, inverted};
    const bool plain = activation == Activation::identity && !inverted;  // the residual's gradient is the output's
    auto [dx, dresidual, dweight, dbias] = backward_call(call, plain ? nullptr : &fusion);
    if (plain && need_dresidual) dresidual = dy;
    return {std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias)};
  }

 private:
  // The input that the output of an in-place call took the place of, with the input's place in autograd's graph.
  Tensor inverse(const Tensor& output, const Tensor& weight, const std::vector<Tensor>& statistics) const {
    Tensor input;
    {
      const at::NoGradGuard no_grad;
      const py::gil_scoped_acquire gil;
      input = py::module_::import("batchnorm_ext._reference")
                  .attr("inverse")(output, optional(weight), statistics[0], statistics[1], statistics[2],
                                   activation_name, negative_slope)
                  .cast<Tensor>();
    }
    const auto node = torch::autograd::get_current_node();
    if (node && node->next_edge(to_input).is_valid()) {
      torch::autograd::impl::set_gradient_edge(input, node->next_edge(to_input));
    }
    return input;
  }
};

// ---- The calls ----

// Reads a Python argument as a tensor or None, and notes whether it is more than a plain tensor. What is read lives as
// long as the argument.
class Arguments {
 public:
  const Tensor& take(py::handle argument) {
    if (argument.is_none()) return absent();
    if (!THPVariable_CheckExact(argument.ptr())) {
      plain_ = false;
      return absent();
    }
    const Tensor& tensor = THPVariable_Unpack(argument.ptr());
    keys_ = keys_ | tensor.key_set();
    has_tangent_ = has_tangent_ || (differentiates_forward_ && tensor._fw_grad(/*level=*/0).defined());
    return tensor;
  }

  bool plain() const { return plain_ && !has_tangent_ && is_plain(keys_); }

 private:
  c10::DispatchKeySet keys_;
  bool plain_ = true, has_tangent_ = false;
  // Each tensor would have to be locked to be asked for a tangent.
  const bool differentiates_forward_ = torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
};

bool has_kernels(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

bool accepted(const ForwardArguments& call) {
  const Tensor& input = call.input;
  if (input.dim() < 2 || !has_kernels(input.scalar_type()) || !(call.eps > 0.0)) return false;
  if (call.running_mean.requires_grad() || call.running_var.requires_grad()) return false;
  if (!call.training) return call.running_mean.defined() && call.running_var.defined();
  const int64_t channels = input.size(1);  // none: the number of samples, one of which is too few, does not show
  if (call.running_mean.defined() != call.running_var.defined() || channels == 0) return false;
  if (call.parts == 1) return input.numel() != channels;
  // Of the smallest part, which cannot be empty.
  const int64_t batch = input.size(0);
  return batch >= call.parts && call.parts > 0 && input.numel() / batch * (batch / call.parts) > channels;
}

bool like(const Tensor& residual, const Tensor& input) {
  return residual.sizes() == input.sizes() && residual.scalar_type() == input.scalar_type() &&
         residual.device() == input.device();
}

// Whether a gradient may be asked of any of these.
template <class... Tensors>
bool needs_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

// A forward pass inside a backward pass is activation checkpointing's, and the statistics know this batch already.
bool is_recomputing() {
  return torch::autograd::get_current_graph_task_id() != -1;
}

ForwardArguments forward_arguments(Arguments& arguments, py::handle input, py::handle running_mean,
                                   py::handle running_var, py::handle weight, py::handle bias,
                                   py::handle num_batches_tracked, bool training, std::optional<double> momentum,
                                   double eps, bool skip_nonfinite, int64_t correction, int64_t parts) {
  const bool recomputing = training && is_recomputing();
  const auto updated = [&](py::handle buffer) -> const Tensor& {
    const Tensor& tensor = arguments.take(buffer);
    return recomputing ? absent() : tensor;
  };
  return {arguments.take(input),
          arguments.take(weight),
          arguments.take(bias),
          updated(running_mean),
          updated(running_var),
          updated(num_batches_tracked),
          training,
          momentum,
          eps,
          skip_nonfinite,
          correction,
          parts};
}

}  // namespace

py::object fast_path(py::handle input_arg, py::handle running_mean_arg, py::handle running_var_arg,
                     py::handle weight_arg, py::handle bias_arg, py::handle num_batches_tracked_arg, bool training,
                     std::optional<double> momentum, double eps, bool skip_nonfinite, int64_t correction,
                     int64_t parts) {
  Arguments arguments;
  const ForwardArguments call =
      forward_arguments(arguments, input_arg, running_mean_arg, running_var_arg, weight_arg, bias_arg,
                        num_batches_tracked_arg, training, momentum, eps, skip_nonfinite, correction, parts);
  const Tensor& input = call.input;
  if (!input.defined() || !arguments.plain() || !accepted(call)) return py::none();
  Tensor output;
  {
    const py::gil_scoped_release no_gil;
    RECORD_FUNCTION("batchnorm_ext::forward", c10::ArrayRef<const c10::IValue>());
    output =
        needs_grad(input, call.weight, call.bias) ? BatchNorm::forward(call) : forward_call(call, {}, nullptr).output;
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
}

py::object fast_path_act(py::handle input_arg, py::handle residual_arg, py::handle running_mean_arg,
                         py::handle running_var_arg, py::handle weight_arg, py::handle bias_arg,
                         py::handle num_batches_tracked_arg, bool training, std::optional<double> momentum, double eps,
                         bool skip_nonfinite, int64_t correction, std::string_view activation_name,
                         double negative_slope, bool inplace) {
  const auto activation = activation_of(activation_name);
  if (!activation) return py::none();
  Arguments arguments;
  const Tensor& residual = arguments.take(residual_arg);
  const ForwardArguments call =
      forward_arguments(arguments, input_arg, running_mean_arg, running_var_arg, weight_arg, bias_arg,
                        num_batches_tracked_arg, training, momentum, eps, skip_nonfinite, correction, /*parts=*/1);
  const Tensor &input = call.input, &weight = call.weight, &bias = call.bias;
  if (!input.defined() || !arguments.plain() || !accepted(call)) return py::none();
  if (residual.defined() && !like(residual, input)) return py::none();
  const bool recorded = needs_grad(input, residual, weight, bias);
  if (inplace &&
      (!has_inverse(*activation, negative_slope) || (recorded && input.requires_grad() && input.is_leaf()))) {
    return py::none();
  }
  Tensor output;
  {
    const py::gil_scoped_release no_gil;
    RECORD_FUNCTION("batchnorm_ext::forward_act", c10::ArrayRef<const c10::IValue>());
    if (recorded) {
      output = BatchNormAct::forward(call, {residual, *activation, activation_name, negative_slope, inplace});
    } else {
      const bool in_place = inplace && may_overwrite(input, residual, false);
      const Fusion fusion{*activation, negative_slope, residual, /*with_mask=*/false, in_place};
      output = forward_call(call, {}, &fusion).output;
      if (in_place) UpdatedBuffer(input).publish();
    }
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
}

}  // namespace batchnorm_ext::bindings
