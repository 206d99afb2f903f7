// AdamW and LAMB over all parameters, and the norm of all gradients: a few launches for hundreds of
// tensors, whose pointers travel in the kernels' arguments.
//
// A block takes one chunk of one tensor. Moved for each element, w, m, v in fp32: AdamW 28 bytes
// (read g, m, v, w; write m, v, w), 2 more where a 16-bit copy is written; LAMB 44, its second pass
// reading m, v, w again rather than storing the update; the norm 4. Memory bounds all of them.
#include <algorithm>

#include "cuda_call.cuh"
#include "cuda_device.cuh"
#include "cuda_launch.h"
#include "optimizer_math.h"

namespace bert_fast::cuda {
namespace {

using optimizer::Betas;
using Scalars = optimizer::Scalars<float>;

constexpr int kThreads = 512;
constexpr int kChunk = BERT_FAST_CHUNK;
// Tensors of a launch: as many as fit into a kernel's arguments.
#if CUDART_VERSION >= 12010
constexpr int kMost = 512;
constexpr size_t kArgumentBytes = 32764;
#else
constexpr int kMost = 56;
constexpr size_t kArgumentBytes = 4096;
#endif

struct Tensors {
  struct {
    void* param;
    const void* grad;
    float* exp_avg;
    float* exp_avg_sq;
    float* master;
    int64_t numel;
    int first_chunk;  // chunks of the tensors before, in this launch
    int8_t param_dtype, grad_dtype;
  } of[kMost];
  int count;
};

struct Clocks {
  struct {
    float* step;
    const float* lr_dev;
    float lr, weight_decay;
  } of[kMost];
  int count;
};

// What gradients are multiplied by, as the device knows it; and whether the step is left out.
struct Gradients {
  const float* norm;
  const float* scale;
  const float* found_inf;
  float max_norm;

  __device__ bool skip() const { return found_inf != nullptr && *found_inf != 0; }
  __device__ float factor() const {
    float factor = scale == nullptr ? 1 : 1 / *scale;
    if (norm != nullptr) factor *= optimizer::clip_factor(*norm, max_norm);
    return factor;
  }
};

static_assert(sizeof(Tensors) + sizeof(Gradients) + 128 <= kArgumentBytes, "too many tensors");

// A chunk: its tensor, and its elements from first to last.
struct Chunk {
  int tensor;
  int64_t first, last;

  __device__ Chunk(const Tensors& tensors, int chunk) {
    int low = 0, high = tensors.count - 1;  // the last tensor that does not begin behind it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (tensors.of[middle].first_chunk <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    tensor = low;
    first = static_cast<int64_t>(chunk - tensors.of[low].first_chunk) * kChunk;
    const int64_t numel = tensors.of[low].numel;
    last = first + kChunk < numel ? first + kChunk : numel;
  }
};

__device__ __forceinline__ bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// one(i) for elements and four(i) for four from i: four where `vectors`, one for what is left.
template <class FourFn, class OneFn>
__device__ __forceinline__ void for_each(const Chunk& chunk, bool vectors, FourFn four, OneFn one) {
  int64_t i = chunk.first;
  if (vectors) {
    const int64_t end = chunk.first + (chunk.last - chunk.first) / 4 * 4;
    for (int64_t at = i + 4 * threadIdx.x; at < end; at += 4 * kThreads) four(at);
    i = end;
  }
  for (int64_t at = i + threadIdx.x; at < chunk.last; at += kThreads) one(at);
}

// --- the norm of all gradients -------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ Tensors tensors, float* sums) {  // a sum a chunk
  const Chunk chunk(tensors, blockIdx.x);
  const auto& t = tensors.of[chunk.tensor];
  float sum = 0;
  for_each(
      chunk, aligned(t.grad),
      [&](int64_t i) {
        const Four g = load_four(t.grad, t.grad_dtype, i);
        sum += (g.x[0] * g.x[0] + g.x[1] * g.x[1]) + (g.x[2] * g.x[2] + g.x[3] * g.x[3]);
      },
      [&](int64_t i) {
        const float g = load_one(t.grad, t.grad_dtype, i);
        sum += g * g;
      });
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    norm_kernel(const float* sums, int64_t chunks, const float* scale, float* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += sums[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    *norm = static_cast<float>(::sqrt(sum) / (scale == nullptr ? 1 : *scale));
  }
}

// --- one step ------------------------------------------------------------------------------------

// A thread a tensor: its step counts one more, and its scalars are made for the other kernels.
__global__ void __launch_bounds__(kThreads)
    clock_kernel(const __grid_constant__ Clocks clocks, Gradients gradients, double beta1,
                 double beta2, Scalars* scalars) {  // (count)
  const int i = threadIdx.x;
  if (i >= clocks.count || gradients.skip()) return;
  const auto& clock = clocks.of[i];
  const float step = *clock.step + 1;
  *clock.step = step;
  const float lr = clock.lr_dev == nullptr ? clock.lr : *clock.lr_dev;
  scalars[i] = optimizer::scalars<float>(lr, clock.weight_decay, beta1, beta2, step);
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Tensors tensors, Gradients gradients, Betas<float> betas,
                 const Scalars* scalars) {
  if (gradients.skip()) return;
  const Chunk chunk(tensors, blockIdx.x);
  const auto& t = tensors.of[chunk.tensor];
  const Scalars s = scalars[chunk.tensor];
  const float factor = gradients.factor();
  const bool has_master = t.master != nullptr;
  const void* w_from = has_master ? t.master : t.param;
  const int w_dtype = has_master ? BERT_FAST_FLOAT : t.param_dtype;
  for_each(
      chunk,
      aligned(t.param) && aligned(t.grad) && aligned(t.exp_avg) && aligned(t.exp_avg_sq) &&
          aligned(t.master),
      [&](int64_t i) {
        const Four g = load_four(t.grad, t.grad_dtype, i);
        Four w = load_four(w_from, w_dtype, i);
        Four m = load_four(t.exp_avg + i), v = load_four(t.exp_avg_sq + i);
        for (int k = 0; k < 4; ++k) {
          optimizer::moments(g.x[k] * factor, m.x[k], v.x[k], betas);
          w.x[k] = optimizer::adamw(w.x[k], m.x[k], v.x[k], betas, s);
        }
        store_four(t.exp_avg + i, m);
        store_four(t.exp_avg_sq + i, v);
        if (has_master) store_four(t.master + i, w);
        store_four(t.param, t.param_dtype, i, w);
      },
      [&](int64_t i) {
        float w = load_one(w_from, w_dtype, i), m = t.exp_avg[i], v = t.exp_avg_sq[i];
        optimizer::moments(load_one(t.grad, t.grad_dtype, i) * factor, m, v, betas);
        w = optimizer::adamw(w, m, v, betas, s);
        t.exp_avg[i] = m;
        t.exp_avg_sq[i] = v;
        if (has_master) t.master[i] = w;
        store_one(t.param, t.param_dtype, i, w);
      });
}

// The moments, and of each chunk the sums of w^2 and u^2.
__global__ void __launch_bounds__(kThreads)
    lamb_moments_kernel(const __grid_constant__ Tensors tensors, Gradients gradients,
                        Betas<float> betas, const Scalars* scalars, float2* sums) {
  if (gradients.skip()) return;
  const Chunk chunk(tensors, blockIdx.x);
  const auto& t = tensors.of[chunk.tensor];
  const Scalars s = scalars[chunk.tensor];
  const float factor = gradients.factor();
  const bool has_master = t.master != nullptr;
  const void* w_from = has_master ? t.master : t.param;
  const int w_dtype = has_master ? BERT_FAST_FLOAT : t.param_dtype;
  float sum_w = 0, sum_u = 0;
  const auto update = [&](float g, float w, float& m, float& v) {
    optimizer::moments(g * factor, m, v, betas);
    const float u = optimizer::lamb_update(w, m, v, betas, s);
    sum_w += w * w;
    sum_u += u * u;
  };
  for_each(
      chunk,
      aligned(w_from) && aligned(t.grad) && aligned(t.exp_avg) && aligned(t.exp_avg_sq),
      [&](int64_t i) {
        const Four g = load_four(t.grad, t.grad_dtype, i), w = load_four(w_from, w_dtype, i);
        Four m = load_four(t.exp_avg + i), v = load_four(t.exp_avg_sq + i);
        for (int k = 0; k < 4; ++k) update(g.x[k], w.x[k], m.x[k], v.x[k]);
        store_four(t.exp_avg + i, m);
        store_four(t.exp_avg_sq + i, v);
      },
      [&](int64_t i) {
        float m = t.exp_avg[i], v = t.exp_avg_sq[i];
        update(load_one(t.grad, t.grad_dtype, i), load_one(w_from, w_dtype, i), m, v);
        t.exp_avg[i] = m;
        t.exp_avg_sq[i] = v;
      });
  sum_w = block_sum<kThreads>(sum_w);
  sum_u = block_sum<kThreads>(sum_u);
  if (threadIdx.x == 0) sums[blockIdx.x] = make_float2(sum_w, sum_u);
}

// The ratio of each tensor's norms, which each of its blocks adds up, and the parameters.
__global__ void __launch_bounds__(kThreads)
    lamb_apply_kernel(const __grid_constant__ Tensors tensors, Gradients gradients,
                      Betas<float> betas, const Scalars* scalars, const float2* sums, int chunks,
                      bool always_adapt) {
  if (gradients.skip()) return;
  const Chunk chunk(tensors, blockIdx.x);
  const auto& t = tensors.of[chunk.tensor];
  const Scalars s = scalars[chunk.tensor];
  float rate = s.lr;
  if (always_adapt || s.weight_decay != 0) {
    const bool is_last = chunk.tensor + 1 == tensors.count;
    const int end = is_last ? chunks : tensors.of[chunk.tensor + 1].first_chunk;
    float sum_w = 0, sum_u = 0;
    for (int i = t.first_chunk + threadIdx.x; i < end; i += kThreads) {
      sum_w += sums[i].x;
      sum_u += sums[i].y;
    }
    sum_w = block_sum<kThreads>(sum_w);
    sum_u = block_sum<kThreads>(sum_u);
    rate *= optimizer::trust_ratio(sum_w, sum_u);
  }
  const bool has_master = t.master != nullptr;
  const void* w_from = has_master ? t.master : t.param;
  const int w_dtype = has_master ? BERT_FAST_FLOAT : t.param_dtype;
  for_each(
      chunk,
      aligned(t.param) && aligned(t.exp_avg) && aligned(t.exp_avg_sq) && aligned(t.master),
      [&](int64_t i) {
        Four w = load_four(w_from, w_dtype, i);
        const Four m = load_four(t.exp_avg + i), v = load_four(t.exp_avg_sq + i);
        for (int k = 0; k < 4; ++k) {
          w.x[k] -= rate * optimizer::lamb_update(w.x[k], m.x[k], v.x[k], betas, s);
        }
        if (has_master) store_four(t.master + i, w);
        store_four(t.param, t.param_dtype, i, w);
      },
      [&](int64_t i) {
        float w = load_one(w_from, w_dtype, i);
        w -= rate * optimizer::lamb_update(w, t.exp_avg[i], t.exp_avg_sq[i], betas, s);
        if (has_master) t.master[i] = w;
        store_one(t.param, t.param_dtype, i, w);
      });
}

// --- launches ------------------------------------------------------------------------------------

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The next launch's tensors, and how many chunks they are; `params` moves behind them.
int64_t fill(Tensors& tensors, const BertFastParam*& params, const BertFastParam* end) {
  int64_t chunks = 0;
  tensors.count = 0;
  for (; params != end && tensors.count < kMost; ++params) {
    const int64_t more = chunks_of(params->numel);
    if (tensors.count > 0 && chunks + more > INT32_MAX) break;
    auto& t = tensors.of[tensors.count++];
    t.param = params->param;
    t.grad = params->grad;
    t.exp_avg = params->exp_avg;
    t.exp_avg_sq = params->exp_avg_sq;
    t.master = params->master;
    t.numel = params->numel;
    t.first_chunk = static_cast<int>(chunks);
    t.param_dtype = static_cast<int8_t>(params->param_dtype);
    t.grad_dtype = static_cast<int8_t>(params->grad_dtype);
    chunks += more;
  }
  return chunks;
}

cudaError_t tick(const BertFastParam* params, int64_t count, const BertFastStep& step,
                 const Gradients& gradients, Scalars* scalars, cudaStream_t stream) {
  for (int64_t from = 0; from < count; from += kMost) {
    Clocks clocks;
    clocks.count = static_cast<int>(std::min<int64_t>(kMost, count - from));
    for (int i = 0; i < clocks.count; ++i) {
      const BertFastParam& p = params[from + i];
      clocks.of[i] = {p.step, p.lr_dev, p.lr, p.weight_decay};
    }
    const cudaError_t error = launch(clock_kernel, 1, kThreads, stream, clocks, gradients,
                                     step.beta1, step.beta2, scalars + from);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

Gradients gradients_of(const BertFastStep& step) {
  return {step.norm, step.grad_scale, step.found_inf, static_cast<float>(step.max_norm)};
}

}  // namespace
}  // namespace bert_fast::cuda

using namespace bert_fast::cuda;

extern "C" int64_t bert_fast_num_chunks(const BertFastParam* params, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(params[i].numel);
  return chunks;
}

extern "C" cudaError_t bert_fast_grad_norm(const BertFastParam* params, int64_t count,
                                           const float* grad_scale, float* sums, float* norm,
                                           cudaStream_t stream) {
  const BertFastParam* end = params + count;
  int64_t all = 0;
  while (params != end) {
    Tensors tensors;
    const int64_t chunks = fill(tensors, params, end);
    if (chunks == 0) continue;
    const cudaError_t error = launch(squares_kernel, static_cast<unsigned>(chunks), kThreads,
                                     stream, tensors, sums + all);
    if (error != cudaSuccess) return error;
    all += chunks;
  }
  return launch(norm_kernel, 1, kThreads, stream, sums, all, grad_scale, norm);
}

extern "C" cudaError_t bert_fast_adamw(const BertFastParam* params, int64_t count,
                                       const BertFastStep* step, float* scalars,
                                       cudaStream_t stream) {
  const Gradients gradients = gradients_of(*step);
  const auto betas = bert_fast::optimizer::betas<float>(step->beta1, step->beta2, step->eps);
  auto* made = reinterpret_cast<Scalars*>(scalars);
  cudaError_t error = tick(params, count, *step, gradients, made, stream);
  const BertFastParam* end = params + count;
  while (error == cudaSuccess && params != end) {
    Tensors tensors;
    const int64_t chunks = fill(tensors, params, end);
    if (chunks > 0) {
      error = launch(adamw_kernel, static_cast<unsigned>(chunks), kThreads, stream, tensors,
                     gradients, betas, made);
    }
    made += tensors.count;
  }
  return error;
}

extern "C" cudaError_t bert_fast_lamb(const BertFastParam* params, int64_t count,
                                      const BertFastStep* step, float* scalars, float* sums,
                                      cudaStream_t stream) {
  const Gradients gradients = gradients_of(*step);
  const auto betas = bert_fast::optimizer::betas<float>(step->beta1, step->beta2, step->eps);
  auto* made = reinterpret_cast<Scalars*>(scalars);
  auto* partial = reinterpret_cast<float2*>(sums);  // each launch's, one after the other
  cudaError_t error = tick(params, count, *step, gradients, made, stream);
  const BertFastParam* end = params + count;
  while (error == cudaSuccess && params != end) {
    Tensors tensors;
    const int64_t chunks = fill(tensors, params, end);
    const auto blocks = static_cast<unsigned>(chunks);
    if (chunks > 0) {
      error = launch(lamb_moments_kernel, blocks, kThreads, stream, tensors, gradients, betas, made,
                     partial);
    }
    if (chunks > 0 && error == cudaSuccess) {
      error = launch(lamb_apply_kernel, blocks, kThreads, stream, tensors, gradients, betas, made,
                     partial, static_cast<int>(chunks), step->always_adapt != 0);
    }
    made += tensors.count;
  }
  return error;
}
