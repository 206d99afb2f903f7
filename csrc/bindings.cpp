// Module bert_fast._C: importing it registers the compiled CPU implementations of operators whose
// schemas Python defines.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "cpu_ops.h"

// An operator of the CPU stands twice here: its implementation, and its name for Python.
TORCH_LIBRARY_IMPL(bert_fast, CPU, m) { m.impl("unpad", &bert_fast::cpu::unpad); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled operators of bert_fast.";
  m.def(
      "cpu_ops", [] { return std::vector<std::string>{"unpad"}; },
      "Names of the operators whose CPU implementation this module registers.");
}
