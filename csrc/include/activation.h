// GELU in both forms, and ReLU, and their derivatives, on vectors.
//
// GELU(x) = x P(x) = max(x, 0) - a Q(a), a = |x|, Q = 1 - P: no difference of nearly equal numbers,
// so that small values far left keep their digits. The tail Q and its density q = -Q' share an
// exponential:
//   erf:  Q = erfc(a / sqrt 2) / 2 = exp(-a^2 / 2) R(a), q = exp(-a^2 / 2) / sqrt(2 pi)
//   tanh: Q = e / (1 + e), e = exp(-2 u), u = sqrt(2 / pi) (a + 0.044715 a^3), q = 2 u' Q (1 - Q)
#pragma once

#include <cstdint>
#include <string_view>

#include "vec.h"

namespace bert_fast::cpu::CPU_CAPABILITY {

using at::vec::fmadd;
using at::vec::Vectorized;

enum class Activation { kErf, kTanh, kRelu };

// exp(x) for x <= 0, within 2e-7 of its value; 0 below -88, before the result would lose digits.
inline Vectorized<double> exp_of_negative(const Vectorized<double>& x) { return x.exp(); }
inline Vectorized<float> exp_of_negative(const Vectorized<float>& x) {
  using V = Vectorized<float>;
  // What is added to 1.5 * 2^23 is rounded, and lies in the low bits: k and the exponent's bias.
  const V shift(12582912.0f + 127.0f), bounded = at::vec::clamp_min(x, V(-88.0f));
  const V shifted = fmadd(bounded, V(1.44269504f), shift), k = shifted - shift;
  // exp(x) = 2^k exp(r); ln 2 in two parts, the first times k exact. 2^-127 comes out as 0.
  const V power = at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Vectorized<int32_t>(23));
  const V r = fmadd(k, V(2.12194440e-4f), fmadd(k, V(-0.693359375f), bounded));
  V e = fmadd(r, V(0.00831205491f), V(0.0418944508f));
  e = fmadd(e, r, V(0.166671336f));
  e = fmadd(e, r, V(0.499992013f));
  return (fmadd(e * r, r, r) + V(1.0f)) * power;
}

template <class W>
struct Tail {
  Vectorized<W> above, density;
};

inline Tail<double> erf_tail(const Vectorized<double>& a) {
  using V = Vectorized<double>;
  return {V(0.5) * (a * V(0.70710678118654752)).erfc(),
          (V(-0.5) * a * a).exp() * V(0.39894228040143268)};
}

inline Tail<float> erf_tail(const Vectorized<float>& a) {
  using V = Vectorized<float>;
  const V e = exp_of_negative(V(-0.5f) * a * a);
  // R(a) by a polynomial in t whose relative error is at most 1.5e-7 for a in 0 to 14
  const V t = V(1.0f) / fmadd(a, V(0.3f), V(1.0f));
  V r = fmadd(t, V(0.0356747806f), V(-0.157203093f));
  r = fmadd(r, t, V(0.206353486f));
  r = fmadd(r, t, V(-0.0536836348f));
  r = fmadd(r, t, V(0.128561616f));
  r = fmadd(r, t, V(0.0999135002f));
  r = fmadd(r, t, V(0.120753959f));
  r = fmadd(r, t, V(0.119629301f));
  return {e * t * r, e * V(0.398942280f)};
}

template <class W>
inline Tail<W> tanh_tail(const Vectorized<W>& a) {
  using V = Vectorized<W>;
  const V scale(W(0.79788456080286536)), cubic(W(0.044715)), one(W(1));
  const V square = a * a;
  const V u = scale * fmadd(square * a, cubic, a);
  const V slope = scale * fmadd(square, V(W(3 * 0.044715)), one);
  const V e = exp_of_negative(V(W(-2)) * u);
  const V below = one / (one + e), above = e * below;
  return {above, V(W(2)) * slope * above * below};
}

// |x|, not past where the tail is 0: an infinite x times it would be NaN. A NaN stays.
template <class W>
inline Vectorized<W> bounded_size(const Vectorized<W>& x) {
  return at::vec::clamp_max(x.abs(), Vectorized<W>(W(40)));
}

template <Activation kind, class W>
inline Tail<W> tail(const Vectorized<W>& a) {
  if constexpr (kind == Activation::kErf) {
    return erf_tail(a);
  } else {
    return tanh_tail(a);
  }
}

template <Activation kind, class W>
inline Vectorized<W> activation(const Vectorized<W>& x) {
  const Vectorized<W> positive = at::vec::clamp_min(x, Vectorized<W>(W(0)));
  if constexpr (kind == Activation::kRelu) return positive;
  const Vectorized<W> a = bounded_size(x);
  return fmadd(a.neg(), tail<kind>(a).above, positive);
}

// dy times the derivative at x: P(x) + x q(x).
template <Activation kind, class W>
inline Vectorized<W> activation_bwd(const Vectorized<W>& dy, const Vectorized<W>& x) {
  using V = Vectorized<W>;
  const V zero(W(0));
  if constexpr (kind == Activation::kRelu) return V::blendv(zero, dy, x > zero);
  const V a = bounded_size(x);
  const Tail<W> t = tail<kind>(a);
  const V left = fmadd(a.neg(), t.density, t.above);
  return dy * V::blendv(left, V(W(1)) - left, x > zero);
}

// Call body(std::integral_constant<Activation, ...>) for one of bert_fast.config.ACTIVATIONS; false
// for another name.
template <class Body>
inline bool for_activation(std::string_view name, const Body& body) {
  if (name == "gelu") {
    body(std::integral_constant<Activation, Activation::kErf>());
  } else if (name == "gelu_new" || name == "gelu_pytorch_tanh") {
    body(std::integral_constant<Activation, Activation::kTanh>());
  } else if (name == "relu") {
    body(std::integral_constant<Activation, Activation::kRelu>());
  } else {
    return false;
  }
  return true;
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
