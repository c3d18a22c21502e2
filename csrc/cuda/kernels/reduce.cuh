// The kernel of every sum over a channel: its own sums per thread, folded per block, one partial result per split.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/primitives/group_sum.cuh"
#include "cuda/primitives/shared_memory.cuh"
#include "cuda/primitives/tile_walk.cuh"

namespace batchnorm_ext::cuda {

// Block (tile, split) reads the share `split` of a tile's channels and hands each channel's sums to op.finish: what
// becomes of them is the operation's, as is what a sum is. Order of summation: by thread in the order of the walk, then
// over the threads of a channel, so results do not depend on how blocks are scheduled.
template <class Op, class View, int kVector, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename Op::T, View>) reduce(const View view, const Op op) {
  using Walk = TileWalk<View, kVector, kThreads>;
  using Item = typename Op::Item;
  constexpr int kSums = kChannelsPerThread<View, kVector>;

  const Tile tile = Walk::tile(view, blockIdx.x);
  Walk walk(view, tile, blockIdx.y);
  typename Op::Accumulator sums[kSums];
  int channel[kSums];
  walk.channels(channel);
#pragma unroll
  for (int a = 0; a < kSums; ++a) sums[a] = op.begin(tile.first + channel[a]);

  for_each_chunk<Op::kUnroll, kVector>(walk, [&](const auto& slots, auto whole, bool first) {
    op.template accumulate<decltype(whole)::value, kVector>(sums, slots, first);
  });

  Item* const items = shared_memory<Item>();
  walk.channels(channel);
#pragma unroll
  for (int a = 0; a < kSums; ++a)
    items[threadIdx.x * kSums + a] = op.item(sums[a], walk.samples(a), tile.first + channel[a]);
  __syncthreads();

  const int width = walk.fold_width();
  const int lane = static_cast<int>(threadIdx.x) % width;
  const int warp_first = static_cast<int>(threadIdx.x) / kWarp * kWarp / width;
  const int own = static_cast<int>(threadIdx.x) / width;
  for (int first = 0; first + warp_first < tile.count; first += kThreads / width) {
    const int j = first + own;
    const bool active = j < tile.count;
    const Item total =
        op.fold([&](int i) { return items[walk.fold_index(j, i)]; }, active ? walk.fold_items() : 0, lane, width);
    op.finish(tile.first + j, blockIdx.y, total, active && lane == 0);
  }
}

}  // namespace batchnorm_ext::cuda
