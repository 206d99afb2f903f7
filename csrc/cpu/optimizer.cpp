// AdamW and LAMB over all parameters, and the norm of all gradients.
//
// A thread takes chunks of a fixed size, each of one tensor; what is summed over chunks is added in
// their order. So the bits are the same for any number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu_ops.h"
#include "optimizer_lists.h"
#include "optimizer_math.h"
#include "vec.h"

namespace bert_fast::cpu::CPU_CAPABILITY {
namespace {

using optimizer::Betas;
using optimizer::Lists;
using optimizer::Options;
using optimizer::Scalars;

constexpr int64_t kChunk = 16384;  // elements
constexpr int64_t kBlock = 1024;   // elements that are summed in fp32

struct Chunk {
  size_t tensor;
  int64_t first, size;
};

template <class Tensors>
std::vector<Chunk> cut(const Tensors& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].numel();
    for (int64_t at = 0; at < numel; at += kChunk) {
      chunks.push_back({i, at, std::min(kChunk, numel - at)});
    }
  }
  return chunks;
}

// body(chunk, its index) for every chunk, on all threads.
template <class Body>
void for_each_chunk(const std::vector<Chunk>& chunks, const Body& body) {
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) body(chunks[c], c);
  });
}

// body(p) with the tensor's data as what it is.
template <class Body>
auto with_data(const Tensor& t, const Body& body) {
  switch (t.scalar_type()) {
    case at::kDouble: return body(static_cast<double*>(t.data_ptr()));
    case at::kHalf: return body(static_cast<at::Half*>(t.data_ptr()));
    case at::kBFloat16: return body(static_cast<at::BFloat16*>(t.data_ptr()));
    default: return body(static_cast<float*>(t.data_ptr()));
  }
}

// The sum of numbers(j, n), vectors at columns j; in fp32 over blocks, then in double.
template <class T, class Numbers>
double add_up(int64_t size, const Numbers& numbers) {
  double sum = 0;
  for (int64_t block = 0; block < size; block += kBlock) {
    Vec<T> sums(Wide<T>(0));
    for_each_vector<T>(std::min(kBlock, size - block),
                       [&](int64_t j, auto n) { sums = sums + numbers(block + j, n); });
    sum += cpu::CPU_CAPABILITY::sum(sums);
  }
  return sum;
}

template <class T>
double squares(const T* x, int64_t size) {
  return add_up<T>(size, [&](int64_t j, auto n) {
    const auto v = load(x + j, n);
    return v * v;
  });
}

// A parameter whose numbers are R, stored as P; its gradient is G.
template <class P, class G>
struct Slice {
  using R = Wide<P>;
  P* param;
  const G* grad;
  R *exp_avg, *exp_avg_sq, *master;

  Vec<P> w(int64_t j, int64_t n) const { return master ? load(master + j, n) : load(param + j, n); }
  void set_w(int64_t j, const Vec<P>& w, int64_t n) const {
    if (master) store(master + j, w, n);
    store(param + j, w, n);
  }
};

template <class P, class G, class R>
void adamw_chunk(const Slice<P, G>& p, int64_t size, R factor, const Betas<R>& betas,
                 const Scalars<R>& s) {
  for_each_vector<P>(size, [&](int64_t j, auto n) {
    Vec<P> m = load(p.exp_avg + j, n), v = load(p.exp_avg_sq + j, n);
    optimizer::moments(load(p.grad + j, n) * Vec<P>(factor), m, v, betas);
    store(p.exp_avg + j, m, n);
    store(p.exp_avg_sq + j, v, n);
    p.set_w(j, optimizer::adamw(p.w(j, n), m, v, betas, s), n);
  });
}

struct Squares {
  double w, u;
};

template <class P, class G, class R>
Squares lamb_moments_chunk(const Slice<P, G>& p, int64_t size, R factor, const Betas<R>& betas,
                           const Scalars<R>& s) {
  Squares all = {0, 0};
  for (int64_t block = 0; block < size; block += kBlock) {
    Vec<P> sums_w(R(0)), sums_u(R(0));
    for_each_vector<P>(std::min(kBlock, size - block), [&](int64_t column, auto n) {
      const int64_t j = block + column;
      Vec<P> m = load(p.exp_avg + j, n), v = load(p.exp_avg_sq + j, n);
      optimizer::moments(load(p.grad + j, n) * Vec<P>(factor), m, v, betas);
      store(p.exp_avg + j, m, n);
      store(p.exp_avg_sq + j, v, n);
      const Vec<P> w = p.w(j, n), u = optimizer::lamb_update(w, m, v, betas, s);
      sums_w = sums_w + w * w;
      sums_u = sums_u + u * u;
    });
    all.w += sum(sums_w);
    all.u += sum(sums_u);
  }
  return all;
}

template <class P, class G, class R>
void lamb_apply_chunk(const Slice<P, G>& p, int64_t size, R rate, const Betas<R>& betas,
                      const Scalars<R>& s) {
  for_each_vector<P>(size, [&](int64_t j, auto n) {
    const Vec<P> w = p.w(j, n), m = load(p.exp_avg + j, n), v = load(p.exp_avg_sq + j, n);
    p.set_w(j, w - Vec<P>(rate) * optimizer::lamb_update(w, m, v, betas, s), n);
  });
}

// What a step is made of, once its tensors are known to be as they must.
struct Step {
  const Lists& lists;
  std::vector<Tensor> grads;
  std::vector<Chunk> chunks;
  double beta1, beta2, eps;
  double factor = 1;                      // of all gradients
  bool skip = false;                      // a gradient is not finite, the caller says
  std::vector<Scalars<double>> scalars;   // of each parameter

  Step(const char* op, const Lists& lists, const Options& o)
      : lists(lists),
        grads(optimizer::check_lists(op, lists, o, at::kCPU, /*doubles=*/true)),
        beta1(o.beta1),
        beta2(o.beta2),
        eps(o.eps) {
    skip = o.found_inf.has_value() && *optimizer::scalar(o.found_inf) != 0;
    if (skip) return;
    chunks = cut(lists.params);
    if (o.grad_scale.has_value()) factor = 1.0 / *optimizer::scalar(o.grad_scale);
    if (o.norm.has_value()) {
      factor *= optimizer::clip_factor<double>(*optimizer::scalar(o.norm), o.max_norm);
    }
    scalars.reserve(lists.params.size());
    for (size_t g = 0; g < lists.sizes.size(); ++g) {
      const Tensor lr_tensor = optimizer::lr_tensor(lists, g);
      const double lr = lr_tensor.defined() ? *optimizer::scalar(lr_tensor) : lists.lrs[g];
      for (int64_t i = 0; i < lists.sizes[g]; ++i) {
        const float step = ++*lists.steps[scalars.size()].mutable_data_ptr<float>();
        scalars.push_back(
            optimizer::scalars<double>(lr, lists.weight_decays[g], beta1, beta2, step));
      }
    }
  }

  // body(slice, size, betas, scalars) of a chunk, in its dtypes.
  template <class Body>
  void run(const Chunk& chunk, const Body& body) const {
    const size_t i = chunk.tensor;
    with_data(lists.params[i], [&](auto* param) {
      with_data(grads[i], [&](const auto* grad) {
        using P = std::decay_t<decltype(*param)>;
        using G = std::decay_t<decltype(*grad)>;
        if constexpr (std::is_same_v<Wide<P>, Wide<G>>) {  // others were refused
          using R = Wide<P>;
          const int64_t at = chunk.first;
          R* master = optimizer::has_master(lists, i)
                          ? lists.masters[i].template mutable_data_ptr<R>() + at
                          : nullptr;
          const Slice<P, G> slice = {
              param + at, grad + at, lists.exp_avgs[i].template mutable_data_ptr<R>() + at,
              lists.exp_avg_sqs[i].template mutable_data_ptr<R>() + at, master};
          const Scalars<double>& s = scalars[i];
          const Scalars<R> narrow = {R(s.lr), R(s.weight_decay), R(s.inv_correction),
                                     R(s.inv_root)};
          body(slice, chunk.size, optimizer::betas<R>(beta1, beta2, eps), narrow);
        }
      });
    });
  }
};

}  // namespace

Tensor grad_norm(at::TensorList grads, const std::optional<Tensor>& grad_scale) {
  const auto dense = optimizer::check_grads("grad_norm", grads, grad_scale, /*doubles=*/true);
  const std::vector<Chunk> chunks = cut(dense);
  std::vector<double> sums(chunks.size());
  for_each_chunk(chunks, [&](const Chunk& chunk, int64_t c) {
    sums[c] = with_data(dense[chunk.tensor],
                        [&](const auto* x) { return squares(x + chunk.first, chunk.size); });
  });
  double sum = 0;
  for (const double s : sums) sum += s;
  const double scale = grad_scale.has_value() ? *optimizer::scalar(grad_scale) : 1.0;
  Tensor norm = at::empty({}, at::TensorOptions().dtype(at::kFloat));
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(sum) / scale);
  return norm;
}

void adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
            at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList masters,
            at::IntArrayRef sizes, at::ArrayRef<double> lrs, at::ArrayRef<double> weight_decays,
            at::TensorList lr_tensors, double beta1, double beta2, double eps, double max_norm,
            const std::optional<Tensor>& norm, const std::optional<Tensor>& grad_scale,
            const std::optional<Tensor>& found_inf) {
  const Lists lists = {params, grads, exp_avgs, exp_avg_sqs,  steps,
                       masters, sizes, lrs,     weight_decays, lr_tensors};
  const Step step("adamw_", lists, {beta1, beta2, eps, max_norm, norm, grad_scale, found_inf});
  for_each_chunk(step.chunks, [&](const Chunk& chunk, int64_t) {
    step.run(chunk, [&](const auto& slice, int64_t size, const auto& betas, const auto& s) {
      adamw_chunk(slice, size, static_cast<decltype(betas.eps)>(step.factor), betas, s);
    });
  });
}

void lamb_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
           at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList masters,
           at::IntArrayRef sizes, at::ArrayRef<double> lrs, at::ArrayRef<double> weight_decays,
           at::TensorList lr_tensors, double beta1, double beta2, double eps, double max_norm,
           const std::optional<Tensor>& norm, const std::optional<Tensor>& grad_scale,
           const std::optional<Tensor>& found_inf, bool always_adapt) {
  const Lists lists = {params, grads, exp_avgs, exp_avg_sqs,  steps,
                       masters, sizes, lrs,     weight_decays, lr_tensors};
  const Step step("lamb_", lists, {beta1, beta2, eps, max_norm, norm, grad_scale, found_inf});
  std::vector<Squares> sums(step.chunks.size());
  for_each_chunk(step.chunks, [&](const Chunk& chunk, int64_t c) {
    step.run(chunk, [&](const auto& slice, int64_t size, const auto& betas, const auto& s) {
      const auto factor = static_cast<decltype(betas.eps)>(step.factor);
      sums[c] = lamb_moments_chunk(slice, size, factor, betas, s);
    });
  });
  std::vector<Squares> of_tensor(params.size(), Squares{0, 0});
  for (size_t c = 0; c < sums.size(); ++c) {
    of_tensor[step.chunks[c].tensor].w += sums[c].w;
    of_tensor[step.chunks[c].tensor].u += sums[c].u;
  }
  for_each_chunk(step.chunks, [&](const Chunk& chunk, int64_t) {
    const Scalars<double>& scalars = step.scalars[chunk.tensor];
    const Squares& norms = of_tensor[chunk.tensor];
    const bool adapt = always_adapt || scalars.weight_decay != 0;
    const double rate = scalars.lr * (adapt ? optimizer::trust_ratio(norms.w, norms.u) : 1.0);
    step.run(chunk, [&](const auto& slice, int64_t size, const auto& betas, const auto& s) {
      lamb_apply_chunk(slice, size, static_cast<decltype(betas.eps)>(rate), betas, s);
    });
  });
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
