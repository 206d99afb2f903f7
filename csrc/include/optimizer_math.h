// The arithmetic of AdamW and LAMB: on one float (CUDA), and on a vector of numbers (CPU).
//
//   AdamW  w <- w (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
//   LAMB   u =  m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + wd w
//          w <- w - lr * ||w|| / ||u|| * u          (the norms are of one parameter)
//
// where m <- m + (1 - beta1) (g - m) and v <- beta2 v + (1 - beta2) g^2. Loshchilov and Hutter,
// "Decoupled Weight Decay Regularization"; You et al., "Large Batch Optimization for Deep
// Learning: Training BERT in 76 minutes".
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define BERT_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BERT_FAST_HOST_DEVICE inline
#endif

namespace bert_fast::optimizer {

// What the moments need, the same for all parameters.
template <class R>
struct Betas {
  R one_minus_beta1, beta2, one_minus_beta2, eps;
};

template <class R>
BERT_FAST_HOST_DEVICE Betas<R> betas(double beta1, double beta2, double eps) {
  return {R(1 - beta1), R(beta2), R(1 - beta2), R(eps)};
}

// What one parameter's step needs.
template <class R>
struct Scalars {
  R lr, weight_decay;
  R inv_correction;  // 1 / (1 - beta1^t)
  R inv_root;        // 1 / sqrt(1 - beta2^t)
};

// t is the number of this step, the first is 1.
template <class R>
BERT_FAST_HOST_DEVICE Scalars<R> scalars(double lr, double weight_decay, double beta1, double beta2,
                                         double t) {
  return {R(lr), R(weight_decay), R(1 / (1 - ::pow(beta1, t))), R(1 / ::sqrt(1 - ::pow(beta2, t)))};
}

// By what gradients are multiplied so that their norm is at most max_norm; as
// torch.nn.utils.clip_grad_norm_ has it, a norm that is not a number included.
template <class R>
BERT_FAST_HOST_DEVICE R clip_factor(R norm, R max_norm) {
  const R factor = max_norm / (norm + R(1e-6));
  return factor > 1 ? R(1) : factor;
}

BERT_FAST_HOST_DEVICE float root(float x) { return ::sqrtf(x); }
BERT_FAST_HOST_DEVICE double root(double x) { return ::sqrt(x); }
template <class V>
inline auto root(const V& x) -> decltype(x.sqrt()) {
  return x.sqrt();
}

// ||w|| / ||u||, 1 where either is 0; from the sums of squares.
template <class R>
BERT_FAST_HOST_DEVICE R trust_ratio(R squares_w, R squares_u) {
  return squares_w > 0 && squares_u > 0 ? root(squares_w) / root(squares_u) : R(1);
}

// V is R, or a vector of them that is made from one.
template <class V, class R>
BERT_FAST_HOST_DEVICE void moments(V g, V& m, V& v, const Betas<R>& betas) {
  m = m + V(betas.one_minus_beta1) * (g - m);
  v = V(betas.beta2) * v + V(betas.one_minus_beta2) * (g * g);
}

template <class V, class R>
BERT_FAST_HOST_DEVICE V direction(V m, V v, const Betas<R>& betas, const Scalars<R>& s) {
  return m / (root(v) * V(s.inv_root) + V(betas.eps));
}

template <class V, class R>
BERT_FAST_HOST_DEVICE V adamw(V w, V m, V v, const Betas<R>& betas, const Scalars<R>& s) {
  w = w * V(1 - s.lr * s.weight_decay);
  return w - V(s.lr * s.inv_correction) * direction(m, v, betas, s);
}

template <class V, class R>
BERT_FAST_HOST_DEVICE V lamb_update(V w, V m, V v, const Betas<R>& betas, const Scalars<R>& s) {
  return V(s.inv_correction) * direction(m, v, betas, s) + V(s.weight_decay) * w;
}

}  // namespace bert_fast::optimizer
