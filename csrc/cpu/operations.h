// What the steps compute for one vector of elements. Sums and maps (sums.h, elementwise.h) say over which elements, and
// what an operation has to offer.
#pragma once

#include "core/activation.h"
#include "cpu/simd.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

enum class MaskUse { none, read, write };

// What a plain operation is: cheap enough for the compiler to repeat its code, on all tensors, without a mask.
struct Operation {
  static constexpr MaskUse mask = MaskUse::none;
  static constexpr int outputs = 1;
  static constexpr bool heavy = false;  // so much code that it stands once in a loop
  static constexpr bool pairs = false;  // by dot products of pairs of elements
};

// ---- Activations, chosen when compiled or when called ----

struct Relu {
  static constexpr bool heavy = false;
  static constexpr Activation activation = Activation::relu;

  template <class V>
  BN_HOST_DEVICE V apply(V u) const {
    return activate<Activation::relu>(u, V(0));
  }
  template <class V>
  BN_HOST_DEVICE V derivative(V u) const {
    return activation_derivative<Activation::relu>(u, V(0));
  }
};

struct AnyActivation {
  static constexpr bool heavy = true;

  Activation activation;
  double negative_slope;

  template <class A>
  BN_HOST_DEVICE Vec<A> apply(Vec<A> u) const {
    const Vec<A> slope(static_cast<A>(negative_slope));
    return with_activation(activation, [&](auto known) { return activate<decltype(known)::value>(u, slope); });
  }
  template <class A>
  BN_HOST_DEVICE Vec<A> derivative(Vec<A> u) const {
    const Vec<A> slope(static_cast<A>(negative_slope));
    return with_activation(activation,
                           [&](auto known) { return activation_derivative<decltype(known)::value>(u, slope); });
  }
  template <class A>
  BN_HOST_DEVICE Vec<A> inverse(Vec<A> y) const {
    const Vec<A> slope(static_cast<A>(negative_slope));
    return with_activation(activation,
                           [&](auto known) { return activation_inverse<decltype(known)::value>(y, slope); });
  }
};

// ---- Forward ----

// sum(x - center) and sum((x - center)^2)
struct Statistics : Operation {
  static constexpr int inputs = 1, coefficients = 1;

  template <class V>
  BN_HOST_DEVICE void add(const V* k, const V* in, Flags<typename V::Element>, V& s, V& q) const {
    const V deviation = in[0] - k[0];
    s += deviation;
    q = multiply_add(deviation, deviation, q);
  }
  template <class V>
  BN_HOST_DEVICE static V neutral(V center) {
    return center;
  }
};

struct PairStatistics : Statistics {
  static constexpr bool pairs = true;
};

struct Normalize : Operation {
  static constexpr int inputs = 1, coefficients = 3;

  template <class V>
  BN_HOST_DEVICE void apply(const V* k, const V* in, Flags<typename V::Element>&, V* out) const {
    out[0] = NormalizeCoefficients<V>{k[0], k[1], k[2]}(in[0]);
  }
};

// The same where every channel's mean is folded into the shift. k is scale and shift.
struct FoldedNormalize : Operation {
  static constexpr int inputs = 1, coefficients = 2;

  template <class V>
  BN_HOST_DEVICE void apply(const V* k, const V* in, Flags<typename V::Element>&, V* out) const {
    out[0] = multiply_add(in[0], k[0], k[1]);
  }
};

// of x, and of the residual if there is one; the mask is written if there is one.
template <class Act, bool has_residual>
struct NormalizeActivate : Operation {
  static constexpr int inputs = has_residual ? 2 : 1, coefficients = 3;
  static constexpr MaskUse mask = MaskUse::write;
  static constexpr bool heavy = Act::heavy;

  Act act;

  explicit NormalizeActivate(Act act) : act(act) {}

  template <class V>
  BN_HOST_DEVICE void apply(const V* k, const V* in, Flags<typename V::Element>& is_blocked, V* out) const {
    V u = NormalizeCoefficients<V>{k[0], k[1], k[2]}(in[0]);
    if constexpr (has_residual) u = u + in[1];
    is_blocked = blocked(u, act.activation);
    out[0] = act.apply(u);
  }
};

// ---- Backward: where the gradient before the epilogue comes from ----

// Each gives g = dy * activation'(u) and the value whose deviation from k[0] is that of x, up to a factor. The tensors
// are dy, x and the residual.
struct PlainGradient : Operation {
  static constexpr int inputs = 2, coefficients = 1;

  template <class V>
  BN_HOST_DEVICE void gradient(const V*, const V* in, Flags<typename V::Element>, V& g, V& value) const {
    g = in[0];
    value = in[1];
  }
};

// From the mask that forward left of relu or relu6, whose slope is 0, or of leaky_relu.
struct MaskedGradient : Operation {
  static constexpr int inputs = 2, coefficients = 1, outputs = 2;
  static constexpr MaskUse mask = MaskUse::read;

  double slope;

  explicit MaskedGradient(double slope) : slope(slope) {}

  template <class V>
  BN_HOST_DEVICE void gradient(const V*, const V* in, Flags<typename V::Element> is_blocked, V& g, V& value) const {
    g = select(is_blocked, in[0] * V(static_cast<typename V::Element>(slope)), in[0]);
    value = in[1];
  }
};

// From u as forward computed it, of x without a residual. k is center, scale and shift.
struct ReluGradient : Operation {
  static constexpr int inputs = 2, coefficients = 3;

  template <class V>
  BN_HOST_DEVICE void gradient(const V* k, const V* in, Flags<typename V::Element>, V& g, V& value) const {
    g = in[0] * Relu().derivative(NormalizeCoefficients<V>{k[0], k[1], k[2]}(in[1]));
    value = in[1];
  }
};

// From any u: as forward computed it, with its residual if there is one, or of the output by the inverse. The center is
// then the shift, since u - shift is the deviation times the scale.
struct ActivationGradient : Operation {
  static constexpr int inputs = 3, coefficients = 3, outputs = 2;
  static constexpr bool heavy = true;

  AnyActivation act;
  bool x_is_output;

  ActivationGradient(AnyActivation act, bool x_is_output) : act(act), x_is_output(x_is_output) {}

  template <class V>
  BN_HOST_DEVICE void gradient(const V* k, const V* in, Flags<typename V::Element>, V& g, V& value) const {
    V u;
    if (x_is_output) {
      value = u = act.inverse(in[1]);
    } else {
      value = in[1];
      u = NormalizeCoefficients<V>{k[0], k[1], k[2]}(value) + in[2];
    }
    g = in[0] * act.derivative(u);
  }
};

// ---- Backward: what is done with it ----

// sum(g) and sum(g * (value - center))
template <class Gradient>
struct GradientSums : Gradient {
  using Gradient::gradient;

  template <class V>
  BN_HOST_DEVICE void add(const V* k, const V* in, Flags<typename V::Element> is_blocked, V& s, V& q) const {
    V g, value;
    gradient(k, in, is_blocked, g, value);
    s += g;
    q = multiply_add(g, value - k[0], q);
  }
  template <class V>
  BN_HOST_DEVICE static V neutral(V center) {
    return center - center;
  }
};

// dx with batch statistics, and g itself. k is dy_scale, mean_dy, x_scale and the gradient's.
template <class Gradient>
struct InputGradient : Gradient {
  static constexpr int coefficients = 3 + Gradient::coefficients;

  template <class V>
  BN_HOST_DEVICE void apply(const V* k, const V* in, Flags<typename V::Element> is_blocked, V* out) const {
    V g, value;
    Gradient::gradient(k + 3, in, is_blocked, g, value);
    out[0] = InputGradientCoefficients<V>{k[3], k[0], k[1], k[2]}(g, value);
    if constexpr (Gradient::outputs == 2) out[1] = g;
  }
};

// The same for channels some of which have the means folded into a shift, dx = (dy - x * x_scale) * dy_scale + shift:
// what is subtracted is zero there. k is dy_scale, mean_dy, -x_scale, mean, shift and the gradient's.
template <class Gradient>
struct ShiftedInputGradient : Gradient {
  static constexpr int coefficients = 5 + Gradient::coefficients;

  template <class V>
  BN_HOST_DEVICE void apply(const V* k, const V* in, Flags<typename V::Element> is_blocked, V* out) const {
    V g, value;
    Gradient::gradient(k + 5, in, is_blocked, g, value);
    out[0] = multiply_add(multiply_add(value - k[3], k[2], g - k[1]), k[0], k[4]);
    if constexpr (Gradient::outputs == 2) out[1] = g;
  }
};

// And where all have, to the same bit. k is dy_scale, -x_scale, shift and what the gradient needs to compute u.
template <class Gradient>
struct FoldedInputGradient : Gradient {
  static constexpr bool computes_u = Gradient::coefficients > 1;
  static constexpr int coefficients = 3 + (computes_u ? Gradient::coefficients : 0);

  template <class V>
  BN_HOST_DEVICE void apply(const V* k, const V* in, Flags<typename V::Element> is_blocked, V* out) const {
    V g, value;
    Gradient::gradient(computes_u ? k + 3 : k, in, is_blocked, g, value);
    out[0] = multiply_add(multiply_add(value, k[1], g), k[0], k[2]);
    if constexpr (Gradient::outputs == 2) out[1] = g;
  }
};

// The same with running statistics. k is dy_scale and what the gradient needs to compute u, for which alone x is read.
template <class Gradient>
struct ScaledGradient : Gradient {
  static constexpr bool reads_x = Gradient::coefficients > 1;
  static constexpr int inputs = reads_x ? Gradient::inputs : 1;
  static constexpr int coefficients = reads_x ? 1 + Gradient::coefficients : 1;

  template <class V>
  BN_HOST_DEVICE void apply(const V* k, const V* in, Flags<typename V::Element> is_blocked, V* out) const {
    V g, value;
    const V unused[2] = {in[0], in[0]};
    Gradient::gradient(k + (reads_x ? 1 : 0), reads_x ? in : unused, is_blocked, g, value);
    out[0] = InputGradientCoefficients<V>{k[0], k[0], k[0], k[0]}(g);
    if constexpr (Gradient::outputs == 2) out[1] = g;
  }
};

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
