// Memory for results.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace bert_fast::cpu::CPU_CAPABILITY {

using at::Tensor;

// As at::empty; a large one in huge pages, where Linux gives them to who asks. malloc maps a large
// block anew at every call, and to fault it in by pages of 4 KiB takes longer than to fill it.
inline Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  if (t.nbytes() >= 4 * kHuge) {
    const auto first = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t begin = (first + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = (first + t.nbytes()) / kHuge * kHuge;
    // only advice: that it cannot be had is no error
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return t;
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
