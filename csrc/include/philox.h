// Dropout's bits: Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011),
// those of bert_fast/reference_dropout.py. They depend on counters alone: nothing is stored.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "philox.h: want a little-endian machine: a word's lower half is its first value"
#endif

namespace bert_fast::cpu::CPU_CAPABILITY {

constexpr int64_t kPhiloxValues = 8;  // of 16 bits, a group: what one Philox call gives

namespace philox {

constexpr int kLanes = 32;  // groups side by side

// kLanes groups from `first` on -> 2 words of 64 bits each. The state lies in words of 64 bits of
// which the lower half counts, as the product of two halves reads it: no round masks or shuffles.
inline void lanes(uint64_t key, uint32_t row, uint32_t c2, uint32_t c3, uint32_t first,
                  uint64_t* out) {
  constexpr uint64_t kLow = 0xFFFFFFFF;
  uint64_t s0[kLanes], s1[kLanes], s2[kLanes], s3[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    s0[i] = row;
    s1[i] = first + static_cast<uint32_t>(i);
    s2[i] = c2;
    s3[i] = c3;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t low = (s0[i] & kLow) * 0xD2511F53, high = (s2[i] & kLow) * 0xCD9E8D57;
      s0[i] = (high >> 32) ^ s1[i] ^ k0;
      s1[i] = high;
      s2[i] = (low >> 32) ^ s3[i] ^ k1;
      s3[i] = low;
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int i = 0; i < kLanes; ++i) {
    out[2 * i] = (s0[i] & kLow) | s1[i] << 32;
    out[2 * i + 1] = (s2[i] & kLow) | s3[i] << 32;
  }
}

}  // namespace philox

// The bits of `groups` groups of 8 columns from first_group on, in the columns' order; counters
// (row, group, c2, c3). bits (8 * groups).
inline void philox_bits(uint64_t key, uint32_t row, uint32_t c2, uint32_t c3, int64_t first_group,
                        int64_t groups, uint16_t* bits) {
  uint64_t out[2 * philox::kLanes];
  for (int64_t done = 0; done < groups; done += philox::kLanes) {
    philox::lanes(key, row, c2, c3, static_cast<uint32_t>(first_group + done), out);
    const int64_t n = groups - done < philox::kLanes ? groups - done : philox::kLanes;
    std::memcpy(bits + kPhiloxValues * done, out, 2 * sizeof(uint64_t) * n);
  }
}

// Drop where bits < threshold: with probability p, in steps of 1 / 65536.
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::nearbyint(p * 65536));  // to even, as Python's round
}

// What is kept is multiplied by 1 / (share kept).
inline double dropout_scale(uint32_t threshold) {
  return threshold < 65536 ? 65536.0 / (65536.0 - threshold) : 0.0;
}

// factors[j] = 0 where value j is dropped, else scale.
template <class W>
inline void dropout_factors(const uint16_t* bits, int64_t n, uint32_t threshold, W scale,
                            W* factors) {
  for (int64_t j = 0; j < n; ++j) factors[j] = bits[j] >= threshold ? scale : W(0);
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
