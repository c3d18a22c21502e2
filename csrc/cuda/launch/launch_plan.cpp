// How launches are chosen. No figure here was tuned on a device yet; each says what it is derived from.
#include "cuda/launch/launch_plan.h"

#include <algorithm>
#include <numeric>

#include "core/formulas.h"
#include "core/welford.h"

namespace batchnorm_ext::cuda {
namespace {

constexpr int64_t kVectorBytes = 16;
constexpr int64_t kSectorBytes = 32;  // what memory is read by

// Runs at least this long keep their channel's sums in one accumulator a thread; shorter ones would spend their time
// on partial vectors and on finding the next run.
constexpr int64_t kLongRunBytes = 1024;

// Enough of a row for full-width memory access, and few enough channels that a split's partial results stay small.
constexpr int64_t kTileRowBytes = 256;

// What a thread should read at least, in vectors: two chunks of four loads in flight.
constexpr int64_t kThreadVectors = 8;

constexpr int64_t kWorkspaceAlignment = 256;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

// Vectors that cover `elements` elements: exactly where they start and end at boundaries, else wherever they start.
int64_t covering_vectors(int64_t elements, int64_t vector, bool at_boundaries) {
  return at_boundaries && elements % vector == 0 ? elements / vector : (elements + vector - 2) / vector + 1;
}

int64_t blocks_that_fill(const DeviceLimits& limits) {
  return int64_t(limits.multiprocessors) * limits.threads_per_multiprocessor / kBlockThreads;
}

void plan_rows(StepPlan& plan, const Shape& shape, const Alignment& alignment, const DeviceLimits& limits) {
  RowView& view = plan.row_view;
  view.shape = shape;
  view.misalignment = alignment.misalignment;
  const bool at_boundaries = alignment.misalignment == 0 && shape.inner % plan.vector == 0;
  view.run_vectors = covering_vectors(shape.inner, plan.vector, at_boundaries);
  const int64_t vectors = shape.outer * view.run_vectors;
  const int64_t wanted = divide_up(blocks_that_fill(limits), shape.channels);
  const int64_t sensible = std::max<int64_t>(1, vectors / (kBlockThreads * kThreadVectors));
  view.split_vectors = round_up(divide_up(vectors, std::min(wanted, sensible)), kBlockThreads);
  view.splits = divide_up(vectors, view.split_vectors);
  view.step_runs = kBlockThreads / view.run_vectors;
  view.step_vectors = kBlockThreads % view.run_vectors;
  plan.tiles = shape.channels;
  plan.splits = view.splits;
}

// Rows of `outer_per_row` outer indices start at vector boundaries; one tile must then hold the whole row.
int64_t outer_per_row(const Shape& shape, int vector) {
  const int64_t row = shape.channels * shape.inner;
  const int64_t joined = vector / std::gcd(row, int64_t(vector));
  const bool fits = covering_vectors(joined * row, vector, false) <= kBlockThreads;
  return fits && shape.outer >= joined ? joined : 1;
}

int64_t tile_channels(const Shape& shape, DType dtype, int vector) {
  const int64_t element = element_size(dtype);
  const int64_t run_bytes = shape.inner * element;
  const int64_t unit = kSectorBytes / std::gcd(run_bytes, kSectorBytes);  // whole sectors
  int64_t channels = unit * divide_up(kTileRowBytes, unit * run_bytes);
  if (covering_vectors(channels * shape.inner, vector, false) > kBlockThreads) {
    channels = std::max<int64_t>(1, kBlockThreads / 2 * vector / shape.inner);
  }
  return std::min(channels, shape.channels);
}

void plan_columns(StepPlan& plan, const Shape& shape, DType dtype, const Alignment& alignment,
                  const DeviceLimits& limits) {
  ColumnView& view = plan.column_view;
  view.shape = shape;
  view.misalignment = alignment.misalignment;
  view.outer_per_row = outer_per_row(shape, plan.vector);
  view.tile_channels = view.outer_per_row > 1 ? shape.channels : tile_channels(shape, dtype, plan.vector);
  view.phases = plan.vector / std::gcd(view.pitch(), int64_t(plan.vector));
  const int64_t columns = view.tile_channels * view.outer_per_row * shape.inner;
  const bool at_boundaries = alignment.misalignment == 0 && view.pitch() % plan.vector == 0;
  view.tile_vectors = static_cast<int>(covering_vectors(columns, plan.vector, at_boundaries));
  view.lanes = kBlockThreads / view.tile_vectors;
  view.fold_width = 1;
  while (view.fold_width < 32 && 2 * view.fold_width * view.tile_channels <= kBlockThreads) view.fold_width *= 2;

  plan.tiles = divide_up(shape.channels, view.tile_channels);
  view.phases = std::min(view.phases, view.rows());
  const int64_t phase_rows = divide_up(view.rows(), view.phases);
  const int64_t wanted = std::max<int64_t>(1, blocks_that_fill(limits) / (plan.tiles * view.phases));
  const int64_t sensible = std::max<int64_t>(1, phase_rows / (view.lanes * kThreadVectors));
  view.phase_rows = round_up(divide_up(phase_rows, std::min(wanted, sensible)), view.lanes);
  view.splits = view.phases * divide_up(phase_rows, view.phase_rows);
  plan.splits = view.splits;
}

// Bytes of `count` values of the struct template for this dtype's accumulate type.
template <template <class> class Struct>
int64_t bytes_of(int64_t count, DType dtype) {
  return count * static_cast<int64_t>(dtype == DType::float64 ? sizeof(Struct<double>) : sizeof(Struct<float>));
}

// One split's results are final at once.
int64_t partial_results(const Shape& shape, const StepPlan& step) {
  return step.splits > 1 ? shape.channels * step.splits : 0;
}

// Not where a multiprocessor could hold only one such block: nothing would hide its waits.
ResidentPlan plan_resident(const StepPlan& step, DType dtype, int inputs, int64_t item_bytes, int64_t coefficient_bytes,
                           const DeviceLimits& limits) {
  constexpr int64_t kReservedBytes = 1024;  // of each block, by the system
  ResidentPlan plan{};
  if (step.vector * element_size(dtype) != kVectorBytes) return plan;
  plan.step = step;
  int64_t threads = kBlockThreads;
  plan.step.splits = 1;
  if (step.rows) {
    RowView& view = plan.step.row_view;
    view.split_vectors = view.shape.outer * view.run_vectors;
    view.splits = 1;
    plan.thread_vectors = divide_up(view.split_vectors, kBlockThreads);
  } else {
    ColumnView& view = plan.step.column_view;
    if (view.phases > 1) return plan;
    view.phase_rows = view.rows();
    view.splits = 1;
    plan.thread_vectors = divide_up(view.rows(), view.lanes);
    threads = int64_t(view.lanes) * view.tile_vectors;
  }
  const int64_t limit =
      std::min(limits.shared_bytes_per_block, limits.shared_bytes_per_multiprocessor / 2 - kReservedBytes);
  if (plan.thread_vectors > limit / (inputs * kVectorBytes * threads)) return plan;
  const int64_t sums = step.rows ? 1 : step.vector;
  const int64_t shared_bytes = plan.thread_vectors * inputs * kVectorBytes * threads +
                               sums * item_bytes * kBlockThreads + step.tile_channels() * coefficient_bytes;
  plan.shared_bytes = static_cast<size_t>(shared_bytes);
  plan.fits = shared_bytes <= limit;
  return plan;
}

}  // namespace

Alignment alignment_of(DType dtype, std::initializer_list<const void*> tensors) {
  Alignment alignment{-1, true};
  for (const void* tensor : tensors) {
    if (tensor == nullptr) continue;
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor) % kVectorBytes) / element_size(dtype);
    alignment.common = alignment.common && (alignment.misalignment < 0 || alignment.misalignment == past);
    alignment.misalignment = past;
  }
  return alignment.common && alignment.misalignment >= 0 ? alignment : Alignment{0, alignment.common};
}

StepPlan plan_step(Shape shape, DType dtype, const Alignment& alignment, const DeviceLimits& limits) {
  StepPlan plan{};
  if (shape.elements() == 0) return plan;
  if (shape.channels == 1) shape = {1, 1, shape.samples()};
  plan.vector = alignment.common ? static_cast<int>(kVectorBytes / element_size(dtype)) : 1;
  // A tile of columns holds at least one channel's run.
  plan.rows = shape.inner * element_size(dtype) >= kLongRunBytes || shape.inner > kBlockThreads / 2 * plan.vector ||
              shape.channels == 1;
  if (plan.rows) {
    plan_rows(plan, shape, alignment, limits);
  } else {
    plan_columns(plan, shape, dtype, alignment, limits);
  }
  return plan;
}

ForwardPlan plan_forward(const ForwardParams& params, const DeviceLimits& limits) {
  ForwardPlan plan{};
  const Shape& shape = params.shape;
  if (shape.elements() == 0) return plan;
  plan.normalize = plan_step(shape, params.dtype, alignment_of(params.dtype, {params.x, params.y}), limits);
  if (!params.batch_statistics) return plan;
  if (params.record == nullptr) {
    plan.resident = plan_resident(plan.normalize, params.dtype, 1, bytes_of<Moments>(1, params.dtype),
                                  bytes_of<NormalizeCoefficients>(1, params.dtype), limits);
    if (plan.resident.fits) return plan;
  }
  plan.statistics = plan_step(shape, params.dtype, alignment_of(params.dtype, {params.x}), limits);
  const int64_t partials = partial_results(shape, plan.statistics);
  plan.coefficients_offset = round_up(bytes_of<Moments>(partials, params.dtype), kWorkspaceAlignment);
  plan.workspace_bytes = plan.coefficients_offset + bytes_of<NormalizeCoefficients>(shape.channels, params.dtype);
  return plan;
}

BackwardPlan plan_backward(const BackwardParams& params, const DeviceLimits& limits) {
  BackwardPlan plan{};
  const Shape& shape = params.shape;
  if (shape.elements() == 0) return plan;
  const bool dx = params.dx != nullptr;
  plan.needs_sums = params.dweight.data != nullptr || params.dbias.data != nullptr ||
                    (dx && params.batch_statistics && params.joined.count == nullptr);
  plan.needs_input_gradient = dx && (params.batch_statistics || !plan.needs_sums);
  if (plan.needs_sums && plan.needs_input_gradient) {
    const Alignment alignment = alignment_of(params.dtype, {params.dy, params.x, params.dx});
    plan.resident = plan_resident(plan_step(shape, params.dtype, alignment, limits), params.dtype, 2,
                                  bytes_of<GradientPartial>(1, params.dtype),
                                  bytes_of<InputGradientCoefficients>(1, params.dtype), limits);
    if (plan.resident.fits) return plan;
  }
  if (plan.needs_sums) {
    const void* const written = plan.needs_input_gradient ? nullptr : params.dx;
    plan.sums = plan_step(shape, params.dtype, alignment_of(params.dtype, {params.dy, params.x, written}), limits);
    const int64_t partials = partial_results(shape, plan.sums);
    plan.coefficients_offset = round_up(bytes_of<GradientPartial>(partials, params.dtype), kWorkspaceAlignment);
    plan.workspace_bytes = plan.coefficients_offset;
  }
  if (plan.needs_input_gradient) {
    const void* const x = params.batch_statistics ? params.x : nullptr;
    plan.input_gradient = plan_step(shape, params.dtype, alignment_of(params.dtype, {params.dy, x, params.dx}), limits);
    if (params.batch_statistics) {
      plan.workspace_bytes += bytes_of<InputGradientCoefficients>(shape.channels, params.dtype);
    }
  }
  return plan;
}

bool streams_past_l2(const Shape& shape, DType dtype, const DeviceLimits& limits) {
  return 2 * shape.elements() * element_size(dtype) > limits.l2_bytes;
}

}  // namespace batchnorm_ext::cuda
