// The five steps of batch norm over blocks of channels, and the two calls that put them in order.
#pragma once

#include "cpu/blocking.h"
#include "cpu/elementwise.h"
#include "cpu/kernel_table.h"
#include "cpu/operations.h"
#include "cpu/simd.h"
#include "cpu/sums.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

// ---- Memory of one call ----

// Arrays of one value a channel, none of which shares a cache line with another.
template <class T>
struct ChannelArrays {
  T* first;
  int64_t pitch;

  T* operator[](int64_t n) const { return first + n * pitch; }
};

// On the stack for few channels, since a small tensor is normalised faster than memory is allocated.
class Workspace {
 public:
  Workspace(int64_t arrays, int64_t channels)
      : array_bytes_((channels * static_cast<int64_t>(sizeof(double)) + cache_line - 1) / cache_line * cache_line),
        data_(arrays * array_bytes_ <= static_cast<int64_t>(sizeof(local_))
                  ? local_
                  : ::operator new(static_cast<size_t>(arrays * array_bytes_))) {}
  ~Workspace() {
    if (data_ != local_) ::operator delete(data_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  ChannelArrays<T> take(int64_t arrays) {
    char* const taken = static_cast<char*>(data_) + array_bytes_ * taken_;
    taken_ += arrays;
    return {reinterpret_cast<T*>(taken), array_bytes_ / static_cast<int64_t>(sizeof(T))};
  }

 private:
  alignas(cache_line) char local_[8 << 10];
  int64_t array_bytes_;
  void* data_;
  int64_t taken_ = 0;
};

// Two doubles per channel and set: mean and m2, or sum_dy and sum_dy_x. A set is what one task found in its samples.
struct PartialSums {
  double* first;
  double* second;
};

// ---- Vectors of one value a channel ----

// What is done once a channel is done in loops over arrays of this many, which the compiler turns into vectors.
constexpr int64_t channels_at_once = 64;
using ChannelValues = double[channels_at_once];

// NaN is read as one whose float has a clear lower half, as those of 16-bit elements and of arithmetic have: the others
// would become numbers where bfloat16 is rounded as though there were no NaN.
BN_CPU_NOINLINE void read(const ChannelVector& vector, Range channels, double if_null, double* values) {
  const auto copy = [&](const auto* data) {
    for (int64_t i = 0; i < channels.size(); ++i) {
      const double value = static_cast<double>(widen(data[channels.begin + i]));
      values[i] = value == value ? value : __builtin_nan("");
    }
  };
  if (vector.data == nullptr) {
    for (int64_t i = 0; i < channels.size(); ++i) values[i] = if_null;
    return;
  }
  switch (vector.dtype) {
    case DType::float64:
      return copy(static_cast<const double*>(vector.data));
    case DType::float32:
      return copy(static_cast<const float*>(vector.data));
    case DType::float16:
      return copy(static_cast<const float16*>(vector.data));
    case DType::bfloat16:
      return copy(static_cast<const bfloat16*>(vector.data));
  }
}
BN_CPU_NOINLINE void read(const MutableChannelVector& vector, Range channels, double if_null, double* values) {
  read(ChannelVector{vector.data, vector.dtype}, channels, if_null, values);
}

BN_CPU_NOINLINE void write(const MutableChannelVector& vector, Range channels, const double* values) {
  const auto copy = [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    for (int64_t i = 0; i < channels.size(); ++i) {
      data[channels.begin + i] = narrow<T>(static_cast<accumulate_t<T>>(values[i]));
    }
  };
  if (vector.data == nullptr) return;
  switch (vector.dtype) {
    case DType::float64:
      return copy(static_cast<double*>(vector.data));
    case DType::float32:
      return copy(static_cast<float*>(vector.data));
    case DType::float16:
      return copy(static_cast<float16*>(vector.data));
    case DType::bfloat16:
      return copy(static_cast<bfloat16*>(vector.data));
  }
}

// As update_running_statistics in core/formulas.h does channel by channel.
BN_CPU_NOINLINE void update_running_statistics(const RunningStatistics& running, Range channels, const double* means,
                                               const double* m2s, int64_t count) {
  if (running.mean.data == nullptr) return;
  ChannelValues mean, variance;
  read(running.mean, channels, 0.0, mean);
  read(running.variance, channels, 0.0, variance);
  for (int64_t i = 0; i < channels.size(); ++i) {
    const double batch_variance = corrected_variance_of(Moments<double>{means[i], m2s[i], count}, running.correction);
    const bool kept = running.skip_nonfinite && !are_finite(means[i], batch_variance);
    mean[i] = kept ? mean[i] : running_average(mean[i], means[i], running.momentum);
    variance[i] = kept ? variance[i] : running_average(variance[i], batch_variance, running.momentum);
  }
  write(running.mean, channels, mean);
  write(running.variance, channels, variance);
}

// Whether the means of these elements' channels are folded into shifts where they may be.
template <class E>
constexpr bool folds = sizeof(E) == 2;

template <class A>
inline bool all_zero(const A* values, Range channels) {
  int64_t others = 0;
  for (int64_t c = channels.begin; c < channels.end; ++c) others += values[c] == A(0) ? 0 : 1;
  return others == 0;
}

// ---- Order of the steps ----

template <class Task>
inline void parallel(const Threads& threads, int64_t tasks, const Task& task) {
  if (tasks == 1) {
    task(0);
    return;
  }
  threads.run(
      threads.executor, tasks, [](const void* state, int64_t index) { (*static_cast<const Task*>(state))(index); },
      &task);
}

template <class Action>
inline void for_each_block(Range channels, int64_t block_channels, const Action& action) {
  for (int64_t begin = channels.begin; begin < channels.end; begin += block_channels) {
    action(Range{begin, min(channels.end, begin + block_channels)});
  }
}

// Which steps a call has besides finalizing.
struct Steps {
  bool sums, map;
};

// When tasks share the samples, each needs what is finalized of all channels. From so many merges on they share that
// work too; below, each does all of it for itself, which is sooner done than handing coefficients from core to core.
constexpr int64_t merges_worth_sharing = 8192;

// How many copies of the coefficients there are. Only the first is made by a task that writes what the caller sees.
inline int64_t coefficient_copies(const Shape& shape, const Blocking& blocking, Steps steps) {
  if (!blocking.split_samples || !steps.map) return 1;
  const int64_t merges = shape.channels * (steps.sums ? blocking.tasks : 1);
  return merges < merges_worth_sharing ? blocking.tasks : 1;
}

// sums(channels, samples, set), finalize(channels, copy), map(channels, samples, copy): block by block in one parallel
// region, or in separate regions where tasks share channels.
template <class Sums, class Finalize, class Map>
inline void run_steps(const Shape& shape, const Blocking& blocking, const Threads& threads, Steps steps,
                      const Sums& sums, const Finalize& finalize, const Map& map) {
  const Range all_channels{0, shape.channels}, all_samples{0, shape.samples()};
  const auto for_own_blocks = [&](int64_t task, const auto& action) {
    for_each_block(split(shape.channels, blocking.channel_unit, blocking.tasks, task), blocking.block_channels, action);
  };
  if (!blocking.split_results) {
    parallel(threads, blocking.tasks, [&](int64_t task) {
      for_own_blocks(task, [&](Range block) {
        if (steps.sums) sums(block, all_samples, 0);
        finalize(block, 0);
        if (steps.map) map(block, all_samples, 0);
      });
    });
    return;
  }
  const bool copied = coefficient_copies(shape, blocking, steps) > 1;
  if (!blocking.split_samples) {
    parallel(threads, blocking.tasks, [&](int64_t task) {
      for_own_blocks(task, [&](Range block) {
        sums(block, all_samples, 0);
        finalize(block, 0);
      });
    });
  } else {
    if (steps.sums) {
      parallel(threads, blocking.tasks, [&](int64_t task) {
        for_each_block(all_channels, blocking.block_channels,
                       [&](Range block) { sums(block, own_samples(shape, blocking, task), task); });
      });
    }
    if (!copied) {
      const int64_t merges = shape.channels * (steps.sums ? blocking.tasks : 1);
      const int64_t tasks = max(1, min(blocking.tasks, 2 * merges / merges_worth_sharing));
      parallel(threads, tasks,
               [&](int64_t task) { finalize(split(shape.channels, blocking.channel_unit, tasks, task), 0); });
    }
  }
  if (!steps.map) return;
  parallel(threads, blocking.tasks, [&](int64_t task) {
    const int64_t copy = copied ? task : 0;
    if (copied) finalize(all_channels, copy);
    for_each_block(all_channels, blocking.result_channels,
                   [&](Range block) { map(block, own_samples(shape, blocking, task), copy); });
  });
}

// ---- channel_statistics and gradient_sums ----

// Whether all of these are finite.
template <class T>
inline bool all_finite(const T* values, int64_t count) {
  int64_t others = 0;
  for (int64_t i = 0; i < count; ++i) others += values[i] - values[i] == T(0) ? 0 : 1;
  return others == 0;
}

inline bool all_above(double limit, const double* values, int64_t count) {
  int64_t others = 0;
  for (int64_t i = 0; i < count; ++i) others += values[i] > limit ? 0 : 1;
  return others == 0;
}

// A variance that dot products, to which numbers below 2^-126 are zero, give to the precision of float.
constexpr double smallest_pair_variance = 1e-30;

// action(run) for each run of samples that count; for all samples at once where all do.
template <class Action>
inline void for_each_run(const CountedSamples& counted, Range samples, const Action& action) {
  if (counted.all) return action(samples);
  for (const int64_t *run = counted.bounds, *end = run + 2 * counted.runs; run < end; run += 2) {
    const Range own{max(run[0], samples.begin), min(run[1], samples.end)};
    if (own.begin < own.end) action(own);
  }
}

inline int64_t count_samples(const CountedSamples& counted, Range samples) {
  int64_t count = 0;
  for_each_run(counted, samples, [&](Range run) { count += run.size(); });
  return count;
}

// action(outer, inner) for each sample of one channel. For the rare channels whose sums overflowed.
template <class Action>
inline void for_each_sample(const Shape& shape, Range samples, const Action& action) {
  for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
    action(sample / shape.inner, sample % shape.inner);
  }
}

// What sums are taken around: the mean to the precision of the elements. Deviations are then multiples of the elements'
// own spacing and add up almost exactly; with more bits in the center, each addition would round the same way.
template <class E, class A = accumulate_t<E>>
BN_CPU_NOINLINE void set_centers(const double* mean, int64_t count, A* center) {
  for (int64_t i = 0; i < count; ++i) center[i] = static_cast<A>(mean[i]);
  if constexpr (sizeof(E) == sizeof(A)) return;
  constexpr int64_t lanes = Vec<A>::lanes;
  E rounded[lanes];
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(rounded, load(center + i));
    store(center + i, load(rounded));
  }
  for (; i < count; ++i) center[i] = widen(narrow<E>(center[i]));
}

template <class A>
BN_HOST_DEVICE A median(A a, A b, A c) {
  const A low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : (c > high ? high : c);
}

// The first center of a slab: the median of three of its samples, which is near the mean or, if one is an outlier, near
// the other samples.
template <class E, class A>
BN_CPU_NOINLINE void set_first_centers(const Shape& shape, const E* x, Range channels, Range slab, A* center) {
  const auto first_channel_at = [&](int64_t sample) {
    return x + sample / shape.inner * shape.channels * shape.inner + sample % shape.inner;
  };
  const E* const early = first_channel_at(slab.begin + slab.size() / 4);
  const E* const middle = first_channel_at(slab.begin + slab.size() / 2);
  const E* const late = first_channel_at(slab.begin + slab.size() * 3 / 4);
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const int64_t at = c * shape.inner;
    center[c] = median(widen(early[at]), widen(middle[at]), widen(late[at]));
  }
}

// Each slab is summed around the mean of the samples before it, and the first around one of its own, so that sums of
// squares in the accumulate type lose nothing however large the mean is, or one of the samples.
template <class Sum, class E, class A>
BN_CPU_NOINLINE void sum_statistics(const Sum& sum, const Shape& shape, const Blocking& blocking, const E* x,
                                    Range channels, Range samples, const CountedSamples& counted, A* center,
                                    PartialSums moments) {
  for (int64_t c = channels.begin; c < channels.end; ++c) moments.first[c] = moments.second[c] = 0.0;
  const A* const pivot = center + channels.begin;
  double* const mean = moments.first + channels.begin;
  double* const m2 = moments.second + channels.begin;
  int64_t merged = 0;
  const auto add = [&](Range slab) {
    if (merged == 0) {
      set_first_centers(shape, x, channels, slab, center);
    } else {
      set_centers<E>(mean, channels.size(), center + channels.begin);
    }
    sum_slab(sum, shape, blocking, Inputs<E, 1>{{x}}, nullptr, channels, slab, Coefficients<A>{{center}},
             [&](const A* s, const A* q) {
               for (int64_t i = 0; i < channels.size(); ++i) {
                 const Moments<double> before{mean[i], m2[i], merged};
                 // Infinite in either direction, squares that overflowed become NaN, which no merge takes for a number.
                 const A squares = q[i] + (q[i] - q[i]);
                 const Moments<double> after =
                     merge(before, moments_from_sums<double>(pivot[i], s[i], squares, slab.size()));
                 mean[i] = after.mean;
                 m2[i] = after.m2;
               }
             });
    merged += slab.size();
  };
  for_each_run(counted, samples, [&](Range run) {
    for (int64_t begin = run.begin, end; begin < run.end; begin = end) {
      end = slab_end<A>(shape, blocking, begin, run.end);
      add({begin, end});
    }
  });
}

template <class E, class A>
inline void channel_statistics(const Shape& shape, const Blocking& blocking, const E* x, Range channels, Range samples,
                               const CountedSamples& counted, A* center, PartialSums moments) {
  double* const m2 = moments.second + channels.begin;
  const double count = static_cast<double>(count_samples(counted, samples));
  if constexpr (has_dot_products<E>) {
    sum_statistics(PairStatistics{}, shape, blocking, x, channels, samples, counted, center, moments);
    if (all_above(smallest_pair_variance * count, m2, channels.size()) && all_finite(m2, channels.size())) return;
  }
  sum_statistics(Statistics{}, shape, blocking, x, channels, samples, counted, center, moments);
  if (all_finite(m2, channels.size())) return;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    if (all_finite(&moments.second[c], 1)) continue;
    double sum = 0.0, squares = 0.0;
    const auto value_at = [&](int64_t outer, int64_t inner) {
      return static_cast<double>(widen(x[(outer * shape.channels + c) * shape.inner + inner]));
    };
    const auto for_each_counted = [&](const auto& action) {
      for_each_run(counted, samples, [&](Range run) { for_each_sample(shape, run, action); });
    };
    for_each_counted([&](int64_t outer, int64_t inner) { sum += value_at(outer, inner); });
    const double exact_mean = sum / count;
    for_each_counted([&](int64_t outer, int64_t inner) {
      const double deviation = value_at(outer, inner) - exact_mean;
      squares += deviation * deviation;
    });
    moments.first[c] = exact_mean;
    moments.second[c] = squares;
  }
}

// The gradient sums of one channel, in double.
template <class Gradient, class E, class A>
BN_CPU_NOINLINE void sum_gradient_in_double(const Gradient& gradient, const Shape& shape, const Blocking& blocking,
                                            Inputs<E, Gradient::inputs> in, const uint8_t* mask, int64_t channel,
                                            Range samples, const Coefficients<A>& coefficients, double& sum_g,
                                            double& sum_g_deviation) {
  Vec<A> k[Gradient::coefficients];
  for (int n = 0; n < Gradient::coefficients; ++n) k[n] = Vec<A>(coefficients.of[n][channel]);
  for_each_sample(shape, samples, [&](int64_t outer, int64_t inner) {
    Vec<A> v[Gradient::inputs], g, value;
    in.load_vectors((outer * shape.channels + channel) * shape.inner + inner, 1, Vec<A>(A(0)), v);
    Flags<A> is_blocked{};
    if constexpr (Gradient::mask == MaskUse::read) {
      const MaskBit bit = mask_bit(shape, blocking, outer, channel, inner);
      from_bits(mask[bit.byte] >> bit.shift & 1 ? 0u : 1u, is_blocked);
    }
    gradient.gradient(k, v, is_blocked, g, value);
    const double first = static_cast<double>(g.v[0]);
    sum_g += first;
    sum_g_deviation += first * (static_cast<double>(value.v[0]) - static_cast<double>(coefficients.of[0][channel]));
  });
}

// after_slab(samples) is called while the slab is still in the cache, and may overwrite it. k[0] is the center.
template <class Gradient, class E, class A, class AfterSlab>
BN_CPU_NOINLINE void gradient_sums(const Gradient& gradient, const Shape& shape, const Blocking& blocking,
                                   Inputs<E, Gradient::inputs> in, const uint8_t* mask, Range channels, Range samples,
                                   const Coefficients<A>& coefficients, PartialSums sums, const AfterSlab& after_slab) {
  const GradientSums<Gradient> operation{gradient};
  double *const first = sums.first + channels.begin, *const second = sums.second + channels.begin;
  for (int64_t i = 0; i < channels.size(); ++i) first[i] = second[i] = 0.0;
  for (int64_t begin = samples.begin; begin < samples.end;) {
    const Range slab{begin, slab_end<A>(shape, blocking, begin, samples.end)};
    sum_slab(operation, shape, blocking, in, mask, channels, slab, coefficients, [&](const A* s, const A* q) {
      if (all_finite(s, channels.size()) && all_finite(q, channels.size())) {
        for (int64_t i = 0; i < channels.size(); ++i) {
          first[i] += static_cast<double>(s[i]);
          second[i] += static_cast<double>(q[i]);
        }
        return;
      }
      for (int64_t i = 0; i < channels.size(); ++i) {
        double sum_g = static_cast<double>(s[i]), sum_g_deviation = static_cast<double>(q[i]);
        if (!are_finite(sum_g, sum_g_deviation)) {
          sum_g = sum_g_deviation = 0.0;
          sum_gradient_in_double(gradient, shape, blocking, in, mask, channels.begin + i, slab, coefficients, sum_g,
                                 sum_g_deviation);
        }
        first[i] += sum_g;
        second[i] += sum_g_deviation;
      }
    });
    after_slab(slab);
    begin = slab.end;
  }
}

// ---- The two calls ----

// Where backward's gradient before the epilogue comes from: see operations.h.
enum class GradientSource { plain, mask, relu, any };

inline GradientSource gradient_source(const BackwardParams& params) {
  const Epilogue& epilogue = params.epilogue;
  if (params.mask != nullptr) return GradientSource::mask;
  if (params.x_is_output) return GradientSource::any;
  if (epilogue.activation == Activation::identity && params.dresidual == nullptr) return GradientSource::plain;
  const bool one_input = epilogue.residual == nullptr && params.dresidual == nullptr;
  return epilogue.activation == Activation::relu && one_input ? GradientSource::relu : GradientSource::any;
}

template <class Action>
inline void with_gradient(GradientSource source, const BackwardParams& params, const Action& action) {
  const AnyActivation act{params.epilogue.activation, params.epilogue.negative_slope};
  switch (source) {
    case GradientSource::plain:
      return action(PlainGradient{});
    case GradientSource::mask:
      return action(MaskedGradient(act.activation == Activation::leaky_relu ? act.negative_slope : 0.0));
    case GradientSource::relu:
      return action(ReluGradient{});
    case GradientSource::any:
      return action(ActivationGradient(act, params.x_is_output));
  }
}

template <class E>
inline void forward(const ForwardParams& params, const Threads& threads) {
  using A = accumulate_t<E>;
  const Shape shape = params.shape;
  const bool writes = params.y != nullptr;
  Traffic traffic{1, params.batch_statistics, params.batch_statistics && writes, writes};
  traffic.late_inputs = params.epilogue.residual != nullptr;
  traffic.in_place = params.y == params.x;
  traffic.masked = params.mask != nullptr;
  traffic.summed_in_runs = !params.counted.all;
  const Blocking blocking = choose_blocking(shape, sizeof(E), traffic, Vec<A>::lanes, threads.count);
  if (params.mask != nullptr) {
    const int64_t used = used_mask_bytes(shape, blocking);
    __builtin_memset(params.mask + used, 0, static_cast<size_t>(mask_bytes(shape) - used));
  }
  const Steps steps{params.batch_statistics, writes};
  const int64_t sets = blocking.split_samples ? blocking.tasks : 1;
  const int64_t copies = coefficient_copies(shape, blocking, steps);
  Workspace workspace(Normalize::coefficients * copies + 3 * sets, shape.channels);
  ChannelArrays<A> k_of[Normalize::coefficients];
  for (ChannelArrays<A>& k : k_of) k = workspace.take<A>(copies);
  const auto means = workspace.take<double>(sets), m2s = workspace.take<double>(sets);
  const auto centers = workspace.take<A>(sets);
  const E* const x = static_cast<const E*>(params.x);
  E* const y = static_cast<E*>(params.y);

  const auto statistics = [&](Range channels, Range samples, int64_t set) {
    channel_statistics(shape, blocking, x, channels, samples, params.counted, centers[set], {means[set], m2s[set]});
  };
  const auto finalize_statistics = [&](Range all, int64_t copy) {
    for_each_block(all, channels_at_once, [&](Range channels) {
      const int64_t begin = channels.begin, size = channels.size();
      ChannelValues mean, variance, inv_std, weight, bias;
      if (params.batch_statistics) {
        ChannelValues m2;
        const auto samples_of = [&](int64_t set) {
          if (sets == 1) return shape.samples();
          return count_samples(params.counted, own_samples(shape, blocking, set));
        };
        int64_t merged = samples_of(0);
        for (int64_t i = 0; i < size; ++i) mean[i] = means[0][begin + i], m2[i] = m2s[0][begin + i];
        for (int64_t set = 1; set < sets; ++set) {
          const double *const set_mean = means[set] + begin, *const set_m2 = m2s[set] + begin;
          const int64_t count = samples_of(set);
          for (int64_t i = 0; i < size; ++i) {
            const Moments<double> both =
                merge(Moments<double>{mean[i], m2[i], merged}, {set_mean[i], set_m2[i], count});
            mean[i] = both.mean;
            m2[i] = both.m2;
          }
          merged += count;
        }
        if (params.record != nullptr) {
          double* const record = params.record + 2 + begin;
          for (int64_t i = 0; i < size; ++i) record[i] = mean[i], record[shape.channels + i] = m2[i];
          return;
        }
        if (copy == 0) update_running_statistics(params.running, channels, mean, m2, merged);
        for (int64_t i = 0; i < size; ++i) variance[i] = variance_of(Moments<double>{mean[i], m2[i], merged});
      } else {
        read(params.running.mean, channels, 0.0, mean);
        read(params.running.variance, channels, 1.0, variance);
      }
      read(params.weight, channels, 1.0, weight);
      read(params.bias, channels, 0.0, bias);
      for (int64_t i = 0; i < size; ++i) inv_std[i] = inverse_std(variance[i], params.eps);
      if (copy == 0) write({params.mean, DTypeOf<A>::value}, channels, mean);
      if (copy == 0) write({params.inv_std, DTypeOf<A>::value}, channels, inv_std);
      for (int64_t i = 0; i < size; ++i) {
        const NormalizeCoefficients<A> k = normalize_coefficients<A>(mean[i], inv_std[i], weight[i], bias[i]);
        k_of[0][copy][begin + i] = k.mean;
        k_of[1][copy][begin + i] = k.scale;
        k_of[2][copy][begin + i] = k.shift;
      }
      // Where the shift is saved, backward computes from it.
      if (folds<E> && params.epilogue.empty() && params.shift == nullptr) {
        for (int64_t i = 0; i < size; ++i) {
          const bool fold = may_be_folded(mean[i], variance[i]);
          const double shift = bias[i] - mean[i] * static_cast<double>(k_of[1][copy][begin + i]);
          k_of[0][copy][begin + i] = fold ? A(0) : k_of[0][copy][begin + i];
          k_of[2][copy][begin + i] = fold ? static_cast<A>(shift) : k_of[2][copy][begin + i];
        }
      }
      if (A* const shift = static_cast<A*>(params.shift); shift != nullptr && copy == 0) {
        for (int64_t i = 0; i < size; ++i) shift[begin + i] = k_of[2][0][begin + i];
      }
    });
  };
  const auto normalize = [&](Range channels, Range samples, int64_t copy) {
    Coefficients<A> coefficients{{k_of[0][copy], k_of[1][copy], k_of[2][copy]}};
    const auto map = [&](const auto& operation) {
      using Operation = std::decay_t<decltype(operation)>;
      Inputs<E, Operation::inputs> in{{x}};
      if constexpr (Operation::inputs == 2) in.of[1] = static_cast<const E*>(params.epilogue.residual);
      map_samples(operation, shape, blocking, in, Outputs<E, 1>{{y}}, params.mask, channels, samples, coefficients);
    };
    const auto map_activation = [&](const auto& act) {
      using Act = std::decay_t<decltype(act)>;
      if (params.epilogue.residual != nullptr) {
        map(NormalizeActivate<Act, true>(act));
      } else {
        map(NormalizeActivate<Act, false>(act));
      }
    };
    if (params.epilogue.empty()) {
      if constexpr (folds<E>) {
        if (all_zero(k_of[0][copy], channels)) {
          coefficients = {{k_of[1][copy], k_of[2][copy]}};
          return map(FoldedNormalize{});
        }
      }
      map(Normalize{});
    } else if (params.epilogue.activation == Activation::relu) {
      map_activation(Relu{});
    } else {
      map_activation(AnyActivation{params.epilogue.activation, params.epilogue.negative_slope});
    }
  };
  run_steps(shape, blocking, threads, steps, statistics, finalize_statistics, normalize);
}

template <class E>
inline void backward(const BackwardParams& params, const Threads& threads) {
  using A = accumulate_t<E>;
  const Shape shape = params.shape;
  const E* const dy = static_cast<const E*>(params.dy);
  // Where only sum_dy is wanted there may be no x: dy stands in, and the other sum is not used.
  const E* const x = params.x != nullptr ? static_cast<const E*>(params.x) : dy;
  E* const dx = static_cast<E*>(params.dx);
  E* const dresidual = static_cast<E*>(params.dresidual);
  const A* const mean = static_cast<const A*>(params.mean);
  const A* const inv_std = static_cast<const A*>(params.inv_std);
  const bool training = params.batch_statistics && dx != nullptr;  // dx waits for the sums
  const bool writes = dx != nullptr || dresidual != nullptr, joined = params.joined.count != nullptr;
  const bool wants_sums = params.dweight.data != nullptr || params.dbias.data != nullptr || (training && !joined);
  if (!wants_sums && !writes) return;
  const bool fused = !training && wants_sums && writes;
  const GradientSource source = gradient_source(params);
  const bool reads_x = source == GradientSource::relu || source == GradientSource::any;

  Traffic traffic{(wants_sums || training || reads_x) && x != dy ? 2 : 1, wants_sums, wants_sums && training && !joined,
                  (dx != nullptr ? 1 : 0) + (dresidual != nullptr ? 1 : 0)};
  if (source == GradientSource::any && params.epilogue.residual != nullptr) ++traffic.inputs;
  traffic.in_place = dx != nullptr && (dx == dy || dx == x);
  traffic.masked = traffic.masked_sums = source == GradientSource::mask;
  const Blocking blocking = choose_blocking(shape, sizeof(E), traffic, Vec<A>::lanes, threads.count);
  const int64_t sets = blocking.split_samples ? blocking.tasks : 1;
  const Steps steps{wants_sums, writes && !fused};
  const int64_t copies = coefficient_copies(shape, blocking, steps);
  const bool fold_any = folds<E> && training && source != GradientSource::any;
  Workspace workspace((fold_any ? 5 : 3) * copies + 1 + 2 * sets, shape.channels);
  const auto dy_scale = workspace.take<A>(copies), mean_dy = workspace.take<A>(copies);
  const auto x_scale = workspace.take<A>(copies);
  // Of what folds, which has -x_scale.
  const auto dx_center = workspace.take<A>(fold_any ? copies : 0), dx_shift = workspace.take<A>(fold_any ? copies : 0);
  A* const scale = workspace.take<A>(1)[0];
  const auto sum_dys = workspace.take<double>(sets), sum_dy_xs = workspace.take<double>(sets);

  // What computes u, and at first the center.
  const A* const shift = static_cast<const A*>(params.shift);
  const A* const center = params.x_is_output ? shift : mean;
  if (reads_x) {
    for_each_block({0, shape.channels}, channels_at_once, [&](Range channels) {
      ChannelValues weight;
      read(params.weight, channels, 1.0, weight);
      for (int64_t i = 0; i < channels.size(); ++i) {
        scale[channels.begin + i] = normalize_scale(inv_std[channels.begin + i], weight[i]);
      }
    });
  }
  const auto inputs_of = [&](const auto& operation) {
    constexpr int inputs = std::decay_t<decltype(operation)>::inputs;
    Inputs<E, inputs> in{{dy}};
    if constexpr (inputs > 1) in.of[1] = x;
    if constexpr (inputs > 2) in.of[2] = static_cast<const E*>(params.epilogue.residual);
    return in;
  };

  const auto write_gradients = [&](Range channels, Range samples, int64_t copy) {
    const auto map = [&](const auto& operation, const Coefficients<A>& coefficients) {
      constexpr int outputs = std::decay_t<decltype(operation)>::outputs;
      Outputs<E, outputs> out{{dx}};
      if constexpr (outputs == 2) out.of[1] = dresidual;
      map_samples(operation, shape, blocking, inputs_of(operation), out, const_cast<uint8_t*>(params.mask), channels,
                  samples, coefficients);
    };
    with_gradient(source, params, [&](const auto& gradient) {
      using Gradient = std::decay_t<decltype(gradient)>;
      if (training) {
        if constexpr (folds<E> && !Gradient::heavy) {
          if (all_zero(dx_center[copy], channels)) {
            return map(FoldedInputGradient<Gradient>{gradient},
                       Coefficients<A>{{dy_scale[copy], x_scale[copy], dx_shift[copy], center, scale, shift}});
          }
          return map(ShiftedInputGradient<Gradient>{gradient},
                     Coefficients<A>{{dy_scale[copy], mean_dy[copy], x_scale[copy], dx_center[copy], dx_shift[copy],
                                      center, scale, shift}});
        }
        map(InputGradient<Gradient>{gradient},
            Coefficients<A>{{dy_scale[copy], mean_dy[copy], x_scale[copy], center, scale, shift}});
      } else {
        map(ScaledGradient<Gradient>{gradient}, Coefficients<A>{{dy_scale[copy], center, scale, shift}});
      }
    });
  };
  const int64_t count = joined ? static_cast<int64_t>(*params.joined.count) : shape.samples();
  const auto set_coefficients = [&](Range channels, int64_t copy, const double* sum_dy,
                                    const double* sum_dy_xhat) __attribute__((noinline)) {
    ChannelValues weight;
    read(params.weight, channels, 1.0, weight);
    for (int64_t i = 0; i < channels.size(); ++i) {
      const int64_t c = channels.begin + i;
      const InputGradientCoefficients<A> k = input_gradient_coefficients<A>(
          mean[c], inv_std[c], static_cast<A>(weight[i]), sum_dy[i], sum_dy_xhat[i], count);
      dy_scale[copy][c] = k.dy_scale;
      mean_dy[copy][c] = k.mean_dy;
      x_scale[copy][c] = params.x_is_output ? k.x_scale / scale[c] : k.x_scale;
    }
    if (!fold_any) return;
    for (int64_t i = 0; i < channels.size(); ++i) {
      const int64_t c = channels.begin + i;
      const double deviations = static_cast<double>(mean[c]) * static_cast<double>(inv_std[c]);
      const bool fold = !params.x_is_output && may_be_folded(deviations, 1.0);
      const double means = static_cast<double>(mean[c]) * static_cast<double>(x_scale[copy][c]) - sum_dy[i] / count;
      dx_center[copy][c] = fold ? A(0) : center[c];
      mean_dy[copy][c] = fold ? A(0) : mean_dy[copy][c];
      dx_shift[copy][c] = fold ? static_cast<A>(means * static_cast<double>(dy_scale[copy][c])) : A(0);
      x_scale[copy][c] = -x_scale[copy][c];
    }
  };
  const auto set_without_sums = [&](Range all) __attribute__((noinline)) {
    const ChannelValues zeros{};
    for_each_block(all, channels_at_once, [&](Range channels) { set_coefficients(channels, 0, zeros, zeros); });
  };
  if (fused && blocking.split_samples) set_without_sums({0, shape.channels});  // tasks share all channels
  const auto sums = [&](Range channels, Range samples, int64_t set) {
    if (fused && !blocking.split_samples) set_without_sums(channels);
    with_gradient(source, params, [&](const auto& gradient) {
      gradient_sums(gradient, shape, blocking, inputs_of(gradient), params.mask, channels, samples,
                    Coefficients<A>{{center, scale, shift}}, {sum_dys[set], sum_dy_xs[set]}, [&](Range slab) {
                      if (fused) write_gradients(channels, slab, 0);
                    });
    });
  };
  const auto finalize = [&](Range all, int64_t copy) {
    for_each_block(all, channels_at_once, [&](Range channels) {
      const int64_t begin = channels.begin, size = channels.size();
      ChannelValues sum_dy{}, sum_dy_xhat{};
      if (joined) {
        for (int64_t i = 0; i < size; ++i) sum_dy[i] = params.joined.sum_dy[begin + i];
        for (int64_t i = 0; i < size; ++i) sum_dy_xhat[i] = params.joined.sum_dy_xhat[begin + i];
      } else if (wants_sums) {
        for (int64_t set = 0; set < sets; ++set) {
          const double *const first = sum_dys[set] + begin, *const second = sum_dy_xs[set] + begin;
          for (int64_t i = 0; i < size; ++i) sum_dy[i] += first[i], sum_dy_xhat[i] += second[i];
        }
        for (int64_t i = 0; i < size; ++i) sum_dy_xhat[i] *= static_cast<double>(inv_std[begin + i]);
        if (params.x_is_output) {
          for (int64_t i = 0; i < size; ++i) sum_dy_xhat[i] /= static_cast<double>(scale[begin + i]);
        }
        if (copy == 0) write(params.dweight, channels, sum_dy_xhat);
        if (copy == 0) write(params.dbias, channels, sum_dy);
      }
      if (writes && !fused) set_coefficients(channels, copy, sum_dy, sum_dy_xhat);
    });
  };
  run_steps(shape, blocking, threads, steps, sums, finalize, write_gradients);
}

template <class Params, void (*on_float64)(const Params&, const Threads&),
          void (*on_float32)(const Params&, const Threads&), void (*on_float16)(const Params&, const Threads&),
          void (*on_bfloat16)(const Params&, const Threads&)>
inline void dispatch(const Params& params, const Threads& threads) {
  switch (params.dtype) {
    case DType::float64:
      return on_float64(params, threads);
    case DType::float32:
      return on_float32(params, threads);
    case DType::float16:
      return on_float16(params, threads);
    case DType::bfloat16:
      return on_bfloat16(params, threads);
  }
}

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
