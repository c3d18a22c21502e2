// What the plan of the CUDA kernels rests on, measured: bandwidths, clusters, meetings of blocks, rows of a tile, L2.
// Prints the JSON object of the experiment that is its argument. `device_limits.py` compiles and runs it.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "cuda/primitives/block_group.cuh"
#include "cuda/primitives/shared_memory.cuh"

namespace {

using batchnorm_ext::cuda::BlockGroup;
using batchnorm_ext::cuda::Exchange;
using batchnorm_ext::cuda::Groups;
using batchnorm_ext::cuda::shared_memory;

constexpr int kRepeats = 7;
constexpr int64_t kLarge = int64_t(1) << 30;  // bytes, far more than any cache

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

cudaStream_t stream;
cudaDeviceProp device;

// The median of microseconds that `work` takes on the device, after a first time that does not count.
double microseconds(const std::function<void()>& work) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i <= kRepeats; ++i) {
    float milliseconds = 0;
    CHECK(cudaEventRecord(start, stream));
    work();
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&milliseconds, start, end));
    if (i > 0) times.push_back(milliseconds);
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return 1e3 * times[times.size() / 2];
}

struct Launch {
  int blocks, threads;
  size_t shared_bytes = 0;
  int cluster = 1;
  bool cooperative = false;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.blocks);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  if (how.shared_bytes > 48 * 1024) {
    CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes)));
  }
  if (how.cluster > 1) {
    if (how.cluster > 8) CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = how.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.numAttrs = 1;
  } else if (how.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// ---- Bandwidth by what is moved and by blocks of a multiprocessor

// Reads `kReads` tensors and writes their sum to one, or nothing, four 16-byte vectors a thread at a time.
template <int kReads, bool kWrites>
__global__ void move(const uint4* a, const uint4* b, uint4* out, int64_t vectors, uint4* never) {
  constexpr int kUnroll = 4;
  uint4 total{0, 0, 0, 0};
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += kUnroll * step) {
    uint4 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * step >= vectors) continue;
      values[u] = __ldcs(a + i + u * step);
      if (kReads == 2) {
        const uint4 other = __ldcs(b + i + u * step);
        values[u] = {values[u].x + other.x, values[u].y + other.y, values[u].z + other.z, values[u].w + other.w};
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * step >= vectors) continue;
      if (kWrites) {
        __stcs(out + i + u * step, values[u]);
      } else {
        total = {total.x + values[u].x, total.y ^ values[u].y, total.z + values[u].z, total.w ^ values[u].w};
      }
    }
  }
  if (!kWrites && total.x == 0x12345678u && total.y == 0x9abcdefu) *never = total;
}

// Shared memory of a block so that a multiprocessor holds just so many.
size_t share_of_multiprocessor(int blocks) {
  return std::min<size_t>(device.sharedMemPerBlockOptin, device.sharedMemPerMultiprocessor / blocks - 1024);
}

void bandwidth(uint4* a, uint4* b, uint4* out) {
  std::printf("\"bandwidth_gb_s\": [");
  const char* separator = "";
  const int64_t vectors = kLarge / 16;
  for (const int per_multiprocessor : {1, 2}) {
    for (const int threads : {256, 512}) {
      const Launch how{device.multiProcessorCount * per_multiprocessor, threads,
                       share_of_multiprocessor(per_multiprocessor)};
      const auto rate = [&](int tensors, const auto& kernel) {
        return tensors * kLarge / 1e3 / microseconds([&] { CHECK(launch(how, kernel, a, b, out, vectors, out)); });
      };
      std::printf("%s{\"blocks\": %d, \"threads\": %d, \"read\": %.1f, \"copy\": %.1f, \"two_reads_one_write\": %.1f}",
                  separator, per_multiprocessor, threads, rate(1, move<1, false>), rate(2, move<1, true>),
                  rate(3, move<2, true>));
      separator = ", ";
    }
  }
  std::printf("]");
}

// ---- Clusters that fit

__global__ void nothing() {}

void clusters() {
  std::printf("\"active_clusters\": [");
  const char* separator = "";
  for (const int blocks : {1, 2}) {
    for (const int size : {2, 4, 8, 16}) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = size;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(size);
      config.blockDim = dim3(256);
      config.dynamicSmemBytes = share_of_multiprocessor(blocks);
      config.attrs = &attribute;
      config.numAttrs = 1;
      int count = 0;
      CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(config.dynamicSmemBytes)));
      if (device.major >= 9) CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      if (cudaOccupancyMaxActiveClusters(&count, nothing, &config) != cudaSuccess) {
        count = 0;
        cudaGetLastError();
      }
      std::printf("%s{\"blocks\": %d, \"size\": %d, \"active\": %d}", separator, blocks, size, count);
      separator = ", ";
    }
  }
  std::printf("]");
}

// ---- How long blocks take to exchange, and what a launch costs

struct Partial {
  float mean, m2;
  int64_t count;
};

// As the resident kernels do it: write a partial result, meet, read those of all blocks of the group.
__global__ void exchange(const Groups groups, float* out) {
  BlockGroup<Partial, float> group(groups, shared_memory<unsigned char>(), 1);
  float total = 0;
  while (group.tile() < groups.tiles) {
    group.begin_writing();
    if (threadIdx.x == 0) group.board(group.rank()).items[0] = {total, 1, 1};
    group.meet(0);
    if (threadIdx.x < 32) {
      for (int rank = static_cast<int>(threadIdx.x); rank < groups.size; rank += 32) {
        total += group.board(rank).items[0].m2;
      }
    }
    group.end_reading();
    group.end_tile();
  }
  group.begin_writing();
  if (threadIdx.x < 32) out[blockIdx.x * 32 + threadIdx.x] = total;
}

// Microseconds of one exchange: of many, less the same of few.
double exchange_us(Exchange kind, int size, int count, void* workspace, float* out) {
  constexpr int kFew = 8, kMany = 264;
  Groups groups{};
  groups.exchange = kind;
  groups.size = size;
  groups.count = count;
  groups.each_merges = true;
  groups.board_bytes = static_cast<int>(batchnorm_ext::cuda::kWorkspaceLine);
  groups.workspace = workspace;
  Launch how{size * count, 256, 1024};
  how.cluster = kind == Exchange::cluster ? size : 1;
  how.cooperative = kind == Exchange::grid;
  const auto time = [&](int rounds) {
    groups.tiles = rounds * count;
    return microseconds([&] { CHECK(launch(how, exchange, groups, out)); });
  };
  return (time(kMany) - time(kFew)) / (kMany - kFew);
}

__global__ void meet_grid(int rounds) {
  for (int i = 0; i < rounds; ++i) cooperative_groups::this_grid().sync();
}

void exchanges(void* workspace, float* out) {
  const int multiprocessors = device.multiProcessorCount;
  std::printf("\"exchange_us\": [");
  const char* separator = "";
  const auto print = [&](const char* kind, int size, int count, double us) {
    std::printf("%s{\"kind\": \"%s\", \"blocks\": %d, \"groups\": %d, \"us\": %.3f}", separator, kind, size, count, us);
    separator = ", ";
  };
  if (device.major >= 9) {
    for (const int size : {2, 4, 8, 16}) {
      const int count = multiprocessors / size / 2;
      print("cluster", size, count, exchange_us(Exchange::cluster, size, count, workspace, out));
    }
  }
  for (const int size : {8, 16, multiprocessors / 2, multiprocessors, 2 * multiprocessors}) {
    const int count = 2 * multiprocessors / size;
    print("grid", size, count, exchange_us(Exchange::grid, size, count, workspace, out));
  }
  for (const int blocks : {multiprocessors, 2 * multiprocessors}) {
    Launch how{blocks, 256};
    how.cooperative = true;
    const auto time = [&](int rounds) { return microseconds([&] { CHECK(launch(how, meet_grid, rounds)); }); };
    print("cooperative_groups", blocks, 1, (time(264) - time(8)) / 256);
  }
  std::printf("]");
}

void launches() {
  constexpr int kLaunches = 1000;
  const int multiprocessors = device.multiProcessorCount;
  std::printf("\"launch_us\": [");
  const char* separator = "";
  const auto print = [&](const char* kind, const Launch& how) {
    const auto all = [&] {
      for (int i = 0; i < kLaunches; ++i) CHECK(launch(how, nothing));
    };
    const double plain = microseconds(all) / kLaunches;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    all();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    const double node = microseconds([&] { CHECK(cudaGraphLaunch(executable, stream)); }) / kLaunches;
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(graph));
    std::printf("%s{\"kind\": \"%s\", \"stream\": %.3f, \"graph\": %.3f}", separator, kind, plain, node);
    separator = ", ";
  };
  print("one block", {1, 256});
  print("two blocks a multiprocessor", {2 * multiprocessors, 256});
  print("with much shared memory", {2 * multiprocessors, 256, share_of_multiprocessor(2)});
  if (device.major >= 9) print("clusters of 8", {multiprocessors / 16 * 16, 256, 0, 8});
  print("cooperative", {2 * multiprocessors, 256, 0, 1, true});
  std::printf("]");
}

// ---- Columns of a matrix: what narrow rows at a distance cost

// Blocks copy all rows of one slice of `width` vectors before those of the next, or only read them.
template <bool kWrites>
__global__ void slices(const uint4* in, uint4* out, int64_t rows, int pitch, int width, uint4* never) {
  uint4 total{0, 0, 0, 0};
  const int lanes = blockDim.x / width;
  const int lane = threadIdx.x / width;
  const int64_t step = int64_t(gridDim.x) * lanes;
  for (int slice = 0; slice + width <= pitch; slice += width) {
    const int64_t column = slice + threadIdx.x % width;
#pragma unroll 4
    for (int64_t row = int64_t(blockIdx.x) * lanes + lane; row < rows; row += step) {
      const uint4 value = __ldcs(in + row * pitch + column);
      if (kWrites) {
        __stcs(out + row * pitch + column, value);
      } else {
        total = {total.x + value.x, total.y ^ value.y, total.z + value.z, total.w ^ value.w};
      }
    }
  }
  if (!kWrites && total.x == 0x12345678u && total.y == 0x9abcdefu) *never = total;
}

void columns(const uint4* in, uint4* out) {
  std::printf("\"slices_gb_s\": [");
  const char* separator = "";
  const Launch how{8 * device.multiProcessorCount, 256};
  for (const int pitch_bytes : {128, 512, 1024, 4096}) {
    for (const int row_bytes : {32, 64, 128, 256}) {
      if (row_bytes > pitch_bytes) continue;
      const int64_t rows = kLarge / pitch_bytes;
      const auto rate = [&](int tensors, const auto& kernel) {
        const auto work = [&] { CHECK(launch(how, kernel, in, out, rows, pitch_bytes / 16, row_bytes / 16, out)); };
        return tensors * kLarge / 1e3 / microseconds(work);
      };
      std::printf("%s{\"pitch\": %d, \"row\": %d, \"read\": %.1f, \"copy\": %.1f}", separator, pitch_bytes, row_bytes,
                  rate(1, slices<false>), rate(2, slices<true>));
      separator = ", ";
    }
  }
  std::printf("]");
}

// ---- What the second-level cache keeps from one pass to the next

__global__ void read(const uint4* in, int64_t vectors, bool backwards, uint4* never) {
  uint4 total{0, 0, 0, 0};
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += step) {
    const uint4 value = __ldg(in + (backwards ? vectors - 1 - i : i));
    total = {total.x + value.x, total.y ^ value.y, total.z + value.z, total.w ^ value.w};
  }
  if (total.x == 0x12345678u && total.y == 0x9abcdefu) *never = total;
}

void retention(const uint4* in, uint4* out) {
  std::printf("\"second_read_gb_s\": [");
  const char* separator = "";
  const Launch how{8 * device.multiProcessorCount, 256};
  for (const int megabytes : {8, 16, 24, 32, 40, 48, 64, 96, 128, 256}) {
    const int64_t bytes = int64_t(megabytes) << 20;
    // Pairs of passes, the second in this order, less the first alone on the same data out of the cache.
    const auto pass = [&](bool backwards) { CHECK(launch(how, read, in, bytes / 16, backwards, out)); };
    const auto flush = [&] { CHECK(launch(how, read, in + kLarge / 32, kLarge / 32, false, out)); };
    const auto second = [&](bool backwards) {
      const double first = microseconds([&] { flush(), pass(false); });
      return std::max(0.1, microseconds([&] { flush(), pass(false), pass(backwards); }) - first);
    };
    std::printf("%s{\"mb\": %d, \"forwards\": %.1f, \"backwards\": %.1f}", separator, megabytes,
                bytes / 1e3 / second(false), bytes / 1e3 / second(true));
    separator = ", ";
  }
  std::printf("]");
}

}  // namespace

// One experiment a process, so that one that fails or hangs costs the others nothing.
int main(int count, char** arguments) {
  CHECK(cudaGetDeviceProperties(&device, 0));
  CHECK(cudaStreamCreate(&stream));
  uint4 *a, *b, *out;
  for (uint4** buffer : {&a, &b, &out}) {
    CHECK(cudaMalloc(buffer, kLarge));
    CHECK(cudaMemset(*buffer, 1, kLarge));
  }
  const struct {
    const char* name;
    std::function<void()> measure;
  } experiments[] = {{"bandwidth", [&] { bandwidth(a, b, out); }},
                     {"clusters", [&] { clusters(); }},
                     {"exchanges", [&] { exchanges(a, reinterpret_cast<float*>(out)); }},
                     {"launches", [&] { launches(); }},
                     {"columns", [&] { columns(a, out); }},
                     {"retention", [&] { retention(a, out); }}};
  for (const auto& experiment : experiments) {
    if (count != 2 || std::strcmp(arguments[1], experiment.name) != 0) continue;
    std::printf("{");
    experiment.measure();
    CHECK(cudaDeviceSynchronize());
    std::printf("}\n");
    return 0;
  }
  std::fprintf(stderr, "usage: device_limits bandwidth|clusters|exchanges|launches|columns|retention\n");
  return 2;
}
