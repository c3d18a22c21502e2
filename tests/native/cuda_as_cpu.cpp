// Stands in for csrc/cpu in the native module that runs the emulated CUDA kernels on tensors of the CPU.
#include <cstring>
#include <memory>
#include <mutex>

#include "cpu/backend.h"
#include "cuda/launch/backend.h"
#include "cuda_emulation.h"

namespace batchnorm_ext::cpu {
namespace {

using cuda::DeviceLimits;

bool by_groups(const ForwardParams& params, const DeviceLimits& limits) {
  return cuda::plan_forward(params, limits).resident.fits;
}
bool by_groups(const BackwardParams& params, const DeviceLimits& limits) {
  return cuda::plan_backward(params, limits).resident.fits;
}

// Small tensors would all be held by single blocks. So shapes take turns on devices of which blocks hold so little that
// tiles take clusters of them, or blocks across the grid, or are held by none and stream; a shape always on the same
// one, or a call would not give the same bits when it is repeated.
template <class Params>
DeviceLimits limits_for(const Params& params) {
  enum Way { as_it_is, clusters, grid, streaming, ways };
  const Shape& shape = params.shape;
  DeviceLimits limits = cuda::device_limits(0);
  const int64_t whole = limits.shared_bytes_per_multiprocessor;
  const auto way = static_cast<Way>((shape.outer + shape.channels + shape.inner) % ways);
  if (way == as_it_is) return limits;
  if (way == clusters) {
    limits.cooperative = false;
  } else {
    for (int& active : limits.active_clusters) active = 0;
  }
  int64_t& room = limits.shared_bytes_per_multiprocessor;
  for (room = way == streaming ? 0 : 4 << 10; room > 0 && room < whole; room += 2 << 10) {
    if (by_groups(params, limits)) break;
  }
  return limits;
}

// The emulation runs one launch at a time.
std::mutex engine;

// In a workspace that is aligned as a device's allocator would, and full of rubbish. Threads run in the opposite order
// the next time, and the bits must be the same.
template <class Params>
void run(const Params& params, size_t (*workspace_bytes)(const Params&, const DeviceLimits&),
         void (*call)(const Params&, const DeviceLimits&, void*, cudaStream_t)) {
  const std::lock_guard<std::mutex> lock(engine);
  using emulation::Order;
  Order& order = emulation::settings.order;
  order = order == Order::ascending ? Order::descending : Order::ascending;
  const DeviceLimits limits = limits_for(params);
  const size_t bytes = workspace_bytes(params, limits);
  const auto free = [](void* memory) { operator delete(memory, std::align_val_t(256)); };
  const std::unique_ptr<void, decltype(free)> workspace(operator new(bytes, std::align_val_t(256)), free);
  std::memset(workspace.get(), 0xcd, bytes);
  call(params, limits, workspace.get(), nullptr);
}

}  // namespace

bool sums_counted_runs() {
  return false;
}

void forward(const ForwardParams& params, const Executor&) {
  run(params, cuda::forward_workspace_bytes, cuda::forward);
}

void backward(const BackwardParams& params, const Executor&) {
  run(params, cuda::backward_workspace_bytes, cuda::backward);
}

void join_statistics(const JoinParams& params, const Executor&) {
  const std::lock_guard<std::mutex> lock(engine);
  cuda::join_statistics(params, nullptr);
}

void advise_huge_pages(void*, int64_t) {}

const char* instruction_set() {
  return "emulated CUDA";
}

}  // namespace batchnorm_ext::cpu
