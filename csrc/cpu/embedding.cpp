// embed: gather of word, type and position rows, their sum, LayerNorm and dropout in one pass.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>

#include <vector>

#include "checks.h"
#include "cpu_ops.h"
#include "layer_norm.h"
#include "memory.h"
#include "row_dropout.h"
#include "row_sums.h"
#include "scatter_rows.h"

namespace bert_fast::cpu::CPU_CAPABILITY {
namespace {

constexpr char kOp[] = "embed", kBwdOp[] = "embed_bwd";

// ids (T,) as int64; each is a row of a table of `rows`.
Tensor checked_ids(const char* op, const char* name, const Tensor& ids, int64_t T, int64_t rows) {
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, op, ": ",
                   name, ": want int64 or int32, got torch.", dtype_name(ids.scalar_type()));
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.size(0) == T, op, ": ", name, ": want [", T, "], got ",
                    ids.sizes());
  TORCH_CHECK_VALUE(ids.device().is_cpu() && ids.is_contiguous(), op, ": ", name,
                    ": want it contiguous on cpu, got strides ", ids.strides(), " on ",
                    ids.device());
  Tensor wide = ids.to(at::kLong);
  const int64_t* id = wide.const_data_ptr<int64_t>();
  bool fits = true;
  for (int64_t i = 0; i < T; ++i) fits &= id[i] >= 0 && id[i] < rows;
  for (int64_t i = 0; !fits && i < T; ++i) {
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < rows, op, ": ", name, ": want 0 to ", rows - 1,
                      ", got ", id[i], " at ", i);
  }
  return wide;
}

struct Ids {
  std::optional<Tensor> word;
  Tensor position, type;
};

// The ids and the sizes that forward and backward share; word holds a row a token without word ids.
Ids checked(const char* op, const std::optional<Tensor>& input_ids, const Tensor& position_ids,
            const Tensor& token_type_ids, const Tensor& word, const Tensor& position,
            const Tensor& type, const Tensor& w) {
  check_floating(op, "w", w, {-1});
  const int64_t D = w.size(0);
  check_floating(op, "word", word, {-1, D});
  check_floating(op, "position", position, {-1, D});
  check_floating(op, "type_", type, {-1, D});
  if (input_ids.has_value()) {
    TORCH_CHECK_VALUE(input_ids->dim() == 1, op, ": input_ids: want [-1], got ",
                      input_ids->sizes());
  }
  const int64_t T = input_ids.has_value() ? input_ids->size(0) : word.size(0);
  Ids ids;
  if (input_ids.has_value()) {
    ids.word = checked_ids(op, "input_ids", *input_ids, T, word.size(0));
  }
  ids.position = checked_ids(op, "position_ids", position_ids, T, position.size(0));
  ids.type = checked_ids(op, "token_type_ids", token_type_ids, T, type.size(0));
  return ids;
}

// word_ids is null where word holds a row a token; z, mean and rstd where nobody saves them.
template <class T>
struct Forward {
  const int64_t *word_ids, *position_ids, *type_ids;
  const T *word, *position, *type;
  const Wide<T> *w, *b;
  T *y, *z;
  Wide<T> *mean, *rstd;
};

template <class T>
void forward(const Forward<T>& t, int64_t T_, int64_t D, double eps, const RowDropout& dropout) {
  using W = Wide<T>;
  at::parallel_for(0, T_, row_grain(D), [&](int64_t begin, int64_t end) {
    std::vector<W> z(D), factors(dropout.is_on() ? D : 0);
    for (int64_t row = begin; row < end; ++row) {
      const T* word = t.word + (t.word_ids == nullptr ? row : t.word_ids[row]) * D;
      const T* position = t.position + t.position_ids[row] * D;
      const T* type = t.type + t.type_ids[row] * D;
      T* saved = t.z == nullptr ? nullptr : t.z + row * D;
      for_each_vector<T>(D, [&](int64_t j, auto n) {
        const Vec<T> v = load(word + j, n) + load(type + j, n) + load(position + j, n);
        store(z.data() + j, v, n);
        if (saved != nullptr) store(saved + j, v, n);
      });
      const RowStatistics<W> statistics = row_statistics(z.data(), D, eps);
      if (dropout.is_on()) dropout.factors(row, D, factors.data());
      normalize_row(z.data(), statistics, t.w, t.b, dropout.is_on() ? factors.data() : nullptr, D,
                    t.y + row * D);
      if (t.mean != nullptr) {
        t.mean[row] = statistics.mean + statistics.rest;
        t.rstd[row] = statistics.rstd;
      }
    }
  });
}

// sums: dw, db.
template <class T>
struct Backward {
  const T *dy, *z;
  bool z_is_exact;
  const Wide<T> *w, *mean, *rstd;
  Wide<T> *dz, *sums;
};

template <class T>
void backward(const Backward<T>& t, int64_t T_, int64_t D, const RowDropout& dropout) {
  using W = Wide<T>;
  sum_rows<W>(T_, D, 2 * D, t.sums, [&](int64_t first, int64_t last, W* sums) {
    std::vector<W> factors(dropout.is_on() ? D : 0);
    for (int64_t row = first; row < last; ++row) {
      if (dropout.is_on()) dropout.factors(row, D, factors.data());
      W* dz = t.dz + row * D;
      layer_norm_bwd_row(t.dy + row * D, dropout.is_on() ? factors.data() : nullptr,
                         t.z + row * D, t.z_is_exact, {t.mean[row], t.rstd[row]}, t.w, D, sums,
                         sums + D,
                         [&](int64_t j, auto n, const Vec<T>& d) { store(dz + j, d, n); });
    }
  });
}

// The gradient of a table from that of its gathered rows, dz (T, D) wide.
Tensor table_gradient(const Tensor& dz, const Tensor& ids, const Tensor& table, int64_t padding) {
  const at::ScalarType wide = dz.scalar_type(), dtype = table.scalar_type();
  const bool fits = wide_dtype(dtype) == wide;  // else it is fp64, though not for this table
  Tensor grad = empty(table.sizes(), table.options().dtype(fits ? dtype : wide));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), kBwdOp, [&] {
    scatter_rows(dz.const_data_ptr<Wide<scalar_t>>(), ids.const_data_ptr<int64_t>(), ids.size(0),
                 table.size(0), table.size(1), padding, grad.mutable_data_ptr<scalar_t>());
  });
  return grad.to(dtype);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> embed(
    const std::optional<Tensor>& input_ids, const Tensor& position_ids,
    const Tensor& token_type_ids, const Tensor& word, const Tensor& position, const Tensor& type_,
    const Tensor& w, const Tensor& b, double eps, double p, const std::optional<Tensor>& seed,
    int64_t site, at::ScalarType out_dtype, bool save) {
  Ids ids = checked(kOp, input_ids, position_ids, token_type_ids, word, position, type_, w);
  const int64_t T = ids.position.size(0), D = w.size(0);
  check_floating(kOp, "b", b, {D});
  TORCH_CHECK_TYPE(is_floating(out_dtype), kOp, ": out_dtype: want a floating one, got torch.",
                   dtype_name(out_dtype));
  const RowDropout dropout(kOp, p, seed, site);

  at::ScalarType dtype =
      promoted({word.scalar_type(), position.scalar_type(), type_.scalar_type(), out_dtype});
  if (w.scalar_type() == at::kDouble) dtype = at::kDouble;
  const at::ScalarType wide = wide_dtype(dtype);
  Tensor words = word;
  if (word.scalar_type() != dtype) {  // of a table, what is wanted of it alone
    if (ids.word.has_value()) words = at::index_select(word, 0, *ids.word);
    words = words.to(dtype);
    ids.word = std::nullopt;
  }
  const Tensor positions = position.to(dtype), types = type_.to(dtype);
  const Tensor wide_w = w.to(wide), wide_b = b.to(wide);

  const auto like = words.options();
  Tensor y = empty({T, D}, like);
  Tensor z = save ? empty({T, D}, like) : empty({0}, like);
  Tensor mean = empty({save ? T : 0}, like.dtype(wide)), rstd = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, kOp, [&] {
    using W = Wide<scalar_t>;
    const Forward<scalar_t> tensors{
        ids.word.has_value() ? ids.word->const_data_ptr<int64_t>() : nullptr,
        ids.position.const_data_ptr<int64_t>(),
        ids.type.const_data_ptr<int64_t>(),
        words.const_data_ptr<scalar_t>(),
        positions.const_data_ptr<scalar_t>(),
        types.const_data_ptr<scalar_t>(),
        wide_w.const_data_ptr<W>(),
        wide_b.const_data_ptr<W>(),
        y.mutable_data_ptr<scalar_t>(),
        save ? z.mutable_data_ptr<scalar_t>() : nullptr,
        save ? mean.mutable_data_ptr<W>() : nullptr,
        save ? rstd.mutable_data_ptr<W>() : nullptr,
    };
    forward(tensors, T, D, eps, dropout);
  });
  return {y.to(out_dtype), z.to(out_dtype), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embed_bwd(
    const Tensor& dy, const std::optional<Tensor>& input_ids, const Tensor& position_ids,
    const Tensor& token_type_ids, const Tensor& word, const Tensor& position, const Tensor& type_,
    const Tensor& w, const Tensor& z, const Tensor& mean, const Tensor& rstd, int64_t pad_id,
    double p, const std::optional<Tensor>& seed, int64_t site) {
  const Ids ids =
      checked(kBwdOp, input_ids, position_ids, token_type_ids, word, position, type_, w);
  const int64_t T = ids.position.size(0), D = w.size(0);
  check_floating(kBwdOp, "dy", dy, {T, D});
  check_floating(kBwdOp, "z", z, {T, D});
  check_floating(kBwdOp, "mean", mean, {T});
  check_floating(kBwdOp, "rstd", rstd, {T});
  const RowDropout dropout(kBwdOp, p, seed, site);

  at::ScalarType dtype = promoted({dy.scalar_type(), z.scalar_type()});
  for (const Tensor& t : {w, mean, word, position, type_}) {
    if (t.scalar_type() == at::kDouble) dtype = at::kDouble;
  }
  const at::ScalarType wide = wide_dtype(dtype);
  const Tensor wide_dy = dy.to(dtype), rows = z.to(dtype), wide_w = w.to(wide);
  const Tensor wide_mean = mean.to(wide), wide_rstd = rstd.to(wide);

  const auto like = rows.options().dtype(wide);
  Tensor dz = empty({T, D}, like), sums = empty({2, D}, like);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, kBwdOp, [&] {
    using W = Wide<scalar_t>;
    const Backward<scalar_t> tensors{
        wide_dy.const_data_ptr<scalar_t>(),
        rows.const_data_ptr<scalar_t>(),
        z.scalar_type() == wide,
        wide_w.const_data_ptr<W>(),
        wide_mean.const_data_ptr<W>(),
        wide_rstd.const_data_ptr<W>(),
        dz.mutable_data_ptr<W>(),
        sums.mutable_data_ptr<W>(),
    };
    backward(tensors, T, D, dropout);
  });
  Tensor dword = ids.word.has_value() ? table_gradient(dz, *ids.word, word, pad_id)
                                      : dz.to(word.scalar_type());
  return {dword, table_gradient(dz, ids.position, position, -1),
          table_gradient(dz, ids.type, type_, -1), sums[0].to(w.scalar_type(), false, true),
          sums[1].to(w.scalar_type(), false, true)};
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
