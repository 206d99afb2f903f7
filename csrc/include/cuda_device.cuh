// Device functions of several kernels. Sums have one order, which the number of threads fixes: the
// same numbers give the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "cuda_launch.h"

namespace bert_fast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

__device__ __forceinline__ int warp_max(int x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const int other = __shfl_xor_sync(kAll, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// The sum over the block, in every thread of it; each thread must call.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T x) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp, "a warp adds what the warps have");
  __shared__ T sums[kWarps];
  const int lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  if (lane == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = warp_sum(lane < kWarps ? sums[lane] : T(0));
  __syncthreads();  // before the next call writes there
  return x;
}

// Four numbers, side by side in memory that nothing reads again soon. By intrinsics: of an
// assignment the compiler would make four.
struct Four {
  float x[4];
};

__device__ __forceinline__ Four load_four(const float* p) {
  const float4 v = __ldcs(reinterpret_cast<const float4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ void store_four(float* p, const Four& v) {
  __stcs(reinterpret_cast<float4*>(p), make_float4(v.x[0], v.x[1], v.x[2], v.x[3]));
}

// Tensors whose dtype is known when the kernel runs only: all of a parameter set in one launch.
__device__ __forceinline__ float load_one(const void* p, int dtype, int64_t at) {
  if (dtype == BERT_FAST_FLOAT) return static_cast<const float*>(p)[at];
  if (dtype == BERT_FAST_HALF) return __half2float(static_cast<const __half*>(p)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[at]);
}

__device__ __forceinline__ void store_one(void* p, int dtype, int64_t at, float x) {
  if (dtype == BERT_FAST_FLOAT) {
    static_cast<float*>(p)[at] = x;
  } else if (dtype == BERT_FAST_HALF) {
    static_cast<__half*>(p)[at] = __float2half_rn(x);
  } else {
    static_cast<__nv_bfloat16*>(p)[at] = __float2bfloat16_rn(x);
  }
}

// Two 16-bit numbers in one word, the first in its lower half.
__device__ __forceinline__ float half_of(uint32_t word, bool upper) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(upper ? word >> 16 : word)));
}
__device__ __forceinline__ float bfloat16_of(uint32_t word, bool upper) {
  return __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(upper ? word >> 16 : word)));
}
__device__ __forceinline__ uint32_t halves(float lower, float upper) {
  return __half_as_ushort(__float2half_rn(lower)) |
         static_cast<uint32_t>(__half_as_ushort(__float2half_rn(upper))) << 16;
}
__device__ __forceinline__ uint32_t bfloat16s(float lower, float upper) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(lower)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(upper))) << 16;
}

// p + at is aligned to four numbers.
__device__ __forceinline__ Four load_four(const void* p, int dtype, int64_t at) {
  if (dtype == BERT_FAST_FLOAT) return load_four(static_cast<const float*>(p) + at);
  const uint2 raw = __ldcs(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p) + at));
  if (dtype == BERT_FAST_HALF) {
    return {{half_of(raw.x, false), half_of(raw.x, true), half_of(raw.y, false),
             half_of(raw.y, true)}};
  }
  return {{bfloat16_of(raw.x, false), bfloat16_of(raw.x, true), bfloat16_of(raw.y, false),
           bfloat16_of(raw.y, true)}};
}

__device__ __forceinline__ void store_four(void* p, int dtype, int64_t at, const Four& v) {
  if (dtype == BERT_FAST_FLOAT) {
    store_four(static_cast<float*>(p) + at, v);
  } else {
    const bool half = dtype == BERT_FAST_HALF;
    const uint32_t first = half ? halves(v.x[0], v.x[1]) : bfloat16s(v.x[0], v.x[1]);
    const uint32_t second = half ? halves(v.x[2], v.x[3]) : bfloat16s(v.x[2], v.x[3]);
    __stcs(reinterpret_cast<uint2*>(static_cast<uint16_t*>(p) + at), make_uint2(first, second));
  }
}

}  // namespace bert_fast::cuda
