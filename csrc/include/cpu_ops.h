// The compiled CPU operators: a declaration each. bindings.cpp registers them.
//
// Their bodies (cpu/*.cpp) hold no registration and no static state, so that a file can be compiled
// several times, once per instruction set, without registering an operator twice.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace bert_fast::cpu {

// mask (B, L) bool, any strides -> rows (T,) int64, cu_seqlens (B + 1,) int32, max_len () int64.
std::tuple<at::Tensor, at::Tensor, at::Tensor> unpad(const at::Tensor& mask);

}  // namespace bert_fast::cpu
