// The kernel of every step that maps each element by its channel's coefficients.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/primitives/shared_memory.cuh"
#include "cuda/primitives/tile_walk.cuh"

namespace batchnorm_ext::cuda {

// A thread's coefficients, from those of its block's tile.
template <class Coefficients, class Walk, int kSets>
__device__ __forceinline__ void take_coefficients(Coefficients (&coefficients)[kSets], const Coefficients* of_tile,
                                                  const Walk& walk) {
  int channel[kSets];
  walk.channels(channel);
#pragma unroll
  for (int a = 0; a < kSets; ++a) coefficients[a] = of_tile[banked<kSets, Coefficients>(channel[a])];
}

// Maps slots that were loaded, each element by its channel's coefficients, and stores what they become.
template <class Op, class Whole, int kVector, int kInputs, int kUnroll, int kSets>
__device__ __forceinline__ void map_and_store(const Op& op, Whole whole,
                                              Pack<typename Op::T, kVector> (&packs)[kInputs][kUnroll],
                                              const typename Op::Coefficients (&coefficients)[kSets],
                                              const Slot (&slots)[kUnroll], typename Op::T* output, Reuse reuse) {
  using T = typename Op::T;
  if constexpr (Op::kEpilogue) {
    op.map_and_store(whole, packs, coefficients, slots, output, reuse);
  } else {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const auto& c = coefficients[kSets == 1 ? 0 : e];
        if constexpr (kInputs == 1) {
          packs[0][u].values[e] = narrow<T>(c(widen(packs[0][u].values[e])));
        } else {
          packs[0][u].values[e] = narrow<T>(c(widen(packs[0][u].values[e]), widen(packs[1][u].values[e])));
        }
      }
    }
    store(whole, packs[0], output, slots, reuse);
  }
}

// Block (tile, split) obtains the coefficients of a tile's channels and maps the share `split` of their elements.
// Blocks run from the tensor's end to its front: what the step before read last is still in the second-level cache.
template <class Op, class View, int kVector, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename Op::T, Op::kEpilogue>)
    pointwise(const View view, const Op op) {
  using Walk = TileWalk<View, kVector, kThreads, Op::kEpilogue>;
  using Coefficients = typename Op::Coefficients;
  constexpr int kSets = kChannelsPerThread<View, kVector>;

  const int64_t split = gridDim.y - 1 - blockIdx.y;
  const Tile tile = Walk::tile(view, gridDim.x - 1 - blockIdx.x);
  Coefficients* const of_tile = shared_memory<Coefficients>();
#pragma unroll 1
  for (int j = static_cast<int>(threadIdx.x); j < tile.count; j += kThreads) {
    of_tile[banked<kSets, Coefficients>(j)] = op.coefficients(tile.first + j, split == 0);
  }
  __syncthreads();

  Walk walk(view, tile, split);
  Coefficients coefficients[kSets];
  take_coefficients(coefficients, of_tile, walk);
  for_each_chunk<Op::kUnroll, kVector, Op::kEpilogue>(walk, [&](const auto& slots, auto whole, int) {
    Pack<typename Op::T, kVector> packs[Op::kInputs][Op::kUnroll];
    load<Reuse::none>(whole, packs, op.inputs, slots);
    map_and_store(op, whole, packs, coefficients, slots, op.output, op.output_reuse);
  });
}

}  // namespace batchnorm_ext::cuda
