// What is launched for a call: a pure function of shape, dtype, alignment and the device's limits. Needs no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "core/params.h"
#include "cuda/primitives/views.h"

namespace batchnorm_ext::cuda {

constexpr int kClusterSizes = 4;  // 2, 4, 8 and 16 blocks

struct DeviceLimits {
  // 10 * major + minor, of the code: what the driver has translated from code for an earlier device lacks what came
  // later.
  int compute_capability;
  int multiprocessors;
  int threads_per_multiprocessor;
  int64_t shared_bytes_per_block;
  int64_t shared_bytes_per_multiprocessor;
  int64_t l2_bytes;
  bool cooperative;  // launches whose blocks may wait for each other
  // Clusters of each size that run at once when each block takes half of a multiprocessor; 0: none may, or
  // the kernels were compiled for devices without.
  int active_clusters[kClusterSizes];
  // Blocks that wait for each other leave the memory idle for about as long as it takes to move this much.
  int64_t exchange_bytes = 8 << 20;
};

// Shared memory of a block of `resident`, at the most.
int64_t resident_shared_bytes(const DeviceLimits& limits);

constexpr int kBlockThreads = 256;
constexpr int kFinalizeThreads = 128;
constexpr int kPortableCluster = 8;  // larger ones need a kernel's consent
constexpr int kClusterCapability = 90;
constexpr int kAsyncCopyCapability = 80;

// How the tensors of a step lie in memory: `misalignment` elements past a vector boundary, if `common` to all of them;
// else they share no vectors and are read and written element by element.
struct Alignment {
  int64_t misalignment;
  bool common;
};
Alignment alignment_of(DType dtype, std::initializer_list<const void*> tensors);

// One launch of `reduce` or `pointwise`: the view and the grid (tiles, splits).
struct StepPlan {
  int vector;    // elements of a slot
  bool vectors;  // whether slots that are whole start at vector boundaries, in every tensor
  bool rows;     // which of the views
  RowView row_view;
  ColumnView column_view;
  int64_t tiles, splits;

  int64_t tile_channels() const { return rows ? 1 : column_view.tile_channels; }
  // For the coefficients of a tile, which change places within as many as a thread has.
  int64_t coefficient_places() const { return rows ? 1 : (column_view.tile_channels + vector - 1) / vector * vector; }
};
// With an epilogue, which slots there are follows from the shape and the dtype alone, so that a mask is the same in
// forward and backward.
StepPlan plan_step(const Shape& shape, DType dtype, const Alignment& alignment, const DeviceLimits& limits,
                   bool epilogue = false);
// Whether an epilogue may be part of `resident`: of double it wants more registers than there are.
constexpr bool resident_has_epilogue(DType dtype) {
  return dtype != DType::float64;
}
bool has_epilogue(const ForwardParams& params);
bool has_epilogue(const BackwardParams& params);

// Slots that `resident` sums at once, at the most. Where it streams, threads keep whole chunks.
constexpr int kForwardChunk = 4, kBackwardChunk = 2;

// Whether the device may refuse groups that its limits allow: across the grid they need all of it, which something else
// may have a part of, and clusters above the portable size are promised by none.
constexpr bool may_be_refused(const Groups& groups) {
  return groups.exchange == Exchange::grid || (groups.exchange == Exchange::cluster && groups.size > kPortableCluster);
}

// One launch of `resident`, where a group of blocks can keep a tile of each of the inputs in their shared memory, or
// enough of one that the rest is worth reading again. Two blocks share a multiprocessor.
struct ResidentPlan {
  bool fits;
  bool streams;                            // a thread visits more than it keeps
  StepPlan step;                           // a split is a block's share
  Groups groups;                           // without the workspace
  int64_t thread_vectors;                  // that a thread keeps
  size_t shared_bytes, most_shared_bytes;  // of a block of this launch, and of any on the device
};

// Workspace: that of the groups, or the partial results of the reducing step and then the coefficients of the mapping
// step; room for either where both are planned.
struct ForwardPlan {
  ResidentPlan resident;  // if it fits, instead of the steps; those are planned too where the device may refuse it
  StepPlan statistics, normalize;
  size_t coefficients_offset, workspace_bytes;
};
struct BackwardPlan {
  ResidentPlan resident;  // as in ForwardPlan
  StepPlan sums, input_gradient;
  bool needs_sums, needs_input_gradient;  // which of the two steps run; evaluation mode has both in the first
  size_t coefficients_offset, workspace_bytes;
};
ForwardPlan plan_forward(const ForwardParams& params, const DeviceLimits& limits);
BackwardPlan plan_backward(const BackwardParams& params, const DeviceLimits& limits);

// Whether what a step writes would only push from the second-level cache what is needed sooner.
bool streams_past_l2(const Shape& shape, DType dtype, const DeviceLimits& limits);

}  // namespace batchnorm_ext::cuda
