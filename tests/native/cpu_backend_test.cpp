// Tests the CPU backend without torch: every instruction set, element type, layout and thread count against a long
// double oracle.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/activation.h"
#include "core/formulas.h"
#include "cpu/backend.h"
#include "cpu/blocking.h"

namespace {

using namespace batchnorm_ext;

int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 20) std::printf("FAILED (%s) %s\n", cpu::instruction_set(), what.c_str());
}

cpu::Executor executor_with(int threads, int64_t* runs = nullptr) {
  return {threads, [=](int64_t tasks, const std::function<void(int64_t)>& task) {
            if (runs != nullptr) ++*runs;
            std::vector<std::thread> pool;
            for (int64_t i = 0; i < tasks; ++i) pool.emplace_back(task, i);
            for (auto& thread : pool) thread.join();
          }};
}

template <class E>
constexpr double unit_roundoff() {
  switch (DTypeOf<E>::value) {
    case DType::float64:
      return 0x1p-53;
    case DType::float32:
      return 0x1p-24;
    case DType::float16:
      return 0x1p-11;
    default:
      return 0x1p-8;
  }
}

// Memory that ends where a page ends that may neither be read nor written.
template <class E>
struct BeforeAGap {
  using value_type = E;
  static constexpr size_t page = 4096;

  BeforeAGap() = default;
  template <class Other>
  BeforeAGap(const BeforeAGap<Other>&) {}

  static size_t before(size_t size) { return (size * sizeof(E) + page - 1) / page * page; }

  E* allocate(size_t size) {
    const size_t bytes = before(size);
    void* const memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + bytes, page, PROT_NONE) != 0) std::abort();
    return reinterpret_cast<E*>(static_cast<char*>(memory) + bytes) - size;
  }
  void deallocate(E* memory, size_t size) {
    const size_t bytes = before(size);
    munmap(reinterpret_cast<char*>(memory + size) - bytes, bytes + page);
  }
  bool operator==(const BeforeAGap&) const { return true; }
  bool operator!=(const BeforeAGap&) const { return false; }
};

// A guard value in front shows writes before the first element; accesses behind the last one end the test.
template <class E>
struct Tensor {
  std::vector<E, BeforeAGap<E>> storage;

  explicit Tensor(int64_t size, double value = 0)
      : storage(static_cast<size_t>(size) + 1, narrow<E>(static_cast<accumulate_t<E>>(value))) {
    storage[0] = narrow<E>(static_cast<accumulate_t<E>>(-77));
  }
  E* data() { return storage.data() + 1; }
  const E* data() const { return storage.data() + 1; }
  int64_t size() const { return static_cast<int64_t>(storage.size()) - 1; }
  double at(int64_t i) const { return static_cast<double>(widen(data()[i])); }
  void set(int64_t i, double value) { data()[i] = narrow<E>(static_cast<accumulate_t<E>>(value)); }
  bool guarded() const { return widen(storage.front()) == -77; }
  bool same_bits(const Tensor& other) const {
    return std::memcmp(storage.data(), other.storage.data(), storage.size() * sizeof(E)) == 0;
  }
};

template <class E>
Tensor<E> normal(int64_t size, double mean, double std, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution(mean, std);
  Tensor<E> tensor(size);
  for (int64_t i = 0; i < size; ++i) tensor.set(i, distribution(generator));
  return tensor;
}

template <class E>
struct Forward {
  using A = accumulate_t<E>;
  Tensor<E> y;
  Tensor<A> mean, inv_std, running_mean, running_var;
  int64_t batches = 4;
};

template <class E>
struct Case {
  using A = accumulate_t<E>;
  Shape shape;
  Tensor<E> x, dy;
  Tensor<float> weight, bias;
  bool affine = true;
  double eps = 1e-5;

  Case(Shape s, double mean = 0.5, double std = 2)
      : shape(s),
        x(normal<E>(s.elements(), mean, std, 1)),
        dy(normal<E>(s.elements(), 0.25, 1, 2)),
        weight(normal<float>(s.channels, 1, 0.3, 3)),
        bias(normal<float>(s.channels, 0, 1, 4)) {}

  std::string name() const {
    return "dtype " + std::to_string(int(DTypeOf<E>::value)) + " [" + std::to_string(shape.outer) + "][" +
           std::to_string(shape.channels) + "][" + std::to_string(shape.inner) + "]";
  }

  int64_t at(int64_t channel, int64_t sample) const {
    return (sample / shape.inner * shape.channels + channel) * shape.inner + sample % shape.inner;
  }

  Forward<E> forward(int threads, bool training, bool cumulative = false, bool skip_nonfinite = false) const {
    const int64_t c = shape.channels;
    Forward<E> result{Tensor<E>(shape.elements()), Tensor<A>(c), Tensor<A>(c), Tensor<A>(c, 0.75), Tensor<A>(c, 1.5)};
    ForwardParams params{};
    params.shape = shape;
    params.dtype = DTypeOf<E>::value;
    params.x = x.data();
    params.y = result.y.data();
    if (affine) params.weight = {weight.data(), DType::float32};
    if (affine) params.bias = {bias.data(), DType::float32};
    params.running.mean = {result.running_mean.data(), DTypeOf<A>::value};
    params.running.variance = {result.running_var.data(), DTypeOf<A>::value};
    params.running.num_batches_tracked = &result.batches;
    params.running.momentum = 0.1;
    params.running.cumulative = cumulative;
    params.running.skip_nonfinite = skip_nonfinite;
    params.eps = eps;
    params.batch_statistics = training;
    params.mean = result.mean.data();
    params.inv_std = result.inv_std.data();
    cpu::forward(params, executor_with(threads));
    return result;
  }
};

bool near(double actual, long double expected, double tolerance) {
  if (std::isnan(static_cast<double>(expected))) return std::isnan(actual);
  if (std::isinf(static_cast<double>(expected))) return actual == static_cast<double>(expected);
  return std::fabs(actual - static_cast<double>(expected)) <= tolerance;
}

struct Statistics {
  long double mean = 0, m2 = 0;
};

template <class E>
Statistics statistics_of(const Case<E>& c, int64_t channel) {
  Statistics result;
  const int64_t n = c.shape.samples();
  for (int64_t i = 0; i < n; ++i) result.mean += c.x.at(c.at(channel, i));
  result.mean /= n;
  for (int64_t i = 0; i < n; ++i) {
    const long double d = c.x.at(c.at(channel, i)) - result.mean;
    result.m2 += d * d;
  }
  return result;
}

template <class E>
void check_forward(const Case<E>& c, const Forward<E>& result, bool training, double momentum, const std::string& name,
                   double roundoffs = 16) {
  const int64_t n = c.shape.samples();
  // Squares of values with few bits round alike in a sum.
  if (sizeof(E) == 2) roundoffs *= 2;
  const double accurate = roundoffs * unit_roundoff<accumulate_t<E>>();
  bool saved = true, running = true, output = true;
  for (int64_t channel = 0; channel < c.shape.channels; ++channel) {
    Statistics s = training ? statistics_of(c, channel) : Statistics{0.75L, 1.5L * n};
    const long double variance = s.m2 / n, inv_std = 1 / std::sqrt(variance + (long double)c.eps);
    const double deviation = static_cast<double>(std::sqrt(variance));
    saved = saved && near(result.mean.at(channel), s.mean, accurate * (std::fabs(double(s.mean)) + deviation));
    saved = saved && near(result.inv_std.at(channel), inv_std, accurate * double(inv_std));
    const long double unbiased = s.m2 / (n - 1);
    const long double expected_mean = training ? 0.75L * (1 - momentum) + s.mean * momentum : 0.75L;
    const long double expected_var = training ? 1.5L * (1 - momentum) + unbiased * momentum : 1.5L;
    running = running && near(result.running_mean.at(channel), expected_mean,
                              accurate * (std::fabs(double(s.mean)) + deviation + 1));
    running = running && near(result.running_var.at(channel), expected_var, accurate * (double(expected_var) + 1));
    const long double weight = c.affine ? c.weight.at(channel) : 1, bias = c.affine ? c.bias.at(channel) : 0;
    for (int64_t i = 0; i < n; ++i) {
      const long double xhat = (c.x.at(c.at(channel, i)) - s.mean) * inv_std;
      const long double expected = xhat * weight + bias;
      const double scale = std::fabs(double(xhat * weight)) + std::fabs(double(bias)) + 1;
      const double tolerance = (unit_roundoff<E>() + accurate) * scale;
      if (!near(result.y.at(c.at(channel, i)), expected, tolerance)) output = false;
    }
  }
  check(saved, name + ": saved mean and inv_std");
  check(running, name + ": running statistics");
  check(output, name + ": output");
  check(result.batches == (training ? 5 : 4), name + ": batch counter");
  check(result.y.guarded() && result.mean.guarded() && result.inv_std.guarded(), name + ": bounds");
}

template <class E>
struct Gradients {
  Tensor<E> dx;
  Tensor<float> dweight, dbias;
};

template <class E>
Gradients<E> backward(const Case<E>& c, const Forward<E>& saved, int threads, bool training, bool want_dx = true,
                      bool want_dweight = true, bool want_dbias = true) {
  Gradients<E> result{Tensor<E>(c.shape.elements()), Tensor<float>(c.shape.channels, 9),
                      Tensor<float>(c.shape.channels, 9)};
  BackwardParams params{};
  params.shape = c.shape;
  params.dtype = DTypeOf<E>::value;
  params.dy = c.dy.data();
  params.x = (training && want_dx) || want_dweight ? c.x.data() : nullptr;
  params.dx = want_dx ? result.dx.data() : nullptr;
  if (c.affine) params.weight = {c.weight.data(), DType::float32};
  params.mean = saved.mean.data();
  params.inv_std = saved.inv_std.data();
  if (want_dweight) params.dweight = {result.dweight.data(), DType::float32};
  if (want_dbias) params.dbias = {result.dbias.data(), DType::float32};
  params.batch_statistics = training;
  cpu::backward(params, executor_with(threads));
  return result;
}

template <class E>
void check_backward(const Case<E>& c, const Forward<E>& saved, const Gradients<E>& result, bool training, bool want_dx,
                    bool want_dweight, bool want_dbias, const std::string& name) {
  const int64_t n = c.shape.samples();
  const double accurate = 16 * unit_roundoff<accumulate_t<E>>();
  bool sums = true, gradient = true;
  for (int64_t channel = 0; channel < c.shape.channels; ++channel) {
    const long double mean = saved.mean.at(channel), inv_std = saved.inv_std.at(channel);
    const long double weight = c.affine ? c.weight.at(channel) : 1;
    long double sum_dy = 0, sum_dy_xhat = 0, size_dy = 0, size_dy_xhat = 0;
    for (int64_t i = 0; i < n; ++i) {
      const long double dy = c.dy.at(c.at(channel, i)), xhat = (c.x.at(c.at(channel, i)) - mean) * inv_std;
      sum_dy += dy, sum_dy_xhat += dy * xhat;
      size_dy += std::fabs(dy), size_dy_xhat += std::fabs(dy * xhat);
    }
    const double stored = 0x1p-23;  // dweight and dbias are float here
    const auto bound = [&](long double size, long double value) {
      return accurate * static_cast<double>(size) + stored * std::fabs(static_cast<double>(value));
    };
    if (want_dbias) sums = sums && near(result.dbias.at(channel), sum_dy, bound(size_dy, sum_dy));
    if (want_dweight) sums = sums && near(result.dweight.at(channel), sum_dy_xhat, bound(size_dy_xhat, sum_dy_xhat));
    if (!want_dx) continue;
    for (int64_t i = 0; i < n; ++i) {
      const long double dy = c.dy.at(c.at(channel, i)), xhat = (c.x.at(c.at(channel, i)) - mean) * inv_std;
      const long double inner = training ? dy - sum_dy / n - xhat * (sum_dy_xhat / n) : dy;
      const double scale = double(inv_std * std::fabs(weight)) *
                           double(std::fabs(dy) + (training ? size_dy / n + std::fabs(xhat) * size_dy_xhat / n : 0));
      const double subnormal =
          std::is_same<E, float16>::value ? 0x1p-24 : 0x1p-133;  // spacing below which nothing scales
      const double tolerance = (unit_roundoff<E>() + accurate) * scale + subnormal;
      if (!near(result.dx.at(c.at(channel, i)), weight * inv_std * inner, tolerance)) gradient = false;
    }
  }
  check(sums, name + ": dweight and dbias");
  check(gradient, name + ": dx");
  check(result.dx.guarded() && result.dweight.guarded() && result.dbias.guarded(), name + ": bounds");
}

// Shapes of more elements are left out: main's argument, for processors that are emulated.
int64_t most_elements = std::numeric_limits<int64_t>::max();

std::vector<Shape> up_to_most(std::vector<Shape> all) {
  const auto is_larger = [](const Shape& shape) { return shape.elements() > most_elements; };
  all.erase(std::remove_if(all.begin(), all.end(), is_larger), all.end());
  return all;
}

// Each shape is here for a reason that the comment beside it gives.
const std::vector<Shape> shapes = {
    {2, 4, 4},       // tiny
    {3, 5, 49},      // 7x7: a few vectors and a rest
    {2, 3, 16},      // the shortest plane
    {5, 3, 15},      // the longest run that is still walked in columns
    {40, 33, 4},     // small planes of many channels
    {2, 2, 20000},   // planes longer than a sum
    {1, 1, 100003},  // one channel of one sample: tasks share a plane
    {3, 3, 30011},   // fewer channels than it takes to share them
    {300, 20, 196},  // more than the second-level cache holds of a block
    {7, 150, 64},    // more channels than a block
    {9, 64, 1},      // channels last, whole vectors
    {1201, 3, 1},    // channels last, three channels: repeated rows and a rest
    {6007, 1, 1},    // one channel of single values
    {1500, 20, 1},   // several rows to a whole vector
    {700, 65, 1},    // a vector and a rest in each row
    {40, 2500, 1},   // more columns than a block
    {196, 256, 1},   // sums by channels, results by samples
    {30, 60, 20},    // the same with several columns a channel
    {3000, 130, 1},  // more rows than a sum
    {2, 3, 1},       // fewer rows than are taken at once
};

template <class E>
void test_against_oracle() {
  for (const Shape& shape : up_to_most(shapes)) {
    for (const bool affine : {true, false}) {
      Case<E> c(shape);
      c.affine = affine;
      for (const int threads : {1, 2, 3}) {
        if (!affine && threads == 2) continue;
        for (const bool training : {true, false}) {
          const std::string name =
              c.name() + (training ? " training, " : " evaluation, ") + std::to_string(threads) + " threads";
          const Forward<E> saved = c.forward(threads, training);
          check_forward(c, saved, training, 0.1, name);
          check(saved.y.same_bits(c.forward(threads, training).y), name + ": forward repeats to the bit");
          for (int wanted = 1; wanted < 8; ++wanted) {
            if (wanted != 7 && (threads != 2 || shape.elements() > 100000)) continue;
            const bool dx = wanted & 1, dweight = wanted & 2, dbias = wanted & 4;
            const Gradients<E> gradients = backward(c, saved, threads, training, dx, dweight, dbias);
            check_backward(c, saved, gradients, training, dx, dweight, dbias,
                           name + " wants " + std::to_string(wanted));
            if (wanted == 7) {
              const Gradients<E> again = backward(c, saved, threads, training);
              check(again.dx.same_bits(gradients.dx) && again.dweight.same_bits(gradients.dweight) &&
                        again.dbias.same_bits(gradients.dbias),
                    name + ": backward repeats to the bit");
            }
          }
        }
      }
    }
  }
}

// ---- Fused activation and residual ----

struct Fusion {
  Activation activation;
  bool residual = false, mask = false, in_place = false;

  std::string name() const {
    return std::string("activation ") + std::to_string(int(activation)) + (residual ? " residual" : "") +
           (mask ? " mask" : "") + (in_place ? " in place" : "");
  }
};

const Fusion fusions[] = {
    {Activation::relu},
    {Activation::relu, true, true},
    {Activation::relu, true, false},
    {Activation::relu, false, true},
    {Activation::relu6},
    {Activation::relu6, true, true},
    {Activation::leaky_relu},
    {Activation::leaky_relu, true, true},
    {Activation::elu},
    {Activation::elu, true},
    {Activation::silu},
    {Activation::silu, true},
    {Activation::hardswish},
    {Activation::hardswish, true},
    {Activation::identity, true},
    {Activation::identity, false, false, true},
    {Activation::leaky_relu, false, false, true},
    {Activation::elu, false, false, true},
};

constexpr double slope = 0.125;

long double activate_exactly(Activation activation, long double u) {
  switch (activation) {
    case Activation::relu:
      return u <= 0 ? 0 : u;
    case Activation::relu6:
      return std::min(std::max(u, 0.0L), 6.0L);
    case Activation::leaky_relu:
      return u <= 0 ? u * slope : u;
    case Activation::elu:
      return u <= 0 ? std::expm1(u) : u;
    case Activation::silu:
      return u / (1 + std::exp(-u));
    case Activation::hardswish:
      return u * std::min(std::max(u + 3, 0.0L), 6.0L) / 6;
    default:
      return u;
  }
}

// Of a u whose sign is known otherwise.
long double derivative_exactly(Activation activation, long double u, bool passes) {
  const long double sigmoid = 1 / (1 + std::exp(-u));
  switch (activation) {
    case Activation::relu:
      return passes ? 1 : 0;
    case Activation::relu6:
      return passes && u < 6 ? 1 : 0;
    case Activation::leaky_relu:
      return passes ? 1 : slope;
    case Activation::elu:
      return passes ? 1 : std::exp(u);
    case Activation::silu:
      return sigmoid * (1 + u * (1 - sigmoid));
    case Activation::hardswish:
      return u <= -3 ? 0 : u >= 3 ? 1 : u / 3 + 0.5L;
    default:
      return 1;
  }
}

template <class E>
struct FusedCall {
  using A = accumulate_t<E>;
  Case<E> c;
  Fusion fusion;
  bool training;
  int threads;
  Tensor<E> residual, y, dx, dresidual;
  Tensor<A> mean, inv_std, shift, running_mean, running_var;
  Tensor<float> dweight, dbias;
  std::vector<uint8_t, BeforeAGap<uint8_t>> mask;

  FusedCall(const Shape& shape, const Fusion& fused, bool in_training, int thread_count)
      : c(shape),
        fusion(fused),
        training(in_training),
        threads(thread_count),
        residual(normal<E>(shape.elements(), 0, 1, 5)),
        y(fusion.in_place ? c.x : Tensor<E>(shape.elements())),
        dx(shape.elements()),
        dresidual(shape.elements()),
        mean(shape.channels),
        inv_std(shape.channels),
        shift(shape.channels),
        running_mean(shape.channels, 0.75),
        running_var(shape.channels, 1.5),
        dweight(shape.channels, 9),
        dbias(shape.channels, 9),
        mask(static_cast<size_t>(mask_bytes(shape)), 0xa5) {}

  Epilogue epilogue() const { return {fusion.activation, slope, fusion.residual ? residual.data() : nullptr}; }

  void forward() {
    ForwardParams params{};
    params.shape = c.shape;
    params.dtype = DTypeOf<E>::value;
    params.x = fusion.in_place ? y.data() : c.x.data();
    params.y = y.data();
    params.weight = {c.weight.data(), DType::float32};
    params.bias = {c.bias.data(), DType::float32};
    params.running.mean = {running_mean.data(), DTypeOf<A>::value};
    params.running.variance = {running_var.data(), DTypeOf<A>::value};
    params.eps = c.eps;
    params.batch_statistics = training;
    params.mean = mean.data();
    params.inv_std = inv_std.data();
    params.epilogue = epilogue();
    params.shift = shift.data();
    params.mask = fusion.mask ? mask.data() : nullptr;
    cpu::forward(params, executor_with(threads));
  }

  BackwardParams backward_params(bool want_dx, bool want_sums, bool want_dresidual) {
    BackwardParams params{};
    params.shape = c.shape;
    params.dtype = DTypeOf<E>::value;
    params.dy = c.dy.data();
    params.x = fusion.in_place ? y.data() : c.x.data();
    if (fusion.mask && !want_sums && !(training && want_dx)) params.x = nullptr;
    params.dx = want_dx ? dx.data() : nullptr;
    params.weight = {c.weight.data(), DType::float32};
    params.mean = mean.data();
    params.inv_std = inv_std.data();
    if (want_sums) params.dweight = {dweight.data(), DType::float32};
    if (want_sums) params.dbias = {dbias.data(), DType::float32};
    params.batch_statistics = training;
    params.epilogue = epilogue();
    if (fusion.mask) params.epilogue.residual = nullptr;
    params.shift = shift.data();
    params.mask = fusion.mask ? mask.data() : nullptr;
    params.dresidual = want_dresidual ? dresidual.data() : nullptr;
    params.x_is_output = fusion.in_place;
    return params;
  }

  std::string name() const {
    return c.name() + (training ? " training, " : " evaluation, ") + std::to_string(threads) + " threads, " +
           fusion.name();
  }
};

template <class E>
void check_fused_forward(const FusedCall<E>& call) {
  using A = accumulate_t<E>;
  const Case<E>& c = call.c;
  const double accurate = (sizeof(E) == 2 ? 32 : 16) * unit_roundoff<A>();
  bool output = true, shifted = true;
  for (int64_t channel = 0; channel < c.shape.channels; ++channel) {
    const int64_t n = c.shape.samples();
    const Statistics s = call.training ? statistics_of(c, channel) : Statistics{0.75L, 1.5L * n};
    const long double inv_std = 1 / std::sqrt(s.m2 / n + (long double)c.eps);
    const long double weight = c.weight.at(channel), bias = c.bias.at(channel);
    const long double residue = (s.mean - call.mean.at(channel)) * inv_std * weight;
    shifted = shifted && near(call.shift.at(channel), bias - residue,
                              accurate * (std::fabs(double(bias)) + double(inv_std * std::fabs(s.mean)) + 1));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = c.at(channel, i);
      const long double xhat = (c.x.at(at) - s.mean) * inv_std;
      const long double residual = call.fusion.residual ? call.residual.at(at) : 0;
      const long double expected = activate_exactly(call.fusion.activation, xhat * weight + bias + residual);
      const double scale = double(std::fabs(xhat * weight) + std::fabs(bias) + std::fabs(residual)) + 1;
      if (!near(call.y.at(at), expected, (unit_roundoff<E>() + 2 * accurate) * scale)) output = false;
    }
  }
  check(output, call.name() + ": output");
  check(shifted, call.name() + ": saved shift");
  check(call.y.guarded(), call.name() + ": bounds");
}

template <class E>
void check_fused_backward(const FusedCall<E>& call, bool want_dx, bool want_sums, bool want_dresidual) {
  using A = accumulate_t<E>;
  const Case<E>& c = call.c;
  const int64_t n = c.shape.samples();
  const double accurate = 32 * unit_roundoff<A>();
  bool sums = true, input = true, residual_gradient = true;
  std::vector<long double> g(static_cast<size_t>(n)), deviation(static_cast<size_t>(n));
  for (int64_t channel = 0; channel < c.shape.channels; ++channel) {
    const long double mean = call.mean.at(channel), inv_std = call.inv_std.at(channel);
    const long double weight = c.weight.at(channel), shift = call.shift.at(channel), scale = inv_std * weight;
    long double sum_g = 0, sum_g_xhat = 0, size_g = 0, size_g_xhat = 0;
    const auto index = [](int64_t i) { return static_cast<size_t>(i); };
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = c.at(channel, i);
      long double u, magnitude;
      if (call.fusion.in_place) {
        const long double y = call.y.at(at);
        u = y > 0 || call.fusion.activation == Activation::identity ? y
            : call.fusion.activation == Activation::elu             ? std::log1p(std::max(y, -1.0L + 0x1p-24L))
                                                                    : y / slope;
        deviation[index(i)] = (u - shift) / scale;
        magnitude = (std::fabs(u) + std::fabs(shift)) / std::fabs(weight);
      } else {
        deviation[index(i)] = c.x.at(at) - mean;
        u = deviation[index(i)] * scale + shift + (call.fusion.residual ? call.residual.at(at) : 0);
        magnitude = std::fabs(deviation[index(i)] * inv_std);
      }
      const long double dy = c.dy.at(at);
      g[index(i)] = dy * derivative_exactly(call.fusion.activation, u, call.y.at(at) > 0);
      const double size = double(std::fabs(dy) * (1 + std::fabs(u)));
      sum_g += g[index(i)], sum_g_xhat += g[index(i)] * deviation[index(i)] * inv_std;
      size_g += size, size_g_xhat += size * magnitude;
      if (want_dresidual && !near(call.dresidual.at(at), g[index(i)],
                                  (unit_roundoff<E>() + accurate) * size + (sizeof(E) == 2 ? 0x1p-24 : 0))) {
        residual_gradient = false;
      }
    }
    const auto bound = [&](long double size, long double value) {
      return accurate * static_cast<double>(size) + 0x1p-23 * std::fabs(static_cast<double>(value));
    };
    if (want_sums) {
      sums = sums && near(call.dbias.at(channel), sum_g, bound(size_g, sum_g)) &&
             near(call.dweight.at(channel), sum_g_xhat, bound(size_g_xhat, sum_g_xhat));
    }
    if (!want_dx) continue;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = c.at(channel, i);
      const long double xhat = deviation[index(i)] * inv_std;
      const long double inner = call.training ? g[index(i)] - sum_g / n - xhat * (sum_g_xhat / n) : g[index(i)];
      const double size =
          double(std::fabs(scale)) * double(std::fabs(c.dy.at(at)) * (1 + std::fabs(call.y.at(at))) * 4 +
                                            (call.training ? size_g / n + (std::fabs(xhat) + 4) * size_g_xhat / n : 0));
      const double subnormal = std::is_same<E, float16>::value ? 0x1p-24 : 0x1p-133;
      if (!near(call.dx.at(at), scale * inner, (unit_roundoff<E>() + accurate) * size + subnormal)) input = false;
    }
  }
  check(sums, call.name() + ": dweight and dbias");
  check(input, call.name() + ": dx");
  check(residual_gradient, call.name() + ": dresidual");
  check(call.dx.guarded() && call.dresidual.guarded(), call.name() + ": bounds");
}

template <class E>
void check_fused(const Shape& shape, const Fusion& fusion, bool training, int threads) {
  FusedCall<E> call(shape, fusion, training, threads);
  call.forward();
  check_fused_forward(call);
  // A different number of threads than forward had must find the same mask.
  for (int wanted = 1; wanted < 8; ++wanted) {
    const bool want_dx = wanted & 1, want_sums = wanted & 2, want_dresidual = wanted & 4;
    if (want_dresidual != fusion.residual && !(fusion.residual && wanted < 4)) continue;
    if (shape.elements() > 50000 && wanted != (fusion.residual ? 7 : 3)) continue;
    call.threads = wanted % 3 + 1;
    cpu::backward(call.backward_params(want_dx, want_sums, want_dresidual), executor_with(call.threads));
    check_fused_backward(call, want_dx, want_sums, want_dresidual);
  }
}

// Shapes whose rows of the columns view are no whole bytes, or whose blocks of channels must begin at one.
const std::vector<Shape> mask_shapes = {
    {50, 12, 1},     // 4 rows to 6 bytes
    {61, 3, 7},      // 21 columns
    {20, 24, 49},    // planes of no whole bytes, seen as columns that are
    {9, 1030, 3},    // more columns than a block, and no whole bytes
    {300, 2056, 1},  // blocks of channels owned by tasks
    {100, 520, 1},   // sums by channels, results by samples
    {2, 5, 1003},    // planes of no whole bytes
};

template <class E>
void test_fused() {
  int turn = 0;
  const auto test = [&](const Shape& shape) {
    for (const Fusion& fusion : fusions) {
      const bool large = shape.elements() > 50000;
      if (large && !(fusion.mask && fusion.residual && fusion.activation == Activation::relu)) continue;
      ++turn;
      check_fused<E>(shape, fusion, true, turn % 3 + 1);
      if (!large) check_fused<E>(shape, fusion, false, (turn + 1) % 3 + 1);
    }
  };
  for (const Shape& shape : up_to_most(shapes)) test(shape);
  for (const Shape& shape : up_to_most(mask_shapes)) test(shape);
}

// The exponentials of core/activation.h in vectors, against the C library's: with dy = scale = 1 and shift = 0, y of
// elu is exp(x) - 1, its dx exp(x), and y of silu x / (1 + exp(-x)).
template <class E>
void test_exponentials() {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const double least = DTypeOf<E>::value == DType::float64 ? -760 : -110;
  std::vector<double> values{0.0, -0.0, -infinity, infinity, nan, -1e30, 1e30, -1e-30, -0x1p-149, 0x1p-140};
  const int64_t steps = std::min<int64_t>(200000, most_elements);
  for (int64_t i = 0; i <= steps; ++i) values.push_back(least * static_cast<double>(i) / static_cast<double>(steps));
  for (int64_t i = 0; i < steps / 2; ++i) values.push_back(-std::pow(2.0, -80 * double(i) / double(steps)));
  const int64_t size = static_cast<int64_t>(values.size());
  Tensor<E> x(size), dy(size, 1), elu(size), silu(size), dx(size), inverted(size);
  for (int64_t i = 0; i < size; ++i) x.set(i, values[static_cast<size_t>(i)]);
  Tensor<E> mean(1, 0), one(1, 1);
  ForwardParams params{};
  params.shape = {1, 1, size};
  params.dtype = DTypeOf<E>::value;
  params.x = x.data();
  params.running.mean = {mean.data(), DTypeOf<E>::value};
  params.running.variance = {one.data(), DTypeOf<E>::value};
  params.y = elu.data();
  params.epilogue.activation = Activation::elu;
  cpu::forward(params, executor_with(1));
  params.y = silu.data();
  params.epilogue.activation = Activation::silu;
  cpu::forward(params, executor_with(1));
  BackwardParams gradients{};
  gradients.shape = params.shape;
  gradients.dtype = params.dtype;
  gradients.dy = dy.data();
  gradients.x = x.data();
  gradients.dx = dx.data();
  gradients.mean = mean.data();
  gradients.inv_std = one.data();
  gradients.shift = mean.data();
  gradients.epilogue.activation = Activation::elu;
  cpu::backward(gradients, executor_with(1));
  double worst_exp = 0, worst_expm1 = 0, worst_silu = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double v = x.at(i);
    const auto ulps = [&](double actual, long double expected) {
      if (std::isnan(double(expected))) return std::isnan(actual) ? 0.0 : 1e9;
      if (static_cast<E>(expected) == actual) return 0.0;
      int exponent;
      std::frexp(static_cast<double>(expected), &exponent);
      const double ulp = std::max(std::ldexp(2 * unit_roundoff<E>(), exponent - 1),
                                  static_cast<double>(std::numeric_limits<E>::denorm_min()));
      return std::fabs(static_cast<double>((actual - expected) / ulp));
    };
    const long double exact = v;
    worst_expm1 = std::max(worst_expm1, ulps(elu.at(i), v <= 0 ? std::expm1(exact) : exact));
    worst_exp = std::max(worst_exp, ulps(dx.at(i), v <= 0 ? std::exp(exact) : 1.0L));
    // Where exp(-x) overflows, the quotient is -0.
    const double limit = DTypeOf<E>::value == DType::float64 ? -709 : -88;
    if (v > limit || std::isnan(v)) worst_silu = std::max(worst_silu, ulps(silu.at(i), exact / (1 + std::exp(-exact))));
  }
  const std::string name = "dtype " + std::to_string(int(DTypeOf<E>::value)) + ": ";
  check(worst_exp < 2, name + "exp is " + std::to_string(worst_exp) + " ulp off");
  check(worst_expm1 < 2, name + "expm1 is " + std::to_string(worst_expm1) + " ulp off");
  check(worst_silu < 4, name + "silu is " + std::to_string(worst_silu) + " ulp off");
}

// Forward and backward calls must see one mask, whatever else they do and on however many threads.
void test_masks_agree() {
  std::mt19937 generator(7);
  const auto up_to = [&](int64_t limit) { return std::uniform_int_distribution<int64_t>(1, limit)(generator); };
  const int64_t largest[] = {3, 70, 3000};
  for (int round = 0; round < 20000; ++round) {
    const Shape shape{up_to(largest[up_to(3) - 1]), up_to(largest[up_to(3) - 1]), up_to(3) == 1 ? 1 : up_to(200)};
    const int64_t element = int64_t(1) << up_to(3), lanes = int64_t(1) << up_to(4);
    std::vector<cpu::Blocking> seen;
    bool one_view = true;
    for (int call = 0; call < 6; ++call) {
      const bool sums = up_to(2) == 1;
      cpu::Traffic traffic{up_to(2), sums, sums && up_to(2) == 1, up_to(3) - 1};
      traffic.late_inputs = up_to(2) - 1;
      traffic.masked = true;
      traffic.masked_sums = sums && up_to(2) == 1;
      seen.push_back(cpu::choose_blocking(shape, element, traffic, lanes, up_to(16)));
      one_view = one_view && (!traffic.masked_sums || seen.back().sums_by_columns == seen.back().columns);
    }
    bool same = true, whole = true;
    for (const cpu::Blocking& blocking : seen) {
      same = same && cpu::used_mask_bytes(shape, blocking) <= mask_bytes(shape);
      for (int i = 0; i < 20; ++i) {
        const int64_t outer = up_to(shape.outer) - 1, channel = up_to(shape.channels) - 1;
        const int64_t inner = up_to(shape.inner) - 1;
        const cpu::MaskBit a = cpu::mask_bit(shape, blocking, outer, channel, inner);
        const cpu::MaskBit b = cpu::mask_bit(shape, seen[0], outer, channel, inner);
        same = same && a.byte == b.byte && a.shift == b.shift && a.byte < cpu::used_mask_bytes(shape, blocking);
      }
      for (int64_t task = 0; task < blocking.tasks && blocking.split_results; ++task) {
        const int64_t begin = cpu::own_samples(shape, blocking, task).begin;
        const cpu::MaskBit first = cpu::mask_bit(shape, blocking, begin / shape.inner, 0, begin % shape.inner);
        whole = whole && first.shift == 0;
      }
      for (int64_t c = 0; c < shape.channels; c += blocking.block_channels) {
        whole = whole && cpu::mask_bit(shape, blocking, 0, c, 0).shift == 0;
      }
      for (int64_t c = 0; c < shape.channels && blocking.split_results; c += blocking.result_channels) {
        whole = whole && cpu::mask_bit(shape, blocking, 0, c, 0).shift == 0;
      }
      for (int64_t task = 0; task < blocking.tasks && !blocking.split_samples; ++task) {
        const int64_t begin = cpu::split(shape.channels, blocking.channel_unit, blocking.tasks, task).begin;
        whole = whole && (begin == shape.channels || cpu::mask_bit(shape, blocking, 0, begin, 0).shift == 0);
        whole = whole && (blocking.block_channels % blocking.channel_unit == 0 ||
                          blocking.block_channels >= shape.channels || !blocking.columns);
      }
    }
    check(same && whole && one_view, "mask of [" + std::to_string(shape.outer) + "][" + std::to_string(shape.channels) +
                                         "][" + std::to_string(shape.inner) + "] element " + std::to_string(element) +
                                         " lanes " + std::to_string(lanes) +
                                         (!same   ? ": the same bits"
                                          : whole ? ": one view"
                                                  : ": whole bytes"));
  }
}

// A result larger than what is written through the caches.
template <class E>
void test_streamed() {
  for (const Shape& shape :
       up_to_most({Shape{64, 20, 7000}, Shape{64, 20, 7168}, Shape{8, 1000, 1100}, Shape{500000, 19, 1},
                   Shape{4500, 2040, 1}, Shape{60000, 176, 1}, Shape{900, 512, 20}})) {
    Case<E> c(shape);
    const Forward<E> saved = c.forward(2, true);
    check_forward(c, saved, true, 0.1, c.name() + " streamed");
    check_backward(c, saved, backward(c, saved, 2, true), true, true, true, true, c.name() + " streamed");
    if (shape.channels < 100) check_fused<E>(shape, {Activation::relu, true, true}, true, 2);
  }
}

template <class E>
void test_large_means() {
  const bool is_short = sizeof(E) == 2;  // in whose precision little is left of a deviation a thousandth of the mean
  for (const double mean : is_short ? std::vector<double>{3, 8, 30, 400} : std::vector<double>{1e4, 1e5, 1e6}) {
    for (const Shape& shape :
         up_to_most({Shape{16, 3, 3136}, Shape{20000, 16, 1}, Shape{999, 64, 1}, Shape{3, 5, 8}})) {
      Case<E> c(shape, mean, 1);
      for (const int threads : {1, 3}) {
        check_forward(c, c.forward(threads, true), true, 0.1, c.name() + " mean " + std::to_string(mean));
      }
      // A beginning far from the rest must not spoil the sums around it.
      for (int64_t channel = 0; channel < shape.channels; ++channel) c.x.set(c.at(channel, 0), 0);
      check_forward(c, c.forward(2, true), true, 0.1, c.name() + " outlier first, mean " + std::to_string(mean), 64);
    }
  }
}

// Of which squares, and at last the values themselves, are too small for what adds them up.
template <class E>
void test_small_values() {
  for (const double size : {1e-12, 1e-16, 1e-20, 1e-39}) {
    for (const Shape& shape : up_to_most({Shape{4, 3, 500}, Shape{1100, 64, 1}, Shape{2, 9, 49}})) {
      for (const double mean : {0.0, 0.5, 5.0}) {
        Case<E> c(shape, mean * size, size);
        c.eps = std::max(1e-36, size * size);
        char sizes[64];
        std::snprintf(sizes, sizeof(sizes), " mean %g, deviation %g", mean * size, size);
        for (const int threads : {1, 2}) {
          check_forward(c, c.forward(threads, true), true, 0.1, c.name() + sizes);
        }
        // Beside a channel like any other.
        for (int64_t i = 0; i < shape.samples(); ++i) c.x.set(c.at(1, i), c.dy.at(c.at(1, i)));
        check_forward(c, c.forward(2, true), true, 0.1, c.name() + " partly" + sizes);
      }
    }
  }
}

// What served as center of a channel's beginning is far from its end.
template <class E>
void test_means_that_move() {
  for (const Shape& shape :
       up_to_most({Shape{9, 6, 3001}, Shape{5003, 20, 1}, Shape{4099, 70, 1}, Shape{300, 9, 49}})) {
    for (const int64_t moved_channels : {shape.channels, int64_t{1}}) {
      Case<E> c(shape, 0.5, 1);
      for (int64_t channel = 0; channel < moved_channels; ++channel) {
        for (int64_t i = shape.samples() * 2 / 3; i < shape.samples(); ++i) {
          const int64_t at = c.at(channel, i);
          c.x.set(at, c.x.at(at) + 90);
        }
      }
      for (const int threads : {1, 2}) {
        check_forward(c, c.forward(threads, true), true, 0.1, c.name() + " mean that moves");
      }
    }
  }
}

template <class E>
void test_constant() {
  for (const Shape& shape : up_to_most({Shape{8, 3, 700}, Shape{2000, 24, 1}, Shape{3, 700, 5}})) {
    for (const double value : {0.0, -3.140625, 30000.0}) {
      Case<E> c(shape);
      for (int64_t i = 0; i < shape.elements(); ++i) c.x.set(i, value);
      const double stored = c.x.at(0);
      const Forward<E> result = c.forward(2, true);
      bool exact = true;
      for (int64_t channel = 0; channel < shape.channels; ++channel) {
        exact = exact && result.mean.at(channel) == stored;
        const E bias = narrow<E>(static_cast<accumulate_t<E>>(c.bias.at(channel)));
        for (int64_t i = 0; i < shape.samples(); ++i) {
          exact = exact && result.y.at(c.at(channel, i)) == static_cast<double>(widen(bias));
        }
      }
      check(exact, c.name() + " constant " + std::to_string(value) + " gives exactly mean and bias");
    }
  }
}

template <class E>
void test_huge_values() {
  const auto test = [](const Shape& shape, double mean, double std, int threads) {
    Case<E> c(shape, mean, std);
    const Forward<E> result = c.forward(threads, true);
    bool good = true;
    for (int64_t channel = 0; channel < shape.channels; ++channel) {
      const Statistics s = statistics_of(c, channel);
      const long double deviation = std::sqrt(s.m2 / shape.samples());
      good = good && near(result.inv_std.at(channel), 1 / deviation, 1e-5 / double(deviation));
      for (int64_t i = 0; i < shape.samples(); ++i) {
        const long double expected =
            (c.x.at(c.at(channel, i)) - s.mean) / deviation * c.weight.at(channel) + c.bias.at(channel);
        good = good && near(result.y.at(c.at(channel, i)), expected,
                            4 * unit_roundoff<E>() * (std::fabs(double(expected)) + 4));
      }
    }
    char sizes[64];
    std::snprintf(sizes, sizeof(sizes), " mean %g, deviation %g", mean, std);
    check(good, c.name() + sizes);
  };
  // Squares of deviations overflow, or squares of values in sums of several; in one slab or in several that are merged.
  for (const Shape& shape :
       up_to_most({Shape{4, 3, 500}, Shape{16, 2, 3136}, Shape{1100, 20, 1}, Shape{2000, 64, 1}})) {
    for (const int threads : {1, 2}) {
      test(shape, 1e30, 3e30, threads);
      test(shape, 0, 1e30, threads);
      for (const double mean : {6e18, 1e19, 1e20}) test(shape, mean, mean / 10, threads);
    }
  }
}

template <class E>
void test_nonfinite() {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  for (const Shape& shape : {Shape{3, 4, 100}, Shape{300, 4, 1}}) {
    Case<E> c(shape);
    c.x.set(c.at(1, 7), nan);
    c.x.set(c.at(2, 0), infinity);
    const Forward<E> result = c.forward(1, true);
    const Forward<E> skipping = c.forward(1, true, false, true);
    bool clean = true, poisoned = true;
    for (int64_t i = 0; i < shape.samples(); ++i) {
      clean = clean && std::isfinite(result.y.at(c.at(0, i))) && std::isfinite(result.y.at(c.at(3, i)));
      poisoned = poisoned && std::isnan(result.y.at(c.at(1, i))) && std::isnan(result.y.at(c.at(2, i)));
    }
    check(clean && poisoned, c.name() + ": NaN and infinity stay in their channels");
    check(std::isnan(result.mean.at(1)) && result.mean.at(2) == infinity, c.name() + ": mean of NaN and infinity");
    check(std::isnan(result.running_var.at(1)) && std::isnan(result.running_var.at(2)), c.name() + ": NaN is tracked");
    check(skipping.running_mean.at(1) == 0.75 && skipping.running_var.at(2) == 1.5 &&
              skipping.running_mean.at(2) == 0.75 && skipping.running_mean.at(0) == result.running_mean.at(0) &&
              skipping.batches == 5,
          c.name() + ": skip_nonfinite keeps the old values");
  }
}

void test_running_statistics() {
  Case<float> c({4, 3, 25});
  check_forward(c, c.forward(1, true, true), true, 1.0 / 5, "cumulative momentum counts this batch");

  // Half-precision running statistics, and none at all.
  ForwardParams params{};
  Tensor<float> y(c.shape.elements());
  Tensor<bfloat16> running_mean(3, 1), running_var(3, 1);
  params.shape = c.shape;
  params.dtype = DType::float32;
  params.x = c.x.data();
  params.y = y.data();
  params.eps = 1e-5;
  params.batch_statistics = true;
  params.running.momentum = 0.5;
  cpu::forward(params, executor_with(1));
  check(std::isfinite(y.at(0)), "no running statistics, no saved statistics");
  params.running.mean = {running_mean.data(), DType::bfloat16};
  params.running.variance = {running_var.data(), DType::bfloat16};
  cpu::forward(params, executor_with(1));
  const Statistics s = statistics_of(c, 2);
  const double expected = static_cast<double>(0.5L + 0.5L * s.m2 / (c.shape.samples() - 1));
  check(std::fabs(running_var.at(2) - expected) <= 0x1p-8 * expected, "running statistics in bfloat16");
}

// The record of runs of samples; what lies between them is never read into a sum.
template <class E>
void test_counted_runs() {
  const Shape shapes[] = {{1, 3, 35},  {3, 17, 15},    {40, 3, 1},  {64, 5, 6},      {9, 64, 49},
                          {300, 4, 4}, {200, 1100, 1}, {77, 20, 1}, {6, 4, 113 * 9}, {2049, 33, 1}};
  std::mt19937 generator(5);
  for (const Shape& shape : shapes) {
    for (const double length : {1.5, 6.0, 500.0}) {
      Case<E> c(shape, 3, 2);
      std::geometric_distribution<int64_t> lengths(1 / length);
      std::vector<int64_t> bounds, counted;
      for (int64_t begin = lengths(generator); begin < shape.samples();) {
        const int64_t end = std::min(shape.samples(), begin + 1 + lengths(generator));
        bounds.insert(bounds.end(), {begin, end});
        for (int64_t sample = begin; sample < end; ++sample) counted.push_back(sample);
        begin = end + 1 + lengths(generator);
      }
      std::vector<bool> counts(static_cast<size_t>(shape.samples()));
      for (const int64_t sample : counted) counts[static_cast<size_t>(sample)] = true;
      for (int64_t channel = 0; channel < shape.channels; ++channel) {
        for (int64_t sample = 0; sample < shape.samples(); ++sample) {
          if (!counts[static_cast<size_t>(sample)]) c.x.set(c.at(channel, sample), std::nan(""));
        }
      }
      for (const int threads : {1, 3}) {
        Tensor<double> record(2 + 2 * shape.channels);
        ForwardParams params{};
        params.shape = shape;
        params.dtype = DTypeOf<E>::value;
        params.x = c.x.data();
        params.batch_statistics = true;
        params.record = record.data();
        params.signature = 7;
        params.counted = {false, bounds.data(), static_cast<int64_t>(bounds.size()) / 2,
                          static_cast<int64_t>(counted.size())};
        cpu::forward(params, executor_with(threads));
        bool right = record.at(0) == 7 && record.at(1) == static_cast<double>(counted.size());
        const double accurate = 32 * unit_roundoff<accumulate_t<E>>();
        for (int64_t channel = 0; channel < shape.channels; ++channel) {
          Statistics s;
          for (const int64_t sample : counted) s.mean += c.x.at(c.at(channel, sample)) / (long double)counted.size();
          for (const int64_t sample : counted) {
            const long double d = c.x.at(c.at(channel, sample)) - s.mean;
            s.m2 += d * d;
          }
          right = right && near(record.at(2 + channel), s.mean, accurate * (std::fabs(double(s.mean)) + 2));
          right = right && near(record.at(2 + shape.channels + channel), s.m2,
                                accurate * (double(s.m2) + double(counted.size() > 1 ? 1 : 0)));
        }
        check(right && record.guarded(), c.name() + ": " + std::to_string(bounds.size() / 2) + " runs of samples, " +
                                             std::to_string(threads) + " threads");
      }
    }
  }
}

void test_empty() {
  for (const Shape& shape : {Shape{0, 3, 5}, Shape{4, 0, 5}, Shape{4, 3, 0}}) {
    Case<float> c(shape);
    const Forward<float> result = c.forward(2, true);
    bool untouched = result.batches == 5;
    for (int64_t i = 0; i < shape.channels; ++i) untouched = untouched && result.running_mean.at(i) == 0.75;
    check(untouched, c.name() + ": only the counter changes");
    const Gradients<float> gradients = backward(c, result, 2, true);
    bool zero = true;
    for (int64_t i = 0; i < shape.channels; ++i)
      zero = zero && gradients.dweight.at(i) == 0 && gradients.dbias.at(i) == 0;
    check(zero, c.name() + ": gradients of an empty batch are zero");
  }
}

// Widening and narrowing in vectors must agree with core/dtype.h to the bit, for every 16-bit pattern.
template <class E>
void test_conversions() {
  constexpr int64_t patterns = 1 << 16;
  Tensor<E> dy(patterns), dx(patterns);
  for (int64_t i = 0; i < patterns; ++i) dy.data()[i] = E{static_cast<uint16_t>(i)};
  const float mean = 0, inv_std = 0.7f;
  BackwardParams params{};
  params.shape = {patterns, 1, 1};
  params.dtype = DTypeOf<E>::value;
  params.dy = dy.data();
  params.dx = dx.data();
  params.mean = &mean;
  params.inv_std = &inv_std;
  cpu::backward(params, executor_with(1));
  bool same = true;
  for (int64_t i = 0; i < patterns; ++i) {
    const float expected = widen(dy.data()[i]) * inv_std;
    const E rounded = narrow<E>(expected);
    const uint16_t bits = dx.data()[i].bits;
    // AVX-512's own conversion takes float's subnormal numbers for zero.
    const bool flushed = std::fabs(expected) < std::numeric_limits<float>::min() && (bits & 0x7fff) == 0;
    if (expected == expected ? rounded.bits != bits && !flushed : !std::isnan(widen(dx.data()[i]))) same = false;
  }
  check(same, "conversion of dtype " + std::to_string(int(DTypeOf<E>::value)));
}

// Also NaN whose bits a rounding to 16 bits would carry over into those of a number.
template <class E>
void test_nan_of_a_weight_is_nan() {
  constexpr int64_t samples = 67;
  Tensor<E> x(2 * samples), y(2 * samples);
  for (int64_t i = 0; i < 2 * samples; ++i) x.set(i, static_cast<double>(i));
  for (const uint32_t bits : {0x7fffffffu, 0xffffffffu, 0x7f800001u}) {
    float weight[2] = {1.0f, 0.0f}, running[2] = {0.5f, 0.5f};
    std::memcpy(&weight[1], &bits, sizeof(bits));
    for (const Shape shape : {Shape{1, 2, samples}, Shape{samples, 2, 1}}) {
      ForwardParams params{};
      params.shape = shape;
      params.dtype = DTypeOf<E>::value;
      params.x = x.data();
      params.y = y.data();
      params.weight = {weight, DType::float32};
      params.running.mean = params.running.variance = {running, DType::float32};
      params.eps = 1e-5;
      cpu::forward(params, executor_with(1));
      bool right = true;
      for (int64_t i = 0; i < 2 * samples; ++i) {
        const bool of_weight = (shape.inner == 1 ? i % 2 : i / samples) == 1;
        right = right && std::isnan(y.at(i)) == of_weight;
      }
      check(right, "NaN of a weight, dtype " + std::to_string(int(DTypeOf<E>::value)));
    }
  }
}

void test_small_tensors_stay_on_the_calling_thread() {
  Case<float> c({2, 4, 4});
  int64_t runs = 0;
  ForwardParams params{};
  Tensor<float> y(c.shape.elements());
  params.shape = c.shape;
  params.dtype = DType::float32;
  params.x = c.x.data();
  params.y = y.data();
  params.batch_statistics = true;
  cpu::forward(params, executor_with(8, &runs));
  check(runs == 0, "a tiny tensor starts no parallel region");
}

void test_all() {
  test_against_oracle<double>();
  test_against_oracle<float>();
  test_against_oracle<float16>();
  test_against_oracle<bfloat16>();
  test_streamed<float>();
  test_streamed<bfloat16>();
  test_fused<double>();
  test_fused<float>();
  test_fused<float16>();
  test_fused<bfloat16>();
  test_exponentials<double>();
  test_exponentials<float>();
  test_masks_agree();
  test_large_means<float>();
  test_large_means<float16>();
  test_large_means<bfloat16>();
  test_small_values<float>();
  test_small_values<bfloat16>();
  test_means_that_move<float>();
  test_means_that_move<bfloat16>();
  test_constant<double>();
  test_constant<float>();
  test_constant<float16>();
  test_constant<bfloat16>();
  test_huge_values<float>();
  test_huge_values<bfloat16>();
  test_nonfinite<float>();
  test_nonfinite<double>();
  test_nonfinite<bfloat16>();
  test_running_statistics();
  test_counted_runs<double>();
  test_counted_runs<float>();
  test_counted_runs<float16>();
  test_counted_runs<bfloat16>();
  test_empty();
  test_conversions<float16>();
  test_conversions<bfloat16>();
  test_nan_of_a_weight_is_nan<float>();
  test_nan_of_a_weight_is_nan<float16>();
  test_nan_of_a_weight_is_nan<bfloat16>();
  test_small_tensors_stay_on_the_calling_thread();
}

}  // namespace

// One process for each instruction set, which the backend chooses once.
int main(int count, char** arguments) {
  if (count > 1) most_elements = std::atoll(arguments[1]);
#if defined(__x86_64__)
  const char* const capabilities[] = {"default", "avx2", "avx512", ""};  // the last: no cap
#else
  const char* const capabilities[] = {"default", ""};
#endif
  struct Run {
    pid_t process;
    int output;
  };
  std::vector<Run> runs;
  for (const char* capability : capabilities) {
    int channel[2];
    if (pipe(channel) != 0) return 1;
    const pid_t child = fork();
    if (child == 0) {
      setenv("ATEN_CPU_CAPABILITY", capability, 1);
      test_all();
      std::printf("%s: %d passed, %d failed\n", cpu::instruction_set(), passed, failed);
      std::fflush(stdout);
      const int counts[2] = {passed, failed};
      _exit(write(channel[1], counts, sizeof(counts)) == sizeof(counts) ? 0 : 1);
    }
    close(channel[1]);
    runs.push_back({child, channel[0]});
  }
  for (const Run& run : runs) {
    int counts[2];
    if (read(run.output, counts, sizeof(counts)) != sizeof(counts)) {
      std::printf("a run ended early\n");
      counts[0] = 0;
      counts[1] = 1;
    }
    close(run.output);
    waitpid(run.process, nullptr, 0);
    passed += counts[0];
    failed += counts[1];
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
