// Batch norm on tensors, as the native module and torch's dispatcher call it.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "bindings/fusion.h"
#include "bindings/tensors.h"

namespace batchnorm_ext::bindings {

// Where forward leaves what backward knows of the batch besides tensors: vectors of one value a channel, in the type
// that sums are kept in. Null: not wanted.
struct KeptVectors {
  void *mean = nullptr, *inv_std = nullptr, *shift = nullptr;
};

// They are rows of one tensor: {mean, inv_std}, and of fused calls shift.
inline KeptVectors rows_to_keep(const Tensor& statistics) {
  if (!statistics.defined()) return {};
  char* const first = static_cast<char*>(statistics.mutable_data_ptr());
  const int64_t row = statistics.size(1) * static_cast<int64_t>(statistics.element_size());
  return {first, first + row, statistics.size(0) > 2 ? first + 2 * row : nullptr};
}

struct ForwardArguments {
  const Tensor &input, &weight, &bias, &running_mean, &running_var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  bool skip_nonfinite;
  int64_t correction;
  // Of how many batches this one is made, as torch.tensor_split cuts it: each is normalised with its own statistics,
  // and they update the running ones in turn. More than one only in training, without a fusion; kept vectors then have
  // the values of all parts, one after the other.
  int64_t parts = 1;
};

// The mask is undefined where it was not asked for.
struct Normalized {
  Tensor output, mask;
};

// Normalises input; in training also updates the running statistics. Without a fusion, plain batch norm.
Normalized forward_call(const ForwardArguments& call, const KeptVectors& kept, const Fusion* fusion);

struct SavedVectors {
  const void *mean, *inv_std, *shift;
};

SavedVectors saved_rows(const Tensor& statistics, int64_t rows, const Tensor& grad_output, int64_t parts = 1);

struct BackwardArguments {
  const Tensor &grad_output, &input, &weight;
  SavedVectors saved;
  bool training;
  bool need_dx;
  std::optional<at::ScalarType> dweight_dtype, dbias_dtype;
  int64_t parts = 1;  // as forward's
};

// Gradients of forward; those that were not asked for are undefined.
struct Gradients {
  Tensor dx, dresidual, dweight, dbias;
};

Gradients backward_call(const BackwardArguments& call, const FusedBackward* fusion);

// ---- as Python and the dispatcher see them ----

// Returns (output, mean, inv_std).
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                                           const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                           bool training, std::optional<double> momentum, double eps,
                                           bool skip_nonfinite, int64_t correction);

// Returns (output, mean, inv_std, shift, mask), the mask undefined where not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_act(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    bool training, std::optional<double> momentum, double eps, bool skip_nonfinite, int64_t correction,
    std::string_view activation, double negative_slope, bool with_mask);

// Gradients of forward: (dx, dweight, dbias), undefined where not asked for.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const OptionalTensor& input,
                                            const OptionalTensor& weight, const Tensor& mean, const Tensor& inv_std,
                                            bool training, bool need_dx, std::optional<at::ScalarType> dweight_dtype,
                                            std::optional<at::ScalarType> dbias_dtype);

// Gradients of forward_act: (dx, dresidual, dweight, dbias), undefined where not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_act(const Tensor& grad_output, const OptionalTensor& input,
                                                        const OptionalTensor& residual, const OptionalTensor& weight,
                                                        const Tensor& mean, const Tensor& inv_std, const Tensor& shift,
                                                        const OptionalTensor& mask, at::IntArrayRef strides,
                                                        bool training, bool need_dx, bool need_dresidual,
                                                        std::optional<at::ScalarType> dweight_dtype,
                                                        std::optional<at::ScalarType> dbias_dtype,
                                                        std::string_view activation, double negative_slope);

}  // namespace batchnorm_ext::bindings
