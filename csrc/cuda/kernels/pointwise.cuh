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
template <class Op, int kVector, int kInputs, int kUnroll, int kSets>
__device__ __forceinline__ void map_and_store(const Op& op, Pack<typename Op::T, kVector> (&packs)[kInputs][kUnroll],
                                              const typename Op::Coefficients (&coefficients)[kSets],
                                              const Slot (&slots)[kUnroll], typename Op::T* output, Reuse reuse) {
  using T = typename Op::T;
  if constexpr (Op::kEpilogue) {
    op.map_and_store(packs, coefficients, slots, output, reuse);
  } else {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      accumulate_t<T> values[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const auto& c = coefficients[kSets == 1 ? 0 : e];
        if constexpr (kInputs == 1) {
          values[e] = c(widen(packs[0][u].values[e]));
        } else {
          values[e] = c(widen(packs[0][u].values[e]), widen(packs[1][u].values[e]));
        }
      }
      narrow_all(packs[0][u], values);
    }
    store(packs[0], output, slots, reuse);
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
  Walk walk(view, tile, split);
  Coefficients* const of_tile = shared_memory<Coefficients>();
  Coefficients coefficients[kSets];
  const auto load_inputs = [&](auto& packs, const auto& slots) { load<Reuse::none>(packs, op.inputs, slots); };
  const auto prepare = [&] {
#pragma unroll 1
    for (int j = static_cast<int>(threadIdx.x); j < tile.count; j += kThreads) {
      of_tile[banked<kSets, Coefficients>(j)] = op.coefficients(tile.first + j, split == 0);
    }
    __syncthreads();
    take_coefficients(coefficients, of_tile, walk);
  };
  using Packs = Pack<typename Op::T, kVector>[Op::kInputs][Op::kUnroll];
  for_each_loaded_chunk<Op::kUnroll, Packs>(walk, load_inputs, prepare, [&](const auto& slots, auto& packs, int) {
    map_and_store(op, packs, coefficients, slots, op.output, op.output_reuse);
  });
}

}  // namespace batchnorm_ext::cuda
