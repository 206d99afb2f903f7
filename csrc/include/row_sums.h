// Sums over rows, with the same bits for any number of threads: blocks of rows that depend on how
// many rows there are and on nothing else, each summed by one thread, then added in order.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace bert_fast::cpu::CPU_CAPABILITY {

// Elements below which a thread is not worth waking.
constexpr int64_t kGrain = 32768;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of `columns` elements that are worth a thread.
inline int64_t row_grain(int64_t columns) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
}

template <class W>
inline void add_to(W* total, const W* part, int64_t n) {
  for_each_vector<W>(n, [&](int64_t j, auto k) {
    store(total + j, load(total + j, k) + load(part + j, k), k);
  });
}

// out (width) = the sum of what `body(first, last, sums)` adds to sums (width) for rows first to
// last, of `columns` elements each. A block is short, and so is the row of blocks that make a
// part: the error grows slower than the number of rows.
template <class W, class Body>
void sum_rows(int64_t rows, int64_t columns, int64_t width, W* out, const Body& body) {
  constexpr int64_t kBlock = 32, kParts = 64;
  const int64_t blocks = divide_up(rows, kBlock);
  const int64_t part_blocks = std::max<int64_t>(1, divide_up(blocks, kParts));
  const int64_t parts = divide_up(blocks, part_blocks);
  std::vector<W> sums(parts * width, W(0));
  at::parallel_for(0, parts, divide_up(row_grain(columns), kBlock * part_blocks),
                   [&](int64_t begin, int64_t end) {
    std::vector<W> block(part_blocks > 1 ? width : 0);
    for (int64_t part = begin; part < end; ++part) {
      W* total = sums.data() + part * width;
      const int64_t last = std::min(rows, (part + 1) * part_blocks * kBlock);
      for (int64_t row = part * part_blocks * kBlock; row < last; row += kBlock) {
        const int64_t end_row = std::min(last, row + kBlock);
        if (part_blocks == 1) {
          body(row, end_row, total);
        } else {
          std::fill(block.begin(), block.end(), W(0));
          body(row, end_row, block.data());
          add_to(total, block.data(), width);
        }
      }
    }
  });
  at::parallel_for(0, width, divide_up(kGrain, std::max<int64_t>(1, parts)),
                   [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, W(0));
    for (int64_t part = 0; part < parts; ++part) {
      add_to(out + begin, sums.data() + part * width + begin, end - begin);
    }
  });
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
