// Checks arguments and turns tensors into the core's params: dense layouts, per-channel vectors, running statistics.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/MaybeOwned.h>

#include <optional>

#include "core/params.h"
#include "cpu/backend.h"

namespace batchnorm_ext::bindings {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Inside the bindings an absent tensor is an undefined one.
inline const Tensor& absent() {
  static const Tensor undefined;
  return undefined;
}

inline const Tensor& or_undefined(const OptionalTensor& tensor) {
  return tensor.has_value() ? *tensor : absent();
}

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

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

// The same, with each sample's elements side by side.
inline Tensor dense_by_samples(const Tensor& tensor) {
  const Tensor x = dense(tensor);
  return x.size(0) <= 1 || x.stride(0) * x.size(0) == x.numel() ? x : x.contiguous();
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

// An uninitialised tensor in the memory order of `dense_input`. On the CPU not by way of torch's dispatcher, which
// takes longer than a small batch norm.
inline Tensor empty_like_dense(const Tensor& dense_input) {
  if (!dense_input.is_cpu()) return at::empty_like(dense_input);
  Tensor result = at::detail::empty_strided_cpu(dense_input.sizes(), dense_input.strides(), dense_input.scalar_type());
  cpu::advise_huge_pages(result.mutable_data_ptr(), static_cast<int64_t>(result.nbytes()));
  return result;
}

// For a result in the memory order of `operand`, which is `argument` or the call's own copy of it: the copy's memory,
// since each element is read before its result is written.
inline Tensor empty_or_copy(const Tensor& operand, const Tensor& argument) {
  return operand.is_same(argument) ? empty_like_dense(operand) : operand;
}

// The same for dx, which may take the place of x or of dy. No x where the call does without. The strides of dimensions
// of size 1, which say what memory format a tensor is in, are x's.
inline Tensor empty_or_copy(const Tensor& x, const Tensor& input, const Tensor& dy, const Tensor& grad_output) {
  if (!x.defined()) return empty_or_copy(dy, grad_output);
  if (!x.is_same(input)) return x;
  return dy.is_same(grad_output) ? empty_like_dense(x) : dy;
}

// An uninitialised tensor of any shape, contiguous, on the device of `input`.
inline Tensor empty_beside(const Tensor& input, at::IntArrayRef sizes, at::ScalarType type) {
  if (!input.is_cpu()) return at::empty(sizes, input.options().dtype(type));
  return at::detail::empty_cpu(sizes, type);
}

// One value a channel, in the type that sums are kept in, and rows of them. Of an empty batch nothing computes them:
// they are zero, and so are the batch's sums times them.
inline Tensor statistics_to_compute(const Tensor& input, at::IntArrayRef sizes) {
  Tensor statistics = empty_beside(input, sizes, accumulate_type(input.scalar_type()));
  return input.numel() == 0 ? statistics.zero_() : statistics;
}
inline Tensor empty_statistic(const Tensor& input) {
  return statistics_to_compute(input, {channels_of(input)});
}
inline Tensor empty_statistics(const Tensor& input, int64_t rows, int64_t parts = 1) {
  return statistics_to_compute(input, {rows, parts * channels_of(input)});
}

// A per-channel argument: absent, or one value per channel, on the input's device, in the input's type or the type that
// sums are kept in.
inline void check_channel_vector(const char* name, const Tensor& vector, const Tensor& input) {
  if (!vector.defined()) return;
  const int64_t channels = input.size(1);
  TORCH_CHECK(vector.numel() == channels, name, " should contain ", channels, " elements not ", vector.numel());
  TORCH_CHECK(vector.dim() == 1, name, " must have shape [", channels, "] (channels of input), got ", vector.sizes());
  TORCH_CHECK(vector.device() == input.device(), name, " must be on ", input.device(), " (the device of input), got ",
              vector.device());
  const at::ScalarType accumulate = accumulate_type(input.scalar_type());
  TORCH_CHECK(vector.scalar_type() == input.scalar_type() || vector.scalar_type() == accumulate, "mixed dtype (",
              input.is_cuda() ? "CUDA" : "CPU", "): expect parameter to have scalar type of ",
              c10::toString(accumulate), ", but ", name, " has ", c10::toString(vector.scalar_type()),
              " for an input of ", c10::toString(input.scalar_type()));
}

// A buffer about to be updated. An expanded one would keep what the last channel left.
inline void check_written(const char* name, const Tensor& buffer) {
  TORCH_CHECK(!buffer.defined() || at::has_internal_overlap(buffer) != at::MemOverlap::Yes, name,
              " is updated, and so must have memory for each of its elements, got strides ", buffer.strides(),
              "; clone() it");
}

inline void check_counter(const Tensor& counter, const Tensor& input) {
  if (!counter.defined()) return;
  TORCH_CHECK(counter.scalar_type() == at::kLong && counter.numel() == 1,
              "num_batches_tracked must be one value of type Long, got shape ", counter.sizes(), " of type ",
              c10::toString(counter.scalar_type()));
  TORCH_CHECK(counter.device() == input.device(), "num_batches_tracked must be on ", input.device(),
              " (the device of input), got ", counter.device());
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

// Rows of one value a channel, or one such vector, as forward returned them.
inline void check_saved(const char* name, const Tensor& saved, at::IntArrayRef sizes, const Tensor& grad_output) {
  const at::ScalarType accumulate = accumulate_type(grad_output.scalar_type());
  TORCH_CHECK(saved.sizes() == sizes && saved.is_contiguous() && saved.scalar_type() == accumulate &&
                  saved.device() == grad_output.device(),
              name, " must be what forward returned: contiguous ", c10::toString(accumulate), " of shape ", sizes,
              " on ", grad_output.device());
}

inline const void* saved_vector(const char* name, const Tensor& saved, const Tensor& grad_output) {
  check_saved(name, saved, {channels_of(grad_output)}, grad_output);
  return saved.const_data_ptr();
}

inline ChannelVector channel_vector(const Tensor& contiguous) {
  if (!contiguous.defined()) return {};
  return {contiguous.const_data_ptr(), dtype_of(contiguous.scalar_type())};
}

inline MutableChannelVector mutable_channel_vector(const Tensor& contiguous) {
  if (!contiguous.defined()) return {};
  return {contiguous.mutable_data_ptr(), dtype_of(contiguous.scalar_type())};
}

// The tensor itself where it is compact or absent.
inline c10::MaybeOwned<Tensor> compact(const Tensor& tensor) {
  return tensor.defined() ? tensor.expect_contiguous() : c10::MaybeOwned<Tensor>::borrowed(tensor);
}

// Operator results are always defined: what was not asked for comes back with no elements.
template <class... Results>
void define(const Tensor& like, Results&... results) {
  for (Tensor* result : {&results...}) {
    if (!result->defined()) *result = at::empty({0}, like.options());
  }
}

// A buffer that a kernel updates in place and that lives as long: strided buffers are written through a compact copy,
// and autograd learns of the write.
class UpdatedBuffer {
 public:
  explicit UpdatedBuffer(const Tensor& buffer) : buffer_(buffer), compact_(bindings::compact(buffer)) {}

  const Tensor& compact() const { return *compact_; }

  void publish() const {
    if (!buffer_.defined()) return;
    if (!compact_->is_same(buffer_)) buffer_.copy_(*compact_);
    if (!buffer_.is_inference()) buffer_.unsafeGetTensorImpl()->bump_version();
  }

 private:
  const Tensor& buffer_;
  c10::MaybeOwned<Tensor> compact_;
};

}  // namespace batchnorm_ext::bindings
