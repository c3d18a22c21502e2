// Launches the joining of records.
#include "cuda/kernels/join_statistics.cuh"

#include "cuda/kernels/normalize.cuh"
#include "cuda/launch/backend.h"
#include "cuda/launch/launcher.cuh"

namespace batchnorm_ext::cuda {

void join_statistics(const JoinParams& params, cudaStream_t stream) {
  const int64_t blocks = (params.channels + kFinalizeThreads - 1) / kFinalizeThreads;
  if (blocks > 0) {
    launch("finalize_statistics", stream, join_records<kFinalizeThreads>, blocks, 1, kFinalizeThreads, 0, params);
  }
  int64_t* const counter = params.running.num_batches_tracked;
  if (counter != nullptr) launch("count_batch", stream, count_batch<float>, 1, 1, 1, 0, counter);
}

}  // namespace batchnorm_ext::cuda
