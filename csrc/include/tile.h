// Small matrix products on one core, of operands that lie in its cache.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

#include "vec.h"

namespace bert_fast::cpu::CPU_CAPABILITY {

// A tile of the result stays in registers: rows x vectors, of the 32 that AVX-512 has or of 16.
constexpr int kTileRows = 6;
#ifdef CPU_CAPABILITY_AVX512
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

template <class W>
constexpr int64_t kTileColumns = kTileVectors * Vec<W>::size();

// Columns rounded up to whole tiles: a right operand or a result is this wide.
template <class W>
constexpr int64_t tile_width(int64_t columns) {
  return (columns + kTileColumns<W> - 1) / kTileColumns<W> * kTileColumns<W>;
}

// How many of a sum's K products are added one to the next; then sums of so many are added, which
// loses less: as little as a BLAS that keeps four sums.
inline int64_t chain(int64_t K) { return std::clamp<int64_t>((K + 3) / 4, 4, 64); }

// c (M, tile) = or += a (M, K) b (K, tile). Each element is one chain of fused products in the
// order of K, whatever M is: the bits of a row do not depend on its neighbours.
template <bool add, int M, class W>
inline void multiply_tile(const W* a, int64_t a_row, int64_t a_column, const W* b, int64_t b_row,
                          W* c, int64_t c_row, int64_t K) {
  using V = Vec<W>;
  V sums[M][kTileVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kTileVectors; ++n) {
      sums[m][n] = V(W(0));
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    V right[kTileVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kTileVectors; ++n) right[n] = V::loadu(b + n * V::size());
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V left(a[m * a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < kTileVectors; ++n) {
        sums[m][n] = at::vec::fmadd(left, right[n], sums[m][n]);
      }
    }
    a += a_column;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kTileVectors; ++n) {
      W* const to = c + m * c_row + n * V::size();
      (add ? V::loadu(to) + sums[m][n] : sums[m][n]).store(to);
    }
  }
}

// As multiply_tile, for any number of rows.
template <bool add, class W>
inline void multiply_rows(int64_t M, const W* a, int64_t a_row, int64_t a_column, const W* b,
                          int64_t b_row, W* c, int64_t c_row, int64_t K) {
  for (; M >= kTileRows; M -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row) {
    multiply_tile<add, kTileRows>(a, a_row, a_column, b, b_row, c, c_row, K);
  }
  switch (M) {
    case 5: return multiply_tile<add, 5>(a, a_row, a_column, b, b_row, c, c_row, K);
    case 4: return multiply_tile<add, 4>(a, a_row, a_column, b, b_row, c, c_row, K);
    case 3: return multiply_tile<add, 3>(a, a_row, a_column, b, b_row, c, c_row, K);
    case 2: return multiply_tile<add, 2>(a, a_row, a_column, b, b_row, c, c_row, K);
    case 1: return multiply_tile<add, 1>(a, a_row, a_column, b, b_row, c, c_row, K);
  }
}

// A right operand (K, N), N any, in panels of one tile's columns: panel p, row k begins at
// (p K + k) kTileColumns. Columns past N are 0.
//
// c (M, tile_width(N)) = or += a (M, K) b (K, N). a's element (m, k) is a[m a_row + k a_column].
template <bool add, class W>
inline void multiply(int64_t M, int64_t N, int64_t K, const W* a, int64_t a_row, int64_t a_column,
                     const W* panels, W* c, int64_t c_row) {
  constexpr int64_t columns = kTileColumns<W>;
  const int64_t step = chain(K);
  for (int64_t n = 0; n < N; n += columns, panels += K * columns) {
    multiply_rows<add>(M, a, a_row, a_column, panels, columns, c + n, c_row, std::min(step, K));
    for (int64_t k = step; k < K; k += step) {
      multiply_rows<true>(M, a + k * a_column, a_row, a_column, panels + k * columns, columns,
                          c + n, c_row, std::min(step, K - k));
    }
  }
}

// Put rows x (K, N) into panels.
template <class T, class W = Wide<T>>
inline void pack_rows(const T* x, int64_t x_row, int64_t K, int64_t N, W* panels) {
  constexpr int64_t columns = kTileColumns<W>, size = Vec<W>::size();
  for (int64_t n = 0; n < N; n += columns) {
    for (int64_t k = 0; k < K; ++k, panels += columns) {
      for (int64_t j = 0; j < columns; j += size) {
        const int64_t left = std::clamp<int64_t>(N - n - j, 0, size);
        load(x + k * x_row + n + j, left).store(panels + j);
      }
    }
  }
}

// Put the transpose (N, K) of rows x (K, N) into panels: what is right of a product with x^T.
template <class W>
inline void pack_columns(const W* x, int64_t x_row, int64_t K, int64_t N, W* panels) {
  constexpr int64_t columns = kTileColumns<W>;
  constexpr int64_t block = Vec<float>::size();
  for (int64_t k = 0; k < K; k += columns, panels += N * columns) {
    const int64_t width = std::min(columns, K - k);
    if (width < columns) std::fill(panels, panels + N * columns, W(0));
    int64_t j = 0;
    for (; j + block <= width; j += block) {
      int64_t n = 0;
      for (; n + block <= N; n += block) {
        at::vec::transpose_mxn<W, block, block>(x + (k + j) * x_row + n, x_row,
                                                panels + n * columns + j, columns);
      }
      for (; n < N; ++n) {
        for (int64_t i = 0; i < block; ++i) panels[n * columns + j + i] = x[(k + j + i) * x_row + n];
      }
    }
    for (; j < width; ++j) {
      for (int64_t n = 0; n < N; ++n) panels[n * columns + j] = x[(k + j) * x_row + n];
    }
  }
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
