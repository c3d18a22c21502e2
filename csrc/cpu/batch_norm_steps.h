// The five steps of batch norm over blocks of channels, and the two calls that put them in order.
#pragma once

#include "cpu/blocking.h"
#include "cpu/elementwise.h"
#include "cpu/kernel_table.h"
#include "cpu/simd.h"
#include "cpu/sums.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

// ---- What the steps compute for one vector of samples ----

// sum(x - center) and sum((x - center)^2)
struct Statistics {
  static constexpr int inputs = 1;

  template <class V>
  BN_HOST_DEVICE static void add(V x, V, V center, V& s, V& q) {
    const V deviation = x - center;
    s += deviation;
    q = multiply_add(deviation, deviation, q);
  }
  template <class V>
  BN_HOST_DEVICE static V neutral(V center) {
    return center;
  }
};

// sum(dy) and sum(dy * (x - center))
struct GradientSums {
  static constexpr int inputs = 2;

  template <class V>
  BN_HOST_DEVICE static void add(V dy, V x, V center, V& s, V& q) {
    s += dy;
    q = multiply_add(dy, x - center, q);
  }
  template <class V>
  BN_HOST_DEVICE static V neutral(V center) {
    return center - center;
  }
};

struct Normalize {
  static constexpr int inputs = 1, coefficients = 3;

  template <class V>
  BN_HOST_DEVICE static V apply(const V* k, V x, V) {
    return NormalizeCoefficients<V>{k[0], k[1], k[2]}(x);
  }
};

struct InputGradient {
  static constexpr int inputs = 2, coefficients = 4;

  template <class V>
  BN_HOST_DEVICE static V apply(const V* k, V dy, V x) {
    return InputGradientCoefficients<V>{k[0], k[1], k[2], k[3]}(dy, x);
  }
};

struct ScaledGradient {  // with running statistics
  static constexpr int inputs = 1, coefficients = 1;

  template <class V>
  BN_HOST_DEVICE static V apply(const V* k, V dy, V) {
    return InputGradientCoefficients<V>{k[0], k[0], k[0], k[0]}(dy);
  }
};

// ---- Memory of one call ----

// On the stack for few channels, since a small tensor is normalised faster than memory is allocated.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : data_(bytes <= static_cast<int64_t>(sizeof(local_)) ? local_ : ::operator new(static_cast<size_t>(bytes))) {}
  ~Workspace() {
    if (data_ != local_) ::operator delete(data_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(static_cast<char*>(data_) + used_);
    used_ += count * static_cast<int64_t>(sizeof(double));  // whatever T: the next one stays aligned
    return taken;
  }

 private:
  alignas(cache_line) char local_[8 << 10];
  void* data_;
  int64_t used_ = 0;
};

// Two doubles per channel and set: mean and m2, or sum_dy and sum_dy_x. A set is what one task found in its samples.
struct PartialSums {
  double* first;
  double* second;
};

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

// sums(channels, samples, set), finalize(channels), map(channels, samples): block by block in one parallel region, or
// in separate regions where tasks share channels.
template <class Sums, class Finalize, class Map>
inline void run_steps(const Shape& shape, const Blocking& blocking, const Threads& threads, bool sums_first,
                      const Sums& sums, const Finalize& finalize, const Map& map) {
  const Range all_channels{0, shape.channels}, all_samples{0, shape.samples()};
  if (!blocking.split_samples) {
    parallel(threads, blocking.tasks, [&](int64_t task) {
      const Range own = split(shape.channels, blocking.unit, blocking.tasks, task);
      for_each_block(own, blocking.block_channels, [&](Range block) {
        if (sums_first) sums(block, all_samples, 0);
        finalize(block);
        map(block, all_samples);
      });
    });
    return;
  }
  const auto own_samples = [&](int64_t task) { return split(shape.samples(), blocking.unit, blocking.tasks, task); };
  if (sums_first) {
    parallel(threads, blocking.tasks, [&](int64_t task) {
      for_each_block(all_channels, blocking.block_channels, [&](Range block) { sums(block, own_samples(task), task); });
    });
  }
  constexpr int64_t merges_per_task = 4096;
  const int64_t merge_tasks =
      max(1, min(blocking.tasks, shape.channels * (sums_first ? blocking.tasks : 1) / merges_per_task));
  parallel(threads, merge_tasks, [&](int64_t task) { finalize(split(shape.channels, cache_line, merge_tasks, task)); });
  parallel(threads, blocking.tasks, [&](int64_t task) {
    for_each_block(all_channels, blocking.block_channels, [&](Range block) { map(block, own_samples(task)); });
  });
}

// ---- channel_statistics and gradient_sums ----

BN_HOST_DEVICE bool is_finite(double value) {
  return value - value == 0.0;
}

// action(offset) for each sample of one channel. For the rare channels whose sums overflowed.
template <class Action>
inline void for_each_sample(const Shape& shape, int64_t channel, Range samples, const Action& action) {
  for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
    const int64_t outer = sample / shape.inner, inner = sample % shape.inner;
    action((outer * shape.channels + channel) * shape.inner + inner);
  }
}

// What sums are taken around: the mean to the precision of the elements. Deviations are then multiples of the elements'
// own spacing and add up almost exactly; with more bits in the center, each addition would round the same way.
template <class E>
BN_HOST_DEVICE accumulate_t<E> center_near(double mean) {
  return widen(narrow<E>(static_cast<accumulate_t<E>>(mean)));
}

template <class A>
BN_HOST_DEVICE A median(A a, A b, A c) {
  const A low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : (c > high ? high : c);
}

// Each slab is summed around the mean of the samples before it, and the first around the median of three of its own, so
// that sums of squares in the accumulate type lose nothing however large the mean is, or one of the samples.
template <class E, class A>
inline void channel_statistics(const Shape& shape, const Blocking& blocking, const E* x, Range channels, Range samples,
                               A* center, PartialSums moments) {
  for (int64_t c = channels.begin; c < channels.end; ++c) moments.first[c] = moments.second[c] = 0.0;
  if (samples.size() == 0) return;
  const int64_t first_slab = slab_end<A>(shape, blocking, samples.begin, samples.end) - samples.begin;
  const auto first_channel_at = [&](int64_t sample) {
    return x + sample / shape.inner * shape.channels * shape.inner + sample % shape.inner;
  };
  const E* const early = first_channel_at(samples.begin + first_slab / 4);
  const E* const middle = first_channel_at(samples.begin + first_slab / 2);
  const E* const late = first_channel_at(samples.begin + first_slab * 3 / 4);
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const int64_t at = c * shape.inner;
    center[c] = median(widen(early[at]), widen(middle[at]), widen(late[at]));
  }

  const Inputs<E> in{x, x};
  int64_t merged = 0;
  for (int64_t begin = samples.begin; begin < samples.end;) {
    const int64_t end = slab_end<A>(shape, blocking, begin, samples.end);
    const int64_t count = end - begin;
    sum_slab<Statistics>(shape, blocking, in, channels, {begin, end}, center, [&](int64_t c, double s, double q) {
      const Moments<double> before{moments.first[c], moments.second[c], merged};
      const Moments<double> after = merge(before, moments_from_sums(static_cast<double>(center[c]), s, q, count));
      moments.first[c] = after.mean;
      moments.second[c] = after.m2;
    });
    for (int64_t c = channels.begin; c < channels.end; ++c) center[c] = center_near<E>(moments.first[c]);
    merged += count;
    begin = end;
  }

  for (int64_t c = channels.begin; c < channels.end; ++c) {
    if (is_finite(moments.second[c])) continue;
    double sum = 0.0, m2 = 0.0;
    for_each_sample(shape, c, samples, [&](int64_t at) { sum += static_cast<double>(widen(x[at])); });
    const double mean = sum / static_cast<double>(merged);
    for_each_sample(shape, c, samples, [&](int64_t at) {
      const double deviation = static_cast<double>(widen(x[at])) - mean;
      m2 += deviation * deviation;
    });
    moments.first[c] = mean;
    moments.second[c] = m2;
  }
}

// after_slab(samples) is called while the slab is still in the cache.
template <class E, class A, class AfterSlab>
inline void gradient_sums(const Shape& shape, const Blocking& blocking, Inputs<E> in, Range channels, Range samples,
                          const A* mean, PartialSums sums, const AfterSlab& after_slab) {
  for (int64_t c = channels.begin; c < channels.end; ++c) sums.first[c] = sums.second[c] = 0.0;
  for (int64_t begin = samples.begin; begin < samples.end;) {
    const int64_t end = slab_end<A>(shape, blocking, begin, samples.end);
    sum_slab<GradientSums>(shape, blocking, in, channels, {begin, end}, mean, [&](int64_t c, double s, double q) {
      sums.first[c] += s;
      sums.second[c] += q;
    });
    after_slab(Range{begin, end});
    begin = end;
  }

  for (int64_t c = channels.begin; c < channels.end; ++c) {
    if (is_finite(sums.first[c]) && is_finite(sums.second[c])) continue;
    double sum_dy = 0.0, sum_dy_x = 0.0;
    for_each_sample(shape, c, samples, [&](int64_t at) {
      const double dy = static_cast<double>(widen(in.first[at]));
      sum_dy += dy;
      sum_dy_x += dy * (static_cast<double>(widen(in.second[at])) - static_cast<double>(mean[c]));
    });
    sums.first[c] = sum_dy;
    sums.second[c] = sum_dy_x;
  }
}

// ---- The two calls ----

template <class E>
inline void forward(const ForwardParams& params, const Threads& threads) {
  using A = accumulate_t<E>;
  const Shape shape = params.shape;
  const bool writes = params.y != nullptr;
  const Traffic traffic{1, params.batch_statistics, params.batch_statistics && writes, writes};
  const Blocking blocking = choose_blocking(shape, sizeof(E), traffic, Vec<A>::lanes, threads.count);
  const int64_t sets = blocking.split_samples ? blocking.tasks : 1;
  Workspace workspace(shape.channels * (3 + 3 * sets) * static_cast<int64_t>(sizeof(double)));
  Coefficients<A> coefficients{};
  for (int k = 0; k < Normalize::coefficients; ++k) coefficients.of[k] = workspace.take<A>(shape.channels);
  double* const means = workspace.take<double>(shape.channels * sets);
  double* const m2s = workspace.take<double>(shape.channels * sets);
  A* const centers = workspace.take<A>(shape.channels * sets);
  const auto moments_of = [&](int64_t set) {
    return PartialSums{means + set * shape.channels, m2s + set * shape.channels};
  };
  const E* const x = static_cast<const E*>(params.x);
  E* const y = static_cast<E*>(params.y);

  const auto statistics = [&](Range channels, Range samples, int64_t set) {
    channel_statistics(shape, blocking, x, channels, samples, centers + set * shape.channels, moments_of(set));
  };
  const auto finalize_statistics = [&](Range channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      double mean, variance;
      if (params.batch_statistics) {
        Moments<double> moments{means[c], m2s[c], shape.samples()};
        if (blocking.split_samples) {
          moments.count = split(shape.samples(), blocking.unit, sets, 0).size();
          for (int64_t set = 1; set < sets; ++set) {
            const int64_t count = split(shape.samples(), blocking.unit, sets, set).size();
            moments = merge(moments, {moments_of(set).first[c], moments_of(set).second[c], count});
          }
        }
        if (params.record != nullptr) {
          params.record[2 + c] = moments.mean;
          params.record[2 + shape.channels + c] = moments.m2;
          continue;
        }
        update_running_statistics(params.running, c, moments, params.running.momentum);
        mean = moments.mean;
        variance = variance_of(moments);
      } else {
        mean = params.running.mean.load(c, 0.0);
        variance = params.running.variance.load(c, 1.0);
      }
      const double inv_std = inverse_std(variance, params.eps);
      if (params.mean != nullptr) static_cast<A*>(params.mean)[c] = static_cast<A>(mean);
      if (params.inv_std != nullptr) static_cast<A*>(params.inv_std)[c] = static_cast<A>(inv_std);
      const NormalizeCoefficients<A> k =
          normalize_coefficients<A>(mean, inv_std, params.weight.load(c, 1.0), params.bias.load(c, 0.0));
      coefficients.of[0][c] = k.mean;
      coefficients.of[1][c] = k.scale;
      coefficients.of[2][c] = k.shift;
    }
  };
  const auto normalize = [&](Range channels, Range samples) {
    if (y == nullptr) return;
    map_samples<Normalize>(shape, blocking, Inputs<E>{x, x}, y, channels, samples, coefficients);
  };
  run_steps(shape, blocking, threads, params.batch_statistics, statistics, finalize_statistics, normalize);
}

template <class E>
inline void backward(const BackwardParams& params, const Threads& threads) {
  using A = accumulate_t<E>;
  const Shape shape = params.shape;
  const E* const dy = static_cast<const E*>(params.dy);
  // Where only sum_dy is wanted there may be no x: dy stands in, and the other sum is not used.
  const E* const x = params.x != nullptr ? static_cast<const E*>(params.x) : dy;
  E* const dx = static_cast<E*>(params.dx);
  const A* const mean = static_cast<const A*>(params.mean);
  const A* const inv_std = static_cast<const A*>(params.inv_std);
  const bool wants_dx = dx != nullptr, training = params.batch_statistics, joined = params.joined.count != nullptr;
  const bool wants_sums =
      params.dweight.data != nullptr || params.dbias.data != nullptr || (training && wants_dx && !joined);
  if (!wants_sums && !wants_dx) return;
  const bool fused = !training && wants_sums && wants_dx;  // dx does not wait for the sums

  const Traffic traffic{(wants_sums || joined) && x != dy ? 2 : 1, wants_sums,
                        wants_sums && training && wants_dx && !joined, wants_dx};
  const Blocking blocking = choose_blocking(shape, sizeof(E), traffic, Vec<A>::lanes, threads.count);
  const int64_t sets = blocking.split_samples ? blocking.tasks : 1;
  Workspace workspace(shape.channels * (4 + 2 * sets) * static_cast<int64_t>(sizeof(double)));
  Coefficients<A> coefficients{};
  for (int k = 0; k < InputGradient::coefficients; ++k) coefficients.of[k] = workspace.take<A>(shape.channels);
  double* const sum_dys = workspace.take<double>(shape.channels * sets);
  double* const sum_dy_xs = workspace.take<double>(shape.channels * sets);

  const auto input_gradient = [&](Range channels, Range samples) {
    if (!wants_dx) return;
    if (training) {
      map_samples<InputGradient>(shape, blocking, Inputs<E>{dy, x}, dx, channels, samples, coefficients);
    } else {
      // One coefficient, which the operation expects first.
      map_samples<ScaledGradient>(shape, blocking, Inputs<E>{dy, dy}, dx, channels, samples,
                                  Coefficients<A>{{coefficients.of[1]}});
    }
  };
  const auto set_coefficients = [&](int64_t c, double sum_dy, double sum_dy_xhat) {
    const InputGradientCoefficients<A> k =
        input_gradient_coefficients<A>(mean[c], inv_std[c], params.weight.load(c, A(1)), sum_dy, sum_dy_xhat,
                                       joined ? static_cast<int64_t>(*params.joined.count) : shape.samples());
    coefficients.of[0][c] = k.mean;
    coefficients.of[1][c] = k.dy_scale;
    coefficients.of[2][c] = k.mean_dy;
    coefficients.of[3][c] = k.x_scale;
  };
  const auto set_without_sums = [&](Range channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c) set_coefficients(c, 0.0, 0.0);
  };
  if (fused && blocking.split_samples) set_without_sums({0, shape.channels});  // tasks share all channels
  const auto sums = [&](Range channels, Range samples, int64_t set) {
    if (fused && !blocking.split_samples) set_without_sums(channels);
    gradient_sums(shape, blocking, Inputs<E>{dy, x}, channels, samples, mean,
                  PartialSums{sum_dys + set * shape.channels, sum_dy_xs + set * shape.channels}, [&](Range slab) {
                    if (fused) input_gradient(channels, slab);
                  });
  };
  const auto finalize = [&](Range channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      double sum_dy = 0.0, sum_dy_xhat = 0.0;
      if (joined) {
        sum_dy = params.joined.sum_dy[c], sum_dy_xhat = params.joined.sum_dy_xhat[c];
      } else if (wants_sums) {
        sum_dy = sum_dys[c], sum_dy_xhat = sum_dy_xs[c];
        for (int64_t set = 1; set < sets; ++set) {
          sum_dy += sum_dys[set * shape.channels + c];
          sum_dy_xhat += sum_dy_xs[set * shape.channels + c];
        }
        sum_dy_xhat *= static_cast<double>(inv_std[c]);
        params.dweight.store(c, sum_dy_xhat);
        params.dbias.store(c, sum_dy);
      }
      if (wants_dx && !fused) set_coefficients(c, sum_dy, sum_dy_xhat);
    }
  };
  run_steps(shape, blocking, threads, wants_sums, sums, finalize, [&](Range channels, Range samples) {
    if (!fused) input_gradient(channels, samples);
  });
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
