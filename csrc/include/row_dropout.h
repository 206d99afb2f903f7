// Dropout of rows (T, D): counters (row, column // 8, 0, 0), as bert_fast/reference_dropout.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "checks.h"
#include "philox.h"

namespace bert_fast::cpu::CPU_CAPABILITY {

class RowDropout {
 public:
  // None without a seed or with p = 0.
  RowDropout(const char* op, double p, const std::optional<Tensor>& seed, int64_t site) {
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, op, ": p: want 0 to 1, got ", p);
    if (!seed.has_value() || p == 0) return;
    TORCH_CHECK_VALUE(seed->numel() == 1 && seed->scalar_type() == at::kLong &&
                          seed->device().is_cpu(),
                      op, ": seed: want [1] torch.int64 on cpu, got ", seed->sizes(), " torch.",
                      dtype_name(seed->scalar_type()), " on ", seed->device());
    key_ = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) + static_cast<uint64_t>(site);
    threshold_ = dropout_threshold(p);
    is_on_ = true;
  }

  bool is_on() const { return is_on_; }

  // What the D columns of a row are multiplied by: 0, or 1 / (share kept).
  template <class W>
  void factors(int64_t row, int64_t D, W* out) const {
    constexpr int64_t kColumns = philox::kLanes * kPhiloxValues;
    const W scale = static_cast<W>(dropout_scale(threshold_));
    uint16_t bits[kColumns];
    for (int64_t j = 0; j < D; j += kColumns) {
      const int64_t n = std::min(kColumns, D - j);
      const int64_t groups = (n + kPhiloxValues - 1) / kPhiloxValues;
      philox_bits(key_, static_cast<uint32_t>(row), 0, 0, j / kPhiloxValues, groups, bits);
      dropout_factors(bits, n, threshold_, scale, out + j);
    }
  }

 private:
  bool is_on_ = false;
  uint32_t threshold_ = 0;
  uint64_t key_ = 0;
};

}  // namespace bert_fast::cpu::CPU_CAPABILITY
