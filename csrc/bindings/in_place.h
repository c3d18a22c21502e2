// When a fused call may overwrite its input: what autograd allows, and where backward can compute the input from the
// output.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>

#include "bindings/tensors.h"

#ifdef BATCHNORM_EXT_WITH_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#endif

namespace batchnorm_ext::bindings {

// Whether y = activation(u) determines u at all.
inline bool has_inverse(Activation activation, double negative_slope) {
  return activation == Activation::identity || activation == Activation::elu ||
         (activation == Activation::leaky_relu && negative_slope > 0.0);
}

// Strided inputs are computed from a compact copy; a residual in the same memory is read while the output is written;
// the gradient of a view's base would have to be split.
inline bool may_overwrite(const Tensor& input, const Tensor& residual, bool needs_grad) {
  return input.is_non_overlapping_and_dense() && !(needs_grad && input.is_view()) &&
         !(residual.defined() && residual.is_alias_of(input));
}

// How many times larger than the rounding of y, relative to u, the error of a deviation in units of the standard
// deviation may become. docs/numerics.md has the derivation.
constexpr double largest_amplification = 4.0;

// Whether the deviation x - mean follows from y, in every channel, as exactly as the tolerances ask of gradients. Of
//   y = activation(u),  u = weight * xhat + bias,  |xhat| <= sqrt(samples - 1) in training
// a rounding of y is one of u, times 1 / activation'(u) for elu, and |u / weight| <= |xhat| + |bias / weight| of xhat.
// Reading the parameters makes the host wait for a GPU, which a graph's capture does not allow.
inline bool is_invertible(const Tensor& input, const Tensor& weight, const Tensor& bias, Activation activation,
                          double negative_slope, bool training) {
  if (input.scalar_type() != at::kFloat && input.scalar_type() != at::kDouble) return false;
  if (activation == Activation::elu && !training) return false;
  const bool wide = input.scalar_type() == at::kDouble;
  const double rounding = wide ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  const double smallest = wide ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  if (activation == Activation::leaky_relu &&
      !(negative_slope * rounding * rounding >= smallest && negative_slope * rounding <= 1.0)) {
    return false;
  }
#ifdef BATCHNORM_EXT_WITH_CUDA
  if (input.is_cuda()) {
    const c10::cuda::CUDAGuard guard(input.device());
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return false;
  }
#endif
  const auto on_host = [](const Tensor& vector) { return vector.defined() ? vector.cpu().contiguous() : vector; };
  const Tensor weights = on_host(weight), biases = on_host(bias);
  const ChannelVector weight_of = channel_vector(weights), bias_of = channel_vector(biases);
  const int64_t channels = input.size(1);
  const double samples = static_cast<double>(input.numel()) / static_cast<double>(std::max<int64_t>(channels, 1));
  const double largest_xhat = std::sqrt(std::max(samples - 1.0, 0.0));
  for (int64_t channel = 0; channel < channels; ++channel) {
    const double scale = std::abs(weight_of.load(channel, 1.0));
    const double shift = bias_of.load(channel, 0.0);
    if (!(scale >= rounding && std::abs(shift) <= largest_amplification * scale)) return false;
    if (activation == Activation::elu && !(std::exp(scale * largest_xhat - shift) <= largest_amplification)) {
      return false;
    }
  }
  return true;
}

}  // namespace batchnorm_ext::bindings
