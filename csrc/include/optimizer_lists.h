// The tensors of an optimizer's step, checked where they come in; the same for CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace bert_fast::optimizer {

using at::Tensor;
using at::TensorList;

// The arguments of adamw_ and lamb_ in their order; see bert_fast/reference_optimizer.py.
struct Lists {
  TensorList params, grads, exp_avgs, exp_avg_sqs, steps, masters;
  at::IntArrayRef sizes;  // parameters of each group, which follow each other
  at::ArrayRef<double> lrs, weight_decays;
  TensorList lr_tensors;  // of each group, without elements where lrs has it; or no tensor at all
};

// Scalars that are on the device, and what goes with them.
struct Options {
  double beta1, beta2, eps, max_norm;
  const std::optional<Tensor>& norm;
  const std::optional<Tensor>& grad_scale;
  const std::optional<Tensor>& found_inf;
};

inline auto dtype_name(const Tensor& t) { return c10::getDtypeNames(t.scalar_type()).first; }

inline void check_dtype(const char* op, const char* name, size_t i, const Tensor& t,
                        at::ScalarType want) {
  TORCH_CHECK_TYPE(t.scalar_type() == want, op, ": ", name, "[", i, "]: want torch.",
                   c10::getDtypeNames(want).first, ", got torch.", dtype_name(t));
}

inline void check_floating(const char* op, const char* name, size_t i, const Tensor& t,
                           bool doubles) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ||
                       (doubles && dtype == at::kDouble),
                   op, ": ", name, "[", i, "]: want fp32, fp16",
                   doubles ? ", bf16 or fp64" : " or bf16", ", got torch.", dtype_name(t));
}

inline void check_device(const char* op, const char* name, size_t i, const Tensor& t,
                         at::Device device) {
  TORCH_CHECK_VALUE(t.device() == device, op, ": ", name, "[", i, "]: want it on ", device,
                    ", got ", t.device());
  TORCH_CHECK_NOT_IMPLEMENTED(t.layout() == at::kStrided, op, ": ", name, "[", i,
                              "]: want a dense tensor, got ", t.layout());
}

inline void check_count(const char* op, const char* name, size_t got, size_t want) {
  TORCH_CHECK_VALUE(got == want, op, ": ", name, ": want ", want, " of them, got ", got);
}

// As the parameter lies in memory: an element has the same place in both.
inline void check_layout(const char* op, const char* name, size_t i, const Tensor& t,
                         const Tensor& param) {
  TORCH_CHECK_VALUE(t.sizes() == param.sizes() && t.strides() == param.strides(), op, ": ", name,
                    "[", i, "]: want the parameter's ", param.sizes(), " with strides ",
                    param.strides(), ", got ", t.sizes(), " with strides ", t.strides());
}

inline void check_scalar(const char* op, const char* name, const std::optional<Tensor>& t,
                         at::Device device) {
  if (!t.has_value()) return;
  TORCH_CHECK_VALUE(t->numel() == 1, op, ": ", name, ": want one number, got ", t->sizes());
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, op, ": ", name,
                   ": want torch.float32, got torch.", dtype_name(*t));
  TORCH_CHECK_VALUE(t->device() == device, op, ": ", name, ": want it on ", device, ", got ",
                    t->device());
}

inline const float* scalar(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

inline bool has_master(const Lists& lists, size_t i) { return lists.masters[i].numel() > 0; }

// The group's rate where it is a tensor, else undefined.
inline Tensor lr_tensor(const Lists& lists, size_t group) {
  const bool given = !lists.lr_tensors.empty() && lists.lr_tensors[group].numel() > 0;
  return given ? lists.lr_tensors[group] : Tensor();
}

// Returns the gradients, laid as their parameters. `doubles`: fp64 is taken too.
inline std::vector<Tensor> check_lists(const char* op, const Lists& lists, const Options& options,
                                       at::Device device, bool doubles) {
  const size_t n = lists.params.size(), groups = lists.sizes.size();
  check_count(op, "grads", lists.grads.size(), n);
  check_count(op, "exp_avgs", lists.exp_avgs.size(), n);
  check_count(op, "exp_avg_sqs", lists.exp_avg_sqs.size(), n);
  check_count(op, "steps", lists.steps.size(), n);
  check_count(op, "masters", lists.masters.size(), n);
  check_count(op, "lrs", lists.lrs.size(), groups);
  check_count(op, "weight_decays", lists.weight_decays.size(), groups);
  if (!lists.lr_tensors.empty()) check_count(op, "lr_tensors", lists.lr_tensors.size(), groups);
  int64_t grouped = 0;
  for (const int64_t size : lists.sizes) {
    TORCH_CHECK_VALUE(size >= 0, op, ": sizes: want none below 0, got ", size);
    TORCH_CHECK_VALUE(size <= static_cast<int64_t>(n) - grouped, op, ": sizes: want the sum ", n,
                      ", got ", lists.sizes);
    grouped += size;
  }
  TORCH_CHECK_VALUE(grouped == static_cast<int64_t>(n), op, ": sizes: want the sum ", n, ", got ",
                    grouped);
  check_scalar(op, "norm", options.norm, device);
  check_scalar(op, "grad_scale", options.grad_scale, device);
  check_scalar(op, "found_inf", options.found_inf, device);
  for (size_t g = 0; g < groups; ++g) {
    const Tensor lr = lr_tensor(lists, g);
    if (lr.defined()) check_scalar(op, "lr_tensors", lr, device);
  }

  std::vector<Tensor> grads;
  grads.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor& param = lists.params[i];
    check_device(op, "params", i, param, device);
    check_floating(op, "params", i, param, doubles);
    TORCH_CHECK_VALUE(param.is_non_overlapping_and_dense(), op, ": params[", i,
                      "]: want memory without gaps, got ", param.sizes(), " with strides ",
                      param.strides());
    const auto wide = param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor* states[] = {&lists.exp_avgs[i], &lists.exp_avg_sqs[i], &lists.masters[i]};
    const char* names[] = {"exp_avgs", "exp_avg_sqs", "masters"};
    for (int s = 0; s < (has_master(lists, i) ? 3 : 2); ++s) {
      check_device(op, names[s], i, *states[s], device);
      check_dtype(op, names[s], i, *states[s], wide);
      check_layout(op, names[s], i, *states[s], param);
    }
    const Tensor& step = lists.steps[i];
    check_device(op, "steps", i, step, device);
    check_dtype(op, "steps", i, step, at::kFloat);
    TORCH_CHECK_VALUE(step.numel() == 1, op, ": steps[", i, "]: want one number, got ",
                      step.sizes());
    Tensor grad = lists.grads[i];
    check_device(op, "grads", i, grad, device);
    check_floating(op, "grads", i, grad, doubles);
    TORCH_CHECK_TYPE((grad.scalar_type() == at::kDouble) == (wide == at::kDouble), op, ": grads[",
                     i, "]: want fp64 where the parameter has it and only there, got torch.",
                     dtype_name(grad), " beside torch.", dtype_name(param));
    TORCH_CHECK_VALUE(grad.sizes() == param.sizes(), op, ": grads[", i, "]: want ", param.sizes(),
                      ", got ", grad.sizes());
    if (grad.strides() != param.strides()) {
      grad = at::empty_strided(param.sizes(), param.strides(), grad.options()).copy_(grad);
    }
    grads.push_back(std::move(grad));
  }
  return grads;
}

// Gradients alone, each without gaps in memory: in which order its elements lie does not matter.
inline std::vector<Tensor> check_grads(const char* op, TensorList grads,
                                       const std::optional<Tensor>& grad_scale, bool doubles) {
  TORCH_CHECK_VALUE(!grads.empty(), op, ": grads: want at least one, got 0");
  const at::Device device = grads[0].device();
  check_scalar(op, "grad_scale", grad_scale, device);
  std::vector<Tensor> dense;
  dense.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check_device(op, "grads", i, grads[i], device);
    check_floating(op, "grads", i, grads[i], doubles);
    dense.push_back(grads[i].is_non_overlapping_and_dense() ? grads[i] : grads[i].contiguous());
  }
  return dense;
}

}  // namespace bert_fast::optimizer
