// The compiled CPU operators: a declaration each. bindings.cpp registers them.
//
// No include guard: bindings.cpp includes this once for each instruction set, in a namespace each.
// The bodies (cpu/*.cpp) are compiled as often, and hold no registration and no static state.
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace bert_fast::cpu::CPU_CAPABILITY {

using at::Tensor;

// mask (B, L) bool, any strides -> rows (T,) int64, cu_seqlens (B + 1,) int32, max_len () int64.
std::tuple<Tensor, Tensor, Tensor> unpad(const Tensor& mask);

}  // namespace bert_fast::cpu::CPU_CAPABILITY
