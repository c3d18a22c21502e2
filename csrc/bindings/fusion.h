// What a fused call adds to batch norm's tensors and params: activation, residual, shift and mask.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <utility>

#include "bindings/tensors.h"

namespace batchnorm_ext::bindings {

// Of a name in Python; nothing if there is no such activation.
inline std::optional<Activation> activation_of(std::string_view name) {
  constexpr std::pair<std::string_view, Activation> activations[] = {
      {"identity", Activation::identity},     {"relu", Activation::relu}, {"relu6", Activation::relu6},
      {"leaky_relu", Activation::leaky_relu}, {"elu", Activation::elu},   {"silu", Activation::silu},
      {"hardswish", Activation::hardswish},
  };
  for (const auto& [known, activation] : activations) {
    if (name == known) return activation;
  }
  return std::nullopt;
}

inline Activation checked_activation(std::string_view name) {
  const auto activation = activation_of(name);
  TORCH_CHECK_VALUE(activation.has_value(),
                    "activation must be one of identity, relu, relu6, leaky_relu, elu, silu, hardswish, got '", name,
                    "'");
  return *activation;
}

// Whether one bit an element, whether it passes, is all that the derivative depends on.
inline bool has_one_bit_derivative(Activation activation) {
  return activation == Activation::relu || activation == Activation::relu6 || activation == Activation::leaky_relu;
}

// What a forward call is asked for beyond batch norm: y = activation(batch_norm(x) + residual).
struct Fusion {
  Activation activation;
  double negative_slope;
  const Tensor& residual;
  bool with_mask = false;
  bool in_place = false;  // the output takes the memory of the input, which is dense
};

// What forward left of a fused call, and what its backward is asked for beyond batch norm's gradients.
struct FusedBackward {
  Activation activation;
  double negative_slope;
  const Tensor& residual;
  const Tensor& mask;       // serves instead of input, residual and weight for the activation's derivative
  at::IntArrayRef strides;  // of the output
  bool need_dresidual = false;
  bool input_is_output = false;  // the call was in place: input is inverted

  // Whether the derivative follows from the input.
  bool need_u() const { return activation != Activation::identity && !mask.defined(); }
};

// In the memory order of x.
inline Tensor checked_residual(const Tensor& residual, const Tensor& x) {
  if (!residual.defined()) return {};
  check_like_input("residual", residual, x);
  return dense_as(residual, x);
}

inline Epilogue epilogue_of(Activation activation, double negative_slope, const Tensor& residual) {
  return {activation, negative_slope, residual.defined() ? residual.const_data_ptr() : nullptr};
}

// Returns the mask. `residual` is checked_residual, and lives as long as the params.
inline Tensor fuse(ForwardParams& params, const Fusion& fusion, const Tensor& residual, const Tensor& x) {
  params.epilogue = epilogue_of(fusion.activation, fusion.negative_slope, residual);
  if (!fusion.with_mask) return {};
  Tensor mask = empty_beside(x, {mask_bytes(params.shape)}, at::kByte);
  params.mask = mask.mutable_data_ptr<uint8_t>();
  return mask;
}

inline void fuse(BackwardParams& params, const FusedBackward& fusion, const Tensor& residual, const Tensor& dresidual,
                 const Tensor& dy) {
  params.epilogue = epilogue_of(fusion.activation, fusion.negative_slope, residual);
  params.x_is_output = fusion.input_is_output;
  params.dresidual = dresidual.defined() ? dresidual.mutable_data_ptr() : nullptr;
  const Tensor& mask = fusion.mask;
  if (!mask.defined()) return;
  const int64_t bytes = mask_bytes(params.shape);
  TORCH_CHECK(has_one_bit_derivative(fusion.activation), "only relu, relu6 and leaky_relu have a mask");
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.dim() == 1 && mask.numel() == bytes && mask.is_contiguous() &&
                  mask.device() == dy.device(),
              "mask must be what forward returned: ", bytes, " contiguous bytes on ", dy.device());
  params.mask = mask.const_data_ptr<uint8_t>();
}

}  // namespace batchnorm_ext::bindings
