// What csrc/cuda/*.cu needs of CUDA, on the CPU: kernels run as they are, a fiber a thread.
//
// Warp by warp, in an order drawn from a seed, each as far as a barrier of the block lets it: a
// barrier that is missing, or a sum in the order of threads, shows as a difference. A warp or a
// block that waits for a thread which never comes, and an access to vectors that are not aligned,
// are errors of the launch.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // a block has an OS thread to itself
#define CUDART_VERSION 13000

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };

struct uint3 {
  unsigned x, y, z;
};
inline thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

namespace emulator {

enum Waits { kRuns, kForWarp, kForBlock, kForGrid, kDone };

// What the fiber that runs says to its block.
void wait(Waits what);
void* exchange(const void* mine, size_t bytes);  // of the warp: 32 values of `bytes`, lane by lane
void fail(const char* why);

struct State {
  uint64_t seed = 0;
  int processors = 4;
  int launches = 0;
  cudaStream_t stream = nullptr;  // of the last launch
  bool one_stream = true;         // all launches had the same
  const char* error = nullptr;
};
State& state();

// Run a kernel's body in every thread of every block; `together`: blocks may wait for each other.
cudaError_t run(unsigned blocks, unsigned threads, cudaStream_t stream, bool together,
                const std::function<void()>& body);

template <class T>
T of_lane(T mine, int lane) {
  T values[32];
  std::memcpy(values, exchange(&mine, sizeof(T)), sizeof(values));
  return values[lane];
}

template <class T>
void check_aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) fail("an access that is not aligned");
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::kForBlock); }

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int step) {
  if (mask != 0xffffffffu) emulator::fail("a mask of some lanes");
  return emulator::of_lane(x, (threadIdx.x % 32) ^ step);
}

template <class T>
T __shfl_up_sync(unsigned mask, T x, int step) {
  if (mask != 0xffffffffu) emulator::fail("a mask of some lanes");
  const int lane = threadIdx.x % 32;
  return emulator::of_lane(x, lane < step ? lane : lane - step);
}

inline unsigned __ballot_sync(unsigned mask, bool x) {
  if (mask != 0xffffffffu) emulator::fail("a mask of some lanes");
  bool values[32];
  std::memcpy(values, emulator::exchange(&x, sizeof(bool)), sizeof(values));
  unsigned found = 0;
  for (int lane = 0; lane < 32; ++lane) found |= static_cast<unsigned>(values[lane]) << lane;
  return found;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T __ldcs(const T* p) {
  emulator::check_aligned(p);
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}

template <class T>
T __ldg(const T* p) {
  return __ldcs(p);
}

template <class T>
void __stcs(T* p, T x) {
  emulator::check_aligned(p);
  std::memcpy(p, &x, sizeof(T));
}
