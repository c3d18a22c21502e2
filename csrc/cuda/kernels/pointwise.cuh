// The kernel of every step that maps each element by its channel's coefficients.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/primitives/shared_memory.cuh"
#include "cuda/primitives/tile_walk.cuh"

namespace batchnorm_ext::cuda {

// Block (tile, split) obtains the coefficients of a tile's channels and maps the share `split` of their elements.
// Blocks run from the tensor's end to its front: what the step before read last is still in the second-level cache.
template <class Op, class View, int kVector, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename Op::T, View>)
    pointwise(const View view, const Op op) {
  using T = typename Op::T;
  using Walk = TileWalk<View, kVector, kThreads>;
  using Coefficients = typename Op::Coefficients;
  constexpr int kSets = kChannelsPerThread<View, kVector>;
  constexpr int kUnroll = Op::kInputs == 1 ? 4 : 2;

  const int64_t split = gridDim.y - 1 - blockIdx.y;
  const Tile tile = Walk::tile(view, gridDim.x - 1 - blockIdx.x);
  Coefficients* const of_tile = shared_memory<Coefficients>();
  for (int j = static_cast<int>(threadIdx.x); j < tile.count; j += kThreads) {
    of_tile[j] = op.coefficients(tile.first + j, split == 0);
  }
  __syncthreads();

  Walk walk(view, tile, split);
  int channel[kSets];
  walk.channels(channel);
  Coefficients coefficients[kSets];
#pragma unroll
  for (int a = 0; a < kSets; ++a) coefficients[a] = of_tile[channel[a]];

  for_each_chunk<kUnroll, kVector>(walk, [&](const auto& slots, auto whole, bool) {
    constexpr bool kWhole = decltype(whole)::value;
    Pack<T, kVector> packs[Op::kInputs][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < Op::kInputs; ++i) load<kWhole, Reuse::none>(packs[i][u], op.inputs[i], slots[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const Coefficients& c = coefficients[kSets == 1 ? 0 : e];
        if constexpr (Op::kInputs == 1) {
          packs[0][u].values[e] = narrow<T>(c(widen(packs[0][u].values[e])));
        } else {
          packs[0][u].values[e] = narrow<T>(c(widen(packs[0][u].values[e]), widen(packs[1][u].values[e])));
        }
      }
      store<kWhole>(packs[0][u], op.output, slots[u], op.output_reuse);
    }
  });
}

}  // namespace batchnorm_ext::cuda
