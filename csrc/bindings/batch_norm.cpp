// Batch norm on tensors: arguments checked before anything is allocated, then one call of the device's backend.
#include "bindings/batch_norm.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <type_traits>
#include <utility>

#include "bindings/device_call.h"

namespace batchnorm_ext::bindings {
namespace {

// A part of a batch, which is a batch of its own: its shape, and how many bytes into a tensor and into vectors of all
// parts it begins.
struct Part {
  Shape shape;
  int64_t tensor_bytes, vector_bytes;

  template <class Pointer>
  static Pointer move(Pointer pointer, int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    return pointer == nullptr ? nullptr : static_cast<Byte*>(pointer) + bytes;
  }
};

// action(part) for each of `parts` parts of what dense_by_samples() returned.
template <class Action>
void for_each_part(const Tensor& dense_input, int64_t parts, const Action& action) {
  const Shape whole = shape_of(dense_input);
  const int64_t batch = dense_input.size(0), samples_each = whole.samples() / batch;
  const int64_t vector_bytes =
      whole.channels * static_cast<int64_t>(c10::elementSize(accumulate_type(dense_input.scalar_type())));
  int64_t tensor_bytes = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t samples = (batch / parts + (part < batch % parts ? 1 : 0)) * samples_each;
    const int64_t inner = whole.channels == 1 ? samples : whole.inner;
    action(Part{{samples / inner, whole.channels, inner}, tensor_bytes, part * vector_bytes});
    tensor_bytes += samples * whole.channels * static_cast<int64_t>(dense_input.element_size());
  }
}

void run_parts(const ForwardParams& whole, const Tensor& x, int64_t parts) {
  for_each_part(x, parts, [&](const Part& part) {
    ForwardParams params = whole;
    params.shape = part.shape;
    params.x = Part::move(whole.x, part.tensor_bytes);
    params.y = Part::move(whole.y, part.tensor_bytes);
    params.mean = Part::move(whole.mean, part.vector_bytes);
    params.inv_std = Part::move(whole.inv_std, part.vector_bytes);
    run(params, x);
  });
}

// What `whole` names as dweight and dbias becomes the sums over the parts.
void run_parts(const BackwardParams& whole, const Tensor& x, int64_t parts, Gradients& result) {
  const int64_t channels = whole.shape.channels;
  const auto rows = [&](const Tensor& gradient) {
    return gradient.defined() ? empty_beside(x, {parts, channels}, at::kDouble) : Tensor();
  };
  const Tensor dweights = rows(result.dweight), dbiases = rows(result.dbias);
  int64_t index = 0;
  for_each_part(x, parts, [&](const Part& part) {
    BackwardParams params = whole;
    params.shape = part.shape;
    params.dy = Part::move(whole.dy, part.tensor_bytes);
    params.x = Part::move(whole.x, part.tensor_bytes);
    params.dx = Part::move(whole.dx, part.tensor_bytes);
    params.mean = Part::move(whole.mean, part.vector_bytes);
    params.inv_std = Part::move(whole.inv_std, part.vector_bytes);
    const int64_t row = index++ * channels * static_cast<int64_t>(sizeof(double));
    params.dweight.data = Part::move(mutable_channel_vector(dweights).data, row);
    params.dbias.data = Part::move(mutable_channel_vector(dbiases).data, row);
    params.dweight.dtype = params.dbias.dtype = DType::float64;
    run(params, x);
  });
  if (dweights.defined()) result.dweight.copy_(dweights.sum(0));
  if (dbiases.defined()) result.dbias.copy_(dbiases.sum(0));
}

}  // namespace

Normalized forward_call(const ForwardArguments& call, const KeptVectors& kept, const Fusion* fusion) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensor &input = call.input, &running_mean = call.running_mean, &running_var = call.running_var;
  const Tensor& counter = call.num_batches_tracked;
  const bool training = call.training;
  channels_of(input);
  const DType dtype = dtype_of(input.scalar_type());
  check_device(input);
  check_channel_vector("running_mean", running_mean, input);
  check_channel_vector("running_var", running_var, input);
  check_channel_vector("weight", call.weight, input);
  check_channel_vector("bias", call.bias, input);
  check_counter(counter, input);
  if (training) {
    check_written("running_mean", running_mean);
    check_written("running_var", running_var);
  }
  TORCH_CHECK(training || running_mean.defined(), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(training || running_var.defined(), "running_var must be defined in evaluation mode");
  TORCH_CHECK(call.momentum.has_value() || !training || !running_mean.defined() || counter.defined(),
              "momentum=None needs num_batches_tracked");

  const Tensor x = call.parts > 1 ? dense_by_samples(input) : dense(input);
  const Tensor residual = fusion != nullptr ? checked_residual(fusion->residual, x) : Tensor();
  const auto weight = compact(call.weight), bias = compact(call.bias);
  const UpdatedBuffer updated_mean(running_mean), updated_var(running_var);
  Normalized result;
  result.output = fusion != nullptr && fusion->in_place ? x : empty_or_copy(x, input);

  ForwardParams params;
  params.shape = shape_of(x);
  params.dtype = dtype;
  params.y = result.output.mutable_data_ptr();  // first: it may move the memory, which may be x's
  params.x = x.const_data_ptr();
  params.weight = channel_vector(*weight);
  params.bias = channel_vector(*bias);
  params.running.mean = mutable_channel_vector(updated_mean.compact());
  params.running.variance = mutable_channel_vector(updated_var.compact());
  params.running.num_batches_tracked = training && counter.defined() ? counter.mutable_data_ptr<int64_t>() : nullptr;
  params.running.momentum = call.momentum.value_or(0.0);
  params.running.cumulative = !call.momentum.has_value();
  params.running.skip_nonfinite = call.skip_nonfinite;
  params.running.correction = call.correction;
  params.eps = call.eps;
  params.batch_statistics = training;
  params.mean = kept.mean;
  params.inv_std = kept.inv_std;
  params.shift = kept.shift;
  if (fusion != nullptr) result.mask = fuse(params, *fusion, residual, x);
  if (call.parts > 1) {
    run_parts(params, x, call.parts);
  } else {
    run(params, x);
  }

  if (training) {
    updated_mean.publish();
    updated_var.publish();
    UpdatedBuffer(counter).publish();
  }
  return result;
}

SavedVectors saved_rows(const Tensor& statistics, int64_t rows, const Tensor& grad_output, int64_t parts) {
  check_saved("statistics", statistics, {rows, parts * channels_of(grad_output)}, grad_output);
  const char* const first = static_cast<const char*>(statistics.const_data_ptr());
  const int64_t row = statistics.size(1) * static_cast<int64_t>(statistics.element_size());
  return {first, first + row, rows > 2 ? first + 2 * row : nullptr};
}

Gradients backward_call(const BackwardArguments& call, const FusedBackward* fusion) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensor &grad_output = call.grad_output, &input = call.input;
  const int64_t channels = channels_of(grad_output);
  const DType dtype = dtype_of(grad_output.scalar_type());
  check_device(grad_output);
  const bool need_deviation = call.dweight_dtype.has_value() || (call.training && call.need_dx);
  const bool need_u = fusion != nullptr && fusion->need_u();
  const bool need_x = need_deviation || need_u;
  TORCH_CHECK(!need_x || input.defined(), "input is needed for the gradients asked for");
  if (need_x) check_like_input("grad_output", grad_output, input);
  check_channel_vector("weight", call.weight, grad_output);
  TORCH_CHECK(fusion == nullptr || need_x || static_cast<int64_t>(fusion->strides.size()) == grad_output.dim(),
              "strides must be those of the output");

  const Tensor x = !need_x ? Tensor() : call.parts > 1 ? dense_by_samples(input) : dense(input);
  const Tensor dy = need_x              ? dense_as(grad_output, x)
                    : fusion != nullptr ? dense(strided_as(grad_output, fusion->strides))
                                        : dense(grad_output);
  const Tensor residual = need_u ? checked_residual(fusion->residual, x) : Tensor();
  const auto weight = compact(call.weight);
  Gradients result;
  if (call.need_dx) result.dx = empty_or_copy(x, input, dy, grad_output);
  if (fusion != nullptr && fusion->need_dresidual) result.dresidual = empty_like_dense(need_x ? x : dy);
  if (call.dweight_dtype) result.dweight = empty_beside(dy, {channels}, *call.dweight_dtype);
  if (call.dbias_dtype) result.dbias = empty_beside(dy, {channels}, *call.dbias_dtype);

  BackwardParams params;
  params.shape = shape_of(dy);
  params.dtype = dtype;
  params.dy = dy.const_data_ptr();
  params.x = need_x ? x.const_data_ptr() : nullptr;
  params.dx = call.need_dx ? result.dx.mutable_data_ptr() : nullptr;
  params.weight = channel_vector(*weight);
  params.mean = call.saved.mean;
  params.inv_std = call.saved.inv_std;
  params.shift = call.saved.shift;
  params.dweight = mutable_channel_vector(result.dweight);
  params.dbias = mutable_channel_vector(result.dbias);
  params.batch_statistics = call.training;
  if (fusion != nullptr) fuse(params, *fusion, residual, result.dresidual, dy);
  if (call.parts > 1 && need_x) {
    run_parts(params, x, call.parts, result);
  } else {  // what does not depend on x does not depend on its parts
    run(params, dy);
  }
  return result;
}

namespace {

// The optional tensors outlive what is made of them here.
ForwardArguments forward_arguments(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                   const OptionalTensor& num_batches_tracked, bool training,
                                   std::optional<double> momentum, double eps, bool skip_nonfinite,
                                   int64_t correction) {
  return {input,
          or_undefined(weight),
          or_undefined(bias),
          or_undefined(running_mean),
          or_undefined(running_var),
          or_undefined(num_batches_tracked),
          training,
          momentum,
          eps,
          skip_nonfinite,
          correction};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                                           const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                           bool training, std::optional<double> momentum, double eps,
                                           bool skip_nonfinite, int64_t correction) {
  Tensor mean = empty_statistic(input), inv_std = empty_statistic(input);
  const auto call = forward_arguments(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                                      momentum, eps, skip_nonfinite, correction);
  auto result = forward_call(call, {mean.mutable_data_ptr(), inv_std.mutable_data_ptr()}, nullptr);
  return {std::move(result.output), std::move(mean), std::move(inv_std)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_act(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    bool training, std::optional<double> momentum, double eps, bool skip_nonfinite, int64_t correction,
    std::string_view activation, double negative_slope, bool with_mask) {
  const Fusion fusion{checked_activation(activation), negative_slope, or_undefined(residual), with_mask};
  Tensor mean = empty_statistic(input), inv_std = empty_statistic(input), shift = empty_statistic(input);
  const auto call = forward_arguments(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                                      momentum, eps, skip_nonfinite, correction);
  auto result =
      forward_call(call, {mean.mutable_data_ptr(), inv_std.mutable_data_ptr(), shift.mutable_data_ptr()}, &fusion);
  return {std::move(result.output), std::move(mean), std::move(inv_std), std::move(shift), std::move(result.mask)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const OptionalTensor& input,
                                            const OptionalTensor& weight, const Tensor& mean, const Tensor& inv_std,
                                            bool training, bool need_dx, std::optional<at::ScalarType> dweight_dtype,
                                            std::optional<at::ScalarType> dbias_dtype) {
  const SavedVectors saved{saved_vector("mean", mean, grad_output), saved_vector("inv_std", inv_std, grad_output),
                           nullptr};
  auto result = backward_call(
      {grad_output, or_undefined(input), or_undefined(weight), saved, training, need_dx, dweight_dtype, dbias_dtype},
      nullptr);
  return {std::move(result.dx), std::move(result.dweight), std::move(result.dbias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_act(const Tensor& grad_output, const OptionalTensor& input,
                                                        const OptionalTensor& residual, const OptionalTensor& weight,
                                                        const Tensor& mean, const Tensor& inv_std, const Tensor& shift,
                                                        const OptionalTensor& mask, at::IntArrayRef strides,
                                                        bool training, bool need_dx, bool need_dresidual,
                                                        std::optional<at::ScalarType> dweight_dtype,
                                                        std::optional<at::ScalarType> dbias_dtype,
                                                        std::string_view activation, double negative_slope) {
  const FusedBackward fusion{checked_activation(activation),
                             negative_slope,
                             or_undefined(residual),
                             or_undefined(mask),
                             strides,
                             need_dresidual};
  const SavedVectors saved{saved_vector("mean", mean, grad_output), saved_vector("inv_std", inv_std, grad_output),
                           saved_vector("shift", shift, grad_output)};
  auto result = backward_call(
      {grad_output, or_undefined(input), or_undefined(weight), saved, training, need_dx, dweight_dtype, dbias_dtype},
      &fusion);
  return {std::move(result.dx), std::move(result.dresidual), std::move(result.dweight), std::move(result.dbias)};
}

}  // namespace batchnorm_ext::bindings
