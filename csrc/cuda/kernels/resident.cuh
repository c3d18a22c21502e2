// The kernel that runs all steps of a direction in one launch, where a block can keep all of its channels on the chip.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels/pointwise.cuh"
#include "cuda/kernels/reduce.cuh"
#include "cuda/primitives/shared_memory.cuh"
#include "cuda/primitives/tile_walk.cuh"

namespace batchnorm_ext::cuda {

// How many the plan leaves shared memory for.
constexpr int kResidentBlocks = 2;

// Block `tile` reads its channels once, keeps what it read in shared memory, sums it, finalises the channels, and maps
// what it kept: `reduce` and `pointwise` in one, with the same sums to the bit as if unsplit. Each thread keeps its own
// vectors, kept[vector][input][word][thread]; shared are only the sums and the coefficients. Block 0 counts the batch
// if `num_batches_tracked` is not null; no block may then read it.
template <class Op, class View, int kVector, int kThreads>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    resident(const View view, const Op op, int thread_vectors, typename Op::T* output, int64_t* num_batches_tracked) {
  using T = typename Op::T;
  using Walk = TileWalk<View, kVector, kThreads, Op::kEpilogue>;
  using Item = typename Op::Item;
  using Coefficients = typename Op::Coefficients;
  constexpr int kSums = kChannelsPerThread<View, kVector>;
  constexpr int kPackWords = kWords<T, kVector>;

  const Tile tile = Walk::tile(view, blockIdx.x);
  Walk walk(view, tile, 0);
  const int active = walk.active_threads();
  uint4* const kept = shared_memory<uint4>();
  Item* const items = reinterpret_cast<Item*>(kept + Op::kInputs * kPackWords * thread_vectors * active);
  Coefficients* const of_tile = reinterpret_cast<Coefficients*>(items + kSums * kThreads);
  const auto place = [&](int64_t vector, int input, int word) {
    return ((static_cast<int>(vector) * Op::kInputs + input) * kPackWords + word) * active +
           static_cast<int>(threadIdx.x);
  };
  const auto each_word = [](const auto& use) {
#pragma unroll
    for (int u = 0; u < Op::kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < Op::kInputs; ++i) {
#pragma unroll
        for (int w = 0; w < kPackWords; ++w) use(u, i, w);
      }
    }
  };

  typename Op::Accumulator sums[kSums];
  begin_sums(op, walk, tile, sums);
  for_each_chunk<Op::kUnroll, kVector, Op::kEpilogueInSums>(walk, [&](const auto& slots, auto whole, int64_t index) {
    Pack<T, kVector> packs[Op::kInputs][Op::kUnroll];
    load<Reuse::none>(whole, packs, op.inputs, slots);
    each_word([&](int u, int i, int w) {
      if (whole.value || index + u < thread_vectors) kept[place(index + u, i, w)] = word_of(packs[i][u], w);
    });
    op.accumulate(whole, sums, packs, slots, index == 0);
  });

  fold_block<kThreads>(op, walk, tile, sums, items, [&](int j, const Item& total, bool active) {
    op.complete(tile.first + j, total, active, true, of_tile + j);
  });
  if (num_batches_tracked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *num_batches_tracked += 1;
  __syncthreads();

  Walk again(view, tile, 0);
  Coefficients coefficients[kSums];
  take_coefficients(coefficients, of_tile, again);
  for_each_chunk<Op::kUnroll, kVector, Op::kEpilogue>(again, [&](const auto& slots, auto whole, int64_t index) {
    Pack<T, kVector> packs[Op::kInputs][Op::kUnroll];
    each_word([&](int u, int i, int w) {
      const bool is_kept = whole.value || index + u < thread_vectors;
      set_word(packs[i][u], w, is_kept ? kept[place(index + u, i, w)] : uint4{0, 0, 0, 0});
    });
    map_and_store(op, whole, packs, coefficients, slots, output, Reuse::soon);
  });
}

}  // namespace batchnorm_ext::cuda
