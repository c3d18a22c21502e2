// Batch norm's formulas, each written once (Ioffe and Szegedy 2015, "Batch Normalization", sections 3 and 3.1).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/params.h"
#include "core/welford.h"

namespace batchnorm_ext {

// a * b + c rounded once. Vector types of a backend bring their own overload.
BN_HOST_DEVICE float multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}
BN_HOST_DEVICE double multiply_add(double a, double b, double c) {
  return std::fma(a, b, c);
}

BN_HOST_DEVICE double inverse_std(double variance, double eps) {
  return 1.0 / std::sqrt(variance + eps);
}

// Biased: what normalises. NaN and infinite m2 pass through.
BN_HOST_DEVICE double variance_of(const Moments<double>& moments) {
  return moments.m2 / static_cast<double>(moments.count);
}

// y = (x - mean) * scale + shift for one channel. `mean` is rounded to A; what rounding dropped is in `shift`, so a
// mean far larger than the deviation costs no accuracy. Not folded to x * a + b, which cancels, but where it may be.
template <class A>
struct NormalizeCoefficients {
  A mean, scale, shift;

  template <class V>
  BN_HOST_DEVICE V operator()(V x) const {
    return multiply_add(x - V(mean), V(scale), V(shift));
  }
};

// Of the rounded inv_std, so that backward, which knows no other, has the same scale.
template <class A>
BN_HOST_DEVICE A normalize_scale(A inv_std, double weight) {
  return static_cast<A>(static_cast<double>(inv_std) * weight);
}

template <class A>
BN_HOST_DEVICE NormalizeCoefficients<A> normalize_coefficients(double mean, double inv_std, double weight,
                                                               double bias) {
  const double scale = static_cast<double>(static_cast<A>(inv_std)) * weight;
  const A rounded = static_cast<A>(mean);
  const double residue = mean - static_cast<double>(rounded);
  // An infinite mean has no residue to carry over (inf - inf is NaN, but the output must be torch's).
  return {rounded, normalize_scale(static_cast<A>(inv_std), weight),
          static_cast<A>(residue == residue ? bias - residue * scale : bias)};
}

// Results of 16 bits are rounded far more coarsely than sums in float. Where the mean is no larger than this many
// deviations, what is folded into a shift of float is rounded at most so many times as coarsely as a deviation is.
constexpr double kFoldedDeviations = 6.0;

// Whether the mean may be folded into the shift, for elements of 16 bits. Not of a constant channel, which must give
// the bias exactly; NaN answers no.
BN_HOST_DEVICE bool may_be_folded(double mean, double variance) {
  return mean * mean <= kFoldedDeviations * kFoldedDeviations * variance;
}

// dx = dy_scale * ((dy - mean_dy) - x_scale * (x - mean)) for one channel: the gradient of the normalised output
// through x, the batch mean and the batch variance. With running statistics only dy_scale * dy remains. The two scales
// are kept apart because their product, of order inv_std^2, underflows for very large deviations.
template <class A>
struct InputGradientCoefficients {
  A mean, dy_scale, mean_dy, x_scale;

  template <class V>
  BN_HOST_DEVICE V operator()(V dy, V x) const {
    return multiply_add(V(mean) - x, V(x_scale), dy - V(mean_dy)) * V(dy_scale);
  }
  template <class V>
  BN_HOST_DEVICE V operator()(V dy) const {  // running statistics
    return dy * V(dy_scale);
  }
};

// sum_dy = sum(dy); sum_dy_xhat = sum(dy * (x - mean)) * inv_std, the gradients of bias and weight.
template <class A>
BN_HOST_DEVICE InputGradientCoefficients<A> input_gradient_coefficients(A mean, A inv_std, A weight, double sum_dy,
                                                                        double sum_dy_xhat, int64_t samples) {
  const double count = static_cast<double>(samples);
  return {mean, inv_std * weight, static_cast<A>(sum_dy / count),
          static_cast<A>(static_cast<double>(inv_std) * (sum_dy_xhat / count))};
}

// The weight of this batch in the running statistics. `batches` counts this batch too.
BN_HOST_DEVICE double running_momentum(const RunningStatistics& running, int64_t batches) {
  return running.cumulative ? 1.0 / static_cast<double>(batches) : running.momentum;
}

BN_HOST_DEVICE double running_average(double running, double batch, double momentum) {
  return (1.0 - momentum) * running + momentum * batch;
}

// What goes into the running variance. A single sample has no unbiased variance: the division gives NaN or infinity, as
// torch's does.
BN_HOST_DEVICE double corrected_variance_of(const Moments<double>& moments, int64_t correction) {
  return moments.m2 / static_cast<double>(moments.count - correction);
}

BN_HOST_DEVICE bool are_finite(double a, double b) {
  return (a - a) + (b - b) == 0.0;
}

// The running statistics of a channel, as ChannelVector::bits.
struct RunningBits {
  uint64_t mean, variance;
};
BN_HOST_DEVICE RunningBits read_running_statistics(const RunningStatistics& running, int64_t channel) {
  return {running.mean.read_only().bits(channel), running.variance.read_only().bits(channel)};
}

BN_HOST_DEVICE void update_running_statistics(const RunningStatistics& running, int64_t channel,
                                              const RunningBits& before, const Moments<double>& moments,
                                              double momentum) {
  const double batch_variance = corrected_variance_of(moments, running.correction);
  if (running.skip_nonfinite && !are_finite(moments.mean, batch_variance)) return;
  const double mean = running.mean.read_only().value(before.mean, 0.0);
  const double variance = running.variance.read_only().value(before.variance, 0.0);
  running.mean.store(channel, running_average(mean, moments.mean, momentum));
  running.variance.store(channel, running_average(variance, batch_variance, momentum));
}

// One channel of finalize_statistics over records. Parts without samples do not matter, and a batch of none leaves the
// running statistics alone.
BN_HOST_DEVICE void join_channel_statistics(const JoinParams& params, int64_t channel, double momentum) {
  Moments<double> joined{0.0, 0.0, 0};
  for (int64_t part = 0; part < params.parts; ++part) {
    const double* const record = params.records + part * (2 * params.channels + 2);
    const double* const of_channel = record + 2 + channel;
    joined = merge(joined, {of_channel[0], of_channel[params.channels], static_cast<int64_t>(record[1])});
  }
  params.mean[channel] = joined.mean;
  params.variance[channel] = joined.count == 0 ? 0.0 : variance_of(joined);
  if (channel == 0) *params.count = static_cast<double>(joined.count);
  if (joined.count == 0) return;
  update_running_statistics(params.running, channel, read_running_statistics(params.running, channel), joined,
                            momentum);
}

}  // namespace batchnorm_ext
