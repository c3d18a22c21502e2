// The activations that may follow batch norm in its kernels: value and derivative of each, written once for scalars and
// for a backend's vectors. V needs -, +, *, /, and the functions at the top for its own type.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/macros.h"
#include "core/params.h"

namespace batchnorm_ext {

BN_HOST_DEVICE bool less_equal(float a, float b) {
  return a <= b;
}
BN_HOST_DEVICE bool less_equal(double a, double b) {
  return a <= b;
}
BN_HOST_DEVICE float select(bool condition, float yes, float no) {
  return condition ? yes : no;
}
BN_HOST_DEVICE double select(bool condition, double yes, double no) {
  return condition ? yes : no;
}
BN_HOST_DEVICE float exponential(float a) {
  return std::exp(a);
}
BN_HOST_DEVICE double exponential(double a) {
  return std::exp(a);
}
BN_HOST_DEVICE float exponential_minus_one(float a) {
  return std::expm1(a);
}
BN_HOST_DEVICE double exponential_minus_one(double a) {
  return std::expm1(a);
}

BN_HOST_DEVICE float logarithm_of_one_plus(float a) {
  return std::log1p(a);
}
BN_HOST_DEVICE double logarithm_of_one_plus(double a) {
  return std::log1p(a);
}

// Whether u does not pass unchanged; the one bit that relu, relu6 and leaky_relu need of u in backward. NaN passes, as
// in torch.
template <class V>
BN_HOST_DEVICE auto blocked(V u, Activation activation) {
  return less_equal(activation == Activation::relu6 ? select(less_equal(V(6), u), V(0), u) : u, V(0));
}

template <class V>
BN_HOST_DEVICE auto negative(V u) {
  return less_equal(u, V(0));
}

template <Activation kActivation, class V>
BN_HOST_DEVICE V activate(V u, V negative_slope) {
  if constexpr (kActivation == Activation::relu) {
    return select(negative(u), V(0), u);
  } else if constexpr (kActivation == Activation::relu6) {
    return select(less_equal(V(6), u), V(6), select(negative(u), V(0), u));
  } else if constexpr (kActivation == Activation::leaky_relu) {
    return select(negative(u), u * negative_slope, u);
  } else if constexpr (kActivation == Activation::elu) {
    return select(negative(u), exponential_minus_one(u), u);
  } else if constexpr (kActivation == Activation::silu) {
    return u / (V(1) + exponential(V(0) - u));
  } else if constexpr (kActivation == Activation::hardswish) {
    const V above = select(less_equal(u, V(-3)), V(0), u + V(3));
    return u * (select(less_equal(V(6), above), V(6), above) * V(1.0 / 6.0));
  } else {
    return u;
  }
}

template <Activation kActivation, class V>
BN_HOST_DEVICE V activation_derivative(V u, V negative_slope) {
  if constexpr (kActivation == Activation::relu) {
    return select(negative(u), V(0), V(1));
  } else if constexpr (kActivation == Activation::relu6) {
    return select(blocked(u, kActivation), V(0), V(1));
  } else if constexpr (kActivation == Activation::leaky_relu) {
    return select(negative(u), negative_slope, V(1));
  } else if constexpr (kActivation == Activation::elu) {
    return select(negative(u), exponential(u), V(1));
  } else if constexpr (kActivation == Activation::silu) {
    const V sigmoid = V(1) / (V(1) + exponential(V(0) - u));
    return sigmoid * (V(1) + u * (V(1) - sigmoid));
  } else if constexpr (kActivation == Activation::hardswish) {
    const V sloping = u * V(1.0 / 3.0) + V(0.5);
    return select(less_equal(u, V(-3)), V(0), select(less_equal(V(3), u), V(1), sloping));
  } else {
    return V(1);
  }
}

// u of y = activation(u), for those that have an inverse: identity, elu, and leaky_relu of a positive slope. Where elu
// has rounded to -1, u is taken for the largest that does so in float, so that gradients stay finite.
template <Activation kActivation, class V>
BN_HOST_DEVICE V activation_inverse(V y, V negative_slope) {
  if constexpr (kActivation == Activation::leaky_relu) {
    return select(negative(y), y / negative_slope, y);
  } else if constexpr (kActivation == Activation::elu) {
    const V least(-1.0 + 0x1p-24);
    return select(negative(y), logarithm_of_one_plus(select(less_equal(y, least), least, y)), y);
  } else {
    return y;
  }
}

// action(std::integral_constant<Activation, ...>{}) for a value known at run time.
template <class Action>
BN_HOST_DEVICE auto with_activation(Activation activation, const Action& action) {
  switch (activation) {
    case Activation::relu:
      return action(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu6:
      return action(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::leaky_relu:
      return action(std::integral_constant<Activation, Activation::leaky_relu>{});
    case Activation::elu:
      return action(std::integral_constant<Activation, Activation::elu>{});
    case Activation::silu:
      return action(std::integral_constant<Activation, Activation::silu>{});
    case Activation::hardswish:
      return action(std::integral_constant<Activation, Activation::hardswish>{});
    default:
      return action(std::integral_constant<Activation, Activation::identity>{});
  }
}

}  // namespace batchnorm_ext
