// bias_gelu: bias + GELU (or ReLU) of rows (T, F); linear_gelu: of a product.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "activation.h"
#include "checks.h"
#include "cpu_ops.h"
#include "memory.h"
#include "row_sums.h"

namespace bert_fast::cpu::CPU_CAPABILITY {
namespace {

constexpr char kOp[] = "bias_gelu", kBwdOp[] = "bias_gelu_bwd", kLinearOp[] = "linear_gelu";
// An exponential and a division: as much work as moving this many elements.
constexpr int64_t kCost = 4;

// x + b of n elements from column j.
template <class T>
Vec<T> biased(const T* x, const Wide<T>* b, int64_t j, int64_t n) {
  const Vec<T> v = load(x + j, n);
  return b == nullptr ? v : v + load(b + j, n);
}

template <Activation kind, class T>
void forward(const T* x, const Wide<T>* b, int64_t T_, int64_t F, T* y) {
  at::parallel_for(0, T_, row_grain(kCost * F), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for_each_vector<T>(F, [&](int64_t j, auto n) {
        store(y + row * F + j, activation<kind>(biased(x + row * F, b, j, n)), n);
      });
    }
  });
}

template <Activation kind, class T>
void backward(const T* dy, const T* x, const Wide<T>* b, int64_t T_, int64_t F, T* dx,
              Wide<T>* db) {
  using W = Wide<T>;
  sum_rows<W>(T_, kCost * F, F, db, [&](int64_t first, int64_t last, W* sums) {
    for (int64_t row = first; row < last; ++row) {
      for_each_vector<T>(F, [&](int64_t j, auto n) {
        const int64_t at = row * F + j;
        const Vec<T> d =
            activation_bwd<kind>(load(dy + at, n), biased(x + row * F, b, j, n));
        store(dx + at, d, n);
        store(sums + j, load(sums + j, n) + d, n);
      });
    }
  });
}

void check_name(const char* op, bool known, std::string_view activation) {
  TORCH_CHECK_VALUE(known, op, ": activation: want gelu, gelu_new, gelu_pytorch_tanh or relu, got ",
                    activation);
}

// activation(x + bias) into y, which may be x; bias is wide, or undefined for none.
void run(const char* op, const Tensor& x, const Tensor& bias, std::string_view activation,
         Tensor& y) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), kOp, [&] {
    using W = Wide<scalar_t>;
    const bool known = for_activation(activation, [&](auto kind) {
      forward<kind.value>(x.const_data_ptr<scalar_t>(),
                          bias.defined() ? bias.const_data_ptr<W>() : nullptr, x.size(0),
                          x.size(1), y.mutable_data_ptr<scalar_t>());
    });
    check_name(op, known, activation);
  });
}

}  // namespace

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& b, std::string_view activation) {
  check_floating(kOp, "x", x, {-1, -1});
  const int64_t T = x.size(0), F = x.size(1);
  check_floating(kOp, "b", b, {F});

  const bool is_double = b.has_value() && b->scalar_type() == at::kDouble;
  const at::ScalarType dtype = is_double ? at::kDouble : x.scalar_type();
  const at::ScalarType wide = wide_dtype(dtype);
  const Tensor rows = x.to(dtype), bias = b.has_value() ? b->to(wide) : Tensor();
  Tensor y = empty({T, F}, rows.options());
  run(kOp, rows, bias, activation, y);
  return y.to(x.scalar_type());
}

std::tuple<Tensor, Tensor> linear_gelu(const Tensor& x, const Tensor& w,
                                       const std::optional<Tensor>& b,
                                       std::string_view activation, bool save) {
  // the product is Python's to choose: bert_fast/ops/products.py
  Tensor h = c10::Dispatcher::singleton()
                 .findSchemaOrThrow("bert_fast::linear", "")
                 .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, bool)>()
                 .call(x, w, b, save);
  check_floating(kLinearOp, "x w^T", h, {-1, -1});
  Tensor y = save ? empty(h.sizes(), h.options()) : h;
  run(kLinearOp, h, Tensor(), activation, y);
  return {y, save ? h : at::empty({0}, h.options())};
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dy, const Tensor& x,
                                         const std::optional<Tensor>& b,
                                         std::string_view activation) {
  check_floating(kBwdOp, "x", x, {-1, -1});
  const int64_t T = x.size(0), F = x.size(1);
  check_floating(kBwdOp, "dy", dy, {T, F});
  check_floating(kBwdOp, "b", b, {F});

  at::ScalarType dtype = promoted({dy.scalar_type(), x.scalar_type()});
  if (b.has_value() && b->scalar_type() == at::kDouble) dtype = at::kDouble;
  const at::ScalarType wide = wide_dtype(dtype);
  const Tensor wide_dy = dy.to(dtype), rows = x.to(dtype);
  const Tensor bias = b.has_value() ? b->to(wide) : Tensor();
  Tensor dx = empty({T, F}, rows.options());
  Tensor db = empty({F}, rows.options().dtype(wide));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, kBwdOp, [&] {
    using W = Wide<scalar_t>;
    const bool known = for_activation(activation, [&](auto kind) {
      backward<kind.value>(wide_dy.const_data_ptr<scalar_t>(), rows.const_data_ptr<scalar_t>(),
                           bias.defined() ? bias.const_data_ptr<W>() : nullptr, T, F,
                           dx.mutable_data_ptr<scalar_t>(), db.mutable_data_ptr<W>());
    });
    check_name(kBwdOp, known, activation);
  });
  return {dx.to(x.scalar_type()), db.to(b.has_value() ? b->scalar_type() : x.scalar_type())};
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
