// How groups of blocks, blocks and threads divide a tensor [outer][channels][inner], as plain sizes chosen by the host.
#pragma once

#include <cstdint>

#include "core/formulas.h"
#include "core/params.h"

namespace batchnorm_ext::cuda {

// A vector is the 16 bytes, or the single element, that a thread loads at once. Every tensor of a call lies at the same
// distance from a vector boundary: `misalignment` elements past one. Vectors are counted from the boundary, so the
// first and the last one of a run may reach over its ends: neighbours of the run are then read with it, but only where
// the vector reaches over the ends of the tensor, it is read element by element.

// With an epilogue a slot is eight elements, a byte of its mask, whatever the type and wherever the tensors lie. Slots
// are counted from the front of the tensor, or from the front of each row where rows are no multiple of eight.
constexpr int kEpilogueVector = 8;

// Divides numbers below 2^16 by one that the host knew, with a multiplication; a division takes some twenty
// instructions.
struct Divisor {
  uint32_t reciprocal;  // rounded down, which the one that is added to the dividend makes up for

  static Divisor of(int64_t value) { return {static_cast<uint32_t>(0xffffffffu / value)}; }

  BN_HOST_DEVICE int quotient(int dividend) const {
    return static_cast<int>(uint64_t(static_cast<uint32_t>(dividend) + 1) * reciprocal >> 32);
  }
};

// Long runs. Block (channel, split) takes a contiguous share of the vectors of one channel's `outer` runs.
struct RowView {
  static constexpr bool kOneChannel = true;

  Shape shape;
  int64_t misalignment;
  int64_t vector_starts;  // offsets, from the front, at which there is still a vector of elements
  int64_t run_vectors;    // that cover any run, wherever it starts
  int64_t split_vectors;
  int64_t splits;
  bool whole_runs;    // they start and end at vector boundaries
  int last_elements;  // of a run that starts at a boundary, in the last of its vectors, less those of a vector
  // To a thread's next vector: by how many of its run and how many elements; once it has left the run, how many more.
  int step_vectors;
  int run_left;  // run_vectors, or a number that no thread leaves a run by: a split has fewer vectors of a tile
  int64_t step_offset, wrap_offset;
  // Of an epilogue. Each run has slots of its own, also where runs share a vector.
  int64_t outer_slots, step_slots, wrap_slots;  // of one outer index; the same ways, in slots
  bool boundaries;                              // every tensor starts at a vector boundary
};

// Short runs and inner == 1. The tensor is a matrix whose rows are `outer_per_row` of the `outer` indices, so that rows
// start at vector boundaries although a single index would not. A tile is a range of channels of a row; each thread
// keeps one vector of columns of its tile and walks down the rows. Where rows start at different distances from a
// vector boundary, the rows of a split are those of one `phase`, `phases` apart, which start at the same.
struct ColumnView {
  static constexpr bool kOneChannel = false;

  Shape shape;
  int64_t misalignment;
  int64_t vector_starts;  // as in RowView
  int64_t outer_per_row;
  int64_t tile_channels;   // all of them when outer_per_row > 1
  int64_t all_phase_rows;  // rows that each phase has
  int64_t phase_rows;      // rows a split takes of its phase
  int64_t splits;          // phases * splits of a phase; split s has phase s % phases
  int phases;
  int long_phases;      // the first of the phases, which have a row more
  int tile_vectors;     // that cover a row of a tile, wherever it starts
  int lanes;            // rows that a block works on at once
  int64_t step_offset;  // to a thread's next vector, in elements: `lanes` rows of its phase
  int fold_width;       // threads that fold one channel's sums of a block: a power of two up to the size of a warp
  Divisor by_phases, by_tile_vectors, by_inner, by_tile_channels, by_channel_items;  // items: elements in a row
  // Of an epilogue.
  int64_t row_slots, step_slots;  // of one row; of `lanes` of them
  bool boundaries;                // every tensor starts at a vector boundary

  BN_HOST_DEVICE int64_t pitch() const { return outer_per_row * shape.channels * shape.inner; }
};

// Where a tile is held by several blocks at once, they form a group: neighbours in the grid, each with the split of its
// rank. Group g works on the tiles g, g + count, ...
enum class Exchange : int {
  none,     // groups of one block
  cluster,  // through each other's shared memory
  grid,     // through a workspace, in a cooperative launch
};

// Blocks of `resident` that share a multiprocessor's memory. Where they are of different groups, one computes and
// exchanges while the other copies.
constexpr int kResidentBlocks = 2;

struct Groups {
  Exchange exchange;
  int size;          // blocks of a group
  int count;         // groups
  int tiles;         // of all groups
  bool each_merges;  // every block merges all partial results it needs; else each merges a share of them for all
  int board_bytes;   // of what a block shows to its group, in the workspace
  void* workspace;   // of Exchange::grid
};

constexpr int64_t kWorkspaceLine = 128;  // what must not be shared: a group's counter, the start of a board

// The workspace holds a counter for each group, then two boards for each block, used in turn.
BN_HOST_DEVICE int64_t group_workspace_bytes(const Groups& groups) {
  return groups.exchange == Exchange::grid
             ? groups.count * (kWorkspaceLine + 2 * int64_t(groups.size) * groups.board_bytes)
             : 0;
}

// A split's part of a channel's gradient sums: sum(dy) and sum(dy * (x - mean)).
template <class A>
struct GradientPartial {
  A sum_dy, sum_dy_xmu;
};

// What an element's gradients follow from behind an epilogue.
template <class A>
struct ActivatedGradientCoefficients {
  NormalizeCoefficients<A> normalize;
  A mean_dy, x_scale;  // of InputGradientCoefficients; its dy_scale is normalize.scale

  BN_HOST_DEVICE A input_gradient(A gradient, A deviation) const {
    return InputGradientCoefficients<A>{A(0), normalize.scale, mean_dy, x_scale}(gradient, deviation);
  }
  BN_HOST_DEVICE A input_gradient(A gradient) const { return gradient * normalize.scale; }
};

}  // namespace batchnorm_ext::cuda
