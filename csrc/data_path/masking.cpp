// mask: which tokens are to be predicted, and what stands there instead.
#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "data_path.h"

namespace bert_fast::data_path {
namespace {

using Words = std::array<uint32_t, 4>;

// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011), one call.
inline Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = uint64_t{c0} * 0xD2511F53, high = uint64_t{c2} * 0xCD9E8D57;
    c0 = static_cast<uint32_t>(high >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(high);
    c2 = static_cast<uint32_t>(low >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(low);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1, c2, c3};
}

// A candidate, a token or a word, as one number: its random word above, the place of its first
// token below. So no two are equal, and their order is the one in which they are taken.
inline uint64_t candidate_at(int64_t place, uint32_t order) {
  return uint64_t{order} << 32 | static_cast<uint64_t>(place);
}
inline int64_t place_of(uint64_t candidate) { return static_cast<uint32_t>(candidate); }
inline uint64_t order_of(uint64_t candidate) { return candidate >> 32; }

// Masks the examples one by one; what it holds is memory that all of them use.
class Masker {
 public:
  Masker(const Rule& rule, uint64_t seed, uint32_t epoch)
      : rule_(rule),
        seed_(seed),
        epoch_(epoch),
        below_(static_cast<uint64_t>(std::nearbyint(rule.share * 4294967296.0))) {}

  void run(int64_t* ids, const int64_t* special, uint64_t index, int64_t n, int64_t* labels) {
    c2_ = static_cast<uint32_t>(index);
    c3_ = static_cast<uint32_t>(index >> 32);
    std::fill_n(labels, n, kIgnore);
    const int64_t tokens = find_candidates(ids, special, n);
    if (rule_.exact) {
      take_in_order(tokens, ids, labels);
    } else {
      for (const uint64_t candidate : candidates_) {
        if (order_of(candidate) < below_) take(candidate, ids, labels);
      }
    }
  }

 private:
  // Fills candidates_, by place, and sizes_; returns how many tokens they have in all.
  int64_t find_candidates(const int64_t* ids, const int64_t* special, int64_t n) {
    candidates_.resize(n);
    if (rule_.words) sizes_.assign(n, 1);
    int64_t count = 0, tokens = 0;
    bool behind = false;  // whether the token in front takes part
    for (int64_t group = 0; 4 * group < n; ++group) {
      const Words order = philox(seed_, 2 * epoch_, static_cast<uint32_t>(group), c2_, c3_);
      for (int64_t i = 4 * group; i < std::min(n, 4 * group + 4); ++i) {
        const uint8_t kind = rule_.table[ids[i]];
        const bool takes_part = !(kind & kSpecial) && !(special && special[i]);
        if (rule_.words && takes_part && behind && (kind & kContinues)) {
          ++sizes_[place_of(candidates_[count - 1])];
        } else {  // written in any case, counted only where it takes part: no branch
          candidates_[count] = candidate_at(i, order[i % 4]);
          count += takes_part;
        }
        tokens += takes_part;
        behind = takes_part;
      }
    }
    candidates_.resize(count);
    return tokens;
  }

  int64_t size_of(uint64_t candidate) const {
    return rule_.words ? sizes_[place_of(candidate)] : 1;
  }

  // Take round(share * tokens) of them; a word that is longer than what is left is passed over.
  void take_in_order(int64_t tokens, int64_t* ids, int64_t* labels) {
    if (!(rule_.share > 0) || tokens == 0) return;
    const auto share = static_cast<int64_t>(std::nearbyint(rule_.share * tokens));
    int64_t left = std::min(rule_.most, std::max<int64_t>(1, share));
    auto from = candidates_.begin();
    while (left > 0 && from != candidates_.end()) {
      // as many as would do if each had one token; more only where words were passed over
      const auto to = from + std::min<int64_t>(left, candidates_.end() - from);
      if (to != candidates_.end()) std::nth_element(from, to, candidates_.end());
      if (rule_.words) std::sort(from, to);  // of single tokens all are taken, in any order
      for (; from != to; ++from) {
        const int64_t size = size_of(*from);
        if (size > left) continue;
        left -= size;
        take(*from, ids, labels);
      }
    }
  }

  void take(uint64_t candidate, int64_t* ids, int64_t* labels) const {
    const int64_t first = place_of(candidate);
    for (int64_t i = first; i < first + size_of(candidate); ++i) {
      const Words drawn = philox(seed_, 2 * epoch_ + 1, static_cast<uint32_t>(i / 2), c2_, c3_);
      const uint64_t action = drawn[2 * (i % 2)], random = drawn[2 * (i % 2) + 1];
      labels[i] = ids[i];
      if (action < rule_.mask_below) {
        ids[i] = rule_.mask_id;
      } else if (action < rule_.random_below) {
        ids[i] = static_cast<int64_t>(random * rule_.num_random >> 32);
      }
    }
  }

  const Rule& rule_;
  const uint64_t seed_;
  const uint32_t epoch_;
  const uint64_t below_;
  uint32_t c2_ = 0, c3_ = 0;  // the index of the example
  std::vector<uint64_t> candidates_;
  std::vector<int32_t> sizes_;  // of words, by the place of their first token
};

void check_ids(const int64_t* ids, const Examples& examples, int64_t num_ids) {
  const auto limit = static_cast<uint64_t>(num_ids);
  const int64_t total = examples.cu[examples.count];
  bool fits = true;
  for (int64_t t = 0; t < total; ++t) fits &= static_cast<uint64_t>(ids[t]) < limit;
  if (fits) return;
  for (int64_t b = 0; b < examples.count; ++b) {
    for (int64_t i = 0; i < examples.length(b); ++i) {
      const int64_t id = ids[examples.start(b) + i];
      if (static_cast<uint64_t>(id) < limit) continue;
      throw std::invalid_argument("input_ids: want 0 to " + std::to_string(num_ids - 1) +
                                  ", got " + std::to_string(id) + " in example " +
                                  std::to_string(b) + ", token " + std::to_string(i));
    }
  }
}

}  // namespace

void mask(int64_t* ids, const Examples& examples, const int64_t* special, const uint64_t* index,
          uint64_t seed, uint32_t epoch, const Rule& rule, int64_t* labels) {
  check_ids(ids, examples, rule.num_ids);
  Masker masker(rule, seed, epoch);
  for (int64_t b = 0; b < examples.count; ++b) {
    const int64_t at = examples.start(b);
    masker.run(ids + at, special ? special + at : nullptr, index[b], examples.length(b),
               labels + at);
  }
}

}  // namespace bert_fast::data_path
