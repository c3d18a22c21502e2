// The CPU backend's whole interface: calls that run on threads that the caller provides, and what goes with them.
#pragma once

#include <cstdint>
#include <functional>

#include "core/params.h"

namespace batchnorm_ext::cpu {

// The caller's thread pool. run(n, task) calls task(i) once for each i in [0, n), on up to `threads` threads at once,
// and returns when all are done; a task never throws.
struct Executor {
  int threads;
  std::function<void(int64_t tasks, const std::function<void(int64_t)>& task)> run;
};

// Results depend on the values and executor.threads only, to the bit.
void forward(const ForwardParams& params, const Executor& executor);
void backward(const BackwardParams& params, const Executor& executor);
// Of ForwardParams, `counted` only where this is so.
bool sums_counted_runs();
void join_statistics(const JoinParams& params, const Executor& executor);

// Asks for huge pages behind a tensor that has just been allocated, if it is so large that allocators map it afresh for
// each call: faulting it in by small pages costs several times what writing it does.
void advise_huge_pages(void* data, int64_t bytes);

// "avx512_bf16", "avx512", "avx2", "neon" or "baseline": what this process runs, capped by the environment variable
// ATEN_CPU_CAPABILITY ("default", "avx2", "avx512") as torch's own kernels are.
const char* instruction_set();

}  // namespace batchnorm_ext::cpu
