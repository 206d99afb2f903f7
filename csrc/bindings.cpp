// Module bert_fast._C: importing it registers the compiled implementations of operators whose
// schemas Python defines.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "data_path.h"

#define CPU_CAPABILITY DEFAULT
#include "cpu_ops.h"
#undef CPU_CAPABILITY
#ifdef BERT_FAST_X86
#define CPU_CAPABILITY AVX2
#include "cpu_ops.h"
#undef CPU_CAPABILITY
#define CPU_CAPABILITY AVX512
#include "cpu_ops.h"
#undef CPU_CAPABILITY
#endif

// The operators of the CPU, by their schemas' names.
#define FOR_EACH_CPU_OP(OP)                                                                    \
  OP(adamw_) OP(add_layer_norm) OP(add_layer_norm_bwd) OP(attention) OP(attention_bwd)         \
  OP(bias_gelu) OP(bias_gelu_bwd) OP(column_sums) OP(embed) OP(embed_bwd) OP(grad_norm)         \
  OP(lamb_) OP(linear_gelu) OP(unpad)

#ifdef BERT_FAST_CUDA
namespace bert_fast::cuda {
std::vector<std::string> ops();  // cuda/bindings.cpp
}
#endif

namespace {

// The instruction set PyTorch uses here; the environment variable ATEN_CPU_CAPABILITY lowers it.
std::string capability() {
#ifdef BERT_FAST_X86
  const std::string has = at::get_cpu_capability();
  if (has == "AVX512" || has == "AVX2") return has;
#endif
  return "DEFAULT";
}

#ifdef BERT_FAST_X86
template <class F>
F* best(F* portable, F* avx2, F* avx512) {
  const std::string has = capability();
  return has == "AVX512" ? avx512 : has == "AVX2" ? avx2 : portable;
}
#define BEST(name) \
  best(&bert_fast::cpu::DEFAULT::name, &bert_fast::cpu::AVX2::name, &bert_fast::cpu::AVX512::name)
#else
#define BEST(name) &bert_fast::cpu::DEFAULT::name
#endif

}  // namespace

#define REGISTER(name) m.impl(#name, BEST(name));
TORCH_LIBRARY_IMPL(bert_fast, CPU, m) { FOR_EACH_CPU_OP(REGISTER) }

#define NAME(name) #name,
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled operators of bert_fast.";
  m.def(
      "cpu_ops", [] { return std::vector<std::string>{FOR_EACH_CPU_OP(NAME)}; },
      "Names of the operators whose CPU implementation this module registers.");
  m.def(
      "cuda_ops",
      [] {
#ifdef BERT_FAST_CUDA
        return bert_fast::cuda::ops();
#else
        return std::vector<std::string>{};
#endif
      },
      "Names of the operators whose CUDA implementation this module registers.");
  m.def("cpu_capability", &capability, "The instruction set they use: DEFAULT, AVX2 or AVX512.");
  bind_data_path(m);
}
