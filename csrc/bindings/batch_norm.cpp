// Batch norm on tensors: arguments checked before anything is allocated, then one call of the device's backend.
#include "bindings/batch_norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <utility>

#include "bindings/device_call.h"

namespace batchnorm_ext::bindings {

Normalized forward_call(const Tensor& input, const OptionalTensor& weight_arg, const OptionalTensor& bias_arg,
                        const OptionalTensor& running_mean_arg, const OptionalTensor& running_var_arg,
                        const OptionalTensor& counter_arg, bool training, std::optional<double> momentum, double eps,
                        bool skip_nonfinite, const Fusion* fusion) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t channels = channels_of(input);
  const DType dtype = dtype_of(input.scalar_type());
  check_device(input);
  const Tensor running_mean = checked_channel_vector("running_mean", running_mean_arg, input);
  const Tensor running_var = checked_channel_vector("running_var", running_var_arg, input);
  const Tensor weight = contiguous_or_undefined(checked_channel_vector("weight", weight_arg, input));
  const Tensor bias = contiguous_or_undefined(checked_channel_vector("bias", bias_arg, input));
  const Tensor counter = checked_counter(counter_arg, input);
  if (training) {
    check_written("running_mean", running_mean);
    check_written("running_var", running_var);
  }
  TORCH_CHECK(training || running_mean.defined(), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(training || running_var.defined(), "running_var must be defined in evaluation mode");
  TORCH_CHECK(momentum.has_value() || !training || !running_mean.defined() || counter.defined(),
              "momentum=None needs num_batches_tracked");

  const Tensor x = dense(input);
  const Tensor residual = fusion != nullptr ? checked_residual(fusion->residual, x) : Tensor();
  const Tensor y = fusion != nullptr && fusion->in_place ? x : at::empty_like(x);
  const auto statistics = input.options().dtype(accumulate_type(input.scalar_type()));
  const Tensor mean = at::empty({channels}, statistics);
  const Tensor inv_std = at::empty({channels}, statistics);
  const UpdatedBuffer updated_mean(running_mean), updated_var(running_var);

  ForwardParams params;
  params.shape = shape_of(x);
  params.dtype = dtype;
  params.y = y.mutable_data_ptr();  // first: it may move the memory, which may be x's
  params.x = x.const_data_ptr();
  params.weight = channel_vector(weight);
  params.bias = channel_vector(bias);
  params.running.mean = mutable_channel_vector(updated_mean.compact());
  params.running.variance = mutable_channel_vector(updated_var.compact());
  params.running.num_batches_tracked = training && counter.defined() ? counter.mutable_data_ptr<int64_t>() : nullptr;
  params.running.momentum = momentum.value_or(0.0);
  params.running.cumulative = !momentum.has_value();
  params.running.skip_nonfinite = skip_nonfinite;
  params.eps = eps;
  params.batch_statistics = training;
  params.mean = mean.mutable_data_ptr();
  params.inv_std = inv_std.mutable_data_ptr();
  ShiftAndMask saved;
  if (fusion != nullptr) saved = fuse(params, *fusion, residual, mean);
  run(params, x);

  if (training) {
    updated_mean.publish();
    updated_var.publish();
    UpdatedBuffer(counter).publish();
  }
  return {y, mean, inv_std, saved.shift, saved.mask};
}

Gradients backward_call(const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight_arg,
                        const Tensor& mean, const Tensor& inv_std, bool training, bool need_dx,
                        std::optional<at::ScalarType> dweight_dtype, std::optional<at::ScalarType> dbias_dtype,
                        const FusedBackward* fusion) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t channels = channels_of(grad_output);
  const DType dtype = dtype_of(grad_output.scalar_type());
  check_device(grad_output);
  const bool need_deviation = dweight_dtype.has_value() || (training && need_dx);
  const bool need_u = fusion != nullptr && fusion->need_u();
  const bool need_x = need_deviation || need_u;
  TORCH_CHECK(!need_x || input.has_value(), "input is needed for the gradients asked for");
  if (need_x) check_like_input("grad_output", grad_output, *input);
  const Tensor weight = contiguous_or_undefined(checked_channel_vector("weight", weight_arg, grad_output));
  check_saved("mean", mean, grad_output);
  check_saved("inv_std", inv_std, grad_output);
  TORCH_CHECK(fusion == nullptr || need_x || static_cast<int64_t>(fusion->strides.size()) == grad_output.dim(),
              "strides must be those of the output");

  const Tensor x = need_x ? dense(*input) : Tensor();
  const Tensor dy = need_x              ? dense_as(grad_output, x)
                    : fusion != nullptr ? dense(strided_as(grad_output, fusion->strides))
                                        : dense(grad_output);
  const auto vector_options = [&](at::ScalarType type) { return grad_output.options().dtype(type); };
  const Tensor dx = need_dx ? at::empty_like(dy) : Tensor();
  const Tensor dweight = dweight_dtype ? at::empty({channels}, vector_options(*dweight_dtype)) : Tensor();
  const Tensor dbias = dbias_dtype ? at::empty({channels}, vector_options(*dbias_dtype)) : Tensor();
  const Tensor residual = need_u ? checked_residual(fusion->residual, x) : Tensor();
  const Tensor dresidual = fusion != nullptr && fusion->need_dresidual ? at::empty_like(dy) : Tensor();

  BackwardParams params;
  params.shape = shape_of(dy);
  params.dtype = dtype;
  params.dy = dy.const_data_ptr();
  params.x = need_x ? x.const_data_ptr() : nullptr;
  params.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  params.weight = channel_vector(weight);
  params.mean = mean.const_data_ptr();
  params.inv_std = inv_std.const_data_ptr();
  params.dweight = mutable_channel_vector(dweight);
  params.dbias = mutable_channel_vector(dbias);
  params.batch_statistics = training;
  if (fusion != nullptr) fuse(params, *fusion, residual, dresidual, dy);
  run(params, dy);
  return {dx, dresidual, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                                           const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                           bool training, std::optional<double> momentum, double eps,
                                           bool skip_nonfinite) {
  auto result = forward_call(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum,
                             eps, skip_nonfinite, nullptr);
  return {std::move(result.output), std::move(result.mean), std::move(result.inv_std)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_act(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    bool training, std::optional<double> momentum, double eps, bool skip_nonfinite, std::string_view activation,
    double negative_slope, bool with_mask) {
  const Fusion fusion{checked_activation(activation), negative_slope, residual, with_mask};
  auto result = forward_call(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum,
                             eps, skip_nonfinite, &fusion);
  return {std::move(result.output), std::move(result.mean), std::move(result.inv_std), std::move(result.shift),
          std::move(result.mask)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const OptionalTensor& input,
                                            const OptionalTensor& weight, const Tensor& mean, const Tensor& inv_std,
                                            bool training, bool need_dx, std::optional<at::ScalarType> dweight_dtype,
                                            std::optional<at::ScalarType> dbias_dtype) {
  auto result =
      backward_call(grad_output, input, weight, mean, inv_std, training, need_dx, dweight_dtype, dbias_dtype, nullptr);
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
  const FusedBackward fusion{
      checked_activation(activation), negative_slope, residual, shift, mask, strides, need_dresidual};
  auto result =
      backward_call(grad_output, input, weight, mean, inv_std, training, need_dx, dweight_dtype, dbias_dtype, &fusion);
  return {std::move(result.dx), std::move(result.dresidual), std::move(result.dweight), std::move(result.dbias)};
}

}  // namespace batchnorm_ext::bindings
