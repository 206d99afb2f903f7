// add_layer_norm: bias + dropout + residual + LayerNorm of rows (T, D), in one pass over memory.
#include "layer_norm.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu_ops.h"
#include "memory.h"
#include "row_dropout.h"
#include "row_sums.h"

namespace bert_fast::cpu::CPU_CAPABILITY {
namespace {

constexpr char kOp[] = "add_layer_norm", kBwdOp[] = "add_layer_norm_bwd";

template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

std::optional<Tensor> cast(const std::optional<Tensor>& t, at::ScalarType dtype) {
  return t.has_value() ? std::optional<Tensor>(t->to(dtype)) : std::nullopt;
}

// Null for what there is none of, and for what nobody saves.
template <class T>
struct Forward {
  const T *x, *residual;
  const Wide<T> *bias, *w, *b;
  T *y, *z;
  Wide<T> *mean, *rstd;
};

template <class T>
void forward(const Forward<T>& t, int64_t T_, int64_t D, double eps, const RowDropout& dropout) {
  using W = Wide<T>;
  at::parallel_for(0, T_, row_grain(D), [&](int64_t begin, int64_t end) {
    std::vector<W> z(D), factors_row(dropout.is_on() ? D : 0);
    const W* factors = dropout.is_on() ? factors_row.data() : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = t.x + row * D;
      const T* residual = t.residual == nullptr ? nullptr : t.residual + row * D;
      T* saved = t.z == nullptr ? nullptr : t.z + row * D;
      if (dropout.is_on()) dropout.factors(row, D, factors_row.data());
      for_each_vector<T>(D, [&](int64_t j, auto n) {
        Vec<T> v = load(x + j, n);
        if (t.bias != nullptr) v = v + load(t.bias + j, n);
        if (factors != nullptr) v = v * load(factors + j, n);
        if (residual != nullptr) v = v + load(residual + j, n);
        store(z.data() + j, v, n);
        if (saved != nullptr) store(saved + j, v, n);
      });
      const RowStatistics<W> statistics = row_statistics(z.data(), D, eps);
      normalize_row(z.data(), statistics, t.w, t.b, static_cast<const W*>(nullptr), D,
                    t.y + row * D);
      if (t.mean != nullptr) {
        t.mean[row] = statistics.mean + statistics.rest;
        t.rstd[row] = statistics.rstd;
      }
    }
  });
}

// dx is null where it would be dz, dbias where there was no bias.
template <class T>
struct Backward {
  const T *dy, *z;
  bool z_is_exact;
  const Wide<T> *w, *mean, *rstd;
  T *dx, *dz;
  Wide<T>* sums;  // dw, db and, if with_bias, dbias
  bool with_bias;
};

template <class T>
void backward(const Backward<T>& t, int64_t T_, int64_t D, const RowDropout& dropout) {
  using W = Wide<T>;
  sum_rows<W>(T_, D, (t.with_bias ? 3 : 2) * D, t.sums, [&](int64_t first, int64_t last, W* sums) {
    W *dw = sums, *db = sums + D, *dbias = t.with_bias ? sums + 2 * D : nullptr;
    std::vector<W> factors(dropout.is_on() ? D : 0);
    for (int64_t row = first; row < last; ++row) {
      T* dz_row = t.dz + row * D;
      T* dx_row = t.dx == nullptr ? nullptr : t.dx + row * D;
      if (dropout.is_on()) dropout.factors(row, D, factors.data());
      layer_norm_bwd_row(t.dy + row * D, static_cast<const W*>(nullptr), t.z + row * D,
                         t.z_is_exact, {t.mean[row], t.rstd[row]}, t.w, D, dw, db,
                         [&](int64_t j, auto n, const Vec<T>& gradient) {
        Vec<T> d = gradient;
        store(dz_row + j, d, n);
        if (dropout.is_on()) d = d * load(factors.data() + j, n);
        if (dx_row != nullptr) store(dx_row + j, d, n);
        if (dbias != nullptr) store(dbias + j, load(dbias + j, n) + d, n);
      });
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
    const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& w, const Tensor& b, double eps, double p, const std::optional<Tensor>& seed,
    int64_t site, at::ScalarType out_dtype, bool save) {
  check_floating(kOp, "x", x, {-1, -1});
  const int64_t T = x.size(0), D = x.size(1);
  check_floating(kOp, "bias", bias, {D});
  check_floating(kOp, "residual", residual, {T, D});
  check_floating(kOp, "w", w, {D});
  check_floating(kOp, "b", b, {D});
  TORCH_CHECK_TYPE(is_floating(out_dtype), kOp, ": out_dtype: want a floating one, got torch.",
                   dtype_name(out_dtype));
  const RowDropout dropout(kOp, p, seed, site);

  // All rows in one dtype, fp64 if anything is. What is narrower loses nothing; the result is
  // rounded once, where it is stored.
  at::ScalarType dtype = promoted({x.scalar_type(), out_dtype});
  at::ScalarType all = promoted({x.scalar_type(), w.scalar_type()});
  for (const auto& t : {bias, residual}) {
    if (t.has_value()) all = promoted({all, t->scalar_type()});
  }
  if (residual.has_value()) dtype = promoted({dtype, residual->scalar_type()});
  if (all == at::kDouble) dtype = at::kDouble;
  const at::ScalarType wide = wide_dtype(dtype);
  const Tensor rows = x.to(dtype), wide_w = w.to(wide), wide_b = b.to(wide);
  const std::optional<Tensor> wide_bias = cast(bias, wide), added = cast(residual, dtype);

  const bool saves_z = save && (bias.has_value() || residual.has_value() || dropout.is_on());
  const auto like = rows.options();
  Tensor y = empty({T, D}, like);
  Tensor z = saves_z ? empty({T, D}, like) : empty({0}, like);
  Tensor mean = empty({save ? T : 0}, like.dtype(wide)), rstd = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, kOp, [&] {
    using W = Wide<scalar_t>;
    const Forward<scalar_t> tensors{
        rows.const_data_ptr<scalar_t>(),
        data<scalar_t>(added),
        data<W>(wide_bias),
        wide_w.const_data_ptr<W>(),
        wide_b.const_data_ptr<W>(),
        y.mutable_data_ptr<scalar_t>(),
        saves_z ? z.mutable_data_ptr<scalar_t>() : nullptr,
        save ? mean.mutable_data_ptr<W>() : nullptr,
        save ? rstd.mutable_data_ptr<W>() : nullptr,
    };
    forward(tensors, T, D, eps, dropout);
  });
  return {y.to(out_dtype), z.to(out_dtype), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const Tensor& dy, const Tensor& z, const Tensor& w, const Tensor& mean, const Tensor& rstd,
    bool with_bias, double p, const std::optional<Tensor>& seed, int64_t site,
    at::ScalarType x_dtype) {
  check_floating(kBwdOp, "z", z, {-1, -1});
  const int64_t T = z.size(0), D = z.size(1);
  check_floating(kBwdOp, "dy", dy, {T, D});
  check_floating(kBwdOp, "w", w, {D});
  check_floating(kBwdOp, "mean", mean, {T});
  check_floating(kBwdOp, "rstd", rstd, {T});
  TORCH_CHECK_TYPE(is_floating(x_dtype), kBwdOp, ": x_dtype: want a floating one, got torch.",
                   dtype_name(x_dtype));
  const RowDropout dropout(kBwdOp, p, seed, site);

  at::ScalarType dtype = promoted({dy.scalar_type(), z.scalar_type(), x_dtype});
  if (promoted({dtype, w.scalar_type(), mean.scalar_type()}) == at::kDouble) dtype = at::kDouble;
  const at::ScalarType wide = wide_dtype(dtype);
  const Tensor wide_dy = dy.to(dtype), rows = z.to(dtype), wide_w = w.to(wide);
  const Tensor wide_mean = mean.to(wide), wide_rstd = rstd.to(wide);

  const bool is_dz = !dropout.is_on() && x_dtype == z.scalar_type();
  const bool by_dropout = dropout.is_on();
  const auto like = rows.options();
  Tensor dz = empty({T, D}, like);
  Tensor dx = by_dropout ? empty({T, D}, like) : empty({0}, like);
  Tensor sums = empty({with_bias ? 3 : 2, D}, like.dtype(wide));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, kBwdOp, [&] {
    using W = Wide<scalar_t>;
    const Backward<scalar_t> tensors{
        wide_dy.const_data_ptr<scalar_t>(),
        rows.const_data_ptr<scalar_t>(),
        z.scalar_type() == wide,
        wide_w.const_data_ptr<W>(),
        wide_mean.const_data_ptr<W>(),
        wide_rstd.const_data_ptr<W>(),
        by_dropout ? dx.mutable_data_ptr<scalar_t>() : nullptr,
        dz.mutable_data_ptr<scalar_t>(),
        sums.mutable_data_ptr<W>(),
        with_bias,
    };
    backward(tensors, T, D, dropout);
  });
  if (!is_dz && !by_dropout) dx = dz.to(x_dtype, /*non_blocking=*/false, /*copy=*/true);
  const at::ScalarType dbias_dtype = promoted({x_dtype, w.scalar_type()});
  Tensor dbias = with_bias ? sums[2].to(dbias_dtype, false, true)
                           : empty({0}, like.dtype(dbias_dtype));
  return {dx.to(x_dtype), dz.to(z.scalar_type()), sums[0].to(w.scalar_type(), false, true),
          sums[1].to(w.scalar_type(), false, true), dbias};
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
