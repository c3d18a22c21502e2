// Groups of blocks: what a block shows to the others of its group, and how they meet.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/primitives/views.h"

namespace batchnorm_ext::cuda {

// What a block shows of its tile: the partial results of its split, and the coefficients of channels it has finalised.
template <class Item, class Coefficients>
struct Board {
  Item* items;
  Coefficients* coefficients;

  __device__ Board(void* start, int channels)
      : items(static_cast<Item*>(start)), coefficients(reinterpret_cast<Coefficients*>(items + channels)) {}
};

// A block's place among the blocks that hold a tile with it. All threads of all blocks of a group call the same
// functions in the same order: for each tile begin_writing, meet once or more, end_reading; at last begin_writing,
// since no block may end while others read its shared memory.
//
// Of Exchange::grid the workspace may hold anything before the launch: the first meeting of all is the barrier that the
// cooperative launch brings, and makes the zeroed counters visible, which later meetings count up. So nothing is kept
// from launch to launch, and launches on several streams, or of several graphs, have nothing in common.
template <class Item, class Coefficients>
class BlockGroup {
 public:
  using OwnBoard = Board<Item, Coefficients>;

  // `board` is in shared memory, at the same place in each block.
  __device__ BlockGroup(const Groups& groups, void* board, int board_channels)
      : groups_(groups), shared_board_(board), board_channels_(board_channels) {
    if (groups.exchange == Exchange::grid && rank() == 0 && threadIdx.x == 0) *counter() = 0;
  }

  __device__ int rank() const { return static_cast<int>(blockIdx.x % static_cast<unsigned>(groups_.size)); }
  // The tile whose turn it is; none when not less than groups.tiles.
  __device__ int tile() const { return index() + turn_ * groups_.count; }
  __device__ int next_tile() const { return tile() + groups_.count; }
  __device__ bool is_first_tile() const { return turn_ == 0; }

  __device__ OwnBoard board(int rank) const {
    if (groups_.exchange == Exchange::grid) {
      const int64_t place = int64_t((turn_ & 1) * groups_.count + index()) * groups_.size + rank;
      return {
          static_cast<char*>(groups_.workspace) + int64_t(groups_.count) * kWorkspaceLine + place * groups_.board_bytes,
          board_channels_};
    }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (groups_.exchange == Exchange::cluster) {
      return {cooperative_groups::this_cluster().map_shared_rank(static_cast<char*>(shared_board_), rank),
              board_channels_};
    }
#endif
    return {shared_board_, board_channels_};
  }

  // Those at a place on the board of `rank`. What is in this block's own shared memory stays as it is: others may
  // be reading it.
  __device__ __forceinline__ void copy_coefficients(int rank, int place, Coefficients* own) const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (groups_.exchange == Exchange::cluster && rank == this->rank()) return;
#endif
    own[place] = board(rank).coefficients[place];
  }

  // Waits until no one reads this block's board any more.
  __device__ __forceinline__ void begin_writing() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (groups_.exchange == Exchange::cluster && turn_ > 0) cooperative_groups::this_cluster().barrier_wait();
#endif
  }

  // What any block of the group wrote before, all see after. `before` counts the meetings for this tile so far.
  __device__ __forceinline__ void meet(int before) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (groups_.exchange == Exchange::cluster) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    const int meetings = turn_ * (groups_.each_merges ? 1 : 2) + before;
    if (meetings == 0) {
      cooperative_groups::this_grid().sync();
    } else {
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter(), 1u);
        while (*static_cast<volatile unsigned*>(counter()) < static_cast<unsigned>(meetings * groups_.size)) {
          __nanosleep(20);
        }
        __threadfence();
      }
      __syncthreads();
    }
  }

  // This block reads no more boards of the present tile. Those in the workspace may only be written again two tiles
  // later, after a meeting that none reaches before it has read them.
  __device__ __forceinline__ void end_reading() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (groups_.exchange == Exchange::cluster) cooperative_groups::this_cluster().barrier_arrive();
#endif
  }

  __device__ void end_tile() { ++turn_; }

 private:
  __device__ int index() const { return static_cast<int>(blockIdx.x / static_cast<unsigned>(groups_.size)); }
  __device__ unsigned* counter() const {
    return reinterpret_cast<unsigned*>(static_cast<char*>(groups_.workspace) + int64_t(index()) * kWorkspaceLine);
  }

  const Groups& groups_;
  void* shared_board_;
  int board_channels_;
  int turn_ = 0;
};

}  // namespace batchnorm_ext::cuda
