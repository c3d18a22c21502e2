// What a batch norm call is, as plain pointers and sizes: the contract between the bindings and every backend.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace batchnorm_ext {

// Every dense tensor is [outer][channels][inner] in memory order, whatever its rank: the channel dimension has some
// dense block of dimensions outside it and some inside it, and statistics do not depend on the order within a channel.
//   contiguous (N, C, ...):     outer = N,           inner = product of the spatial sizes
//   channels_last and (N, C):   outer = N * spatial, inner = 1
struct Shape {
  int64_t outer, channels, inner;

  BN_HOST_DEVICE int64_t samples() const { return outer * inner; }
  BN_HOST_DEVICE int64_t elements() const { return outer * channels * inner; }
};

// One value per channel, read in whichever type the caller keeps it. A null vector reads as its default.
struct ChannelVector {
  const void* data = nullptr;
  DType dtype = DType::float32;

  template <class A>
  BN_HOST_DEVICE A load(int64_t channel, A if_null) const {
    return value(bits(channel), if_null);
  }

  // The two halves of load(), for kernels that want several values at once: what is made of a value waits for it, so
  // the bits of all are read before.
  BN_HOST_DEVICE uint64_t bits(int64_t channel) const {
    if (data == nullptr) return 0;
    switch (dtype) {
      case DType::float64:
        return detail::bit_cast<uint64_t>(static_cast<const double*>(data)[channel]);
      case DType::float32:
        return detail::bit_cast<uint32_t>(static_cast<const float*>(data)[channel]);
      case DType::float16:
        return static_cast<const float16*>(data)[channel].bits;
      default:
        return static_cast<const bfloat16*>(data)[channel].bits;
    }
  }

  template <class A>
  BN_HOST_DEVICE A value(uint64_t bits, A if_null) const {
    if (data == nullptr) return if_null;
    switch (dtype) {
      case DType::float64:
        return static_cast<A>(detail::bit_cast<double>(bits));
      case DType::float32:
        return static_cast<A>(detail::bit_cast<float>(static_cast<uint32_t>(bits)));
      case DType::float16:
        return static_cast<A>(widen(float16{static_cast<uint16_t>(bits)}));
      default:
        return static_cast<A>(widen(bfloat16{static_cast<uint16_t>(bits)}));
    }
  }
};

// As ChannelVector, writable; storing to a null vector does nothing.
struct MutableChannelVector {
  void* data = nullptr;
  DType dtype = DType::float32;

  BN_HOST_DEVICE ChannelVector read_only() const { return {data, dtype}; }

  template <class A>
  BN_HOST_DEVICE void store(int64_t channel, A value) const {
    if (data == nullptr) return;
    switch (dtype) {
      case DType::float64:
        static_cast<double*>(data)[channel] = static_cast<double>(value);
        return;
      case DType::float32:
        static_cast<float*>(data)[channel] = static_cast<float>(value);
        return;
      case DType::float16:
        static_cast<float16*>(data)[channel] = narrow<float16>(static_cast<float>(value));
        return;
      default:
        static_cast<bfloat16*>(data)[channel] = narrow<bfloat16>(static_cast<float>(value));
        return;
    }
  }
};

// The running statistics and how one batch changes them. All pointers may be null.
struct RunningStatistics {
  MutableChannelVector mean, variance;
  int64_t* num_batches_tracked = nullptr;  // incremented once by a training forward
  double momentum = 0.0;                   // weight of the new batch; unused when cumulative
  bool cumulative = false;                 // momentum is 1 / num_batches_tracked after the increment
  bool skip_nonfinite = false;             // a channel with a non-finite batch mean or variance keeps its old values
  int64_t correction = 1;                  // the batch's variance is the squares over the samples less these: 1 or 0
};

// All as in torch.nn.functional; elu has alpha = 1. core/activation.h computes them.
enum class Activation : int32_t { identity, relu, relu6, leaky_relu, elu, silu, hardswish };

// What follows the normalisation of an element: y = activation(u), u = batch_norm(x) + residual.
struct Epilogue {
  Activation activation = Activation::identity;
  double negative_slope = 0.0;     // of leaky_relu
  const void* residual = nullptr;  // of the shape, dtype and memory order of x

  BN_HOST_DEVICE bool empty() const { return activation == Activation::identity && residual == nullptr; }
};

// Bytes of a mask with one bit for each element, set where u passes relu, relu6 or leaky_relu. Which bit is whose
// is the backend's affair: it is the same in forward and backward. Enough for rows of whole bytes, whatever the rows
// are, and for those of runs that start within a byte.
BN_HOST_DEVICE int64_t mask_bytes(const Shape& shape) {
  if (shape.inner == 1) return shape.outer * ((shape.channels + 7) / 8);
  return shape.outer * shape.channels * (shape.inner % 8 == 0 ? shape.inner / 8 : (shape.inner + 14) / 8);
}

// The samples of a batch that its statistics are of, as runs of them in memory's order: [bounds[0], bounds[1]),
// [bounds[2], bounds[3]) and so on, `count` samples in all. Or else all samples.
struct CountedSamples {
  bool all = true;
  const int64_t* bounds = nullptr;
  int64_t runs = 0;
  int64_t count = 0;
};

// Pointers to tensors are aligned to their element size only, and x, y, dy and dx each in their own way.

// Training (batch_statistics): statistics of x normalise, are saved, and update `running`.
// Evaluation: `running` mean and variance normalise and are only read.
// x and y have `shape`; `mean` and `inv_std` are saved for backward in accumulate_t of the element type, unless they
// are null. y may be x.
struct ForwardParams {
  Shape shape;
  DType dtype;  // of x and y
  const void* x;
  void* y;
  ChannelVector weight, bias;  // null: 1 and 0
  RunningStatistics running;
  double eps;
  bool batch_statistics;
  void* mean;
  void* inv_std;
  Epilogue epilogue;
  void* shift = nullptr;    // if not null: saved too, so that backward computes u to the same bit
  uint8_t* mask = nullptr;  // if not null: mask_bytes
  // Not null: the step channel_statistics alone. This batch becomes a record {signature, count, means, m2s} of
  // 2 * channels + 2 values; y, mean, inv_std and what `running` points to are null.
  double* record = nullptr;
  double signature = 0.0;
  CountedSamples counted;  // of a record on the CPU
};

// The step finalize_statistics of a batch whose parts are known by their records. `parts` rows of records, merged in
// their order, become mean, variance (biased) and count, and update `running`.
struct JoinParams {
  int64_t channels, parts;
  const double* records;
  RunningStatistics running;
  double* mean;
  double* variance;
  double* count;
};

// The sums of gradients of a batch of `count` samples that a call sees a part of.
struct JoinedSums {
  const double* sum_dy = nullptr;
  const double* sum_dy_xhat = nullptr;
  const double* count = nullptr;
};

// Gradients of the forward call; null outputs are not computed. x may be null when only dbias, or in evaluation only
// dx and dbias, are asked for. Behind an activation all of them follow from dy * activation'(u), which is dresidual. u
// is that of `mask`, or else computed from x, epilogue.residual and `shift`. dx may be dy or x.
struct BackwardParams {
  Shape shape;
  DType dtype;  // of x, dy and dx
  const void* dy;
  const void* x;
  void* dx;
  ChannelVector weight;  // null: 1
  const void* mean;
  const void* inv_std;
  MutableChannelVector dweight, dbias;
  bool batch_statistics;
  JoinedSums joined;  // not null: the step input_gradient alone, with these sums; dweight and dbias are null
  Epilogue epilogue;
  const void* shift = nullptr;
  const uint8_t* mask = nullptr;
  void* dresidual = nullptr;
  bool x_is_output = false;  // x holds y, written in place: it is inverted, by activation, shift and scale
};

}  // namespace batchnorm_ext
