// LayerNorm of one row, and its gradient: what add_layer_norm and embed share.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace bert_fast::cpu::CPU_CAPABILITY {

template <class W>
struct RowStatistics {
  W mean, rstd;
  W rest = 0;  // what rounding took from the mean: it counts where the mean is far from 0
};

// The N sums over j of term(j, n), each of vectors of n elements from column j whose surplus lanes
// are 0: in turn over four accumulators, as an addition waits for the one before it.
template <class W, int N, class Term>
inline std::array<W, N> sum_columns(int64_t D, const Term& term) {
  using V = at::vec::Vectorized<W>;
  constexpr std::integral_constant<int64_t, V::size()> size;
  V sums[4][N];
  for (auto& sum : sums) std::fill_n(sum, N, V(W(0)));
  const auto add = [&](V* sum, const std::array<V, N>& terms) {
    for (int i = 0; i < N; ++i) sum[i] = sum[i] + terms[i];
  };
  int64_t j = 0;
  for (; j + 4 * size <= D; j += 4 * size) {
    for (int k = 0; k < 4; ++k) add(sums[k], term(j + k * size, size));
  }
  for (; j + size <= D; j += size) add(sums[0], term(j, size));
  if (j < D) add(sums[1], term(j, D - j));
  std::array<W, N> out;
  for (int i = 0; i < N; ++i) {
    out[i] = sum((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
  }
  return out;
}

// Of a row z (D) that lies in cache: its mean first, then the squares around it.
template <class W>
inline RowStatistics<W> row_statistics(const W* z, int64_t D, double eps) {
  using V = at::vec::Vectorized<W>;
  const auto [total] = sum_columns<W, 1>(D, [&](int64_t j, auto n) {
    return std::array<V, 1>{load(z + j, n)};
  });
  const W mean = total / D;
  const auto [centred, squares] = sum_columns<W, 2>(D, [&](int64_t j, auto n) {
    V v = load(z + j, n) - V(mean);
    if (n < V::size()) v = V::set(V(W(0)), v, n);
    return std::array<V, 2>{v, v * v};
  });
  const W rest = centred / D, variance = std::max(squares / D - rest * rest, W(0));
  return {mean, W(1) / std::sqrt(variance + static_cast<W>(eps)), rest};
}

// y = ((z - mean) rstd w + b) factors; factors: null for none. z, w, b, factors, y (D).
template <class T, class W>
inline void normalize_row(const W* z, RowStatistics<W> row, const W* w, const W* b,
                          const W* factors, int64_t D, T* y) {
  const Vec<T> mean(row.mean), rstd(row.rstd), shift(-row.rest * row.rstd);
  for_each_vector<T>(D, [&](int64_t j, auto n) {
    const Vec<T> x_hat = at::vec::fmadd(load(z + j, n) - mean, rstd, shift);
    Vec<T> out = at::vec::fmadd(x_hat, load(w + j, n), load(b + j, n));
    if (factors != nullptr) out = out * load(factors + j, n);
    store(y + j, out, n);
  });
}

// The gradient of one row: emit(j, n, dz) gets dz = rstd (g - mean(g) - x_hat mean(g x_hat)), g =
// dy w, by vectors; dw += dy x_hat and db += dy. dy is multiplied by factors first, unless null.
// `z_is_exact`: it was not rounded when saved, so that the row's true mean is that of z.
template <class T, class W, class Emit>
inline void layer_norm_bwd_row(const T* dy, const W* factors, const T* z, bool z_is_exact,
                               RowStatistics<W> row, const W* w, int64_t D, W* dw, W* db,
                               const Emit& emit) {
  using V = Vec<T>;
  const V mean(row.mean), rstd(row.rstd);
  const auto gradient = [&](int64_t j, auto n) {
    const V d = load(dy + j, n);
    return factors == nullptr ? d : d * load(factors + j, n);
  };
  const auto [g_sum, gx_sum, x_sum] = sum_columns<W, 3>(D, [&](int64_t j, auto n) {
    const V g = gradient(j, n) * load(w + j, n);
    V x_hat = (load(z + j, n) - mean) * rstd;
    if (n < V::size()) x_hat = V::set(V(W(0)), x_hat, n);
    return std::array<V, 3>{g, g * x_hat, x_hat};
  });
  // x_hat has mean 0: what is left is what rounding took from the mean
  const W rest = z_is_exact ? x_sum / D : W(0);
  const W g_mean = g_sum / D, gx_mean = gx_sum / D - g_mean * rest;
  const V shift(-rest);
  for_each_vector<T>(D, [&](int64_t j, auto n) {
    const V d = gradient(j, n), x_hat = at::vec::fmadd(load(z + j, n) - mean, rstd, shift);
    store(dw + j, at::vec::fmadd(d, x_hat, load(dw + j, n)), n);
    store(db + j, load(db + j, n) + d, n);
    const V centred = d * load(w + j, n) - V(g_mean);
    emit(j, n, rstd * at::vec::fmadd(x_hat, V(-gx_mean), centred));
  });
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
