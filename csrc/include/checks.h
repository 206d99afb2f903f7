// What is wrong with a tensor at the border: want and got.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace bert_fast::cpu::CPU_CAPABILITY {

using at::Tensor;

inline std::string dtype_name(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

inline bool is_floating(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

// A floating tensor of these sizes, contiguous, on the CPU; -1 stands for any size.
inline void check_floating(const char* op, const char* name, const Tensor& t,
                           std::initializer_list<int64_t> want) {
  TORCH_CHECK_TYPE(is_floating(t.scalar_type()), op, ": ", name,
                   ": want fp32, fp16, bf16 or fp64, got torch.", dtype_name(t.scalar_type()));
  bool fits = t.dim() == static_cast<int64_t>(want.size());
  int64_t dim = 0;
  for (const int64_t size : want) {
    fits = fits && (size < 0 || t.size(dim) == size);
    ++dim;
  }
  TORCH_CHECK_VALUE(fits, op, ": ", name, ": want ", at::IntArrayRef(want),
                    " (-1: any size), got ", t.sizes());
  TORCH_CHECK_VALUE(t.device().is_cpu(), op, ": ", name, ": want it on cpu, got ", t.device());
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": ", name, ": want it contiguous, got strides ",
                    t.strides());
}

inline void check_floating(const char* op, const char* name, const std::optional<Tensor>& t,
                           std::initializer_list<int64_t> want) {
  if (t.has_value()) check_floating(op, name, *t, want);
}

// The dtype to which they promote; none is an integer.
inline at::ScalarType promoted(std::initializer_list<at::ScalarType> dtypes) {
  at::ScalarType all = *dtypes.begin();
  for (const at::ScalarType dtype : dtypes) all = c10::promoteTypes(all, dtype);
  return all;
}

// The dtype of arithmetic on a dtype: fp32, or fp64 for fp64.
inline at::ScalarType wide_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
