// Picks the instruction set at run time, and does what needs no vectors: empty batches, the batch counter, huge pages.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "core/formulas.h"
#include "cpu/backend.h"
#include "cpu/blocking.h"
#include "cpu/kernel_table.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchnorm_ext::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const KernelTable* kernels;
};

InstructionSet detect() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const auto capped = [&](const char* value) { return variable != nullptr && std::strcmp(variable, value) == 0; };
  if (!capped("default")) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && !capped("avx2")) {
      if (__builtin_cpu_supports("avx512bf16") && !capped("avx512")) return {"avx512_bf16", &avx512_bf16::kernels};
      return {"avx512", &avx512::kernels};
    }
    if (avx2) return {"avx2", &avx2::kernels};
#elif defined(__aarch64__)
    return {"neon", &neon::kernels};
#endif
  }
  return {"baseline", &baseline::kernels};
}

const InstructionSet& chosen() {
  static const InstructionSet set = detect();
  return set;
}

Threads threads_of(const Executor& executor) {
  const auto run = [](const void* erased, int64_t tasks, void (*task)(const void*, int64_t), const void* state) {
    static_cast<const Executor*>(erased)->run(tasks, [=](int64_t index) { task(state, index); });
  };
  return {executor.threads > 1 ? executor.threads : 1, &executor, run};
}

}  // namespace

const char* instruction_set() {
  return chosen().name;
}

bool sums_counted_runs() {
  return true;
}

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t always_fresh = 32 << 20;
  constexpr uintptr_t page = 4096;
  if (bytes < always_fresh) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  // Advice only: a refusal changes nothing but speed.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void forward(const ForwardParams& params, const Executor& executor) {
  ForwardParams call = params;
  if (call.batch_statistics && call.running.num_batches_tracked != nullptr) {
    call.running.momentum = running_momentum(call.running, ++*call.running.num_batches_tracked);
  }
  if (call.record != nullptr) {
    call.record[0] = call.signature;
    call.record[1] = static_cast<double>(call.counted.all ? call.shape.samples() : call.counted.count);
  }
  if (call.shape.elements() == 0) return;
  chosen().kernels->forward(call, threads_of(executor));
}

void backward(const BackwardParams& params, const Executor& executor) {
  if (params.shape.elements() == 0) {
    for (int64_t channel = 0; channel < params.shape.channels; ++channel) {
      params.dweight.store(channel, 0.0);
      params.dbias.store(channel, 0.0);
    }
    return;
  }
  chosen().kernels->backward(params, threads_of(executor));
}

void join_statistics(const JoinParams& params, const Executor& executor) {
  double momentum = params.running.momentum;
  if (params.running.num_batches_tracked != nullptr) {
    momentum = running_momentum(params.running, ++*params.running.num_batches_tracked);
  }
  constexpr int64_t merges_per_task = 4096;
  const int64_t tasks = std::clamp<int64_t>(params.channels * params.parts / merges_per_task, 1, executor.threads);
  executor.run(tasks, [&](int64_t task) {
    const Range own = split(params.channels, 64, tasks, task);
    for (int64_t channel = own.begin; channel < own.end; ++channel) {
      join_channel_statistics(params, channel, momentum);
    }
  });
}

}  // namespace batchnorm_ext::cpu
