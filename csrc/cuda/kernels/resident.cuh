// The kernel that runs all steps of a direction in one launch, where a group of blocks can keep a tile on the chip.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/kernels/finalize_statistics.cuh"
#include "cuda/kernels/pointwise.cuh"
#include "cuda/kernels/reduce.cuh"
#include "cuda/primitives/async_copy.cuh"
#include "cuda/primitives/block_group.cuh"
#include "cuda/primitives/shared_memory.cuh"
#include "cuda/primitives/tile_walk.cuh"

namespace batchnorm_ext::cuda {

// From the partial results on the group's boards to the coefficients of all the tile's channels. Partial results are
// merged in double, in the order of ranks; one block of the group saves what is to be saved of a channel.
template <int kThreads, int kSums, class Op, class Group>
__device__ __forceinline__ void merge_group(const Op& op, const Groups& groups, Group& group, const Tile& tile,
                                            typename Op::Coefficients* of_tile) {
  const int share = groups.each_merges ? tile.count : (tile.count + groups.size - 1) / groups.size;
  const int first = groups.each_merges ? 0 : group.rank() * share;
  const int count = tile.count - first < share ? tile.count - first : share;
  const bool saves = !groups.each_merges || group.rank() == 0;
  auto* const merged = groups.each_merges ? of_tile : group.board(group.rank()).coefficients;
  const auto place_of = [](int j) { return banked<kSums, typename Op::Coefficients>(j); };
  int width = 1;
  while (width < kWarp && width < groups.size) width *= 2;

  group.meet(0);
  for_channels<kThreads>(count, width, [&](int i, int lane, bool active) {
    const int j = first + i;
    const auto total = op.template fold<double>([&](int rank) { return group.board(rank).items[j]; },
                                                active ? groups.size : 0, lane, width);
    op.complete(tile.first + j, total, active && lane == 0, saves, merged + place_of(j));
  });
  if (!groups.each_merges) {
    group.meet(1);
    for (int j = static_cast<int>(threadIdx.x); j < tile.count; j += kThreads) {
      group.copy_coefficients(j / share, place_of(j), of_tile);
    }
  }
}

// Each group reads its tiles one after the other: a block copies its split once to shared memory, sums what has come,
// exchanges the sums with its group, and maps what it kept by the coefficients that follow: `reduce` and `pointwise` in
// one. Each thread keeps its own vectors, kept[place][input][word][thread]; shared are only the sums and the board.
// kStreams: a thread has places for `thread_vectors` of its vectors, a whole number of chunks, which they take in turn.
// Those that were summed last are mapped first, and their places taken by those before them, which are read again.
template <class Op, class View, int kVector, int kThreads, bool kStreams>
__global__ void __launch_bounds__(kThreads, Op::kEpilogue ? kBlocksAtOnce<typename Op::T, true> : kResidentBlocks)
    resident(const View view, const Op op, const Groups groups, int thread_vectors, int tile_channels,
             typename Op::T* output, Reuse output_reuse, const BatchCounter counter) {
  using T = typename Op::T;
  using Walk = TileWalk<View, kVector, kThreads, Op::kEpilogue>;
  using MapWalk = TileWalk<View, kVector, kThreads, Op::kEpilogue, kStreams>;
  using Item = typename Op::Item;
  using Coefficients = typename Op::Coefficients;
  using Group = BlockGroup<Item, Coefficients>;
  constexpr int kSums = kChannelsPerThread<View, kVector>;
  constexpr int kPackWords = kWords<T, kVector>;
  // One slot at a time, where nothing is waited for.
  constexpr int kCopyUnroll = kAsyncCopies ? 1 : Op::kUnroll;

  if constexpr (kStreams && !kAsyncCopies) return;  // never launched, and would spill

  const int active = Walk::active_threads(view);
  uint4* const kept = shared_memory<uint4>();
  Item* const items = reinterpret_cast<Item*>(kept + Op::kInputs * kPackWords * thread_vectors * active);
  Group group(groups, items + kSums * kThreads, tile_channels);
  Coefficients* const of_tile = typename Group::OwnBoard(items + kSums * kThreads, tile_channels).coefficients;
  const auto word_in = [&](int place, int input, int word) {
    return ((place * Op::kInputs + input) * kPackWords + word) * active + static_cast<int>(threadIdx.x);
  };
  const auto take_kept = [&](auto& packs, const auto& slots, int place) {
    for_each_word(packs, [&](auto& pack, int u, int i, int w) {
      set_word(pack, w, !slots[u].is_empty() ? kept[word_in(place + u, i, w)] : uint4{0, 0, 0, 0});
    });
  };
  const auto copy_chunk = [&](auto& walk, int index, int place, auto reuse) {
    Slot slots[kCopyUnroll];
    next_slots(walk, index, slots);
    Pack<T, kVector> packs[Op::kInputs][kCopyUnroll];
    if (kAsyncCopies && has_flags(slots[0].flags, Slot::kAtOnce)) {
      for_each_word(packs, [&](const auto&, int u, int i, int w) {
        const T* const address = op.inputs[i] + slots[u].offset;
        copy_async<decltype(reuse)::value>(kept + word_in(place + u, i, w),
                                           reinterpret_cast<const uint4*>(address) + w);
      });
    } else {
      load<decltype(reuse)::value>(packs, op.inputs, slots);
      for_each_word(packs, [&](const auto& pack, int u, int i, int w) {
        if (!slots[u].is_empty()) kept[word_in(place + u, i, w)] = word_of(pack, w);
      });
    }
    commit_copies();
  };
  constexpr std::integral_constant<Reuse, kStreams ? Reuse::soon : Reuse::none> to_sum{};
  constexpr std::integral_constant<Reuse, Reuse::none> to_map{};

#pragma unroll 1
  while (group.tile() < groups.tiles) {
    const Tile tile = Walk::tile(view, group.tile());
    if (kStreams || !kAsyncCopies || group.is_first_tile()) {
      Walk copying(view, tile, group.rank());
      const int count = kStreams && thread_vectors < copying.count() ? thread_vectors : copying.count();
      for (int index = 0; index < count; index += kCopyUnroll) copy_chunk(copying, index, index, to_sum);
    }

    Walk walk(view, tile, group.rank());
    Walk ahead = without_first(walk, kStreams ? thread_vectors : 0);
    typename Op::Accumulator sums[kSums];
    begin_sums(op, walk, tile, sums, items);
    int turning = 0;  // the place of the next vector, where places are taken in turn
    const auto sum = [&](const auto& slots, int index, const auto&... beside) {
      const int place = kStreams ? turning : index, left = walk.count() - index;
      const int under_way = kStreams && thread_vectors < left ? thread_vectors : left;
      wait_for_copies((under_way - Op::kUnroll) / kCopyUnroll);
      Pack<T, kVector> packs[Op::kInputs][Op::kUnroll];
      take_kept(packs, slots, place);
      op.accumulate(sums, packs, beside..., slots, index == 0);
      if constexpr (kStreams) {
        // A copy begins after what its thread read before, so none comes before its place was read.
#pragma unroll
        for (int u = 0; u < Op::kUnroll; ++u) {
          if (thread_vectors + u < left) copy_chunk(ahead, index + thread_vectors + u, place + u, to_sum);
        }
        turning = place + Op::kUnroll < thread_vectors ? place + Op::kUnroll : 0;
      }
    };
    if constexpr (Op::kEpilogueInSums) {
      const auto read = [&](const auto& slots) { return op.template read_to_sum<kVector>(slots); };
      for_each_chunk_beside<Op::kUnroll, Op::kReadsAhead>(walk, read, sum);
    } else {
      for_each_chunk<Op::kUnroll>(walk, sum);
    }

    group.begin_writing();
    Item* const partials = group.board(group.rank()).items;
    fold_block<kThreads>(op, walk, tile, sums, items, [&](int j, const Item& total, bool active_thread) {
      if (groups.size == 1) {
        op.complete(tile.first + j, total, active_thread, true, of_tile + banked<kSums, Coefficients>(j));
      } else if (active_thread) {
        partials[j] = total;
      }
    });
    if (groups.size > 1) merge_group<kThreads, kSums>(op, groups, group, tile, of_tile);
    __syncthreads();
    group.end_reading();  // not before: it waits for what its thread saved, and the others would wait for that too

    // What is read next, of the next tile or of this one, takes the places of what is mapped, and so comes while this
    // is stored and the group exchanges. A thread has as many vectors in each tile.
    const bool next_tile = !kStreams && kAsyncCopies && group.next_tile() < groups.tiles;
    MapWalk again(view, tile, group.rank());
    Coefficients coefficients[kSums];
    take_coefficients(coefficients, of_tile, again);
    const Tile following_tile = next_tile ? Walk::tile(view, group.next_tile()) : tile;
    MapWalk following = without_first(MapWalk(view, following_tile, group.rank()), kStreams ? thread_vectors : 0);
    const int skipped = kStreams ? thread_vectors : 0;
    turning = kStreams && again.count() > 0 ? (again.count() - 1) % thread_vectors : 0;
    const auto map = [&](const auto& slots, int index, const auto&... beside) {
      static_assert(!kAsyncCopies || Op::kMapUnroll == kCopyUnroll);
      const int place = kStreams ? turning : index;
      if constexpr (kStreams) wait_for_copies(thread_vectors - 1);
      Pack<T, kVector> packs[Op::kInputs][Op::kMapUnroll];
      take_kept(packs, slots, place);
      if constexpr (Op::kEpilogue) {
        op.map_and_store(packs, beside..., coefficients, slots, output, output_reuse);
      } else {
        map_and_store(op, packs, coefficients, slots, output, output_reuse);
      }
      if (kStreams ? index + skipped < again.count() : next_tile) {
        copy_chunk(following, index + skipped, place, to_map);
      } else if constexpr (kStreams) {
        commit_copies();  // of none: the number under way stays the same
      }
      turning = place > 0 ? place - 1 : thread_vectors - 1;
    };
    if constexpr (Op::kEpilogue) {
      const auto read = [&](const auto& slots) { return op.template read_to_map<kVector>(slots); };
      for_each_chunk_beside<Op::kMapUnroll, Op::kReadsAhead>(again, read, map);
    } else {
      for_each_chunk<Op::kMapUnroll>(again, map);
    }
    group.end_tile();
  }
  group.begin_writing();
  counter.count(!groups.each_merges || group.rank() == 0);
}

}  // namespace batchnorm_ext::cuda
