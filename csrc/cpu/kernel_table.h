// What each instruction set's translation unit offers the dispatcher. No standard templates pass through here: their
// instantiations would be shared between files compiled for different processors.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace batchnorm_ext::cpu {

// The caller's executor behind plain pointers.
struct Threads {
  int64_t count;
  const void* executor;
  void (*run)(const void* executor, int64_t tasks, void (*task)(const void* state, int64_t index), const void* state);
};

// Both take shapes with at least one element.
struct KernelTable {
  void (*forward)(const ForwardParams& params, const Threads& threads);
  void (*backward)(const BackwardParams& params, const Threads& threads);
};

namespace baseline {
extern const KernelTable kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512 {
extern const KernelTable kernels;
}
namespace avx512_bf16 {
extern const KernelTable kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const KernelTable kernels;
}
#endif

}  // namespace batchnorm_ext::cpu
