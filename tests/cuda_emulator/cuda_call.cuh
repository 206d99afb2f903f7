// In place of csrc/include/cuda_call.cuh: launches that the emulator runs.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

namespace bert_fast::cuda {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), unsigned blocks, unsigned threads, cudaStream_t stream,
                   const A&... args) {
  return emulator::run(blocks, threads, stream, false, [&] { kernel(args...); });
}

template <class P>
cudaError_t launch_together(void (*kernel)(P), int64_t wanted, unsigned threads,
                            cudaStream_t stream, P args) {
  const int64_t most = emulator::state().processors;
  const auto blocks = static_cast<unsigned>(std::min(std::max<int64_t>(wanted, 1), most));
  return emulator::run(blocks, threads, stream, true, [&] { kernel(args); });
}

}  // namespace bert_fast::cuda
