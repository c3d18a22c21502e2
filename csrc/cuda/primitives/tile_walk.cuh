// Which vectors a thread visits in a view, in order, without a division per vector.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/primitives/pack.cuh"
#include "cuda/primitives/views.h"

namespace batchnorm_ext::cuda {

// The channels a block works on.
struct Tile {
  int64_t first;
  int count;
};

// Whether a vector that starts at the offset lies in the tensor.
__device__ __forceinline__ bool starts_vector(int64_t offset, int64_t vector_starts) {
  return static_cast<uint64_t>(offset) < static_cast<uint64_t>(vector_starts);
}

// A thread's way through a block's share of a tensor, from its start or backwards from its end. count() slots are
// visited by as many calls of next(); no memory is so large that a thread of a block would have 2^31 of its vectors.
// Only with an epilogue have slots numbers: those cost registers.
template <class View, int kVector, int kThreads, bool kEpilogue = false, bool kBackwards = false>
class TileWalk;

// The thread's index, where asked for read anew for each walk, as with an epilogue: what would be kept of an earlier
// one, to save a few instructions before a loop, makes registers spill in it.
template <bool kAnew>
__device__ __forceinline__ unsigned thread_of_walk() {
#if defined(__CUDACC__)
  if constexpr (kAnew) {
    unsigned index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
  }
#endif
  return threadIdx.x;
}

template <int kVector, int kThreads, bool kEpilogue, bool kBackwards>
class TileWalk<RowView, kVector, kThreads, kEpilogue, kBackwards> {
 public:
  static constexpr int kFoldWidth = 32;

  __device__ static Tile tile(const RowView&, int64_t index) { return {index, 1}; }

  __device__ TileWalk(const RowView& view, const Tile& tile, int64_t split) : view_(view) {
    const int64_t first = split * view.split_vectors + thread_of_walk<kEpilogue>();
    const int64_t all = view.shape.outer * view.run_vectors;
    const int64_t end = all < (split + 1) * view.split_vectors ? all : (split + 1) * view.split_vectors;
    count_ = first < end ? static_cast<int>((end - first + kThreads - 1) / kThreads) : 0;
    const int64_t start = first + int64_t(kBackwards ? count_ - 1 : 0) * kThreads;
    const int64_t run = start / view.run_vectors;
    const int64_t vector = start - run * view.run_vectors, left = view.run_vectors - vector;
    left_ = left < view.run_left ? static_cast<int>(left) : view.run_left - (vector == 0 ? 0 : 1);
    offset_ = (run * view.shape.channels + tile.first) * view.shape.inner + vector * kVector;
    number_ = run * view.outer_slots + tile.first * view.run_vectors + vector;
  }

  __device__ int count() const { return count_; }
  // Threads from here on visit nothing.
  __device__ static int active_threads(const RowView&) { return kThreads; }

  __device__ __forceinline__ Slot next() {
    Slot slot{offset_, Slot::elements(0, kVector) | Slot::kAtOnce, kEpilogue ? number_ : 0};
    if (!view_.whole_runs) {
      // As far as the run itself starts past a boundary, its vectors start before the places that are counted.
      const int head = static_cast<int>(offset_ + view_.misalignment) & (kVector - 1);
      // Of the run, if it ends within the vector: it may do so in the last two.
      const int end = (left_ < 3 ? left_ : 3) * kVector + view_.last_elements + head;
      slot.offset -= head;
      slot.flags = Slot::elements(left_ == view_.run_left ? head : 0, end < kVector ? end : kVector);
      samples_ += __popc(slot.flags);
      if (slot.flags != 0 && starts_vector(slot.offset, view_.vector_starts)) slot.flags |= Slot::kAtOnce;
    }
    if (kEpilogue && !view_.boundaries) slot.flags &= ~Slot::kAtOnce;
    if constexpr (kBackwards) {
      left_ += view_.step_vectors;
      offset_ -= view_.step_offset;
      if (kEpilogue) number_ -= view_.step_slots;
      if (left_ > view_.run_left) {
        left_ -= view_.run_left;
        offset_ -= view_.wrap_offset;
        if (kEpilogue) number_ -= view_.wrap_slots;
      }
      return slot;
    }
    left_ -= view_.step_vectors;
    offset_ += view_.step_offset;
    if (kEpilogue) number_ += view_.step_slots;
    if (left_ <= 0) {
      left_ += view_.run_left;
      offset_ += view_.wrap_offset;
      if (kEpilogue) number_ += view_.wrap_slots;
    }
    return slot;
  }

  // Channel, within the tile, of an element of this thread's vectors.
  __device__ void channels(int (&channel)[1]) const { channel[0] = 0; }
  // Elements visited, after the walk.
  __device__ int64_t samples(int) const { return view_.whole_runs ? int64_t(count_) * kVector : samples_; }

  // Where the sums of a channel lie among those of all threads.
  __device__ int fold_width() const { return kFoldWidth; }
  __device__ int fold_items() const { return kThreads; }
  __device__ int fold_index(int, int item) const { return item; }

 private:
  const RowView& view_;
  int count_;
  int left_;        // vectors of the run from here on; of a long one, less than there are
  int64_t offset_;  // if runs started at boundaries
  int64_t number_;
  int samples_ = 0;
};

template <int kVector, int kThreads, bool kEpilogue, bool kBackwards>
class TileWalk<ColumnView, kVector, kThreads, kEpilogue, kBackwards> {
 public:
  __device__ static Tile tile(const ColumnView& view, int64_t index) {
    const int64_t first = index * view.tile_channels;
    const int64_t left = view.shape.channels - first;
    return {first, static_cast<int>(left < view.tile_channels ? left : view.tile_channels)};
  }

  __device__ TileWalk(const ColumnView& view, const Tile& tile, int64_t split)
      : inner_(static_cast<int>(view.shape.inner)),
        row_channels_(static_cast<int>(view.outer_per_row == 1 ? tile.count : view.shape.channels)),
        channel_items_(static_cast<int>(view.outer_per_row) * inner_),
        tile_elements_(view.tile_vectors * kVector),
        lanes_(view.lanes),
        fold_width_(view.fold_width),
        elements_(view.shape.elements()),
        view_(view) {
    const int thread = static_cast<int>(thread_of_walk<kEpilogue>());
    const int lane = view.by_tile_vectors.quotient(thread);
    const int vector = thread - lane * view.tile_vectors;
    const int64_t pitch = view.pitch();
    const int part = view.by_phases.quotient(static_cast<int>(split));
    const int phase = static_cast<int>(split) - part * view.phases;
    const int64_t part_first = part * view.phase_rows;
    const int64_t left = view.all_phase_rows + (phase < view.long_phases ? 1 : 0) - part_first;
    const int end = static_cast<int>(left < view.phase_rows ? left : view.phase_rows);
    count_ = lane < view.lanes && lane < end ? (end - lane + view.lanes - 1) / view.lanes : 0;
    const int64_t start = part_first + lane + int64_t(kBackwards ? count_ - 1 : 0) * view.lanes;

    const int64_t phase_start = phase * pitch + tile.first * inner_;
    head_ = static_cast<int>(phase_start + view.misalignment) & (kVector - 1);
    column_ = vector * kVector - head_;
    const int width = row_channels_ * channel_items_;
    low_ = column_ < 0 ? -column_ : 0;
    flags_ = Slot::elements(low_, width - column_ < kVector ? width - column_ : kVector);
    offset_ = phase_start + start * view.phases * pitch + column_;
    slot_ = start * view.row_slots + tile.first * inner_ / kVector + vector;
  }

  __device__ int count() const { return count_; }
  __device__ static int active_threads(const ColumnView& view) { return view.lanes * view.tile_vectors; }

  __device__ __forceinline__ Slot next() {
    Slot slot{offset_, flags_, kEpilogue ? slot_ : 0};
    if (starts_vector(offset_, view_.vector_starts)) {
      const bool at_boundary = !kEpilogue || (view_.boundaries && offset_ % kVector == 0);
      if (flags_ != 0 && at_boundary) slot.flags |= Slot::kAtOnce;
    } else {  // the first row may begin, and the last one end, within the vector
      const int64_t left = elements_ - offset_;
      if (left < kVector) slot.flags &= Slot::elements(0, static_cast<int>(left));
    }
    offset_ += kBackwards ? -view_.step_offset : view_.step_offset;
    if (kEpilogue) slot_ += kBackwards ? -view_.step_slots : view_.step_slots;
    return slot;
  }

  __device__ void channels(int (&channel)[kVector]) const {
    const int first = column_ < 0 ? 0 : column_;
    const int run = view_.by_inner.quotient(first);
    const int within_row = run - view_.by_tile_channels.quotient(run) * static_cast<int>(view_.tile_channels);
    int position = first - run * inner_;
    int current = within_row < row_channels_ ? within_row : 0;  // of a thread past the end of the last tile: any
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      channel[e] = current;
      if (e >= low_ && ++position == inner_) {
        position = 0;
        if (++current == row_channels_) current = 0;
      }
    }
  }

  __device__ int64_t samples(int element) const {
    if ((flags_ >> element & 1u) == 0 || count_ == 0) return 0;
    return count_ - (offset_ - view_.step_offset + element >= elements_ ? 1 : 0);
  }

  __device__ int fold_width() const { return fold_width_; }
  __device__ int fold_items() const { return lanes_ * channel_items_; }
  __device__ int fold_index(int channel, int item) const {
    const int lane = view_.by_channel_items.quotient(item);
    const int within = item - lane * channel_items_;
    const int outer = view_.by_inner.quotient(within);
    return lane * tile_elements_ + head_ + (outer * row_channels_ + channel) * inner_ + (within - outer * inner_);
  }

 private:
  int inner_, row_channels_, channel_items_, tile_elements_, lanes_, fold_width_;
  int head_, column_, low_, count_;
  unsigned flags_;
  int64_t elements_, offset_, slot_;
  const ColumnView& view_;
};

// The accumulators, or sets of coefficients, that a thread keeps: one where all it visits is one channel's, else one
// for each element of its vectors.
template <class View, int kVector>
constexpr int kChannelsPerThread = View::kOneChannel ? 1 : kVector;

// Blocks that a multiprocessor should hold at once, which bounds a thread's registers: what the state of eight channels
// a thread leaves room for without spills, else enough to have more loads in flight.
template <class T, bool kEpilogue>
constexpr int kBlocksAtOnce = kEpilogue ? (sizeof(T) == 8 ? 1 : 2) : (sizeof(T) == 2 ? 2 : 3);

// Missing slots at the end are empty.
template <class Walk, int kUnroll>
__device__ __forceinline__ void next_slots(Walk& walk, int index, Slot (&slots)[kUnroll]) {
  const int count = walk.count();
  if (count - index >= kUnroll) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) slots[u] = walk.next();
    return;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) slots[u] = index + u < count ? walk.next() : Slot{0, 0, 0};
}

// The same way, but for its first slots.
template <class Walk>
__device__ __forceinline__ Walk without_first(Walk walk, int slots) {
#pragma unroll 1
  for (int i = 0; i < slots; ++i) walk.next();
  return walk;
}

// Calls visit(slots, index) with each kUnroll slots, so that their loads are in flight together; `index` counts the
// slots before these.
template <int kUnroll, class Walk, class Visit>
__device__ __forceinline__ void for_each_chunk(Walk& walk, Visit&& visit) {
  for (int index = 0; index < walk.count(); index += kUnroll) {
    Slot slots[kUnroll];
    next_slots(walk, index, slots);
    visit(slots, index);
  }
}

// As for_each_chunk, for what reads nothing else of a slot: visit(slots, packs, index), where `packs` were filled by
// load(packs, slots). The first are under way while prepare() does what must be done before any is visited.
template <int kUnroll, class Packs, class Walk, class Load, class Prepare, class Visit>
__device__ __forceinline__ void for_each_loaded_chunk(Walk& walk, Load&& load, Prepare&& prepare, Visit&& visit) {
  Slot slots[kUnroll];
  Packs packs;
  next_slots(walk, 0, slots);
  load(packs, slots);
  prepare();
  for (int index = 0; index < walk.count();) {
    visit(slots, packs, index);
    index += kUnroll;
    if (index >= walk.count()) break;
    next_slots(walk, index, slots);
    load(packs, slots);
  }
}

// As for_each_chunk, for what reads besides what is kept: visit(slots, index, beside), where `beside` is read(slots),
// with kAhead under way while the chunk before is visited.
template <int kUnroll, bool kAhead, class Walk, class Read, class Visit>
__device__ __forceinline__ void for_each_chunk_beside(Walk& walk, Read&& read, Visit&& visit) {
  if constexpr (!kAhead) {
    return for_each_chunk<kUnroll>(walk, [&](const auto& slots, int index) { visit(slots, index, read(slots)); });
  }
  Slot next[kUnroll];
  next_slots(walk, 0, next);
  auto next_beside = read(next);
#pragma unroll 1
  for (int index = 0; index < walk.count(); index += kUnroll) {
    Slot slots[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) slots[u] = next[u];
    const auto beside = next_beside;
    next_slots(walk, index + kUnroll, next);
    next_beside = read(next);
    visit(slots, index, beside);
  }
}

}  // namespace batchnorm_ext::cuda
