// The launch plan for four devices: what covers a tensor, what fills a device, what a launch may be.
#include "cuda/launch/launch_plan.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "core/welford.h"
#include "cuda/primitives/shared_memory.cuh"
#include "cuda/primitives/tile_walk.cuh"

namespace {

using namespace batchnorm_ext;
using namespace batchnorm_ext::cuda;

int passed = 0, failed = 0;

void report(bool good, const std::string& name) {
  good ? ++passed : ++failed;
  if (!good) std::printf("FAILED %s\n", name.c_str());
}

constexpr DType all_dtypes[] = {DType::float64, DType::float32, DType::float16, DType::bfloat16};

struct Device {
  const char* name;
  DeviceLimits limits;
};
constexpr Device devices[] = {
    {"H200", {90, 132, 2048, 232448, 233472, 50 << 20, true, {132, 66, 32, 0}}},
    {"A100", {80, 108, 2048, 166912, 167936, 40 << 20, true, {}}},
    {"RTX 4090", {89, 128, 1536, 101376, 102400, 72 << 20, true, {}}},
    {"T4", {75, 40, 1024, 65536, 65536, 4 << 20, true, {}}},
};

std::string describe(const Device& device, const Shape& shape, DType dtype, const Alignment& alignment) {
  char text[160];
  std::snprintf(text, sizeof text, "%s [%lld][%lld][%lld] of %lld bytes, %lld past a boundary%s", device.name,
                static_cast<long long>(shape.outer), static_cast<long long>(shape.channels),
                static_cast<long long>(shape.inner), static_cast<long long>(element_size(dtype)),
                static_cast<long long>(alignment.misalignment), alignment.common ? "" : " each its own");
  return text;
}

// Whether what is read at once lies in the tensor, at a boundary, and has something that is meant.
template <int kVector>
bool is_readable(const Slot& slot, const Shape& shape, int64_t misalignment) {
  return !has_flags(slot.flags, Slot::kAtOnce) ||
         ((slot.flags & Slot::elements(0, kVector)) != 0 && (slot.offset + misalignment) % kVector == 0 &&
          slot.offset >= 0 && slot.offset + kVector <= shape.elements());
}

// Walks as the kernels do. Counts visits and checks each visit's channel, and that all is read at once but what reaches
// over the tensor's ends.
template <int kVector, class View>
bool covers(const StepPlan& plan, const View& view, const Shape& shape) {
  std::vector<int> visits(static_cast<size_t>(shape.elements()));
  constexpr int kChannels = kChannelsPerThread<View, kVector>;
  for (int64_t t = 0; t < plan.tiles; ++t) {
    const Tile tile = TileWalk<View, kVector, kBlockThreads>::tile(view, t);
    for (int64_t split = 0; split < plan.splits; ++split) {
      for (unsigned thread = 0; thread < kBlockThreads; ++thread) {
        threadIdx.x = thread;
        TileWalk<View, kVector, kBlockThreads> walk(view, tile, split);
        int channel[kChannels];
        walk.channels(channel);
        int64_t samples[kChannels] = {};
        for (int64_t n = walk.count(); n > 0; --n) {
          const Slot slot = walk.next();
          if (!is_readable<kVector>(slot, shape, view.misalignment)) return false;
          const bool within = slot.offset >= 0 && slot.offset + kVector <= shape.elements();
          if (!slot.is_empty() && within && !has_flags(slot.flags, Slot::kAtOnce)) return false;
          for (int e = 0; e < kVector; ++e) {
            if (!slot.holds(e)) continue;
            const int64_t i = slot.offset + e;
            const int a = kChannels == 1 ? 0 : e;
            if (i < 0 || i >= shape.elements()) return false;
            if (i / shape.inner % shape.channels != tile.first + channel[a]) return false;
            ++visits[i];
            ++samples[a];
          }
        }
        for (int a = 0; a < kChannels; ++a) {
          if (walk.samples(a) != samples[a]) return false;
        }
      }
    }
  }
  return std::all_of(visits.begin(), visits.end(), [](int n) { return n == 1; });
}

template <int kVector>
bool covers(const StepPlan& plan, const Shape& shape) {
  return plan.rows ? covers<kVector>(plan, plan.row_view, shape) : covers<kVector>(plan, plan.column_view, shape);
}

bool covers(const StepPlan& plan, const Shape& shape) {
  switch (plan.vector) {
    case 1:
      return covers<1>(plan, shape);
    case 2:
      return covers<2>(plan, shape);
    case 4:
      return covers<4>(plan, shape);
    default:
      return covers<8>(plan, shape);
  }
}

bool is_launchable(const StepPlan& plan) {
  if (plan.tiles < 1 || plan.tiles > 0x7fffffff || plan.splits < 1 || plan.splits > 65535) return false;
  if (plan.rows) return true;
  const ColumnView& view = plan.column_view;
  return view.tile_vectors >= 1 && view.lanes >= 1 && view.tile_vectors * view.lanes <= kBlockThreads &&
         view.fold_width >= 1 && view.fold_width <= 32 && view.tile_channels <= kBlockThreads * plan.vector;
}

// Whether the walks of some threads of some splits go through runs of any length as they should.
template <int kVector>
bool walks_runs(const StepPlan& plan) {
  const RowView& view = plan.row_view;
  const Shape& shape = view.shape;
  const int64_t vectors = shape.outer * view.run_vectors;
  const int64_t channel = shape.channels - 1;
  for (const int64_t split : {int64_t(0), plan.splits / 3, plan.splits / 2, plan.splits - 1}) {
    for (const unsigned thread : {0u, 77u, 255u}) {
      threadIdx.x = thread;
      TileWalk<RowView, kVector, kBlockThreads> walk(view, {channel, 1}, split);
      const int64_t end = std::min(vectors, (split + 1) * view.split_vectors);
      for (int64_t i = split * view.split_vectors + thread; i < end; i += kBlockThreads) {
        const int64_t first = (i / view.run_vectors * shape.channels + channel) * shape.inner;
        const int64_t head = (first + view.misalignment) % kVector;
        const int64_t offset = first - head + i % view.run_vectors * kVector;
        const int64_t low = std::max(first, offset), high = std::min(first + shape.inner, offset + kVector);
        const unsigned wanted = Slot::elements(static_cast<int>(low - offset), static_cast<int>(high - offset));
        const Slot slot = walk.next();
        if (slot.offset != offset || (slot.flags & Slot::elements(0, kVector)) != wanted) return false;
      }
    }
  }
  return true;
}

// Where each element's bit of a mask lies, as the kernels of a plan find it; empty where two threads write a byte, or
// one lies outside, or what is taken for a vector starts off a boundary.
template <class View>
std::vector<int64_t> mask_bits(const StepPlan& plan, const View& view, const Shape& shape) {
  using Walk = TileWalk<View, kEpilogueVector, kBlockThreads, true>;
  std::vector<int64_t> bits(static_cast<size_t>(shape.elements()), -1);
  std::vector<bool> taken(static_cast<size_t>(mask_bytes(shape)));
  for (int64_t t = 0; t < plan.tiles; ++t) {
    for (int64_t split = 0; split < plan.splits; ++split) {
      for (unsigned thread = 0; thread < kBlockThreads; ++thread) {
        threadIdx.x = thread;
        Walk walk(view, Walk::tile(view, t), split);
        for (int64_t n = walk.count(); n > 0; --n) {
          const Slot slot = walk.next();
          if (!is_readable<kEpilogueVector>(slot, shape, 0)) return {};
          if (slot.is_empty()) continue;
          if (slot.number < 0 || slot.number >= mask_bytes(shape) || taken[slot.number]) return {};
          taken[slot.number] = true;
          for (int e = 0; e < kEpilogueVector; ++e) {
            if (!slot.holds(e)) continue;
            if (slot.offset + e < 0 || slot.offset + e >= shape.elements() || bits[slot.offset + e] >= 0) return {};
            bits[slot.offset + e] = 8 * slot.number + e;
          }
        }
      }
    }
  }
  return std::find(bits.begin(), bits.end(), -1) == bits.end() ? bits : std::vector<int64_t>();
}

std::vector<int64_t> mask_bits(const StepPlan& plan, const Shape& shape) {
  return plan.rows ? mask_bits(plan, plan.row_view, shape) : mask_bits(plan, plan.column_view, shape);
}

BackwardParams backward_call(const Shape& shape, DType dtype, int64_t misalignment) {
  alignas(16) static char memory[16];
  BackwardParams call{};
  call.shape = shape;
  call.dtype = dtype;
  call.dy = call.x = call.dx = memory + misalignment * element_size(dtype);
  call.batch_statistics = true;
  return call;
}

// What resident groups must be to run at all, on every device.
bool groups_can_run(const ResidentPlan& plan, const DeviceLimits& limits) {
  const Groups& groups = plan.groups;
  const int blocks = kResidentBlocks * limits.multiprocessors;
  if (groups.size < 1 || groups.count < 1 || groups.count > groups.tiles || groups.tiles != plan.step.tiles)
    return false;
  if (plan.step.splits > groups.size) return false;  // what no block has would be left out
  switch (groups.exchange) {
    case Exchange::none:
      return groups.size == 1 && groups.count == groups.tiles;
    case Exchange::cluster:
      return groups.count == groups.tiles && groups.size > 1 && groups.size <= 16 &&
             (groups.size & (groups.size - 1)) == 0 &&
             std::any_of(std::begin(limits.active_clusters), std::end(limits.active_clusters),
                         [&](const int& clusters) {
                           return clusters > 0 && groups.size <= 2 << (&clusters - limits.active_clusters);
                         });
    default:
      return limits.cooperative && groups.size * groups.count <= blocks && groups.board_bytes % kWorkspaceLine == 0 &&
             group_workspace_bytes(groups) > 0;
  }
}

void coverage() {
  std::mt19937_64 random(3);
  int residents = 0;
  const auto below = [&](int64_t limit) { return static_cast<int64_t>(random() % static_cast<uint64_t>(limit)); };
  const int64_t inners[] = {1, 1, 1, 2, 7, 9, 49, 64, 121, 128, 196, 225, 256, 511, 1024, 1030};
  for (int i = 0; i < 600; ++i) {
    const int64_t inner = inners[below(16)];
    const int64_t channels = 1 + (below(2) ? below(40) : below(4) ? below(1 + 3000 / inner) : below(1500));
    const Shape shape{1 + below(std::max<int64_t>(1, 60000 / (channels * inner))), channels, inner};
    const DType dtype = all_dtypes[below(4)];
    const Alignment alignment =
        below(3) == 0 ? Alignment{below(16 / element_size(dtype)), true} : Alignment{0, below(4) != 0};
    const Device& device = devices[below(4)];
    const StepPlan plan = plan_step(shape, dtype, alignment, device.limits);
    const std::string name = describe(device, shape, dtype, alignment);
    report(is_launchable(plan) && covers(plan, shape), "covered once: " + name);
    if (!alignment.common) continue;
    const BackwardParams call = backward_call(shape, dtype, alignment.misalignment);
    const ResidentPlan resident = plan_backward(call, device.limits).resident;
    if (!resident.fits) continue;
    ++residents;
    report(covers(resident.step, shape), "covered once by resident blocks: " + name);
    report(groups_can_run(resident, device.limits), "groups can run: " + name);
    report(int64_t(resident.shared_bytes) <= device.limits.shared_bytes_per_block &&
               2 * int64_t(resident.shared_bytes) <= device.limits.shared_bytes_per_multiprocessor,
           "two resident blocks fit a multiprocessor: " + name);
  }
  report(residents > 100, "many of the random shapes are resident");
}

// Forward writes a mask and backward reads it, each by its own plan, of tensors that may lie elsewhere.
void masks() {
  std::mt19937_64 random(5);
  const auto below = [&](int64_t limit) { return static_cast<int64_t>(random() % static_cast<uint64_t>(limit)); };
  const int64_t inners[] = {1, 1, 1, 2, 7, 8, 9, 49, 64, 121, 196, 225, 256, 511, 1024, 1030};
  int residents = 0;
  for (int i = 0; i < 150; ++i) {
    const int64_t inner = inners[below(16)];
    const int64_t channels = 1 + (below(2) ? below(40) : below(1 + 3000 / inner));
    const Shape shape{1 + below(std::max<int64_t>(1, 40000 / (channels * inner))), channels, inner};
    const DType dtype = all_dtypes[below(4)];
    const std::vector<int64_t> bits = mask_bits(plan_step(shape, dtype, {0, true}, devices[0].limits, true), shape);
    report(!bits.empty(), "each element has a bit: " + describe(devices[0], shape, dtype, {0, true}));
    for (const Device& device : devices) {
      for (const Alignment& alignment : {Alignment{0, true}, Alignment{1, true}, Alignment{0, false}}) {
        const StepPlan plan = plan_step(shape, dtype, alignment, device.limits, true);
        const std::string name = describe(device, shape, dtype, alignment);
        report(is_launchable(plan) && mask_bits(plan, shape) == bits, "the same bits: " + name);
        report(plan.coefficient_places() * int64_t(sizeof(ActivatedGradientCoefficients<double>)) <= 48 << 10,
               "coefficients of a tile: " + name);
      }
      BackwardParams call = backward_call(shape, dtype, 0);
      call.epilogue.activation = Activation::relu;
      const ResidentPlan resident = plan_backward(call, device.limits).resident;
      if (!resident.fits) continue;
      ++residents;
      report(groups_can_run(resident, device.limits) && mask_bits(resident.step, shape) == bits,
             "the same bits of resident blocks: " + describe(device, shape, dtype, {0, true}));
    }
  }
  report(residents > 100, "many of the random masks are written by resident blocks");
}

void fills_the_device() {
  const Shape shapes[] = {{256, 64, 112 * 112}, {256, 256, 56 * 56}, {256, 512, 28 * 28}, {256, 1024, 14 * 14},
                          {256, 2048, 7 * 7},   {4, 128, 1 << 20},   {64, 3, 224 * 224},  {1, 2, 1 << 24},
                          {1 << 20, 64, 1},     {1 << 18, 256, 1},   {12544, 2048, 1},    {3211264, 3, 1},
                          {1 << 24, 1, 1},      {401408, 96, 1},     {401408, 100, 1},    {100352, 1001, 1},
                          {1024, 384, 35 * 35}, {1024, 192, 17 * 17}};
  for (const Device& device : devices) {
    for (const Shape& shape : shapes) {
      for (const DType dtype : all_dtypes) {
        const Alignment aligned{0, true};
        const StepPlan plan = plan_step(shape, dtype, aligned, device.limits);
        const std::string name = describe(device, shape, dtype, aligned);
        const int64_t blocks = plan.tiles * plan.splits;
        report(is_launchable(plan), "launchable: " + name);
        report(blocks >= 2 * device.limits.multiprocessors, "at least two blocks a multiprocessor: " + name);
        const int64_t bytes = shape.elements() * element_size(dtype);
        const int64_t moments = dtype == DType::float64 ? sizeof(Moments<double>) : sizeof(Moments<float>);
        const int64_t partials = plan.splits > 1 ? shape.channels * plan.splits * moments : 0;
        report(partials <= bytes / 20, "partial results are few: " + name);
        if (!plan.rows) {
          const double idle = 1 - double(plan.column_view.lanes * plan.column_view.tile_vectors) / kBlockThreads;
          report(idle < 0.3, "few threads are idle: " + name);
        }
      }
    }
  }
}

void choices() {
  const DeviceLimits& h200 = devices[0].limits;
  const auto plan = [&](Shape shape, DType dtype) { return plan_step(shape, dtype, {0, true}, h200); };
  report(plan({32, 64, 56 * 56}, DType::bfloat16).rows, "56x56 is long runs");
  report(!plan({32, 64, 14 * 14}, DType::bfloat16).rows, "14x14 in 16 bits is columns");
  report(plan({1 << 20, 1, 1}, DType::float32).rows, "a single channel is one run");
  const StepPlan seven = plan({256, 2048, 49}, DType::bfloat16);
  report(!seven.rows && seven.column_view.tile_channels == 16, "7x7 in 16 bits: 16 channels end at a sector");
  const StepPlan image = plan({1 << 20, 3, 1}, DType::bfloat16);
  report(!image.rows && image.column_view.outer_per_row == 8 && image.column_view.tile_vectors == 3,
         "three channels: rows of 24 columns");
  const StepPlan odd = plan({1 << 16, 1001, 1}, DType::bfloat16);
  report(odd.column_view.phases == 8 && odd.vector == 8, "an odd number of channels keeps its vectors");
  report(plan_step({32, 64, 56 * 56}, DType::float32, {0, false}, h200).vector == 1,
         "tensors that share no boundaries go by elements");
  report(plan({2048, 2048, 1 << 13}, DType::float16).row_view.splits == 1, "enough channels are not split");

  const Shape huge{3, 5, int64_t(1) << 33};
  const StepPlan large = plan(huge, DType::bfloat16);
  report(large.row_view.split_vectors * large.splits >= huge.outer * large.row_view.run_vectors && is_launchable(large),
         "runs of more than 2^31 elements");
  for (const int64_t inner : {int64_t(513), int64_t(1225), (int64_t(1) << 35) + 3}) {
    const Shape shape{inner > 5000 ? 2 : 1 << 14, 2, inner};
    report(walks_runs<1>(plan_step(shape, DType::bfloat16, {0, false}, h200)), "runs of " + std::to_string(inner));
    report(walks_runs<8>(plan_step(shape, DType::bfloat16, {3, true}, h200)),
           "vectors of runs of " + std::to_string(inner));
  }
  const Shape tall{int64_t(1) << 34, 8, 1};
  const StepPlan rows = plan(tall, DType::bfloat16);
  report(rows.column_view.phase_rows * rows.splits >= tall.outer && is_launchable(rows), "more than 2^31 rows");
}

// What no group can hold: kept in part where that is worth the exchange, else in steps.
void residues() {
  const auto backward = [](const Shape& shape, const DeviceLimits& limits) {
    return plan_backward(backward_call(shape, DType::bfloat16, 0), limits);
  };
  const auto streams = [&](const Shape& shape, const DeviceLimits& limits) {
    const BackwardPlan plan = backward(shape, limits);
    const ResidentPlan& resident = plan.resident;
    if (!resident.fits || !resident.streams) return false;
    const int64_t visited = resident.step.rows ? resident.step.row_view.split_vectors / kBlockThreads
                                               : resident.step.column_view.phase_rows / resident.step.column_view.lanes;
    report(groups_can_run(resident, limits) && resident.groups.count == 1 && resident.thread_vectors % 2 == 0 &&
               visited > resident.thread_vectors && plan.sums.tiles > 0 &&
               int64_t(plan.workspace_bytes) >= group_workspace_bytes(resident.groups),
           "a group that streams");
    return true;
  };
  DeviceLimits h200 = devices[0].limits;
  const DeviceLimits &a100 = devices[1].limits, &t4 = devices[3].limits;
  const Shape tall{256 * 56 * 56, 64, 1}, wide{256 * 56 * 56, 256, 1}, taller{256 * 112 * 112, 64, 1};
  report(streams(tall, h200), "a quarter of 64 channels at 56x56 is kept");
  report(streams(wide, h200) && backward(wide, h200).resident.groups.tiles == 4, "of 256 channels, of each line");
  report(!streams(taller, h200), "a sixteenth is not worth the exchange");
  report(!streams({32 * 56 * 56, 64, 1}, h200), "what fits does not stream");
  report(streams({10, 1, 1 << 20}, a100), "one channel of 20 MB on A100");
  report(!streams({10, 1, 1 << 20}, t4), "without asynchronous copies nothing streams");
  h200.exchange_bytes = 32 << 20;
  report(!streams(wide, h200), "where an exchange costs more than it saves nothing streams");
  h200 = devices[0].limits;
  h200.cooperative = false;
  report(!streams(tall, h200), "nor where blocks cannot wait for each other");
}

void resident_groups() {
  struct Expected {
    const char* device;
    Shape shape;
    DType dtype;
    bool fits;
    Exchange exchange;
    int at_least, at_most;  // blocks of a group
    const char* why;
  };
  constexpr auto none = Exchange::none, cluster = Exchange::cluster, grid = Exchange::grid;
  constexpr DType bf16 = DType::bfloat16, f32 = DType::float32;
  const Expected expected[] = {
      {"H200", {32, 64, 1}, f32, true, none, 1, 1, "a small matrix needs one block"},
      {"H200", {24, 2048, 49}, bf16, true, none, 1, 1, "7x7 at batch 24: a tile in a block"},
      {"H200", {128, 2048, 49}, bf16, true, cluster, 8, 8, "7x7 at batch 128"},
      {"H200", {256, 2048, 49}, bf16, true, grid, 9, 10, "7x7 at batch 256: more than a cluster holds"},
      {"H200", {32, 64, 56 * 56}, bf16, true, cluster, 4, 4, "56x56 at batch 32"},
      {"H200", {256, 256, 28 * 28}, bf16, true, cluster, 8, 8, "28x28 at batch 256: the largest cluster"},
      {"H200", {256, 64, 112 * 112}, bf16, true, grid, 120, 132, "112x112 at batch 256: two groups"},
      {"H200", {256, 64, 112 * 112}, f32, true, grid, 220, 264, "the same in 32 bits: one group"},
      {"H200", {4, 128, 1024 * 1024}, bf16, true, grid, 150, 264, "a slice of 8 MB, two tensors of it: one group"},
      {"H200", {32 * 56 * 56, 64, 1}, bf16, true, grid, 40, 132, "channels last at batch 32"},
      {"H200", {256 * 112 * 112, 64, 1}, bf16, false, none, 0, 0, "channels last at batch 256 streams"},
      {"H200", {64, 3, 224 * 224}, bf16, true, grid, 190, 264, "three channels, each by the whole device"},
      {"H200", {32, 3, 224 * 224}, bf16, true, grid, 80, 88, "three channels share the device"},
      {"A100", {16, 128, 28 * 28}, bf16, true, none, 1, 1, "28x28 at batch 16 in one block"},
      {"A100", {32, 128, 28 * 28}, bf16, true, grid, 2, 3, "28x28 at batch 32 in more"},
      {"A100", {256, 256, 28 * 28}, bf16, true, grid, 10, 27, "no clusters"},
      {"RTX 4090", {256, 256, 28 * 28}, bf16, true, grid, 16, 32, "half the shared memory"},
      {"T4", {256, 256, 28 * 28}, bf16, true, grid, 26, 40, "less shared memory still"},
      {"T4", {256, 64, 112 * 112}, bf16, false, none, 0, 0, "what T4 cannot hold streams"},
      {"H200", {8, 32, 9 * 9}, bf16, true, none, 1, 1, "what the GPU tests take to be held by a block"},
      {"H200", {32, 64, 56 * 56}, bf16, true, cluster, 2, 8, "by a cluster"},
      {"H200", {32, 3, 224 * 224}, bf16, true, grid, 9, 264, "by blocks across the grid"},
      {"H200", {64, 64, 112 * 112}, bf16, true, grid, 9, 132, "by groups in turn"},
      {"H200", {33, 5, 201 * 203}, bf16, true, grid, 9, 264, "by blocks of odd runs"},
      {"H200", {9, 1, 4096 * 2048}, bf16, true, grid, 264, 264, "by all blocks in part"},
      {"H200", {24, 1, 4096 * 2048}, bf16, false, none, 0, 0, "by nothing"},
      {"H200", {int64_t(1) << 34, 8, 1}, bf16, false, none, 0, 0, "more than 2^31 rows stream"},
  };
  for (const Expected& e : expected) {
    const Device& device = *std::find_if(std::begin(devices), std::end(devices),
                                         [&](const Device& d) { return std::string(d.name) == e.device; });
    const ResidentPlan plan = plan_backward(backward_call(e.shape, e.dtype, 0), device.limits).resident;
    const bool right =
        plan.fits == e.fits && (!e.fits || (plan.groups.exchange == e.exchange && plan.groups.size >= e.at_least &&
                                            plan.groups.size <= e.at_most));
    char found[120];
    std::snprintf(found, sizeof found, ": fits %d, exchange %d, %d groups of %d for %d tiles", plan.fits,
                  static_cast<int>(plan.groups.exchange), plan.groups.count, plan.groups.size, plan.groups.tiles);
    report(right, std::string(e.device) + ", " + e.why + found);
  }

  const DeviceLimits& h200 = devices[0].limits;
  const BackwardParams call = backward_call({256, 64, 112 * 112}, DType::bfloat16, 0);
  DeviceLimits less = h200;
  less.cooperative = false;
  report(!plan_backward(call, less).resident.fits, "no groups across the grid without cooperative launches");
  DeviceLimits more = h200;
  const auto groups = [](const Shape& shape, const DeviceLimits& limits) {
    return plan_backward(backward_call(shape, DType::bfloat16, 0), limits).resident.groups;
  };
  const Shape wide{256, 2048, 49};
  for (const auto& [clusters, size, why] : {std::tuple{14, 16, "clusters of 16 where 8 blocks are too few"},
                                            std::tuple{12, 10, "no clusters of 16 that leave much of a device idle"}}) {
    more.active_clusters[3] = clusters;
    report(groups(wide, more).size == size, why);
    report(groups({128, 2048, 49}, more).size == 8, "no clusters of 16 where 8 blocks will do");
    report(groups({256, 256, 56 * 56}, more).exchange == Exchange::grid, "56x56 at batch 256 by the grid");
  }
}

void workspace() {
  for (const Device& device : devices) {
    alignas(16) static char memory[64];
    ForwardParams forward{};
    forward.shape = {32, 64, 56 * 56};
    forward.dtype = DType::bfloat16;
    forward.x = memory;
    forward.y = memory;
    forward.batch_statistics = true;
    const ForwardPlan training = plan_forward(forward, device.limits);
    if (training.resident.fits) {
      const bool refused = may_be_refused(training.resident.groups);
      report(int64_t(training.workspace_bytes) >= group_workspace_bytes(training.resident.groups) &&
                 (training.workspace_bytes > 0) == refused && (training.statistics.splits > 0) == refused,
             std::string("workspace of groups, and of steps where the device may refuse them, on ") + device.name);
    }
    forward.y = memory + 2;  // tensors that share no vectors
    const ForwardPlan streaming = plan_forward(forward, device.limits);
    report(!streaming.resident.fits && streaming.coefficients_offset % 256 == 0 &&
               streaming.coefficients_offset >= size_t(64 * 16) * streaming.statistics.splits &&
               streaming.workspace_bytes >= streaming.coefficients_offset + 64 * 12,
           std::string("forward workspace on ") + device.name);
    forward.batch_statistics = false;
    report(plan_forward(forward, device.limits).workspace_bytes == 0, "evaluation needs no workspace");
    forward.batch_statistics = true;
    forward.shape.outer = 0;
    report(plan_forward(forward, device.limits).workspace_bytes == 0, "an empty batch needs no workspace");
  }
}

// Each item of a block's threads has a place of its own, and those of a warp that are written at once lie in all banks.
template <int kSums, class Item>
void banks() {
  constexpr int kWords = sizeof(Item) / 4, kItems = kSums * kBlockThreads;
  std::vector<int> taken(kItems);
  for (int i = 0; i < kItems; ++i) ++taken.at(banked<kSums, Item>(i));
  bool once = std::all_of(taken.begin(), taken.end(), [](int n) { return n == 1; }), spread = true;
  for (int sum = 0; sum < kSums; ++sum) {
    int met[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      const int first = banked<kSums, Item>(lane * kSums + sum) * kWords;
      for (int word = first; word < first + kWords; ++word) ++met[word % 32];
    }
    spread = spread && *std::max_element(met, met + 32) == kWords;
  }
  char name[80];
  std::snprintf(name, sizeof name, "%d sums of %d words in all banks", kSums, kWords);
  report(once && spread, name);
}

// The quotients next to where they change, of all divisors.
void divisors() {
  constexpr int kMost = (1 << 16) - 1;
  bool good = true;
  for (int value = 1; value <= kMost; ++value) {
    const Divisor divisor = Divisor::of(value);
    const int last = kMost / value * value;
    for (const int dividend : {0, value - 1, value, last - 1, last, kMost}) {
      good = good && divisor.quotient(dividend) == dividend / value;
    }
  }
  report(good, "divisors divide");
}

}  // namespace

int main() {
  banks<1, Moments<float>>();
  banks<4, Moments<float>>();
  banks<8, Moments<float>>();
  banks<2, GradientPartial<double>>();
  banks<4, GradientPartial<float>>();
  banks<8, GradientPartial<float>>();
  banks<4, NormalizeCoefficients<float>>();
  banks<8, NormalizeCoefficients<float>>();
  banks<2, NormalizeCoefficients<double>>();
  banks<8, InputGradientCoefficients<float>>();
  banks<8, ActivatedGradientCoefficients<float>>();
  divisors();
  coverage();
  masks();
  fills_the_device();
  choices();
  resident_groups();
  residues();
  workspace();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
