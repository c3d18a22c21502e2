// The step finalize_statistics for a batch in several parts, each known by its record.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/formulas.h"
#include "core/params.h"

namespace batchnorm_ext::cuda {

// One thread for each channel: merges the records in their order and updates the running statistics. The counter does
// not yet count this batch.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) join_records(const JoinParams params) {
  const int64_t channel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= params.channels) return;
  const int64_t* const counter = params.running.num_batches_tracked;
  join_channel_statistics(params, channel, running_momentum(params.running, counter == nullptr ? 1 : *counter + 1));
}

}  // namespace batchnorm_ext::cuda
