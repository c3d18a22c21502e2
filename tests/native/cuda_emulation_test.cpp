// The emulation's own test: what it must compute, and what it must catch.
#include <cstdio>
#include <string>
#include <vector>

#include "cooperative_groups.h"
#include "cuda_runtime.h"

namespace {

using emulation::Order;

int passed = 0, failed = 0;

void report(bool good, const char* name) {
  good ? ++passed : ++failed;
  if (!good) std::printf("FAILED %s\n", name);
}

template <class... Parameters>
void launch(unsigned blocks, unsigned threads, size_t shared_bytes, void (*kernel)(Parameters...),
            Parameters... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  if (cudaLaunchKernelEx(&config, kernel, arguments...) != cudaSuccess) throw std::runtime_error("not launched");
}

// Each thread writes a value that its neighbour reads.
__global__ void rotate_without_barrier(int* out) {
  int* const shared = reinterpret_cast<int*>(emulation::shared_memory());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}
__global__ void rotate(int* out) {
  int* const shared = reinterpret_cast<int*>(emulation::shared_memory());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// Whether some order of the threads gives another result than the ascending one.
bool differs_between_orders(void (*kernel)(int*)) {
  constexpr unsigned kBlocks = 5, kThreads = 96;
  std::vector<int> first;
  bool differs = false;
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulation::settings.order = order;
    std::vector<int> out(kBlocks * kThreads);
    launch(kBlocks, kThreads, kThreads * sizeof(int), kernel, out.data());
    if (order == Order::ascending) first = out;
    differs = differs || out != first;
  }
  return differs;
}

__global__ void warp_sums(int* out) {
  int value = static_cast<int>(threadIdx.x);
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x % 2 == 1);
  out[threadIdx.x] = value + (odd == 0xaaaaaaaau ? 0 : 1) + __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 3);
}

__global__ void different_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lanes_that_left(int* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void barrier_between_blocks(int* arrived, int* seen) {
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1);
    while (*static_cast<volatile int*>(arrived) < static_cast<int>(gridDim.x)) __nanosleep(20);
  }
  __syncthreads();
  seen[blockIdx.x * blockDim.x + threadIdx.x] = *arrived;
}

// Each block of a cluster reads what its neighbour has written.
__global__ void neighbours(int* out, int waits) {
  const auto cluster = cooperative_groups::this_cluster();
  int* const shared = reinterpret_cast<int*>(emulation::shared_memory());
  shared[threadIdx.x] = static_cast<int>(blockIdx.x * 100 + threadIdx.x);
  if (waits & 1) cluster.sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      cluster.map_shared_rank(shared, static_cast<int>((blockIdx.x + 1) % 4))[threadIdx.x];
  if (waits & 2) cluster.sync();
}

__global__ void sums_of_grid(int* values, int* out) {
  values[blockIdx.x] = static_cast<int>(blockIdx.x);
  cooperative_groups::this_grid().sync();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += values[i];
  out[blockIdx.x] = sum;
}

template <class... Parameters, class... Arguments>
bool runs(unsigned blocks, unsigned threads, cudaLaunchAttribute attribute, void (*kernel)(Parameters...),
          Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = threads * sizeof(int);
  config.attrs = &attribute;
  config.numAttrs = 1;
  try {
    return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess;
  } catch (const emulation::EmulationError&) {
    return false;
  }
}

cudaLaunchAttribute cluster_of(unsigned size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  return attribute;
}

cudaLaunchAttribute cooperative(int value) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = value;
  return attribute;
}

void blocks_together() {
  std::vector<int> out(12 * 32), expected(12 * 32), values(8), sums(8);
  for (int i = 0; i < 12 * 32; ++i) expected[i] = (i / 128 * 4 + (i / 32 + 1) % 4) * 100 + i % 32;
  report(runs(12, 32, cluster_of(4), neighbours, out.data(), 3) && out == expected, "shared memory of a cluster");
  // Without the last barrier a neighbour may have ended.
  report(!runs(12, 32, cluster_of(4), neighbours, out.data(), 1), "shared memory of an ended block is caught");
  report(!runs(12, 32, cluster_of(3), neighbours, out.data(), 3), "a block beyond its cluster is caught");
  report(!runs(10, 32, cluster_of(4), neighbours, out.data(), 3), "a part of a cluster is not launched");
  report(!runs(16, 32, cluster_of(16), neighbours, out.data(), 3), "a large cluster needs consent");

  report(runs(8, 32, cooperative(1), sums_of_grid, values.data(), sums.data()) && sums == std::vector<int>(8, 28),
         "the barrier of a grid");
  report(!runs(8, 32, cooperative(0), sums_of_grid, values.data(), sums.data()), "a grid that may not wait is caught");
  report(!runs(257, 32, cooperative(1), sums_of_grid, values.data(), sums.data()),
         "a grid that cannot be alive at once is refused");
}

bool is_refused(void (*kernel)(int*)) {
  std::vector<int> out(64);
  try {
    launch(1, 64, 0, kernel, out.data());
  } catch (const emulation::EmulationError&) {
    return true;
  }
  return false;
}

// Copies in three groups, of which it waits for all but `pending`, and reads the second.
__global__ void copies(const int* in, int* out, int pending, bool waits_at_last) {
  int* const shared = reinterpret_cast<int*>(emulation::shared_memory()) + threadIdx.x * 3;
  for (int i = 0; i < 3; ++i) {
    emulation::copy_async(shared + i, in + i, sizeof(int));
    emulation::commit_copies();
  }
  emulation::wait_for_copies(static_cast<unsigned>(pending));
  out[threadIdx.x] = shared[1];
  if (waits_at_last) emulation::wait_for_copies(0);
}

void asynchronous_copies() {
  const std::vector<int> in = {7, 8, 9};
  const auto second = [&](int pending) {
    std::vector<int> out(32);
    launch(1, 32, 3 * 32 * sizeof(int), copies, in.data(), out.data(), pending, true);
    return out[5];
  };
  report(second(0) == 8 && second(1) == 8 && second(2) != 8, "copies come when their group is waited for");
  bool caught = false;
  try {
    std::vector<int> out(32);
    launch(1, 32, 3 * 32 * sizeof(int), copies, in.data(), out.data(), 1, false);
  } catch (const emulation::EmulationError&) {
    caught = true;
  }
  report(caught, "a thread that ends before its copies have come is caught");
  report(is_refused([](int* out) { emulation::copy_async(out + 1, out + 4, 2 * sizeof(int)); }),
         "copies off boundaries are caught");
}

bool blocks_meet(unsigned blocks) {
  int arrived = 0;
  std::vector<int> seen(blocks * 32, -1);
  launch(blocks, 32, 0, barrier_between_blocks, &arrived, seen.data());
  return seen == std::vector<int>(blocks * 32, static_cast<int>(blocks));
}

}  // namespace

int main() {
  report(differs_between_orders(rotate_without_barrier), "a missing barrier shows as a difference between orders");
  report(!differs_between_orders(rotate), "with the barrier all orders agree");

  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulation::settings.order = order;
    std::vector<int> out(64);
    launch(1, 64, 0, warp_sums, out.data());
    bool right = true;
    for (int t = 0; t < 64; ++t) right = right && out[t] == (t < 32 ? 496 + 3 : 1520 + 35);
    report(right, "shuffles and ballots of each warp");
    report(is_refused(different_barriers), "threads at different barriers are caught");
    report(is_refused(lanes_that_left), "waiting for lanes that have ended is caught");

    blocks_together();
    asynchronous_copies();

    emulation::settings.live_blocks = 4;
    report(blocks_meet(4), "blocks that are alive at once can wait for each other");
    bool caught = false;
    try {
      blocks_meet(5);
    } catch (const emulation::EmulationError&) {
      caught = true;
    }
    report(caught, "blocks that wait for one that cannot start are caught");
  }

  cudaLaunchConfig_t config{};
  config.gridDim = dim3(0);
  config.blockDim = dim3(32);
  report(cudaLaunchKernelEx(&config, different_barriers, nullptr) == cudaErrorInvalidConfiguration,
         "an empty grid is refused");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
