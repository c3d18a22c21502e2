// The steps of batch norm one by one: arguments checked, one call of the device's backend for each.
#include "bindings/steps.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "bindings/batch_norm.h"
#include "bindings/device_call.h"

namespace batchnorm_ext::bindings {
namespace {

constexpr int64_t record_header = 2;

void check_float64(const char* name, const Tensor& vector, int64_t values, const Tensor& input) {
  TORCH_CHECK(vector.scalar_type() == at::kDouble && vector.numel() == values && vector.is_contiguous() &&
                  vector.device() == input.device(),
              name, " must be ", values, " contiguous Double values on ", input.device(), ", got shape ",
              vector.sizes(), " of type ", c10::toString(vector.scalar_type()), " on ", vector.device());
}

const Tensor& checked_running_vector(const char* name, const OptionalTensor& argument, int64_t channels,
                                     const Tensor& records) {
  const Tensor& vector = or_undefined(argument);
  if (!vector.defined()) return vector;
  TORCH_CHECK(vector.dim() == 1 && vector.numel() == channels, name, " should contain ", channels, " elements not ",
              vector.numel());
  TORCH_CHECK(vector.device() == records.device(), name, " must be on ", records.device(), ", got ", vector.device());
  check_written(name, vector);
  return vector;
}

void check_counted(const Tensor& counted, const Tensor& input) {
  at::DimVector sizes(input.sizes());
  sizes.erase(sizes.begin() + 1);
  TORCH_CHECK(counted.scalar_type() == at::kBool && counted.sizes() == sizes && counted.device() == input.device(),
              "counted must be of type Bool and shape ", at::IntArrayRef(sizes), " on ", input.device(), ", got shape ",
              counted.sizes(), " of type ", c10::toString(counted.scalar_type()), " on ", counted.device());
}

// Of dense x.
Tensor record_of(const Tensor& x, const CountedSamples& counted) {
  constexpr int64_t dtypes = 4;
  const int64_t channels = x.size(1);
  const DType dtype = dtype_of(x.scalar_type());
  const double signature = static_cast<double>(channels * dtypes + static_cast<int64_t>(dtype));
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) {
    const Tensor record = at::zeros({record_header + 2 * channels}, options);
    record.select(0, 0).fill_(signature);
    return record;
  }
  const Tensor record = at::empty({record_header + 2 * channels}, options);
  ForwardParams params{};
  params.shape = shape_of(x);
  params.dtype = dtype;
  params.x = x.const_data_ptr();
  params.batch_statistics = true;
  params.record = record.mutable_data_ptr<double>();
  params.signature = signature;
  params.counted = counted;
  run(params, x);
  return record;
}

// The bounds of the runs of samples that count, in the order of x's memory.
std::vector<int64_t> runs_of(const Tensor& counted, const Tensor& x) {
  at::DimVector order;
  for (int64_t dim = 0; dim < counted.dim(); ++dim) order.push_back(dim);
  const auto stride_of = [&](int64_t dim) { return x.stride(dim == 0 ? 0 : dim + 1); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return stride_of(a) > stride_of(b); });
  const Tensor in_order = counted.permute(order).contiguous();
  const bool* const counts = in_order.const_data_ptr<bool>();
  std::vector<int64_t> bounds;
  bool within = false;
  for (int64_t sample = 0; sample < in_order.numel(); ++sample) {
    if (counts[sample] == within) continue;
    bounds.push_back(sample);
    within = !within;
  }
  if (within) bounds.push_back(in_order.numel());
  return bounds;
}

// For backends that sum all samples: those that do not count are replaced by one value for each channel, whose part in
// mean and m2 is then taken away again (Chan, Golub and LeVeque 1979, solved for one of the two sets). That costs no
// digits where the value is next to the mean, so what zeros give is only the value that the record is made with.
Tensor record_with_stand_ins(const Tensor& x, const Tensor& counted) {
  const Tensor places = counted.unsqueeze(1), count = counted.sum(at::kDouble);
  const int64_t channels = x.size(1), samples = counted.numel();
  at::DimVector per_channel(x.dim(), 1);
  per_channel[1] = channels;
  Tensor stand_in = at::zeros({channels}, x.options()), record;
  for (int pass = 0; pass < 2; ++pass) {
    record = record_of(dense_as(at::where(places, x, stand_in.view(per_channel)), x), {});
    const Tensor others = samples - count;
    Tensor mean = record.narrow(0, record_header, channels), m2 = record.narrow(0, record_header + channels, channels);
    mean.addcmul_(mean - stand_in, others / count.clamp_min(1));
    m2.addcmul_((mean - stand_in).square(), count * others / samples, -1).clamp_min_(0);
    const Tensor next = mean.to(x.scalar_type());
    stand_in = at::where(next.isfinite(), next, at::zeros_like(next));
  }
  record.select(0, 1).copy_(count);
  return record;
}

}  // namespace

Tensor channel_statistics(const Tensor& input, const OptionalTensor& counted_arg) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  channels_of(input);
  dtype_of(input.scalar_type());
  check_device(input);
  const Tensor& counted = or_undefined(counted_arg);
  if (counted.defined()) check_counted(counted, input);
  const Tensor x = dense(input);
  if (!counted.defined() || x.numel() == 0) return record_of(x, {});
  if (!x.is_cpu() || !cpu::sums_counted_runs()) return record_with_stand_ins(x, counted);
  const std::vector<int64_t> bounds = runs_of(counted, x);
  CountedSamples samples{false, bounds.data(), static_cast<int64_t>(bounds.size()) / 2};
  for (int64_t run = 0; run < samples.runs; ++run) samples.count += bounds[2 * run + 1] - bounds[2 * run];
  return record_of(x, samples);
}

std::tuple<Tensor, Tensor, Tensor> finalize_statistics(const Tensor& records, const OptionalTensor& running_mean_arg,
                                                       const OptionalTensor& running_var_arg,
                                                       const OptionalTensor& counter_arg,
                                                       std::optional<double> momentum, bool skip_nonfinite,
                                                       int64_t correction) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_device(records);
  TORCH_CHECK(records.dim() == 2 && records.size(1) >= record_header && records.size(1) % 2 == 0,
              "records must have one row {signature, count, means, m2s} for each part of the batch, got shape ",
              records.sizes());
  check_float64("records", records, records.numel(), records);
  const int64_t channels = (records.size(1) - record_header) / 2;
  const UpdatedBuffer running_mean(checked_running_vector("running_mean", running_mean_arg, channels, records));
  const UpdatedBuffer running_var(checked_running_vector("running_var", running_var_arg, channels, records));
  const Tensor& counter = or_undefined(counter_arg);
  check_counter(counter, records);
  TORCH_CHECK(momentum.has_value() || !running_mean.compact().defined() || counter.defined(),
              "momentum=None needs num_batches_tracked");

  const Tensor mean = at::empty({channels}, records.options());
  const Tensor variance = at::empty({channels}, records.options());
  const Tensor count = at::empty({1}, records.options());
  JoinParams params;
  params.channels = channels;
  params.parts = records.size(0);
  params.records = records.const_data_ptr<double>();
  params.running.mean = mutable_channel_vector(running_mean.compact());
  params.running.variance = mutable_channel_vector(running_var.compact());
  params.running.num_batches_tracked = counter.defined() ? counter.mutable_data_ptr<int64_t>() : nullptr;
  params.running.momentum = momentum.value_or(0.0);
  params.running.cumulative = !momentum.has_value();
  params.running.skip_nonfinite = skip_nonfinite;
  params.running.correction = correction;
  params.mean = mean.mutable_data_ptr<double>();
  params.variance = variance.mutable_data_ptr<double>();
  params.count = count.mutable_data_ptr<double>();
  run(params, records);
  running_mean.publish();
  running_var.publish();
  UpdatedBuffer(counter).publish();
  return {mean, variance, count};
}

namespace {

struct JoinedNormalized {
  Tensor output, mean, inv_std, shift, mask;
};

JoinedNormalized normalize_call(const Tensor& input, const OptionalTensor& weight_arg, const OptionalTensor& bias_arg,
                                const Tensor& joined_mean, const Tensor& joined_variance, double eps,
                                const Fusion* fusion) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t channels = channels_of(input);
  const DType dtype = dtype_of(input.scalar_type());
  check_device(input);
  check_channel_vector("weight", or_undefined(weight_arg), input);
  check_channel_vector("bias", or_undefined(bias_arg), input);
  check_float64("mean", joined_mean, channels, input);
  check_float64("variance", joined_variance, channels, input);

  const Tensor x = dense(input);
  const Tensor residual = fusion != nullptr ? checked_residual(fusion->residual, x) : Tensor();
  const auto weight = compact(or_undefined(weight_arg)), bias = compact(or_undefined(bias_arg));
  JoinedNormalized result{empty_or_copy(x, input), empty_statistic(x), empty_statistic(x)};
  ForwardParams params{};
  params.shape = shape_of(x);
  params.dtype = dtype;
  params.x = x.const_data_ptr();
  params.y = result.output.mutable_data_ptr();
  params.weight = channel_vector(*weight);
  params.bias = channel_vector(*bias);
  params.running.mean = {const_cast<void*>(joined_mean.const_data_ptr()), DType::float64};
  params.running.variance = {const_cast<void*>(joined_variance.const_data_ptr()), DType::float64};
  params.eps = eps;
  params.batch_statistics = false;
  params.mean = result.mean.mutable_data_ptr();
  params.inv_std = result.inv_std.mutable_data_ptr();
  if (fusion != nullptr) {
    result.shift = empty_statistic(x);
    params.shift = result.shift.mutable_data_ptr();
    result.mask = fuse(params, *fusion, residual, x);
  }
  run(params, x);
  return result;
}

Tensor input_gradient_call(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight_arg,
                           const SavedVectors& saved, const Tensor& sum_dy, const Tensor& sum_dy_xhat,
                           const Tensor& count, const FusedBackward* fusion) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t channels = channels_of(grad_output);
  const DType dtype = dtype_of(grad_output.scalar_type());
  check_device(grad_output);
  check_like_input("grad_output", grad_output, input);
  check_channel_vector("weight", or_undefined(weight_arg), grad_output);
  check_float64("sum_dy", sum_dy, channels, grad_output);
  check_float64("sum_dy_xhat", sum_dy_xhat, channels, grad_output);
  check_float64("count", count, 1, grad_output);

  const Tensor x = dense(input);
  const Tensor dy = dense_as(grad_output, x);
  const Tensor residual = fusion != nullptr && fusion->need_u() ? checked_residual(fusion->residual, x) : Tensor();
  const auto weight = compact(or_undefined(weight_arg));
  Tensor dx = empty_or_copy(x, input, dy, grad_output);
  BackwardParams params{};
  params.shape = shape_of(dy);
  params.dtype = dtype;
  params.dy = dy.const_data_ptr();
  params.x = x.const_data_ptr();
  params.dx = dx.mutable_data_ptr();
  params.weight = channel_vector(*weight);
  params.mean = saved.mean;
  params.inv_std = saved.inv_std;
  params.shift = saved.shift;
  params.batch_statistics = true;
  params.joined = {sum_dy.const_data_ptr<double>(), sum_dy_xhat.const_data_ptr<double>(),
                   count.const_data_ptr<double>()};
  if (fusion != nullptr) fuse(params, *fusion, residual, /*dresidual=*/{}, dy);
  run(params, dy);
  return dx;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& input, const OptionalTensor& weight,
                                             const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                                             double eps) {
  auto result = normalize_call(input, weight, bias, mean, variance, eps, nullptr);
  return {std::move(result.output), std::move(result.mean), std::move(result.inv_std)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_act(const Tensor& input, const OptionalTensor& residual,
                                                                 const OptionalTensor& weight,
                                                                 const OptionalTensor& bias, const Tensor& mean,
                                                                 const Tensor& variance, double eps,
                                                                 std::string_view activation, double negative_slope,
                                                                 bool with_mask) {
  const Fusion fusion{checked_activation(activation), negative_slope, or_undefined(residual), with_mask};
  auto result = normalize_call(input, weight, bias, mean, variance, eps, &fusion);
  return {std::move(result.output), std::move(result.mean), std::move(result.inv_std), std::move(result.shift),
          std::move(result.mask)};
}

Tensor input_gradient(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& mean,
                      const Tensor& inv_std, const Tensor& sum_dy, const Tensor& sum_dy_xhat, const Tensor& count) {
  const SavedVectors saved{saved_vector("mean", mean, grad_output), saved_vector("inv_std", inv_std, grad_output),
                           nullptr};
  return input_gradient_call(grad_output, input, weight, saved, sum_dy, sum_dy_xhat, count, nullptr);
}

Tensor input_gradient_act(const Tensor& grad_output, const Tensor& input, const OptionalTensor& residual,
                          const OptionalTensor& weight, const Tensor& mean, const Tensor& inv_std, const Tensor& shift,
                          const OptionalTensor& mask, const Tensor& sum_dy, const Tensor& sum_dy_xhat,
                          const Tensor& count, std::string_view activation, double negative_slope) {
  const FusedBackward fusion{checked_activation(activation), negative_slope, or_undefined(residual), or_undefined(mask),
                             /*strides=*/{}};
  const SavedVectors saved{saved_vector("mean", mean, grad_output), saved_vector("inv_std", inv_std, grad_output),
                           saved_vector("shift", shift, grad_output)};
  return input_gradient_call(grad_output, input, weight, saved, sum_dy, sum_dy_xhat, count, &fusion);
}

void define_steps(pybind11::module_& module) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> without_gil;
  module.def("channel_statistics", &channel_statistics, py::arg("input"), py::arg("counted") = py::none(), without_gil,
             "A part of a batch, or those of its samples that are counted, as a record, float64: signature, count, "
             "means, m2s.");
  module.def("finalize_statistics", &finalize_statistics, py::arg("records"), py::arg("running_mean"),
             py::arg("running_var"), py::arg("num_batches_tracked"), py::arg("momentum"), py::arg("skip_nonfinite"),
             py::arg("correction"), without_gil,
             "Merge records in their order; update the running statistics. Returns (mean, variance, count).");
  module.def("normalize", &normalize, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("mean"),
             py::arg("variance"), py::arg("eps"), without_gil,
             "Normalise with float64 statistics. Returns (output, mean, inv_std).");
  module.def("normalize_act", &normalize_act, py::arg("input"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
             py::arg("mean"), py::arg("variance"), py::arg("eps"), py::arg("activation"), py::arg("negative_slope"),
             py::arg("with_mask"), without_gil,
             "normalize, then add residual and apply the activation. Returns (output, mean, inv_std, shift, mask).");
  module.def("input_gradient_act", &input_gradient_act, py::arg("grad_output"), py::arg("input"), py::arg("residual"),
             py::arg("weight"), py::arg("mean"), py::arg("inv_std"), py::arg("shift"), py::arg("mask"),
             py::arg("sum_dy"), py::arg("sum_dy_xhat"), py::arg("count"), py::arg("activation"),
             py::arg("negative_slope"), without_gil, "input_gradient of a fused call.");
  module.def("input_gradient", &input_gradient, py::arg("grad_output"), py::arg("input"), py::arg("weight"),
             py::arg("mean"), py::arg("inv_std"), py::arg("sum_dy"), py::arg("sum_dy_xhat"), py::arg("count"),
             without_gil, "dx, for sums over a batch of `count` samples that input is a part of.");
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_act_operator(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& variance, double eps, std::string_view activation, double negative_slope,
    bool with_mask) {
  auto results =
      normalize_act(input, residual, weight, bias, mean, variance, eps, activation, negative_slope, with_mask);
  define(input, std::get<4>(results));
  return results;
}

}  // namespace

void register_step_operators() {
  static torch::Library library(torch::Library::FRAGMENT, "batchnorm_ext", std::nullopt, __FILE__, __LINE__);
  library.def("channel_statistics(Tensor input, Tensor? counted=None) -> Tensor");
  library.def(
      "finalize_statistics(Tensor records, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, bool skip_nonfinite, int correction) -> (Tensor, Tensor, "
      "Tensor)");
  library.def(
      "normalize(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "input_gradient(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor inv_std, Tensor sum_dy, "
      "Tensor sum_dy_xhat, Tensor count) -> Tensor");
  library.def(
      "normalize_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, "
      "float eps, str activation, float negative_slope, bool with_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "input_gradient_act(Tensor grad_output, Tensor input, Tensor? residual, Tensor? weight, Tensor mean, "
      "Tensor inv_std, Tensor shift, Tensor? mask, Tensor sum_dy, Tensor sum_dy_xhat, Tensor count, str activation, "
      "float negative_slope) -> Tensor");
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) {
    library.impl("normalize_act", torch::dispatch(key, TORCH_FN(normalize_act_operator)));
    library.impl("input_gradient_act", torch::dispatch(key, TORCH_FN(input_gradient_act)));
    library.impl("channel_statistics", torch::dispatch(key, TORCH_FN(channel_statistics)));
    library.impl("finalize_statistics", torch::dispatch(key, TORCH_FN(finalize_statistics)));
    library.impl("normalize", torch::dispatch(key, TORCH_FN(normalize)));
    library.impl("input_gradient", torch::dispatch(key, TORCH_FN(input_gradient)));
  }
}

}  // namespace batchnorm_ext::bindings
