// unpad: where the real tokens of a padded batch are.
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu_ops.h"

namespace bert_fast::cpu::CPU_CAPABILITY {

std::tuple<at::Tensor, at::Tensor, at::Tensor> unpad(const at::Tensor& mask) {
  TORCH_CHECK_VALUE(mask.dim() == 2, "unpad: mask: want (B, L) [*, *], got ", mask.sizes());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "unpad: mask: want bool, got torch.",
                   c10::getDtypeNames(mask.scalar_type()).first);

  const int64_t B = mask.size(0), L = mask.size(1);
  const int64_t stride_B = mask.stride(0), stride_L = mask.stride(1);
  // As bytes: a bool tensor that is a view of uint8 may hold any value, and to read one as a C++
  // bool is undefined.
  const auto* mask_BL = static_cast<const uint8_t*>(mask.const_data_ptr());

  const auto cpu = at::TensorOptions().device(at::kCPU);
  at::Tensor cu_seqlens = at::empty({B + 1}, cpu.dtype(at::kInt));
  int32_t* cu = cu_seqlens.mutable_data_ptr<int32_t>();
  cu[0] = 0;
  int64_t total = 0, max_len = 0;
  for (int64_t b = 0; b < B; ++b) {
    const uint8_t* row = mask_BL + b * stride_B;
    int64_t len = 0;
    if (stride_L == 1) {  // its own loop: this one is vectorised
      for (int64_t l = 0; l < L; ++l) len += row[l] != 0;
    } else {
      for (int64_t l = 0; l < L; ++l) len += row[l * stride_L] != 0;
    }
    total += len;
    max_len = std::max(max_len, len);
    TORCH_CHECK_VALUE(total <= std::numeric_limits<int32_t>::max(),
                      "unpad: mask: want at most 2147483647 True entries (cu_seqlens is int32),"
                      " got ", total, " in rows 0 to ", b);
    cu[b + 1] = static_cast<int32_t>(total);
  }

  at::Tensor rows = at::empty({total}, cpu.dtype(at::kLong));
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b) {
    const uint8_t* row = mask_BL + b * stride_B;
    // No branch on the mask: each column is written, and the next overwrites it unless it counted.
    // The loop ends at the row's last True: padding on the right is not read a second time, and
    // nothing is written past the row's place in `out`.
    int64_t n = cu[b];
    for (int64_t l = 0; n < cu[b + 1]; ++l) {
      out[n] = b * L + l;
      n += row[l * stride_L] != 0;
    }
  }
  return {rows, cu_seqlens, at::scalar_tensor(max_len, cpu.dtype(at::kLong))};
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
