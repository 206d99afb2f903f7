// column_sums: the gradient of a bias, from that of the rows (T, F) it was added to.
#include <ATen/Dispatch.h>

#include "checks.h"
#include "cpu_ops.h"
#include "memory.h"
#include "row_sums.h"

namespace bert_fast::cpu::CPU_CAPABILITY {
namespace {

constexpr char kOp[] = "column_sums";

}  // namespace

Tensor column_sums(const Tensor& dy) {
  check_floating(kOp, "dy", dy, {-1, -1});
  const int64_t T = dy.size(0), F = dy.size(1);
  Tensor db = empty({F}, dy.options().dtype(wide_dtype(dy.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dy.scalar_type(), kOp, [&] {
    using W = Wide<scalar_t>;
    const scalar_t* const rows = dy.const_data_ptr<scalar_t>();
    sum_rows<W>(T, F, F, db.mutable_data_ptr<W>(), [&](int64_t first, int64_t last, W* sums) {
      for (int64_t row = first; row < last; ++row) {
        for_each_vector<scalar_t>(F, [&](int64_t j, auto n) {
          store(sums + j, load(sums + j, n) + load(rows + row * F + j, n), n);
        });
      }
    });
  });
  return db.to(dy.scalar_type());
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
