// Stands in for CUDA's header of this name where kernels are compiled for the CPU emulation.
#pragma once

#include "cuda_emulation.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulation::sync_grid(); }
};
inline grid_group this_grid() {
  return {};
}

struct cluster_group {
  static void barrier_arrive() { emulation::arrive_at_cluster(); }
  static void barrier_wait() { emulation::wait_for_cluster(); }
  static void sync() {
    barrier_arrive();
    barrier_wait();
  }
  template <class V>
  static V* map_shared_rank(V* address, int rank) {
    const auto offset = reinterpret_cast<unsigned char*>(address) - emulation::shared_memory();
    return reinterpret_cast<V*>(emulation::shared_memory_of(static_cast<unsigned>(rank)) + offset);
  }
};
inline cluster_group this_cluster() {
  return {};
}

}  // namespace cooperative_groups
