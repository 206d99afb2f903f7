// The gradient of a table whose rows were gathered: no atomics, and the same bits for any number of
// threads, as each row of the table is summed by one thread in the order of its occurrences.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "row_sums.h"
#include "vec.h"

namespace bert_fast::cpu::CPU_CAPABILITY {

// Where each row of a table occurs among ids, in order.
class Occurrences {
 public:
  // ids (count), each in 0 to rows; a row `padding` is taken to occur nowhere.
  Occurrences(const int64_t* ids, int64_t count, int64_t rows, int64_t padding)
      : order_(count), ends_(rows, 0) {
    for (int64_t i = 0; i < count; ++i) ++ends_[ids[i]];
    int64_t total = 0;
    for (int64_t row = 0; row < rows; ++row) {
      if (ends_[row] > 0 && row != padding) {
        rows_.push_back(row);
        starts_.push_back(total);
      }
      const int64_t start = total;
      total += ends_[row];
      ends_[row] = start;
    }
    for (int64_t i = 0; i < count; ++i) order_[ends_[ids[i]]++] = i;
  }

  int64_t size() const { return static_cast<int64_t>(rows_.size()); }  // rows that occur
  int64_t row(int64_t index) const { return rows_[index]; }
  const int64_t* begin(int64_t index) const { return order_.data() + starts_[index]; }
  const int64_t* end(int64_t index) const { return order_.data() + ends_[rows_[index]]; }

  // The first of the rows that occur whose occurrences start at `at` or later in the order.
  int64_t from(int64_t at) const {
    return std::lower_bound(starts_.begin(), starts_.end(), at) - starts_.begin();
  }

  // The first of the rows that occur which is not before `row` in the table.
  int64_t not_before(int64_t row) const {
    return std::lower_bound(rows_.begin(), rows_.end(), row) - rows_.begin();
  }

 private:
  std::vector<int64_t> order_, ends_, rows_, starts_;
};

// Columns first to last of one row of the table: the sum of dz's rows where it occurs, by blocks,
// so that the error of a row that occurs often grows slower than its count.
template <class T>
void sum_occurrences(const Wide<T>* dz, const int64_t* begin, const int64_t* end, int64_t D,
                     int64_t first, int64_t last, T* grad) {
  using W = Wide<T>;
  constexpr int64_t kBlock = 32, kColumns = 256;
  W total[kColumns], block[kColumns];
  for (; first < last; first += kColumns) {
    const int64_t n = std::min(kColumns, last - first);
    std::fill_n(total, n, W(0));
    for (const int64_t* at = begin; at < end; at += kBlock) {
      const int64_t* stop = std::min(end, at + kBlock);
      std::copy_n(dz + *at * D + first, n, block);
      for (const int64_t* i = at + 1; i < stop; ++i) add_to(block, dz + *i * D + first, n);
      add_to(total, block, n);
    }
    for_each_vector<T>(n, [&](int64_t j, auto k) {
      store(grad + first + j, load(total + j, k), k);
    });
  }
}

// grad (rows, D) of a table, dz (count, D), ids (count); zeros where a row occurs nowhere.
template <class T>
void scatter_rows(const Wide<T>* dz, const int64_t* ids, int64_t count, int64_t rows, int64_t D,
                  int64_t padding, T* grad) {
  constexpr int64_t kTile = 64;
  const Occurrences found(ids, count, rows, padding);
  at::parallel_for(0, rows, row_grain(D), [&](int64_t begin, int64_t end) {
    int64_t index = found.not_before(begin);
    for (int64_t row = begin; row < end;) {  // from one that occurs to the next
      const int64_t next = index < found.size() ? std::min(end, found.row(index)) : end;
      if (next > row && D > 0) std::memset(grad + row * D, 0, (next - row) * D * sizeof(T));
      row = next + 1;
      ++index;
    }
  });
  if (found.size() < 32) {  // too few to share out: share the columns
    const int64_t grain = divide_up(row_grain(count), kTile);
    at::parallel_for(0, divide_up(D, kTile), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < found.size(); ++i) {
        sum_occurrences(dz, found.begin(i), found.end(i), D, begin * kTile,
                        std::min(D, end * kTile), grad + found.row(i) * D);
      }
    });
  } else {
    at::parallel_for(0, count, row_grain(D), [&](int64_t begin, int64_t end) {
      const int64_t stop = found.from(end);
      for (int64_t i = found.from(begin); i < stop; ++i) {
        sum_occurrences(dz, found.begin(i), found.end(i), D, 0, D, grad + found.row(i) * D);
      }
    });
  }
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
