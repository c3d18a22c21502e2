// Checks arguments and turns tensors into the core's params: dense layouts, per-channel vectors, running statistics.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <optional>

#include "core/params.h"

namespace batchnorm_ext::bindings {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DType::float64;
    case at::kFloat:
      return DType::float32;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"batch_norm\" not implemented for '", c10::toString(type), "'");
  }
}

inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline int64_t channels_of(const Tensor& input) {
  TORCH_CHECK(input.dim() >= 2, "input must have shape (N, C, ...), got ", input.sizes());
  return input.size(1);
}

// The input itself where its elements fill its memory without gaps or overlaps, else one compact copy.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous(tensor.suggest_memory_format());
}

// `tensor` with exactly these strides, where they matter.
inline Tensor strided_as(const Tensor& tensor, at::IntArrayRef strides) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) != strides[dim]) {
      return at::empty_strided(tensor.sizes(), strides, tensor.options()).copy_(tensor);
    }
  }
  return tensor;
}

// `tensor` with exactly the memory order of `like`, which is dense and has its sizes.
inline Tensor dense_as(const Tensor& tensor, const Tensor& like) {
  return strided_as(tensor, like.strides());
}

// In a dense tensor the stride of the channel dimension is the number of elements inside it.
inline Shape shape_of(const Tensor& dense_input) {
  const int64_t channels = dense_input.size(1);
  const int64_t elements = dense_input.numel();
  if (elements == 0) return {0, channels, 1};
  const int64_t inner = channels == 1 ? elements : dense_input.stride(1);
  return {elements / (channels * inner), channels, inner};
}

// A per-channel argument, checked: one value per channel, on the input's device, in the input's type or the type that
// sums are kept in. Empty when absent.
inline Tensor checked_channel_vector(const char* name, const OptionalTensor& vector, const Tensor& input) {
  if (!vector.has_value() || !vector->defined()) return {};
  const int64_t channels = input.size(1);
  TORCH_CHECK(vector->numel() == channels, name, " should contain ", channels, " elements not ", vector->numel());
  TORCH_CHECK(vector->dim() == 1, name, " must have shape [", channels, "] (channels of input), got ", vector->sizes());
  TORCH_CHECK(vector->device() == input.device(), name, " must be on ", input.device(), " (the device of input), got ",
              vector->device());
  const at::ScalarType accumulate = accumulate_type(input.scalar_type());
  TORCH_CHECK(vector->scalar_type() == input.scalar_type() || vector->scalar_type() == accumulate, "mixed dtype (",
              input.is_cuda() ? "CUDA" : "CPU", "): expect parameter to have scalar type of ",
              c10::toString(accumulate), ", but ", name, " has ", c10::toString(vector->scalar_type()),
              " for an input of ", c10::toString(input.scalar_type()));
  return *vector;
}

// A buffer about to be updated. An expanded one would keep what the last channel left.
inline void check_written(const char* name, const Tensor& buffer) {
  TORCH_CHECK(!buffer.defined() || at::has_internal_overlap(buffer) != at::MemOverlap::Yes, name,
              " is updated, and so must have memory for each of its elements, got strides ", buffer.strides(),
              "; clone() it");
}

inline Tensor checked_counter(const OptionalTensor& counter, const Tensor& input) {
  if (!counter.has_value() || !counter->defined()) return {};
  TORCH_CHECK(counter->scalar_type() == at::kLong && counter->numel() == 1,
              "num_batches_tracked must be one value of type Long, got shape ", counter->sizes(), " of type ",
              c10::toString(counter->scalar_type()));
  TORCH_CHECK(counter->device() == input.device(), "num_batches_tracked must be on ", input.device(),
              " (the device of input), got ", counter->device());
  return *counter;
}

// grad_output or a residual: of the input's shape, dtype and device.
inline void check_like_input(const char* name, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK(input.sizes() == tensor.sizes(), name, " must have the shape of input, ", input.sizes(), ", got ",
              tensor.sizes());
  TORCH_CHECK(input.scalar_type() == tensor.scalar_type(), name, " must have the dtype of input, ",
              c10::toString(input.scalar_type()), ", got ", c10::toString(tensor.scalar_type()));
  TORCH_CHECK(input.device() == tensor.device(), name, " must have the device of input, ", input.device(), ", got ",
              tensor.device());
}

// A vector as forward returned it.
inline void check_saved(const char* name, const Tensor& saved, const Tensor& grad_output) {
  const int64_t channels = grad_output.size(1);
  const at::ScalarType accumulate = accumulate_type(grad_output.scalar_type());
  TORCH_CHECK(saved.dim() == 1 && saved.numel() == channels && saved.is_contiguous() &&
                  saved.scalar_type() == accumulate && saved.device() == grad_output.device(),
              name, " must be what forward returned: contiguous ", c10::toString(accumulate), " of shape [", channels,
              "] on ", grad_output.device());
}

inline ChannelVector channel_vector(const Tensor& contiguous) {
  if (!contiguous.defined()) return {};
  return {contiguous.const_data_ptr(), dtype_of(contiguous.scalar_type())};
}

inline MutableChannelVector mutable_channel_vector(const Tensor& contiguous) {
  if (!contiguous.defined()) return {};
  return {contiguous.mutable_data_ptr(), dtype_of(contiguous.scalar_type())};
}

inline Tensor contiguous_or_undefined(const Tensor& tensor) {
  return tensor.defined() ? tensor.contiguous() : tensor;
}

// Operator results are always defined: what was not asked for comes back with no elements.
template <class... Results>
void define(const Tensor& like, Results&... results) {
  for (Tensor* result : {&results...}) {
    if (!result->defined()) *result = at::empty({0}, like.options());
  }
}

// A buffer that a kernel updates in place: strided buffers are written through a compact copy, and autograd learns of
// the write.
class UpdatedBuffer {
 public:
  explicit UpdatedBuffer(Tensor buffer) : buffer_(std::move(buffer)), compact_(contiguous_or_undefined(buffer_)) {}

  const Tensor& compact() const { return compact_; }

  void publish() const {
    if (!buffer_.defined()) return;
    if (!compact_.is_same(buffer_)) buffer_.copy_(compact_);
    if (!buffer_.is_inference()) buffer_.unsafeGetTensorImpl()->bump_version();
  }

 private:
  Tensor buffer_, compact_;
};

}  // namespace batchnorm_ext::bindings
