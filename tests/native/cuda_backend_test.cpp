// The CUDA backend, run in the CPU emulation through its own launches, against an oracle in long double.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "core/formulas.h"
#include "cuda/launch/backend.h"
#include "cuda_emulation.h"

namespace {

using namespace batchnorm_ext;

int passed = 0, failed = 0;

void report(bool good, const std::string& name, const std::string& why = "") {
  if (good) {
    ++passed;
  } else {
    ++failed;
    std::printf("FAILED %s: %s\n", name.c_str(), why.c_str());
  }
}

// ---- Memory of any element type

const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float64", "float32", "float16", "bfloat16"};
  return names[static_cast<int>(dtype)];
}

DType accumulate_dtype(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

// Exactly sized, so that AddressSanitizer sees any access beyond it; `offset` elements past a 16-byte boundary; filled
// with bytes that no result may keep.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType dtype, int64_t size, int64_t offset = 0)
      : dtype_(dtype),
        size_(size),
        skip_(offset * element_size(dtype)),
        bytes_(static_cast<size_t>(skip_ + size * element_size(dtype)), static_cast<unsigned char>(0xcd)) {}

  void* data() { return bytes_.data() + skip_; }
  int64_t size() const { return size_; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }
  double get(int64_t i) const { return view().load<double>(i, 0.0); }
  void set(int64_t i, double value) { MutableChannelVector{data(), dtype_}.store(i, value); }
  ChannelVector view() const { return {bytes_.data() + skip_, dtype_}; }
  MutableChannelVector mutable_view() { return {data(), dtype_}; }
  bool poisoned() const {  // all elements, or, by chance, none
    for (int64_t i = skip_; i < static_cast<int64_t>(bytes_.size()); ++i) {
      if (bytes_[i] != 0xcd) return false;
    }
    return size_ > 0;
  }

 private:
  DType dtype_ = DType::float32;
  int64_t size_ = 0, skip_ = 0;
  std::vector<unsigned char> bytes_;  // malloc aligns to 16
};

// ---- A case and the oracle

struct Case {
  std::string name;
  Shape shape;
  DType dtype;
  DType parameters = DType::float32;
  bool training = true, affine = true, running = true, cumulative = false, skip_nonfinite = false, in_place = false;
  int64_t x_offset = 0, y_offset = 0;  // elements past a vector boundary
  double mean = 0.5, deviation = 2.0;
  std::function<double(int64_t channel, int64_t sample)> value = nullptr;  // instead of random ones
  double eps = 1e-5, momentum = 0.1;
  Activation activation = Activation::identity;
  double negative_slope = 0.1;
  // Of an epilogue: whether backward is given a mask, else it recomputes; whether y overwrites x, and is inverted.
  bool residual = false, mask = false, inverts = false;
  int64_t residual_offset = 0;
  cuda::DeviceLimits limits{90, 4, 2048, 232448, 233472, 1 << 20, true, {4, 2, 1, 0}};
};

bool has_epilogue(const Case& c) {
  return c.activation != Activation::identity || c.residual || c.inverts;
}

struct Tensors {
  Buffer x, y, dy, dx, weight, bias, running_mean, running_var, mean, inv_std, dweight, dbias;
  Buffer residual, dresidual, shift;
  std::vector<uint8_t> mask;
  int64_t counter = 4;
};

int64_t index_of(const Shape& shape, int64_t channel, int64_t sample) {
  return (sample / shape.inner * shape.channels + channel) * shape.inner + sample % shape.inner;
}

Tensors inputs(const Case& c) {
  Tensors t;
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  const int64_t elements = c.shape.elements(), channels = c.shape.channels;
  t.x = Buffer(c.dtype, elements, c.x_offset);
  t.dy = Buffer(c.dtype, elements, c.x_offset);
  t.y = Buffer(c.dtype, elements, c.y_offset);
  t.dx = Buffer(c.dtype, elements, c.y_offset);
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t s = 0; s < c.shape.samples(); ++s) {
      const double x = c.value ? c.value(channel, s) : c.mean * (1 + channel % 5) + c.deviation * normal(random);
      t.x.set(index_of(c.shape, channel, s), x);
      t.dy.set(index_of(c.shape, channel, s), normal(random) + 0.25);
    }
  }
  for (Buffer* p : {&t.weight, &t.bias, &t.running_mean, &t.running_var, &t.dweight, &t.dbias}) {
    *p = Buffer(c.parameters, channels);
  }
  t.mean = Buffer(accumulate_dtype(c.dtype), channels);
  t.inv_std = Buffer(accumulate_dtype(c.dtype), channels);
  if (has_epilogue(c)) t.shift = Buffer(accumulate_dtype(c.dtype), channels);
  if (c.mask) t.mask.resize(static_cast<size_t>(mask_bytes(c.shape)), 0xcd);
  if (c.residual) {
    t.residual = Buffer(c.dtype, elements, c.residual_offset);
    t.dresidual = Buffer(c.dtype, elements, c.y_offset);
    for (int64_t i = 0; i < elements; ++i) t.residual.set(i, normal(random));
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    t.weight.set(channel, 1.0 + 0.5 * normal(random));
    t.bias.set(channel, normal(random));
    t.running_mean.set(channel, normal(random));
    t.running_var.set(channel, 0.5 + std::abs(normal(random)));
  }
  return t;
}

ForwardParams forward_params(const Case& c, Tensors& t) {
  ForwardParams p{};
  p.shape = c.shape;
  p.dtype = c.dtype;
  p.x = t.x.data();
  p.y = c.in_place || c.inverts ? t.x.data() : t.y.data();
  if (has_epilogue(c)) {
    p.epilogue = {c.activation, c.negative_slope, c.residual ? t.residual.data() : nullptr};
    p.shift = t.shift.data();
    if (c.mask) p.mask = t.mask.data();
  }
  if (c.affine) {
    p.weight = t.weight.view();
    p.bias = t.bias.view();
  }
  if (c.running) {
    p.running.mean = t.running_mean.mutable_view();
    p.running.variance = t.running_var.mutable_view();
    if (c.training) p.running.num_batches_tracked = &t.counter;
  }
  p.running.momentum = c.momentum;
  p.running.cumulative = c.cumulative;
  p.running.skip_nonfinite = c.skip_nonfinite;
  p.eps = c.eps;
  p.batch_statistics = c.training;
  p.mean = t.mean.data();
  p.inv_std = t.inv_std.data();
  return p;
}

BackwardParams backward_params(const Case& c, Tensors& t, bool dx, bool dweight, bool dbias) {
  BackwardParams p{};
  p.shape = c.shape;
  p.dtype = c.dtype;
  p.dy = t.dy.data();
  const bool recomputes = c.activation != Activation::identity && !c.mask;
  p.x = dweight || (dx && c.training) || recomputes ? t.x.data() : nullptr;
  if (has_epilogue(c)) {
    p.epilogue = {c.activation, c.negative_slope, c.residual && recomputes ? t.residual.data() : nullptr};
    p.mask = c.mask ? t.mask.data() : nullptr;
    p.shift = recomputes || c.inverts ? t.shift.data() : nullptr;
    p.dresidual = c.residual ? t.dresidual.data() : nullptr;
    p.x_is_output = c.inverts;
  }
  p.dx = dx ? t.dx.data() : nullptr;
  if (c.affine) p.weight = t.weight.view();
  p.mean = t.mean.data();
  p.inv_std = t.inv_std.data();
  if (dweight) p.dweight = t.dweight.mutable_view();
  if (dbias) p.dbias = t.dbias.mutable_view();
  p.batch_statistics = c.training;
  return p;
}

template <class Params>
void run(const Case& c, const Params& params) {
  size_t bytes;
  if constexpr (std::is_same_v<Params, ForwardParams>) {
    bytes = cuda::forward_workspace_bytes(params, c.limits);
  } else {
    bytes = cuda::backward_workspace_bytes(params, c.limits);
  }
  // Aligned as an allocator of the device would, and full of rubbish.
  void* const workspace = bytes == 0 ? nullptr : std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (workspace != nullptr) std::memset(workspace, 0xcd, bytes);
  try {
    if constexpr (std::is_same_v<Params, ForwardParams>) {
      cuda::forward(params, c.limits, workspace, nullptr);
    } else {
      cuda::backward(params, c.limits, workspace, nullptr);
    }
  } catch (...) {
    std::free(workspace);
    throw;
  }
  std::free(workspace);
}

struct Channel {
  long double first, mean, variance, inv_std, weight, bias, sum_dy = 0, sum_dy_xhat = 0;
};

long double activated(const Case& c, long double u) {
  switch (c.activation) {
    case Activation::relu:
      return u <= 0 ? 0 : u;
    case Activation::relu6:
      return std::min(std::max(u, 0.0L), 6.0L);
    case Activation::leaky_relu:
      return u <= 0 ? u * c.negative_slope : u;
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

long double activated_derivative(const Case& c, long double u) {
  switch (c.activation) {
    case Activation::relu:
      return u <= 0 ? 0 : 1;
    case Activation::relu6:
      return u <= 0 || u >= 6 ? 0 : 1;
    case Activation::leaky_relu:
      return u <= 0 ? c.negative_slope : 1;
    case Activation::elu:
      return u <= 0 ? std::exp(u) : 1;
    case Activation::silu: {
      const long double sigmoid = 1 / (1 + std::exp(-u));
      return sigmoid * (1 + u * (1 - sigmoid));
    }
    case Activation::hardswish:
      return u <= -3 ? 0 : u >= 3 ? 1 : u / 3 + 0.5L;
    default:
      return 1;
  }
}

// What a channel's results should be, from the inputs as they are stored. `before` holds the inputs of the call.
Channel oracle(const Case& c, const Tensors& before, int64_t channel) {
  const int64_t samples = c.shape.samples();
  Channel o{};
  if (c.training) {
    o.first = before.x.get(index_of(c.shape, channel, 0));
    for (int64_t s = 0; s < samples; ++s) o.mean += before.x.get(index_of(c.shape, channel, s)) - o.first;
    o.mean = o.first + o.mean / samples;
    for (int64_t s = 0; s < samples; ++s) {
      const long double d = before.x.get(index_of(c.shape, channel, s)) - o.mean;
      o.variance += d * d;
    }
    o.variance /= samples;
  } else {
    o.mean = before.running_mean.get(channel);
    o.variance = before.running_var.get(channel);
  }
  o.inv_std = 1 / std::sqrt(o.variance + static_cast<long double>(c.eps));
  o.weight = c.affine ? before.weight.get(channel) : 1.0;
  o.bias = c.affine ? before.bias.get(channel) : 0.0;
  return o;
}

// Gradients with respect to u, and normalised x, of one element, as backward knows x and u. Where a derivative jumps,
// the side is that of the u that forward had: in the accumulate type, which both directions compute to the same bit.
struct Element {
  long double gradient, xhat;
};

template <class A>
A u_of(const Case& c, const Tensors& before, const Tensors& after, int64_t channel, int64_t i) {
  const A weight_scale =
      normalize_scale(static_cast<A>(after.inv_std.get(channel)), c.affine ? before.weight.get(channel) : 1.0);
  const NormalizeCoefficients<A> coefficients{static_cast<A>(after.mean.get(channel)), weight_scale,
                                              static_cast<A>(after.shift.get(channel))};
  const A u = coefficients(static_cast<A>(before.x.get(i)));
  return c.residual ? u + static_cast<A>(before.residual.get(i)) : u;
}

Element element_of(const Case& c, const Tensors& before, const Tensors& after, const Channel& o, int64_t channel,
                   int64_t i) {
  const long double dy = before.dy.get(i);
  if (c.inverts) {
    const double y = after.x.get(i);
    const long double u = c.activation == Activation::leaky_relu && y <= 0 ? y / c.negative_slope
                          : c.activation == Activation::elu && y <= 0
                              ? std::log1p(std::max<long double>(y, -1 + 0x1p-24L))
                              : y;
    const long double xhat = o.weight == 0 ? 0 : (u - o.bias) / o.weight;
    return {dy * activated_derivative(c, u), xhat};
  }
  const long double xhat = (before.x.get(i) - o.mean) * o.inv_std;
  if (!has_epilogue(c)) return {dy, xhat};
  const double u = c.dtype == DType::float64 ? u_of<double>(c, before, after, channel, i)
                                             : u_of<float>(c, before, after, channel, i);
  return {dy * activated_derivative(c, u), xhat};
}

// ---- Comparison

// Relative size of a rounding to the type a result is stored in, times what the arithmetic may add to it.
double storage_error(DType dtype) {
  constexpr double halves[] = {0x1p-52, 0x1p-23, 0x1p-10, 0x1p-7};
  return halves[static_cast<int>(dtype)];
}

class Comparison {
 public:
  // |got - wanted| within tolerance * scale.
  void expect(const char* what, int64_t index, double got, long double wanted, double tolerance, long double scale) {
    const bool both_nan = std::isnan(got) && std::isnan(static_cast<double>(wanted));
    const bool equal = static_cast<long double>(got) == wanted;
    if (both_nan || equal || std::abs(got - wanted) <= tolerance * scale) return;
    if (why_.empty()) {
      char text[200];
      std::snprintf(text, sizeof text, "%s[%lld] is %.9g, not %.9Lg (allowed %.3Lg)", what,
                    static_cast<long long>(index), got, wanted, tolerance * scale);
      why_ = text;
    }
  }
  void expect(bool good, const char* why) {
    if (!good && why_.empty()) why_ = why;
  }
  const std::string& why() const { return why_; }

 private:
  std::string why_;
};

void compare_forward(const Case& c, const Tensors& before, const Tensors& after, Comparison& compare) {
  const double accumulate = 8 * storage_error(accumulate_dtype(c.dtype));
  const double stored = accumulate + storage_error(c.dtype);
  const double parameter = accumulate + storage_error(c.parameters);
  const int64_t samples = c.shape.samples();
  for (int64_t channel = 0; channel < c.shape.channels; ++channel) {
    const Channel o = oracle(c, before, channel);
    const long double deviation = std::sqrt(o.variance);
    compare.expect("mean", channel, after.mean.get(channel), o.mean, accumulate, std::abs(o.mean) + deviation);
    compare.expect("inv_std", channel, after.inv_std.get(channel), o.inv_std, 4 * accumulate, o.inv_std);
    if (c.training && c.running) {
      const long double momentum = c.cumulative ? 1.0L / (before.counter + 1) : c.momentum;
      const long double m = before.running_mean.get(channel), v = before.running_var.get(channel);
      const long double unbiased = o.variance * samples / (samples - 1);
      compare.expect("running_mean", channel, after.running_mean.get(channel), (1 - momentum) * m + momentum * o.mean,
                     parameter, std::abs(m) + std::abs(o.mean) + deviation);
      compare.expect("running_var", channel, after.running_var.get(channel), (1 - momentum) * v + momentum * unbiased,
                     4 * parameter, v + unbiased);
    }
    for (int64_t s = 0; s < samples; ++s) {
      const int64_t i = index_of(c.shape, channel, s);
      const long double xhat = (before.x.get(i) - o.mean) * o.inv_std;
      const long double residual = c.residual ? before.residual.get(i) : 0.0;
      const long double y = activated(c, xhat * o.weight + o.bias + residual);
      compare.expect("y", i, (c.inverts ? after.x : after.y).get(i), y, stored,
                     std::abs(xhat * o.weight) + std::abs(o.bias) + std::abs(residual) + std::abs(o.weight));
    }
  }
  if (c.running && c.training) compare.expect(after.counter == before.counter + 1, "the batch was not counted once");
  if (!c.training) compare.expect(after.counter == before.counter, "evaluation counted a batch");
}

void compare_backward(const Case& c, const Tensors& before, const Tensors& after, bool dx, bool dweight, bool dbias,
                      Comparison& compare) {
  const double accumulate = 32 * storage_error(accumulate_dtype(c.dtype));
  const double stored = accumulate + storage_error(c.dtype);
  const double parameter = accumulate + storage_error(c.parameters);
  const int64_t samples = c.shape.samples();
  for (int64_t channel = 0; channel < c.shape.channels; ++channel) {
    Channel o = oracle(c, before, channel);
    std::vector<Element> elements;
    for (int64_t s = 0; s < samples; ++s) {
      elements.push_back(element_of(c, before, after, o, channel, index_of(c.shape, channel, s)));
      o.sum_dy += elements.back().gradient;
      o.sum_dy_xhat += elements.back().gradient * elements.back().xhat;
    }
    const long double root = std::sqrt(static_cast<long double>(samples));
    const long double noise = root * 2;  // the size of a sum of this many gradients around zero
    if (dbias) {
      compare.expect("dbias", channel, after.dbias.get(channel), o.sum_dy, parameter, std::abs(o.sum_dy) + noise);
    }
    if (dweight) {
      compare.expect("dweight", channel, after.dweight.get(channel), o.sum_dy_xhat, parameter,
                     std::abs(o.sum_dy_xhat) + noise * (1 + std::abs(o.mean * o.inv_std)));
    }
    const double smallest = c.dtype == DType::float16 ? 0x1p-14 : 0;  // below it, spacing does not shrink
    for (int64_t s = 0; c.residual && s < samples; ++s) {
      const int64_t i = index_of(c.shape, channel, s);
      compare.expect("dresidual", i, after.dresidual.get(i), elements[s].gradient, stored,
                     std::abs(before.dy.get(i)) + smallest);
    }
    // The mean that forward saved is rounded: an error of |mean| * inv_std in units of the deviation.
    for (int64_t s = 0; dx && s < samples; ++s) {
      const int64_t i = index_of(c.shape, channel, s);
      const long double scale = o.weight * o.inv_std;
      const auto [gradient, xhat] = elements[s];
      const long double wanted =
          c.training ? scale * (gradient - o.sum_dy / samples - xhat * o.sum_dy_xhat / samples) : scale * gradient;
      compare.expect(
          "dx", i, after.dx.get(i), wanted, stored,
          std::abs(scale) * (std::abs(before.dy.get(i)) + 1 + std::abs(xhat) + std::abs(o.mean * o.inv_std)));
    }
  }
  if (!dx) compare.expect(after.dx.poisoned() || after.dx.size() == 0, "dx was written though not asked for");
  if (!dweight) compare.expect(after.dweight.poisoned() || after.dweight.size() == 0, "dweight was written");
  if (!dbias) compare.expect(after.dbias.poisoned() || after.dbias.size() == 0, "dbias was written");
}

bool same_bits(const Tensors& a, const Tensors& b) {
  return a.y.bytes() == b.y.bytes() && a.dx.bytes() == b.dx.bytes() && a.mean.bytes() == b.mean.bytes() &&
         a.inv_std.bytes() == b.inv_std.bytes() && a.running_mean.bytes() == b.running_mean.bytes() &&
         a.running_var.bytes() == b.running_var.bytes() && a.dweight.bytes() == b.dweight.bytes() &&
         a.dbias.bytes() == b.dbias.bytes() && a.counter == b.counter && a.x.bytes() == b.x.bytes() &&
         a.shift.bytes() == b.shift.bytes() && a.mask == b.mask && a.dresidual.bytes() == b.dresidual.bytes();
}

struct Gradients {
  bool dx, dweight, dbias;
};

// The same call in steps: no block of this device could keep a channel.
Case streaming(Case c) {
  c.name += ", streaming";
  c.limits.shared_bytes_per_multiprocessor = 0;
  return c;
}

using Plans = std::array<cuda::ResidentPlan, 2>;

Plans resident_plans(const Case& c) {
  Tensors t = inputs(c);
  return {cuda::plan_forward(forward_params(c, t), c.limits).resident,
          cuda::plan_backward(backward_params(c, t, true, true, true), c.limits).resident};
}

// The same call by groups of blocks, as large as they can be: the least shared memory that both directions fit into.
std::optional<Case> grouped(Case c, cuda::Exchange exchange) {
  if (exchange == cuda::Exchange::cluster) {
    c.limits.cooperative = false;
    c.limits.active_clusters[3] = 1;
  } else {
    for (int& clusters : c.limits.active_clusters) clusters = 0;
  }
  for (c.limits.shared_bytes_per_multiprocessor = 4 << 10; c.limits.shared_bytes_per_multiprocessor < 160 << 10;
       c.limits.shared_bytes_per_multiprocessor += 2 << 10) {
    const Plans plans = resident_plans(c);
    const auto is_wanted = [&](const cuda::ResidentPlan& plan) {
      return plan.fits && plan.groups.exchange == exchange;
    };
    if (!std::all_of(plans.begin(), plans.end(), is_wanted)) continue;
    c.name += exchange == cuda::Exchange::cluster ? ", clusters of " : ", across the grid by ";
    c.name += std::to_string(plans[0].groups.size) + " and " + std::to_string(plans[1].groups.size);
    return c;
  }
  return std::nullopt;
}

// The same call by all blocks of a device that is small enough for them to keep a part of a tile.
std::optional<Case> with_residue(Case c, int direction) {
  c.limits.multiprocessors = 1;
  c.limits.exchange_bytes = 0;
  for (int& clusters : c.limits.active_clusters) clusters = 0;
  for (c.limits.shared_bytes_per_multiprocessor = 4 << 10; c.limits.shared_bytes_per_multiprocessor < 230 << 10;
       c.limits.shared_bytes_per_multiprocessor += 2 << 10) {
    if (!resident_plans(c)[direction].streams) continue;
    c.name += direction == 0 ? ", with a residue of x" : ", with a residue of dy and x";
    return c;
  }
  return std::nullopt;
}

// What the cases reached.
struct Reached {
  int clusters = 0, large_clusters = 0, grids = 0, several_tiles = 0, shared_merges = 0, phases = 0, residues = 0;

  void note(const cuda::ResidentPlan& plan) {
    if (!plan.fits || plan.groups.exchange == cuda::Exchange::none) return;
    ++(plan.groups.exchange == cuda::Exchange::cluster ? clusters : grids);
    large_clusters += plan.groups.exchange == cuda::Exchange::cluster && plan.groups.size > cuda::kPortableCluster;
    several_tiles += plan.groups.tiles > plan.groups.count;
    shared_merges += !plan.groups.each_merges;
    residues += plan.streams;
    phases += !plan.step.rows && plan.step.column_view.phases > 1;
  }
} reached;

void check(const Case& c, const std::vector<Gradients>& subsets = {{true, true, true}}, bool all_ways = true) {
  const Plans plans = resident_plans(c);
  if (all_ways && (plans[0].fits || plans[1].fits)) {
    check(streaming(c), subsets, false);
    for (const auto exchange : {cuda::Exchange::cluster, cuda::Exchange::grid}) {
      if (c.dtype == DType::float16) break;  // walks and exchanges as bfloat16 does
      if (const auto by_groups = grouped(c, exchange)) check(*by_groups, subsets, false);
    }
  }
  for (const cuda::ResidentPlan& plan : plans) reached.note(plan);
  using emulation::Order;
  const std::string name = c.name + " " + name_of(c.dtype) + (c.training ? " training" : " evaluation");
  try {
    for (const Gradients& g : subsets) {
      Comparison compare;
      Tensors first;
      for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
        emulation::settings.order = order;
        emulation::settings.seed = 11;
        const Tensors before = inputs(c);
        Tensors after = before;
        run(c, forward_params(c, after));
        if (c.in_place) {
          after.y = after.x;
          after.x = before.x;
        }
        run(c, backward_params(c, after, g.dx, g.dweight, g.dbias));
        if (order == Order::ascending) {
          compare_forward(c, before, after, compare);
          compare_backward(c, before, after, g.dx, g.dweight, g.dbias, compare);
          first = after;
        } else {
          compare.expect(same_bits(first, after), "the order of threads changes the result");
        }
      }
      report(compare.why().empty(), name, compare.why());
    }
  } catch (const std::exception& error) {
    report(false, name, error.what());
  }
}

// A training call as SyncBatchNorm makes it: the batch in two parts, joined between the steps.
void run_in_steps(const Case& c, Tensors& t) {
  constexpr int64_t parts = 2;
  const int64_t channels = c.shape.channels;
  const int64_t outer_of_first = c.shape.outer / 3;
  std::vector<double> records(parts * (2 * channels + 2)), mean(channels), variance(channels);
  std::vector<double> sums(2 * channels, 0.0), dbias(channels), dweight(channels);
  double count = -1;
  std::vector<uint8_t> masks[parts];
  const auto each_part = [&](const auto& action) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part == 0 ? 0 : outer_of_first, end = part == 0 ? outer_of_first : c.shape.outer;
      Case own = c;
      own.shape.outer = end - begin;
      if (own.shape.outer == 0) own.shape.inner = 1;
      action(part, own, begin * channels * c.shape.inner * element_size(c.dtype));
    }
  };
  const auto at = [](const void* data, int64_t bytes) {
    return const_cast<char*>(static_cast<const char*>(data) + bytes);
  };

  each_part([&](int64_t part, const Case& own, int64_t offset) {
    double* const record = records.data() + part * (2 * channels + 2);
    if (own.shape.elements() == 0) return;
    ForwardParams p{};
    p.shape = own.shape;
    p.dtype = c.dtype;
    p.x = at(t.x.data(), offset);
    p.batch_statistics = true;
    p.record = record;
    p.signature = 17;
    run(own, p);
    if (record[0] != 17) throw std::runtime_error("the record has no signature");
  });
  JoinParams join{};
  join.channels = channels;
  join.parts = parts;
  join.records = records.data();
  join.running = forward_params(c, t).running;
  join.mean = mean.data();
  join.variance = variance.data();
  join.count = &count;
  cuda::join_statistics(join, nullptr);
  if (count != static_cast<double>(c.shape.samples())) throw std::runtime_error("wrong count of samples");

  const auto own_epilogue = [&](auto& p, int64_t part, const Case& own, int64_t offset) {
    if (p.epilogue.residual != nullptr) p.epilogue.residual = at(p.epilogue.residual, offset);
    if (!c.mask) return;
    masks[part].resize(static_cast<size_t>(mask_bytes(own.shape)));
    p.mask = masks[part].data();
  };
  each_part([&](int64_t part, const Case& own, int64_t offset) {
    ForwardParams p = forward_params(c, t);
    p.shape = own.shape;
    p.x = at(p.x, offset);
    p.y = at(p.y, offset);
    own_epilogue(p, part, own, offset);
    p.running = {};
    p.running.mean = {mean.data(), DType::float64};
    p.running.variance = {variance.data(), DType::float64};
    p.batch_statistics = false;
    run(own, p);
  });
  each_part([&](int64_t part, const Case& own, int64_t offset) {
    BackwardParams p = backward_params(c, t, false, false, false);
    p.shape = own.shape;
    p.dresidual = nullptr;
    own_epilogue(p, part, own, offset);
    p.dy = at(p.dy, offset);
    p.x = at(t.x.data(), offset);
    p.dweight = {dweight.data(), DType::float64};
    p.dbias = {dbias.data(), DType::float64};
    run(own, p);
    for (int64_t channel = 0; channel < channels; ++channel) {
      sums[channel] += dbias[channel];
      sums[channels + channel] += dweight[channel];
    }
  });
  each_part([&](int64_t part, const Case& own, int64_t offset) {
    BackwardParams p = backward_params(c, t, true, false, false);
    p.shape = own.shape;
    if (p.dresidual != nullptr) p.dresidual = at(p.dresidual, offset);
    own_epilogue(p, part, own, offset);
    p.dy = at(p.dy, offset);
    p.x = at(p.x, offset);
    p.dx = at(p.dx, offset);
    p.joined = {sums.data(), sums.data() + channels, &count};
    run(own, p);
  });
  for (int64_t channel = 0; channel < channels; ++channel) {
    t.dbias.set(channel, sums[channel]);
    t.dweight.set(channel, sums[channels + channel]);
  }
}

void check_in_steps(const Case& c) {
  const std::string name = c.name + " " + name_of(c.dtype) + " in steps";
  try {
    Comparison compare;
    for (const emulation::Order order : {emulation::Order::ascending, emulation::Order::shuffled}) {
      emulation::settings.order = order;
      const Tensors before = inputs(c);
      Tensors after = before;
      run_in_steps(c, after);
      compare_forward(c, before, after, compare);
      compare_backward(c, before, after, true, true, true, compare);
    }
    report(compare.why().empty(), name, compare.why());
  } catch (const std::exception& error) {
    report(false, name, error.what());
  }
}

const std::vector<Gradients> all_subsets = {{true, true, true},   {true, true, false}, {true, false, true},
                                            {true, false, false}, {false, true, true}, {false, true, false},
                                            {false, false, true}};

constexpr DType all_dtypes[] = {DType::float64, DType::float32, DType::float16, DType::bfloat16};

// ---- The cases

void shapes() {
  const struct {
    const char* name;
    Shape shape;
  } shapes[] = {
      {"long runs", {3, 2, 1024}},
      {"long odd runs", {3, 2, 1027}},
      {"one channel", {5, 1, 77}},
      {"one channel without inner", {200, 1, 1}},
      {"one long run for each channel", {1, 3, 4099}},
      {"long runs of many outer", {70, 1, 600}},
      {"7x7", {6, 32, 49}},
      {"7x7, odd number of channels", {20, 5, 49}},
      {"7x7, more tiles", {4, 70, 49}},
      {"14x14", {5, 8, 196}},
      {"15x15, tiles that share vectors", {3, 40, 225}},
      {"15x15 odd", {9, 41, 225}},
      {"1x1", {9, 64, 1}},
      {"rows", {300, 64, 1}},
      {"wide rows", {40, 600, 1}},
      {"wide odd rows", {40, 1201, 1}},
      {"three channels last", {130, 3, 1}},
      {"20 channels last", {61, 20, 1}},
      {"one row", {1, 24, 5}},
      {"two samples", {2, 7, 1}},
      {"two samples in a run", {1, 7, 2}},
  };
  for (const auto& s : shapes) {
    for (const DType dtype : all_dtypes) {
      for (const bool training : {true, false}) {
        Case c{s.name, s.shape, dtype};
        c.training = training;
        check(c);
      }
    }
  }
}

void flags() {
  for (const Shape shape : {Shape{12, 6, 37}, Shape{2, 2, 1500}}) {
    for (const bool training : {true, false}) {
      for (const bool affine : {true, false}) {
        Case c{std::string("gradient subsets") + (affine ? "" : " without affine"), shape, DType::float32};
        c.training = training;
        c.affine = affine;
        check(c, all_subsets);
      }
    }
    for (const DType parameters : all_dtypes) {
      Case c{std::string("parameters in ") + name_of(parameters), shape, DType::float16};
      c.parameters = parameters;
      check(c);
      c.training = false;
      check(c);
    }
    Case cumulative{"cumulative momentum", shape, DType::float32};
    cumulative.cumulative = true;
    check(cumulative);
    Case no_running{"no running statistics", shape, DType::bfloat16};
    no_running.running = false;
    check(no_running);
  }
}

void alignments() {
  for (const Shape shape :
       {Shape{4, 3, 1030}, Shape{30, 6, 35}, Shape{33, 3, 1}, Shape{20, 40, 1}, Shape{9, 1203, 1}}) {
    for (const DType dtype : all_dtypes) {
      for (const int64_t x : {0, 1}) {
        for (const int64_t y : {0, 1}) {
          if (x == 0 && y == 0) continue;
          Case c{"tensors off vector boundaries", shape, dtype};
          c.x_offset = x;
          c.y_offset = y;
          check(c);
          c.training = false;
          check(c);
        }
      }
    }
  }
}

void numerics() {
  for (const Shape shape : {Shape{8, 4, 1031}, Shape{64, 16, 1}, Shape{40, 6, 49}}) {
    Case far{"mean of 1e5 deviations", shape, DType::float32};
    far.mean = 1e5;
    far.deviation = 1;
    check(far);

    Case huge{"values near 1e30", shape, DType::float32};
    huge.mean = 0;
    huge.deviation = 1e30;
    huge.parameters = DType::float64;  // the variance is no float
    check(huge);
    huge.dtype = DType::bfloat16;
    check(huge);

    Case outlier{"a first element unlike the others", shape, DType::float32};
    outlier.value = [](int64_t, int64_t s) { return s == 0 ? 0.0 : 1e4 + std::sin(static_cast<double>(s)); };
    check(outlier);

    for (const DType dtype : all_dtypes) {
      Case constant{"a constant channel gives exactly bias", shape, dtype};
      constant.value = [](int64_t, int64_t) { return 3.1415926; };
      constant.parameters = dtype;
      check(constant);
      Tensors t = inputs(constant);
      run(constant, forward_params(constant, t));
      bool exact = true;
      for (int64_t i = 0; i < shape.elements(); ++i) {
        exact = exact && t.y.get(i) == t.bias.get(i / shape.inner % shape.channels);
      }
      report(exact, constant.name, "y is not bias to the bit");
    }
  }
}

// One element that is not finite spoils its channel only, and with skip_nonfinite its running statistics stay.
void nonfinite() {
  for (const Shape shape : {Shape{4, 5, 1031}, Shape{40, 9, 7}}) {
    for (const DType dtype : {DType::float32, DType::float16}) {
      for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
        for (const int64_t where : {int64_t(0), shape.samples() / 2}) {
          for (const bool skip : {false, true}) {
            Case c{"not finite", shape, dtype};
            c.skip_nonfinite = skip;
            c.value = [=](int64_t channel, int64_t s) {
              return channel == 2 && s == where ? bad : std::cos(static_cast<double>(s + channel));
            };
            const Tensors before = inputs(c);
            Tensors after = before;
            run(c, forward_params(c, after));
            Comparison compare;
            for (int64_t channel = 0; channel < shape.channels; ++channel) {
              const double y = after.y.get(index_of(shape, channel, 1));
              const bool kept = after.running_mean.get(channel) == before.running_mean.get(channel) &&
                                after.running_var.get(channel) == before.running_var.get(channel);
              const bool finite =
                  std::isfinite(after.running_mean.get(channel)) && std::isfinite(after.running_var.get(channel));
              if (channel == 2) {
                compare.expect(std::isnan(y), "y of the spoilt channel is not NaN");
                compare.expect(skip ? kept : !finite, "running statistics of the spoilt channel");
                const double mean = after.mean.get(channel);
                compare.expect(std::isnan(bad) ? std::isnan(mean) : mean == bad, "mean of the spoilt channel");
              } else {
                compare.expect(std::isfinite(y) && finite && !kept, "a sound channel was spoilt");
              }
            }
            compare.expect(after.counter == before.counter + 1, "the batch was not counted");
            report(compare.why().empty(), c.name, compare.why());
          }
        }
      }
    }
  }
}

// What a vector has of other channels does not matter: whatever one of them holds, the others' results are the same.
void neighbours() {
  constexpr int64_t kSpoilt = 2;
  const auto results = [](const Case& c, double bad) {
    Tensors t = inputs(c);
    for (Buffer* tensor : {&t.x, &t.dy, &t.residual}) {
      for (int64_t s = 0; tensor->size() > 0 && s < c.shape.samples(); ++s) {
        tensor->set(index_of(c.shape, kSpoilt, s), bad);
      }
    }
    run(c, forward_params(c, t));
    run(c, backward_params(c, t, true, true, true));
    return t;
  };
  const auto compare = [&](const Case& c) {
    Tensors sound = results(c, 1.0), spoilt = results(c, std::numeric_limits<double>::quiet_NaN());
    bool same = true;
    for (auto member : {&Tensors::y, &Tensors::dx, &Tensors::dresidual}) {
      for (int64_t i = 0; i < (sound.*member).size(); ++i) {
        if (i / c.shape.inner % c.shape.channels != kSpoilt) same &= (sound.*member).get(i) == (spoilt.*member).get(i);
      }
    }
    for (auto member : {&Tensors::mean, &Tensors::inv_std, &Tensors::running_mean, &Tensors::running_var,
                        &Tensors::dweight, &Tensors::dbias}) {
      for (int64_t i = 0; i < c.shape.channels; ++i) {
        if (i != kSpoilt) same &= (sound.*member).get(i) == (spoilt.*member).get(i);
      }
    }
    report(same, c.name + " " + name_of(c.dtype) + ", beside a channel of NaN");
  };
  for (const Shape shape :
       {Shape{3, 4, 1031}, Shape{12, 4, 1225}, Shape{40, 9, 7}, Shape{6, 41, 49}, Shape{70, 5, 1}}) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      for (const bool training : {true, false}) {
        for (const bool epilogue : {false, true}) {
          Case c{"runs of " + std::to_string(shape.inner), shape, dtype};
          c.training = training;
          c.residual = epilogue;
          c.activation = epilogue ? Activation::silu : Activation::identity;
          compare(c);
          compare(streaming(c));
          for (const auto exchange : {cuda::Exchange::cluster, cuda::Exchange::grid}) {
            if (const auto by_groups = grouped(c, exchange)) compare(*by_groups);
          }
          for (const int direction : {0, 1}) {
            if (const auto residue = with_residue(c, direction)) compare(*residue);
          }
        }
      }
    }
  }
}

// Tiles that some device holds in clusters beyond the portable size.
void large_clusters() {
  for (const Shape shape : {Shape{24, 2, 2100}, Shape{9, 3, 4099}, Shape{1200, 40, 1}, Shape{130, 12, 49}}) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      Case c{"large clusters", shape, dtype};
      check(c);
      c.in_place = true;
      check(c);
      c.in_place = false;
      c.activation = Activation::relu;
      c.residual = c.mask = true;
      check(c);
    }
  }
}

// What is finalised must not depend on whether another block of the group has overwritten its part already.
void in_place() {
  for (const Shape shape : {Shape{12, 6, 37}, Shape{3, 2, 1500}, Shape{60, 40, 1}, Shape{20, 5, 49}}) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      Case c{"in place", shape, dtype};
      c.in_place = true;
      check(c);
      c.name = "in place, values near 1e30";
      c.mean = 0;
      c.deviation = 1e30;
      c.parameters = DType::float64;
      check(c);
    }
  }
}

// Tiles of which a part is kept and the rest read again, last first.
void residues() {
  for (const Shape shape : {Shape{2, 2, 12345}, Shape{5, 2, 8192}, Shape{1100, 70, 1}, Shape{700, 9, 7}}) {
    for (const DType dtype : {DType::float64, DType::float32, DType::bfloat16}) {
      Case c{"residues of " + std::to_string(shape.inner), shape, dtype};
      if (dtype != DType::float64) c.shape.outer *= 2;  // as many vectors in slots of eight elements
      for (const int direction : {0, 1}) {
        for (const bool epilogue : {false, true}) {
          if (epilogue && dtype == DType::float64) break;
          c.activation = epilogue ? Activation::silu : Activation::identity;
          c.residual = c.in_place = epilogue;
          const auto residue = with_residue(c, direction);
          report(residue.has_value(), c.name + " " + name_of(dtype), "none streams");
          if (residue) check(*residue, {{true, true, true}}, false);
        }
      }
    }
  }
}

// What is kept is read once, and all else twice.
void residues_are_kept() {
  for (const int direction : {0, 1}) {
    const Case c = *with_residue({"copies", Shape{10, 1, 4096}, DType::float32}, direction);
    const cuda::ResidentPlan plan = resident_plans(c)[direction];
    const int64_t vectors = c.shape.elements() / 4;
    const int64_t kept = plan.groups.size * int64_t(cuda::kBlockThreads) * plan.thread_vectors;
    Tensors t = inputs(c);
    if (direction == 1) run(c, forward_params(c, t));
    emulation::counters = {};
    if (direction == 0) run(c, forward_params(c, t));
    if (direction == 1) run(c, backward_params(c, t, true, true, true));
    report(emulation::counters.launches == 1 && emulation::counters.copies == (direction + 1) * (2 * vectors - kept),
           c.name, std::to_string(emulation::counters.copies));
  }
}

// A caller that has no use for the statistics gets the same output, and the same in evaluation.
void statistics_not_kept() {
  for (const Shape shape : {Shape{12, 6, 37}, Shape{3, 2, 1500}, Shape{60, 40, 1}}) {
    for (const DType dtype : {DType::float64, DType::bfloat16}) {
      for (const bool training : {true, false}) {
        Case c{"statistics not kept", shape, dtype};
        c.training = training;
        std::vector<Case> cases{c, streaming(c)};
        if (const auto by_grid = grouped(c, cuda::Exchange::grid)) cases.push_back(*by_grid);
        for (const Case& way : cases) {
          Tensors kept = inputs(way), dropped = inputs(way);
          const Buffer unwritten = dropped.mean;
          run(way, forward_params(way, kept));
          ForwardParams params = forward_params(way, dropped);
          params.mean = params.inv_std = nullptr;
          run(way, params);
          report(kept.y.bytes() == dropped.y.bytes() && kept.running_var.bytes() == dropped.running_var.bytes() &&
                     dropped.mean.bytes() == unwritten.bytes(),
                 way.name, "differs from a call that keeps them");
        }
      }
    }
  }
}

void empty() {
  for (const Shape shape : {Shape{0, 4, 9}, Shape{4, 0, 9}, Shape{4, 3, 0}, Shape{0, 0, 0}}) {
    Case c{"empty", shape, DType::float32};
    Tensors t = inputs(c);
    Comparison compare;
    const Tensors before = t;
    run(c, forward_params(c, t));
    compare.expect(t.counter == before.counter + 1, "an empty batch was not counted");
    compare.expect(t.running_mean.bytes() == before.running_mean.bytes(), "running_mean changed");
    run(c, backward_params(c, t, true, true, true));
    for (int64_t channel = 0; channel < shape.channels; ++channel) {
      compare.expect(t.dweight.get(channel) == 0 && t.dbias.get(channel) == 0, "gradients of an empty batch");
    }
    c.training = false;
    run(c, forward_params(c, t));
    compare.expect(t.counter == before.counter + 1, "evaluation counted a batch");
    report(compare.why().empty(), "empty batch", compare.why());
  }
}

// How much is launched is part of the design: a launch costs as much as a small tensor.
void launches() {
  const auto count = [](const Case& c, bool forward, Gradients g = {true, true, true}) {
    Tensors t = inputs(c);
    run(c, forward_params(c, t));
    const int64_t before = emulation::counters.launches;
    if (forward) {
      run(c, forward_params(c, t));
    } else {
      run(c, backward_params(c, t, g.dx, g.dweight, g.dbias));
    }
    return emulation::counters.launches - before;
  };
  Case split{"split channels", {16, 2, 4096}, DType::float32};
  report(count(streaming(split), true) == 3, "split channels take three launches forward");
  report(count(streaming(split), false) == 3, "split channels take three launches backward");
  report(count(split, true) == 1, "groups of blocks take one launch forward");
  report(count(split, false) == 1, "groups of blocks take one launch backward");
  Case small{"small", {4, 16, 8}, DType::float32};
  report(count(small, true) == 1, "a small tensor takes one launch forward");
  report(count(small, false) == 1, "a small tensor takes one launch backward");
  small.cumulative = split.cumulative = true;
  report(count(small, true) == 1 && count(split, true) == 1, "cumulative averages take one launch forward");
  report(count(streaming(small), true) == 2, "unsplit channels take two launches forward");
  report(count(streaming(small), false) == 2, "unsplit channels take two launches backward");
  report(count(small, false, {false, true, true}) == 1, "parameter gradients take one launch");
  small.training = false;
  report(count(small, true) == 1, "evaluation takes one launch forward");
  report(count(small, false) == 1, "evaluation takes one launch backward");
}

// A device that has less room than its limits tell refuses blocks that wait for each other.
void refused() {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    for (const Activation activation : {Activation::identity, Activation::relu}) {
      for (const cuda::Exchange exchange : {cuda::Exchange::cluster, cuda::Exchange::grid}) {
        Case c{"refused", {16, 2, 4096}, dtype};
        c.activation = activation;
        c = *grouped(c, exchange);
        for (const cuda::ResidentPlan& plan : resident_plans(c)) {
          report(may_be_refused(plan.groups), "groups that the device may refuse");
        }
        const emulation::Device whole = emulation::device;
        emulation::device.multiprocessors = 1;
        emulation::device.shared_bytes_per_multiprocessor = c.limits.shared_bytes_per_multiprocessor;
        const int64_t before = emulation::counters.launches;
        Tensors t = inputs(c);
        run(c, forward_params(c, t));
        report(emulation::counters.launches - before == 3, "what is refused is done in steps");
        check(c, {{true, true, true}}, false);
        emulation::device = whole;
      }
    }
  }
}

// Counters that hold anything: a count is a count.
void counters() {
  for (const Case& plain :
       {Case{"small", {4, 16, 8}, DType::float32}, Case{"split", {16, 2, 4096}, DType::float32},
        Case{"one block", {8, 3, 4}, DType::float32}, Case{"512 tiles", {1, 512, 256}, DType::float32},
        Case{"513 tiles", {1, 513, 256}, DType::float32}}) {
    for (const bool cumulative : {false, true}) {
      for (const int64_t count : {int64_t(0), int64_t(-1), int64_t(-5), (int64_t(1) << 53) + 1}) {
        Case c = plain;
        c.cumulative = cumulative;
        Tensors t = inputs(c);
        t.counter = count;
        const double before = t.running_mean.get(0);
        run(c, forward_params(c, t));
        const double momentum = cumulative ? 1.0 / static_cast<double>(count + 1) : c.momentum;
        Comparison compare;
        compare.expect(t.counter == count + 1, "the batch was not counted once");
        if (count != -1) {
          const double wanted = (1 - momentum) * before + momentum * t.mean.get(0);
          compare.expect("running_mean", 0, t.running_mean.get(0), wanted, 1e-6, 1 + std::abs(wanted));
        }
        report(compare.why().empty(), c.name + " counters", compare.why());
      }
    }
  }
}

void failures() {
  const Case small{"failing", {4, 16, 8}, DType::float32};
  const Case split = streaming({"failing", {16, 2, 4096}, DType::float32});
  const struct {
    const Case& c;
    int launch;
    const char* step;
  } launches[] = {{split, 0, "channel_statistics"},
                  {split, 1, "finalize_statistics"},
                  {split, 2, "normalize"},
                  {small, 0, "forward"}};
  for (const auto& l : launches) {
    Tensors t = inputs(l.c);
    emulation::settings.fail_launch = l.launch;
    std::string message;
    try {
      run(l.c, forward_params(l.c, t));
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    emulation::settings.fail_launch = -1;
    report(message.find(l.step) != std::string::npos, "a failed launch names its step", message);
  }
}

constexpr Activation all_activations[] = {Activation::identity,   Activation::relu, Activation::relu6,
                                          Activation::leaky_relu, Activation::elu,  Activation::silu,
                                          Activation::hardswish};

bool has_mask(Activation activation) {
  return activation == Activation::relu || activation == Activation::relu6 || activation == Activation::leaky_relu;
}

const char* name_of(Activation activation) {
  constexpr const char* names[] = {"identity", "relu", "relu6", "leaky_relu", "elu", "silu", "hardswish"};
  return names[static_cast<int>(activation)];
}

// Every activation with and without a residual, and with a mask where one serves.
template <class Action>
void each_epilogue(const Case& plain, const Action& action) {
  for (const Activation activation : all_activations) {
    for (const bool residual : {false, true}) {
      for (const bool mask : {false, true}) {
        if ((mask && !has_mask(activation)) || (activation == Activation::identity && !residual)) continue;
        Case c = plain;
        c.name += std::string(", ") + name_of(activation) + (residual ? ", residual" : "") + (mask ? ", mask" : "");
        c.activation = activation;
        c.residual = residual;
        c.mask = mask;
        action(c);
      }
    }
  }
}

void joined() {
  for (const DType dtype : all_dtypes) {
    for (const Shape shape :
         {Shape{12, 6, 37}, Shape{7, 2, 1500}, Shape{130, 40, 1}, Shape{9, 5, 3}, Shape{2, 3, 50}}) {
      check_in_steps({"joined batch", shape, dtype});
    }
  }
  Case cumulative{"joined batch, cumulative momentum", {12, 6, 37}, DType::float32};
  cumulative.cumulative = true;
  check_in_steps(cumulative);
  Case bare{"joined batch, no affine, no running statistics", {12, 6, 37}, DType::bfloat16};
  bare.affine = bare.running = false;
  check_in_steps(bare);
  Case far{"joined batch, large mean", {12, 6, 37}, DType::float32};
  far.mean = 1e4;
  check_in_steps(far);
  for (const Shape shape : {Shape{12, 6, 37}, Shape{7, 2, 1500}, Shape{130, 40, 1}}) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      each_epilogue({"joined batch", shape, dtype}, [](const Case& c) { check_in_steps(c); });
    }
  }
}

void epilogues() {
  // All of them where each view is at its simplest; elsewhere what differs by shape: the mask, and a residual.
  for (const Shape shape : {Shape{3, 2, 1027}, Shape{6, 32, 49}}) {
    for (const DType dtype : all_dtypes) {
      for (const bool training : {true, false}) {
        Case plain{"epilogue", shape, dtype};
        plain.training = training;
        each_epilogue(plain, [](const Case& c) { check(c); });
      }
    }
  }
  const struct {
    const char* name;
    Shape shape;
  } shapes[] = {
      {"long runs", {3, 2, 1024}},
      {"one channel", {5, 1, 77}},
      {"one channel, one run", {200, 1, 1}},
      {"long runs of many outer", {70, 1, 600}},
      {"7x7, odd number of channels", {20, 5, 49}},
      {"7x7, rows off byte boundaries", {3, 41, 49}},
      {"14x14", {5, 8, 196}},
      {"15x15, tiles that share vectors", {3, 40, 225}},
      {"15x15 odd", {9, 41, 225}},
      {"rows", {300, 64, 1}},
      {"wide odd rows", {40, 1201, 1}},
      {"three channels last", {130, 3, 1}},
      {"20 channels last", {61, 20, 1}},
      {"one row", {1, 24, 5}},
      {"two samples", {2, 7, 1}},
      {"two samples in a run", {1, 7, 2}},
  };
  for (const auto& s : shapes) {
    for (const DType dtype : all_dtypes) {
      for (const bool training : {true, false}) {
        Case c{std::string("epilogue, ") + s.name, s.shape, dtype};
        c.training = training;
        c.residual = true;
        c.activation = Activation::relu;
        c.mask = true;
        check(c);
        c.activation = Activation::silu;
        c.mask = false;
        check(c);
      }
    }
  }
  for (const Shape shape : {Shape{4, 3, 1030}, Shape{30, 6, 35}, Shape{20, 40, 1}}) {
    for (const DType dtype : all_dtypes) {
      for (const int odd : {0, 1, 2, 3}) {
        Case c{"epilogue, tensors off vector boundaries", shape, dtype};
        c.x_offset = odd == 0 || odd == 3 ? 1 : 0;
        c.y_offset = odd == 1 || odd == 3 ? 1 : 0;
        c.residual_offset = odd == 2 || odd == 3 ? 1 : 0;
        c.residual = true;
        c.activation = Activation::leaky_relu;
        for (const bool mask : {true, false}) {
          for (const bool training : {true, false}) {
            c.mask = mask;
            c.training = training;
            check(c);
          }
        }
      }
    }
  }
  std::vector<Gradients> subsets = all_subsets;
  subsets.push_back({false, false, false});  // dresidual alone
  for (const Shape shape : {Shape{12, 6, 37}, Shape{2, 2, 1500}}) {
    for (const bool training : {true, false}) {
      for (const bool affine : {true, false}) {
        Case plain{"epilogue, gradient subsets", shape, DType::float32};
        plain.training = training;
        plain.affine = affine;
        plain.residual = true;
        plain.activation = Activation::relu;
        plain.mask = true;
        check(plain, subsets);
        plain.activation = Activation::elu;
        plain.mask = false;
        check(plain, subsets);
        plain.residual = false;
        check(plain, all_subsets);
      }
    }
  }
}

// y overwrites x, and backward has only y.
void inverted() {
  for (const Shape shape : {Shape{3, 2, 1027}, Shape{6, 32, 49}, Shape{300, 64, 1}, Shape{2, 2, 4096}}) {
    for (const DType dtype : all_dtypes) {
      for (const Activation activation : {Activation::identity, Activation::leaky_relu, Activation::elu}) {
        for (const int64_t offset : {0, 1}) {
          for (const bool training : {true, false}) {
            Case c{std::string("inverted, ") + name_of(activation), shape, dtype};
            c.activation = activation;
            c.inverts = true;
            c.x_offset = c.y_offset = offset;
            c.training = training;
            check(c);
          }
        }
      }
    }
  }
  Case zero{"inverted, a weight of zero", {6, 3, 49}, DType::float32};
  zero.inverts = true;
  zero.activation = Activation::leaky_relu;
  Tensors t = inputs(zero);
  t.weight.set(1, 0.0);
  run(zero, forward_params(zero, t));
  run(zero, backward_params(zero, t, true, true, true));
  Comparison compare;
  compare.expect("dweight", 1, t.dweight.get(1), 0, 0, 0);
  for (int64_t s = 0; s < zero.shape.samples(); ++s) {
    const int64_t i = index_of(zero.shape, 1, s);
    compare.expect("dx", i, t.dx.get(i), 0, 0, 0);
  }
  report(compare.why().empty(), zero.name, compare.why());
}

}  // namespace

int main() {
  launches();
  refused();
  counters();
  failures();
  empty();
  flags();
  shapes();
  alignments();
  numerics();
  nonfinite();
  neighbours();
  in_place();
  residues();
  residues_are_kept();
  statistics_not_kept();
  large_clusters();
  joined();
  epilogues();
  inverted();
  emulation::device.code = 80;
  report(cuda::device_limits(0).active_clusters[0] == 0, "code for devices without clusters has none");
  emulation::device.code = 90;
  emulation::device.multiprocessors = 16;
  report(cuda::device_limits(0).active_clusters[3] == 2, "clusters of 16");
  emulation::device.multiprocessors = 4;
  const cuda::DeviceLimits limits = cuda::device_limits(0);
  report(limits.multiprocessors == 4 && limits.compute_capability == 90 && limits.cooperative &&
             limits.active_clusters[0] == 4 && limits.active_clusters[2] == 1 && limits.active_clusters[3] == 0,
         "device limits");
  std::printf(
      "calls by clusters %d, of 16 %d, across the grid %d, of several tiles %d, with shared merges %d, in phases %d, "
      "with residues %d\n",
      reached.clusters, reached.large_clusters, reached.grids, reached.several_tiles, reached.shared_merges,
      reached.phases, reached.residues);
  report(reached.clusters > 100 && reached.large_clusters > 30 && reached.grids > 100 && reached.several_tiles > 50 &&
             reached.shared_merges > 20 && reached.phases > 20 && reached.residues > 20,
         "the cases reach all exchanges");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
