// Vectors over the ops' dtypes: what is stored in 16 bits is computed in fp32.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace bert_fast::cpu::CPU_CAPABILITY {

// The dtype of arithmetic and sums.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
using Vec = at::vec::Vectorized<Wide<T>>;

template <class T>
inline constexpr bool is_16_bits = !std::is_same_v<T, Wide<T>>;

// The Vec<T>::size() elements at p. No template: c10::load of 16 bits would fit as well.
inline Vec<float> load(const float* p) { return Vec<float>::loadu(p); }
inline Vec<double> load(const double* p) { return Vec<double>::loadu(p); }
inline Vec<at::BFloat16> load(const at::BFloat16* p) {
  Vec<float> v;
  at::vec::load_fp32_from_bf16(p, v);
  return v;
}
inline Vec<at::Half> load(const at::Half* p) {
  Vec<float> v;
  at::vec::load_fp32_from_fp16(p, v);
  return v;
}

// The first n <= Vec<T>::size() elements at p, and zeros.
template <class T>
inline Vec<T> load(const T* p, int64_t n) {
  if (n == Vec<T>::size()) return load(p);
  if constexpr (is_16_bits<T>) {
    return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(p, n));
  } else {
    return Vec<T>::loadu(p, n);
  }
}

// Write the lower half of a vector of 16 bits. As a store of so many elements it would be masked:
// on AMD's Zen 4 GELU took three times as long.
template <class T>
inline void store_half(T* p, const at::vec::Vectorized<T>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(v));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(v));
#else
  v.store(p, Vec<T>::size());
#endif
}

// Write the first n <= Vec<T>::size() elements, rounded to T.
template <class T>
inline void store(T* p, const Vec<T>& v, int64_t n = Vec<T>::size()) {
  if constexpr (is_16_bits<T>) {
    const at::vec::Vectorized<T> narrow = at::vec::convert<T>(v);
    n == Vec<T>::size() ? store_half(p, narrow) : narrow.store(p, n);
  } else {
    v.store(p, n);
  }
}

// Halves are combined until one lane is left: the order is fixed by the number of lanes alone.
template <int lanes, class W, class Combine>
inline W reduce(const W* v, const Combine& combine) {
  if constexpr (lanes == 1) {
    return v[0];
  } else {
    W half[lanes / 2];
    for (int i = 0; i < lanes / 2; ++i) half[i] = combine(v[i], v[i + lanes / 2]);
    return reduce<lanes / 2>(half, combine);
  }
}

template <class W, class Combine>
inline W reduce(const at::vec::Vectorized<W>& v, const Combine& combine) {
  constexpr int size = at::vec::Vectorized<W>::size();
  W lanes[size];
  v.store(lanes);
  return reduce<size>(lanes, combine);
}

template <class W>
inline W sum(const at::vec::Vectorized<W>& v) {
  return reduce(v, [](W a, W b) { return a + b; });
}

template <class W>
inline W maximum(const at::vec::Vectorized<W>& v) {
  return reduce(v, [](W a, W b) { return a < b ? b : a; });
}

// Call body(j, n) for each vector of D columns: n elements from column j, all but the last full.
template <class T, class Body>
inline void for_each_vector(int64_t D, const Body& body) {
  constexpr int64_t size = Vec<T>::size();
  int64_t j = 0;
  for (; j + size <= D; j += size) body(j, std::integral_constant<int64_t, size>());
  if (j < D) body(j, D - j);
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
