// How the kernels are launched: on the stream that is given, never on the default one.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace bert_fast::cuda {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), unsigned blocks, unsigned threads, cudaStream_t stream,
                   const A&... args) {
  kernel<<<blocks, threads, 0, stream>>>(args...);
  return cudaGetLastError();
}

// All blocks run at once, so that they may wait for each other: as many as are wanted, at most one
// a multiprocessor.
template <class P>
cudaError_t launch_together(void (*kernel)(P), int64_t wanted, unsigned threads,
                            cudaStream_t stream, P args) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(std::max<int64_t>(wanted, 1), std::max(processors, 1)));
  void* pointers[] = {&args};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                                     dim3(threads), pointers, 0, stream);
}

}  // namespace bert_fast::cuda
