// How launches are chosen. No figure here was tuned on a device yet; each says what it is derived from.
#include "cuda/launch/launch_plan.h"

#include <algorithm>
#include <limits>
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

// The same of slots that are several vectors.
constexpr int64_t kTileRowSlots = 16;

// Rows of a resident tile, the widest first: a line of the cache is 128 bytes, of which memory sends no less than half.
constexpr int64_t kResidentRowBytes[] = {256, 128, 64};

// What a thread should read at least, in vectors: two chunks of four loads in flight.
constexpr int64_t kChunkVectors = 4;
constexpr int64_t kThreadVectors = 2 * kChunkVectors;

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

void lay_rows(StepPlan& plan, const Shape& shape, const Alignment& alignment) {
  RowView& view = plan.row_view;
  view.shape = shape;
  view.misalignment = alignment.misalignment;
  view.vector_starts = std::max<int64_t>(0, shape.elements() - plan.vector + 1);
  view.whole_runs = alignment.misalignment == 0 && shape.inner % plan.vector == 0;
  view.run_vectors = covering_vectors(shape.inner, plan.vector, view.whole_runs);
  const int64_t step_runs = kBlockThreads / view.run_vectors, pitch = shape.channels * shape.inner;
  view.step_vectors = static_cast<int>(kBlockThreads % view.run_vectors);
  view.run_left = static_cast<int>(std::min<int64_t>(view.run_vectors, std::numeric_limits<int>::max()));
  view.last_elements = static_cast<int>(shape.inner - view.run_vectors * plan.vector);
  view.step_offset = step_runs * pitch + view.step_vectors * plan.vector;
  view.wrap_offset = pitch - view.run_vectors * plan.vector;
  view.outer_slots = shape.channels * view.run_vectors;
  view.step_slots = step_runs * view.outer_slots + view.step_vectors;
  view.wrap_slots = view.outer_slots - view.run_vectors;
  plan.tiles = shape.channels;
}

bool fits_a_row(int64_t columns, int vector) {
  return covering_vectors(columns, vector, false) <= kBlockThreads;
}

// Rows of `outer_per_row` outer indices start at vector boundaries; one tile must then hold the whole row.
int64_t outer_per_row(const Shape& shape, int vector) {
  const int64_t row = shape.channels * shape.inner;
  const int64_t joined = vector / std::gcd(row, int64_t(vector));
  return fits_a_row(joined * row, vector) && shape.outer >= joined ? joined : 1;
}

// Channels of which each multiple makes whole sectors and whole slots.
int64_t unit_channels(const Shape& shape, DType dtype, int vector) {
  const int64_t element = element_size(dtype);
  const int64_t unit_bytes = std::max(kSectorBytes, vector * element);
  return unit_bytes / std::gcd(shape.inner * element, unit_bytes);
}

int64_t tile_channels(const Shape& shape, DType dtype, int vector, int64_t row_bytes) {
  const int64_t unit = unit_channels(shape, dtype, vector);
  int64_t channels = unit * divide_up(row_bytes, unit * shape.inner * element_size(dtype));
  if (!fits_a_row(channels * shape.inner, vector)) {
    channels = std::max<int64_t>(1, kBlockThreads / 2 * vector / shape.inner);
  }
  return std::min(channels, shape.channels);
}

void lay_columns(StepPlan& plan, const Shape& shape, DType dtype, const Alignment& alignment, int64_t row_bytes,
                 bool epilogue) {
  ColumnView& view = plan.column_view;
  view.shape = shape;
  view.misalignment = alignment.misalignment;
  view.vector_starts = std::max<int64_t>(0, shape.elements() - plan.vector + 1);
  view.outer_per_row = outer_per_row(shape, plan.vector);
  view.tile_channels = view.outer_per_row > 1 ? shape.channels : tile_channels(shape, dtype, plan.vector, row_bytes);
  const int64_t rows = divide_up(shape.outer, view.outer_per_row);
  const int64_t columns = view.tile_channels * view.outer_per_row * shape.inner;
  const bool at_boundaries = alignment.misalignment == 0 && view.pitch() % plan.vector == 0;
  view.phases = static_cast<int>(std::min(plan.vector / std::gcd(view.pitch(), int64_t(plan.vector)), rows));
  view.tile_vectors = static_cast<int>(covering_vectors(columns, plan.vector, at_boundaries));
  if (epilogue) {
    // Slots are counted from the front of each row: none has two rows' elements, but few of them are vectors then.
    plan.vectors = plan.vectors && view.phases == 1;
    view.phases = 1;
    view.tile_vectors = static_cast<int>(divide_up(columns, plan.vector));
  }
  view.all_phase_rows = rows / view.phases;
  view.long_phases = static_cast<int>(rows % view.phases);
  view.by_phases = Divisor::of(view.phases);
  view.by_tile_vectors = Divisor::of(view.tile_vectors);
  view.by_inner = Divisor::of(shape.inner);
  view.by_tile_channels = Divisor::of(view.tile_channels);
  view.by_channel_items = Divisor::of(view.outer_per_row * shape.inner);
  view.lanes = kBlockThreads / view.tile_vectors;
  view.step_offset = view.lanes * view.phases * view.pitch();
  view.row_slots = divide_up(view.pitch(), plan.vector);
  view.step_slots = view.lanes * view.row_slots;
  view.fold_width = 1;
  while (view.fold_width < 32 && 2 * view.fold_width * view.tile_channels <= kBlockThreads) view.fold_width *= 2;
  plan.tiles = divide_up(shape.channels, view.tile_channels);
}

// All of a plan but how its tiles are split.
StepPlan lay(Shape shape, DType dtype, Alignment alignment, int64_t row_bytes, bool epilogue) {
  StepPlan plan{};
  if (shape.channels == 1) shape = {1, 1, shape.samples()};
  plan.vectors = alignment.common;
  plan.vector = alignment.common ? static_cast<int>(kVectorBytes / element_size(dtype)) : 1;
  if (epilogue) {
    plan.vectors = alignment.common && alignment.misalignment == 0;
    plan.vector = kEpilogueVector;
    plan.row_view.boundaries = plan.column_view.boundaries = plan.vectors;
    alignment = {0, true};
    row_bytes = std::max(row_bytes, kTileRowSlots * plan.vector * element_size(dtype) * row_bytes / kTileRowBytes);
  }
  // A tile of columns holds at least one channel's run.
  plan.rows = shape.inner * element_size(dtype) >= kLongRunBytes || shape.inner > kBlockThreads / 2 * plan.vector ||
              shape.channels == 1;
  if (epilogue && !plan.rows && outer_per_row(shape, plan.vector) == 1) {
    plan.rows = !fits_a_row(unit_channels(shape, dtype, plan.vector) * shape.inner, plan.vector);
  }
  if (plan.rows) {
    lay_rows(plan, shape, alignment);
  } else {
    lay_columns(plan, shape, dtype, alignment, row_bytes, epilogue);
  }
  return plan;
}

// Splits of which each has some part of a tile, at the least.
int64_t phases_of(const StepPlan& plan) {
  return plan.rows ? 1 : plan.column_view.phases;
}

// What a thread visits in such a split.
int64_t unsplit_thread_vectors(const StepPlan& plan) {
  if (plan.rows) return divide_up(plan.row_view.shape.outer * plan.row_view.run_vectors, kBlockThreads);
  const ColumnView& view = plan.column_view;
  return divide_up(view.all_phase_rows + (view.long_phases > 0 ? 1 : 0), view.lanes);
}

// So that no thread visits more than `thread_vectors`.
void split(StepPlan& plan, int64_t thread_vectors) {
  const int64_t parts = divide_up(unsplit_thread_vectors(plan), thread_vectors);
  plan.splits = phases_of(plan) * parts;
  if (plan.rows) {
    plan.row_view.split_vectors = thread_vectors * kBlockThreads;
    plan.row_view.splits = plan.splits;
  } else {
    plan.column_view.phase_rows = thread_vectors * plan.column_view.lanes;
    plan.column_view.splits = plan.splits;
  }
}

// Parts of a tile, or of a phase of it, that are still worth a block.
int64_t sensible_parts(const StepPlan& plan) {
  return std::max<int64_t>(1, unsplit_thread_vectors(plan) / kThreadVectors);
}

// Such parts that keep `blocks` busy.
int64_t wanted_parts(const StepPlan& plan, int64_t blocks) {
  return std::min(std::max<int64_t>(1, blocks / (plan.tiles * phases_of(plan))), sensible_parts(plan));
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

// What `resident` keeps: of how many tensors, how many slots at once where it streams, and the sizes of a channel's
// results.
struct Kept {
  int inputs, chunk;
  int64_t element_bytes, item_bytes, coefficient_bytes;
  bool in_place;  // the output overwrites an input
};

// The most partial results that each block of a group reads for itself. More than these cost more than the second
// meeting of a group whose blocks share the work.
constexpr int64_t kMergedBytes = 8 << 10;

// Rows of a tile of which a group of all blocks keeps a part, and reads the rest twice: whole lines, no wider, since
// what is kept is saved for each tile. Less than this share of what the steps move is not worth it; 0: nothing is.
constexpr int64_t kStreamedRowBytes = 128;
constexpr int64_t kWorthStreaming = 32;

// How much more of the device a group across the grid must keep busy than one that costs less to bring together.
constexpr int64_t kWorthTheGrid = 4;

// How much of the device clusters beyond the portable size must keep busy: they fit fewer places of it.
constexpr int64_t kBusyQuarters = 3;

// The largest cluster that may hold a tile.
int64_t largest_cluster(const DeviceLimits& limits) {
  int64_t largest = 1;
  for (int i = 0; i < kClusterSizes; ++i) {
    const int64_t size = int64_t(2) << i, blocks = size * limits.active_clusters[i];
    if (size <= kPortableCluster ? blocks > 0
                                 : 4 * blocks >= kBusyQuarters * kResidentBlocks * limits.multiprocessors) {
      largest = size;
    }
  }
  return largest;
}

// Groups of a cooperative launch: few enough to be at work at once, and so many that the last tiles leave few idle and
// that few exchanges follow each other.
int64_t groups_of_grid(int64_t most, int64_t tiles, int64_t tile_traffic, int64_t exchange_bytes) {
  int64_t best = 1;
  double least = 0;
  for (int64_t count = 1; count <= std::min(most, tiles); ++count) {
    const double cost =
        static_cast<double>(divide_up(tiles, count)) * static_cast<double>(exchange_bytes + count * tile_traffic);
    if (count == 1 || cost <= least) {
      least = cost;
      best = count;
    }
  }
  return best;
}

// The groups of blocks for tiles that must be in at least `needed` parts; no tiles if there can be none. Where few
// blocks could hold a tile, more of them may share it, so that all of the device has work.
Groups plan_groups(const StepPlan& step, int64_t needed, int64_t tile_traffic, const DeviceLimits& limits) {
  const int64_t blocks = int64_t(kResidentBlocks) * limits.multiprocessors;
  const int64_t phases = phases_of(step);
  const int64_t least = phases * needed, wanted = phases * std::max(needed, wanted_parts(step, blocks));
  const int64_t largest = largest_cluster(limits);
  int64_t cluster = 1;
  while (cluster < least) cluster *= 2;
  while (2 * cluster <= std::min({wanted, largest, int64_t(kPortableCluster)})) cluster *= 2;

  Groups groups{};
  const bool grid_can = limits.cooperative && least <= blocks;
  if (cluster <= largest && !(grid_can && wanted >= kWorthTheGrid * cluster)) {
    groups.exchange = cluster == 1 ? Exchange::none : Exchange::cluster;
    groups.size = static_cast<int>(cluster);
    groups.count = groups.tiles = static_cast<int>(step.tiles);
  } else if (grid_can) {
    groups.exchange = Exchange::grid;
    groups.count = static_cast<int>(groups_of_grid(blocks / least, step.tiles, tile_traffic, limits.exchange_bytes));
    const int64_t room = blocks / groups.count / phases;
    groups.size = static_cast<int>(phases * std::max(needed, std::min(room, sensible_parts(step))));
    groups.tiles = static_cast<int>(step.tiles);
  }
  return groups;
}

// All blocks, if together they keep so much of each tile that it is worth more than the exchanges; no tiles otherwise.
// The steps are three launches, whose blocks wait for each other twice.
Groups plan_streaming_groups(const StepPlan& step, int64_t kept_bytes, int64_t tile_traffic,
                             const DeviceLimits& limits) {
  const int64_t phases = phases_of(step);
  const int64_t parts = int64_t(kResidentBlocks) * limits.multiprocessors / phases;
  const int64_t saved = step.tiles * (parts * phases * kept_bytes - limits.exchange_bytes) + 2 * limits.exchange_bytes;
  Groups groups{};
  if (limits.cooperative && parts > 0 && kWorthStreaming * saved >= step.tiles * tile_traffic) {
    groups.exchange = Exchange::grid;
    groups.size = static_cast<int>(phases * parts);
    groups.count = 1;
    groups.tiles = static_cast<int>(step.tiles);
  }
  return groups;
}

ResidentPlan plan_resident_tile(StepPlan step, const Kept& kept, bool streams, const DeviceLimits& limits) {
  ResidentPlan plan{};
  const int64_t threads = step.rows ? kBlockThreads : int64_t(step.column_view.lanes) * step.column_view.tile_vectors;
  const int64_t limit = resident_shared_bytes(limits);
  const int64_t sums_bytes = (step.rows ? 1 : step.vector) * kept.item_bytes * kBlockThreads;
  const int64_t board_bytes =
      step.tile_channels() * kept.item_bytes + step.coefficient_places() * kept.coefficient_bytes;
  const int64_t slot_bytes = step.vector * kept.element_bytes;
  const int64_t vector_bytes = kept.inputs * slot_bytes * threads;
  const int64_t most_vectors = (limit - sums_bytes - board_bytes) / vector_bytes;
  if (limit <= sums_bytes + board_bytes || most_vectors < (streams ? 2 * kept.chunk : 1)) return plan;
  const int64_t all = unsplit_thread_vectors(step);
  const int64_t places = most_vectors / kept.chunk * kept.chunk;      // of vectors that stream
  const int64_t once = slot_bytes * threads * all * phases_of(step);  // to read or write one of the tensors
  plan.groups = streams ? plan_streaming_groups(step, places * vector_bytes, (2 * kept.inputs + 1) * once, limits)
                        : plan_groups(step, divide_up(all, most_vectors), (kept.inputs + 1) * once, limits);
  if (plan.groups.tiles == 0) return plan;
  const int64_t visited = divide_up(all, plan.groups.size / phases_of(step));
  split(step, visited);
  plan.streams = streams;
  plan.thread_vectors = streams ? places : visited;
  if (plan.groups.exchange == Exchange::grid) plan.groups.size = static_cast<int>(step.splits);
  plan.groups.each_merges = !kept.in_place && plan.groups.size * step.tile_channels() * kept.item_bytes <= kMergedBytes;
  plan.groups.board_bytes = static_cast<int>(round_up(board_bytes, kWorkspaceLine));
  plan.shared_bytes = static_cast<size_t>(plan.thread_vectors * vector_bytes + sums_bytes + board_bytes);
  plan.most_shared_bytes = static_cast<size_t>(limit);
  plan.step = step;
  plan.fits = true;
  return plan;
}

// Tiles as wide as leave room for two groups at once, one of which copies while the other exchanges; else the widest.
// If none fits, one that streams.
ResidentPlan plan_resident(const Shape& shape, DType dtype, const Alignment& alignment, bool epilogue, const Kept& kept,
                           const DeviceLimits& limits) {
  ResidentPlan best{};
  if (epilogue && !resident_has_epilogue(dtype)) return best;
  for (const int64_t row_bytes : kResidentRowBytes) {
    const StepPlan step = lay(shape, dtype, alignment, row_bytes, epilogue);
    if (!step.vectors) break;
    const ResidentPlan plan = plan_resident_tile(step, kept, false, limits);
    if (!plan.fits) continue;
    if (!best.fits || plan.groups.exchange != Exchange::grid || plan.groups.count > 1) best = plan;
    if (plan.step.rows || best.groups.exchange != Exchange::grid || best.groups.count > 1) break;
  }
  if (best.fits || limits.compute_capability < kAsyncCopyCapability) return best;
  const StepPlan step = lay(shape, dtype, alignment, kStreamedRowBytes, epilogue);
  return step.vectors ? plan_resident_tile(step, kept, true, limits) : best;
}

template <class Plan>
void make_room_for_groups(Plan& plan) {
  const auto of_groups = static_cast<size_t>(group_workspace_bytes(plan.resident.groups));
  plan.workspace_bytes = std::max(plan.workspace_bytes, of_groups);
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

StepPlan plan_step(const Shape& shape, DType dtype, const Alignment& alignment, const DeviceLimits& limits,
                   bool epilogue) {
  if (shape.elements() == 0) return {};
  StepPlan plan = lay(shape, dtype, alignment, kTileRowBytes, epilogue);
  const int64_t thread_vectors = divide_up(unsplit_thread_vectors(plan), wanted_parts(plan, blocks_that_fill(limits)));
  // Whole chunks, but in the last split.
  split(plan, thread_vectors < kThreadVectors ? thread_vectors : round_up(thread_vectors, kChunkVectors));
  return plan;
}

int64_t resident_shared_bytes(const DeviceLimits& limits) {
  constexpr int64_t kReservedBytes = 1024;  // of each block, by the system
  return std::min(limits.shared_bytes_per_block,
                  limits.shared_bytes_per_multiprocessor / kResidentBlocks - kReservedBytes);
}

bool has_epilogue(const ForwardParams& params) {
  return !params.epilogue.empty() || params.shift != nullptr || params.mask != nullptr;
}

bool has_epilogue(const BackwardParams& params) {
  return params.epilogue.activation != Activation::identity || params.x_is_output || params.dresidual != nullptr;
}

ForwardPlan plan_forward(const ForwardParams& params, const DeviceLimits& limits) {
  ForwardPlan plan{};
  const Shape& shape = params.shape;
  if (shape.elements() == 0) return plan;
  const bool epilogue = has_epilogue(params);
  const Alignment alignment = alignment_of(params.dtype, {params.x, params.y, params.epilogue.residual});
  plan.normalize = plan_step(shape, params.dtype, alignment, limits, epilogue);
  if (!params.batch_statistics) return plan;
  if (params.record == nullptr) {
    const Kept kept{1,
                    kForwardChunk,
                    element_size(params.dtype),
                    bytes_of<Moments>(1, params.dtype),
                    bytes_of<NormalizeCoefficients>(1, params.dtype),
                    params.x == params.y};
    plan.resident = plan_resident(shape, params.dtype, alignment, epilogue, kept, limits);
    if (plan.resident.fits && !may_be_refused(plan.resident.groups)) return plan;
  }
  plan.statistics = plan_step(shape, params.dtype, alignment_of(params.dtype, {params.x}), limits);
  const int64_t partials = partial_results(shape, plan.statistics);
  plan.coefficients_offset = round_up(bytes_of<Moments>(partials, params.dtype), kWorkspaceAlignment);
  plan.workspace_bytes = plan.coefficients_offset + bytes_of<NormalizeCoefficients>(shape.channels, params.dtype);
  make_room_for_groups(plan);
  return plan;
}

BackwardPlan plan_backward(const BackwardParams& params, const DeviceLimits& limits) {
  BackwardPlan plan{};
  const Shape& shape = params.shape;
  if (shape.elements() == 0) return plan;
  const bool epilogue = has_epilogue(params), dx = params.dx != nullptr;
  const bool maps = dx || params.dresidual != nullptr;
  plan.needs_sums = params.dweight.data != nullptr || params.dbias.data != nullptr ||
                    (dx && params.batch_statistics && params.joined.count == nullptr);
  plan.needs_input_gradient = maps && ((dx && params.batch_statistics) || !plan.needs_sums);
  // All tensors of the call, so that all steps visit the same slots of an epilogue.
  const Alignment common =
      alignment_of(params.dtype, {params.dy, params.x, params.dx, params.epilogue.residual, params.dresidual});
  const auto step = [&](std::initializer_list<const void*> tensors) {
    return plan_step(shape, params.dtype, epilogue ? common : alignment_of(params.dtype, tensors), limits, epilogue);
  };
  const int64_t coefficient_bytes = bytes_of<InputGradientCoefficients>(1, params.dtype);
  if (plan.needs_sums && plan.needs_input_gradient) {
    const Kept kept{2,
                    kBackwardChunk,
                    element_size(params.dtype),
                    bytes_of<GradientPartial>(1, params.dtype),
                    epilogue ? bytes_of<ActivatedGradientCoefficients>(1, params.dtype) : coefficient_bytes,
                    false};
    plan.resident = plan_resident(shape, params.dtype, common, epilogue, kept, limits);
    if (plan.resident.fits && !may_be_refused(plan.resident.groups)) return plan;
  }
  if (plan.needs_sums) {
    plan.sums = step({params.dy, params.x, plan.needs_input_gradient ? nullptr : params.dx});
    const int64_t partials = partial_results(shape, plan.sums);
    plan.coefficients_offset = round_up(bytes_of<GradientPartial>(partials, params.dtype), kWorkspaceAlignment);
    plan.workspace_bytes = plan.coefficients_offset;
  }
  if (plan.needs_input_gradient) {
    plan.input_gradient = step({params.dy, params.batch_statistics ? params.x : nullptr, params.dx});
    if (dx && params.batch_statistics) plan.workspace_bytes += shape.channels * coefficient_bytes;
  }
  make_room_for_groups(plan);
  return plan;
}

bool streams_past_l2(const Shape& shape, DType dtype, const DeviceLimits& limits) {
  return 2 * shape.elements() * element_size(dtype) > limits.l2_bytes;
}

}  // namespace batchnorm_ext::cuda
