// The kernel of every sum over a channel: its own sums per thread, folded per block, one partial result per split.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/primitives/group_sum.cuh"
#include "cuda/primitives/shared_memory.cuh"
#include "cuda/primitives/tile_walk.cuh"

namespace batchnorm_ext::cuda {

// Calls use(j, lane, active) for each j below count, by `width` threads each, a power of two up to the size of a warp,
// which have the lanes 0 to width - 1. Whole warps call it: what is not active has no j.
template <int kThreads, class Use>
__device__ __forceinline__ void for_channels(int count, int width, Use&& use) {
  const int thread = static_cast<int>(threadIdx.x), bits = log2_of(width);
  const int lane = thread & (width - 1), own = thread >> bits, warp_first = thread / kWarp * kWarp >> bits;
  for (int first = 0; first + warp_first < count; first += kThreads >> bits) {
    use(first + own, lane, first + own < count);
  }
}

// Brings the sums of a block's threads together: calls complete(j, total, active) for each channel j of the tile, by
// whole warps, with the same total in every thread of a channel; `active` in one of them. `items` is shared memory for
// one item of each sum of each thread.
template <int kThreads, class Op, class Walk, int kSums, class Complete>
__device__ __forceinline__ void fold_block(const Op& op, const Walk& walk, const Tile& tile,
                                           const typename Op::Accumulator (&sums)[kSums], typename Op::Item* items,
                                           Complete&& complete) {
  const auto item = [items](int i) -> auto& { return items[banked<kSums, typename Op::Item>(i)]; };
  const int thread = static_cast<int>(thread_of_walk<(kSums > 1)>());  // read anew: places that are kept make spills
  typename Op::Item own[kSums];  // read together, and stored together: between them are branches
#pragma unroll
  for (int a = 0; a < kSums; ++a) own[a] = item(thread * kSums + a);
#pragma unroll
  for (int a = 0; a < kSums; ++a) own[a] = op.item(sums[a], walk.samples(a), own[a]);
#pragma unroll
  for (int a = 0; a < kSums; ++a) item(thread * kSums + a) = own[a];
  __syncthreads();

  for_channels<kThreads>(tile.count, walk.fold_width(), [&](int j, int lane, bool active) {
    const auto total = op.template fold<typename Op::A>([&](int i) { return item(walk.fold_index(j, i)); },
                                                        active ? walk.fold_items() : 0, lane, walk.fold_width());
    complete(j, total, active && lane == 0);
  });
}

// The place of each item keeps until then what the operation wants to know again of its channel.
template <class Op, class Walk, int kSums>
__device__ __forceinline__ void begin_sums(const Op& op, const Walk& walk, const Tile& tile,
                                           typename Op::Accumulator (&sums)[kSums], typename Op::Item* items) {
  const int thread = static_cast<int>(thread_of_walk<(kSums > 1)>());
  int channel[kSums];
  walk.channels(channel);
  typename Op::Channel of_channel[kSums];
#pragma unroll
  for (int a = 0; a < kSums; ++a) of_channel[a] = op.read(tile.first + channel[a]);
#pragma unroll
  for (int a = 0; a < kSums; ++a) sums[a] = op.begin(of_channel[a]);
#pragma unroll
  for (int a = 0; a < kSums; ++a) op.keep(sums[a], items[banked<kSums, typename Op::Item>(thread * kSums + a)]);
}

// Block (tile, split) reads the share `split` of a tile's channels and hands each channel's sums to op.finish: what
// becomes of them is the operation's, as is what a sum is. Order of summation: by thread in the order of the walk, then
// over the threads of a channel, so results do not depend on how blocks are scheduled.
template <class Op, class View, int kVector, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename Op::T, Op::kEpilogue>)
    reduce(const View view, const Op op) {
  using Walk = TileWalk<View, kVector, kThreads, Op::kEpilogue>;
  const Tile tile = Walk::tile(view, blockIdx.x);
  Walk walk(view, tile, blockIdx.y);
  typename Op::Accumulator sums[kChannelsPerThread<View, kVector>];
  auto* const items = shared_memory<typename Op::Item>();
  const auto load_inputs = [&](auto& packs, const auto& slots) { load<Op::kReuse>(packs, op.inputs, slots); };
  using Packs = Pack<typename Op::T, kVector>[Op::kInputs][Op::kUnroll];
  for_each_loaded_chunk<Op::kUnroll, Packs>(
      walk, load_inputs, [&] { begin_sums(op, walk, tile, sums, items); },
      [&](const auto& slots, auto& packs, int index) { op.accumulate(sums, packs, slots, index == 0); });

  fold_block<kThreads>(op, walk, tile, sums, items, [&](int j, const typename Op::Item& total, bool active) {
    op.finish(tile.first + j, blockIdx.y, total, active);
  });
}

}  // namespace batchnorm_ext::cuda
