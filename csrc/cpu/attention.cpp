// attention: softmax(q k^T / sqrt(K)) v within each packed sequence, and its gradient.
//
// A head of a sequence is one core's: its keys and values are packed once and stay in that core's
// cache, the scores of a block of queries too; no padded score is computed anywhere. Cores take
// the heads of the longest sequences first, each the next when it is done.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "checks.h"
#include "cpu_ops.h"
#include "philox.h"
#include "tile.h"
#include "vec.h"

namespace bert_fast::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 8 * kTileRows;    // queries whose scores are held at once
constexpr int64_t kTaskRows = 8 * kBlock;    // queries of a task: few sequences serve many cores too
constexpr int64_t kThreadWork = 1 << 18;     // multiplications that are worth a core

// The queries `first` to `last` of a sequence that begins in row `start` and is `n` long.
struct Task {
  int64_t sequence, start, n, head, first, last;
};

// What all heads share.
struct Shape {
  int64_t T, H, K;
  int64_t row() const { return 3 * H * K; }  // from a row of qkv to the next
};

struct Dropout {
  double p = 0;
  uint64_t key = 0;
};

Shape check_qkv(const char* op, const Tensor& qkv) {
  check_floating(op, "qkv", qkv, {-1, 3, -1, -1});
  TORCH_CHECK_VALUE(qkv.size(3) > 0, op, ": qkv: want heads of 1 or more, got ", qkv.sizes());
  return {qkv.size(0), qkv.size(2), qkv.size(3)};
}

Dropout check_dropout(const char* op, double p, const std::optional<Tensor>& seed, int64_t site) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, op, ": p: want 0 to 1, got ", p);
  if (!seed || p == 0) return {};
  TORCH_CHECK_VALUE(seed->numel() == 1 && seed->scalar_type() == at::kLong, op,
                    ": seed: want (1,) int64, got ", seed->sizes(), " ", seed->scalar_type());
  // unsigned: the sum may wrap
  return {p, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) + static_cast<uint64_t>(site)};
}

// The tasks, the longest first; `rows` queries at most in each.
std::vector<Task> make_tasks(const char* op, const Tensor& cu_seqlens, const Shape& shape,
                             int64_t max_len, int64_t rows) {
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, op,
                    ": cu_seqlens: want (B + 1,), got ", cu_seqlens.sizes());
  TORCH_CHECK_TYPE(cu_seqlens.scalar_type() == at::kInt, op, ": cu_seqlens: want torch.int32, got ",
                   cu_seqlens.scalar_type());
  TORCH_CHECK_VALUE(cu_seqlens.is_contiguous(), op, ": cu_seqlens: want it contiguous");
  const int32_t* ends = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t B = cu_seqlens.size(0) - 1;
  TORCH_CHECK_VALUE(ends[0] == 0, op, ": cu_seqlens: want 0 first, got ", ends[0]);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t n = int64_t{ends[b + 1]} - ends[b];
    TORCH_CHECK_VALUE(n >= 0 && n <= max_len, op, ": cu_seqlens: want steps of 0 to ", max_len,
                      ", got ", n, " at ", b);
  }
  TORCH_CHECK_VALUE(ends[B] <= shape.T, op, ": cu_seqlens: want at most ", shape.T,
                    " (T) last, got ", ends[B]);
  std::vector<int64_t> order(B);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) {
    return ends[one + 1] - ends[one] > ends[other + 1] - ends[other];
  });
  std::vector<Task> tasks;
  for (const int64_t b : order) {
    const int64_t n = ends[b + 1] - ends[b];
    for (int64_t head = 0; head < shape.H; ++head) {
      for (int64_t first = 0; first < n; first += rows) {
        tasks.push_back({b, ends[b], n, head, first, std::min(first + rows, n)});
      }
    }
  }
  return tasks;
}

int64_t longest(const std::vector<Task>& tasks) { return tasks.empty() ? 0 : tasks[0].n; }

// Call run(task, scratch) for each task on as many threads as they are worth; `scratch` points to
// `size` elements of the calling thread.
template <class W, class F>
void run_tasks(const std::vector<Task>& tasks, const Shape& shape, int64_t size, const F& run) {
  int64_t work = 0;
  for (const Task& task : tasks) work += (task.last - task.first) * task.n * shape.K;
  const int64_t most = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads =
      std::max<int64_t>(1, std::min({most, static_cast<int64_t>(tasks.size()), work / kThreadWork}));
  size = tile_width<W>(size);
  const Tensor scratch = at::empty({threads, size}, at::TensorOptions().dtype(
                                                        c10::CppTypeToScalarType<W>::value));
  W* base = scratch.mutable_data_ptr<W>();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) <
                      static_cast<int64_t>(tasks.size());) {
        run(tasks[i], base + thread * size);
      }
    }
  });
}

// Rows x (rows, K) in the wide dtype: they themselves, or a copy in `to`.
template <class W>
const W* widen(const W* x, int64_t& x_row, int64_t, int64_t, W*) {
  return x;
}
template <class T, class W = Wide<T>>
const W* widen(const T* x, int64_t& x_row, int64_t rows, int64_t K, W* to) {
  constexpr int64_t size = Vec<W>::size();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < K; k += size) {
      const int64_t left = std::min(size, K - k);
      load(x + r * x_row + k, left).store(to + r * K + k, left);
    }
  }
  x_row = K;
  return to;
}

// e^x for x <= 0, within 1 unit in the last place; 0 or the least normal number far below.
inline Vec<float> exp_below(const Vec<float>& x) {
  using V = Vec<float>;
  // n is put into the exponent's bits, the rest is a polynomial in -ln(2) / 2 to ln(2) / 2
  const V magic(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  const V bounded = at::vec::clamp_min(x, V(-87.0f));
  const V shifted = at::vec::fmadd(bounded, V(1.44269504089f), magic);
  const V n = shifted - magic;
  V r = at::vec::fmadd(n, V(-0.693359375f), bounded);
  r = at::vec::fmadd(n, V(2.12194440e-4f), r);
  V y = at::vec::fmadd(r, V(1.9875691500e-4f), V(1.3981999507e-3f));
  y = at::vec::fmadd(y, r, V(8.3334519073e-3f));
  y = at::vec::fmadd(y, r, V(4.1665795894e-2f));
  y = at::vec::fmadd(y, r, V(1.6666665459e-1f));
  y = at::vec::fmadd(y, r, V(5.0000001201e-1f));
  y = at::vec::fmadd(y, r * r, r) + V(1.0f);
  using I = at::vec::Vectorized<int32_t>;
  const I exponent = at::vec::cast<int32_t>(shifted) << I(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(y) + exponent);
}
inline Vec<double> exp_below(const Vec<double>& x) { return x.exp(); }

// Rows x (rows, K), wide, into rows of T.
template <class T, class W = Wide<T>>
void narrow(const W* x, int64_t x_row, int64_t rows, int64_t K, T* to, int64_t to_row) {
  constexpr int64_t size = Vec<W>::size();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < K; k += size) {
      store(to + r * to_row + k, Vec<W>::loadu(x + r * x_row + k), std::min(size, K - k));
    }
  }
}

// Multiply the probabilities of a query by its dropout's factors, made of these bits.
template <class W>
void drop(W* probs, int64_t n, const Dropout& dropout, const uint16_t* bits) {
  const uint32_t threshold = dropout_threshold(dropout.p);
  const W scale = static_cast<W>(dropout_scale(threshold));
  for (int64_t j = 0; j < n; ++j) probs[j] = bits[j] >= threshold ? probs[j] * scale : W(0);
}

// Draw the bits of a query's dropout, one value for each key.
void draw(const Task& task, int64_t query, const Dropout& dropout, uint16_t* bits) {
  philox_bits(dropout.key, query, task.sequence, task.head, 0, (task.n + 7) / 8, bits);
}

// Turn a query's raw scores into exp(scale (score - largest)); returns their sum. Behind the n-th
// column, up to a whole vector, stands next to nothing then.
template <class W>
W softmax(W* scores, int64_t n, W scale, W& largest) {
  using V = Vec<W>;
  constexpr int64_t size = V::size();
  const int64_t width = (n + size - 1) / size * size;
  std::fill(scores + n, scores + width, -std::numeric_limits<W>::infinity());
  V most = V::loadu(scores);
  for (int64_t j = size; j < width; j += size) {
    most = at::vec::maximum(most, V::loadu(scores + j));
  }
  largest = maximum(most);
  const V top(largest), factor(scale);
  V total(W(0));
  for (int64_t j = 0; j < width; j += size) {
    const V weight = exp_below((V::loadu(scores + j) - top) * factor);
    weight.store(scores + j);
    total = total + weight;
  }
  return sum(total);
}

template <class T>
void forward(const Tensor& qkv, const std::vector<Task>& tasks, const Shape& shape,
             const Dropout& dropout, Tensor& o, Tensor& lse) {
  if (tasks.empty()) return;  // a head's size may then be any
  using W = Wide<T>;
  const int64_t rows = shape.T, K = shape.K;
  const T* const base = qkv.const_data_ptr<T>();
  T* const o_base = o.mutable_data_ptr<T>();
  W* const lse_base = lse.mutable_data_ptr<W>();
  const int64_t most = longest(tasks), width = tile_width<W>(most), K_wide = tile_width<W>(K);
  const W scale = std::pow(static_cast<W>(K), W(-0.5));
  const int64_t sizes[] = {width * K, most * K_wide, kBlock * width, kBlock * K_wide,
                           std::max(most, kBlock) * K, (most + 7) / 8 * 8};
  const int64_t size = std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0});
  run_tasks<W>(tasks, shape, size, [&](const Task& task, W* scratch) {
    W* const keys = scratch;
    W* const values = keys + sizes[0];
    W* const scores = values + sizes[1];
    W* const out = scores + sizes[2];
    W* const wide = out + sizes[3];
    auto* const bits = reinterpret_cast<uint16_t*>(wide + sizes[4]);
    const int64_t n = task.n, ld = tile_width<W>(n);
    const T* const q = base + task.start * shape.row() + task.head * K;
    int64_t k_row = shape.row();
    const W* const k = widen(q + shape.H * K, k_row, n, K, wide);
    pack_columns(k, k_row, n, K, keys);
    pack_rows(q + 2 * shape.H * K, shape.row(), n, K, values);
    for (int64_t first = task.first; first < task.last; first += kBlock) {
      const int64_t count = std::min(kBlock, task.last - first);
      int64_t q_row = shape.row();
      const W* const queries = widen(q + first * q_row, q_row, count, K, wide);
      multiply<false>(count, n, K, queries, q_row, 1, keys, scores, ld);
      W totals[kBlock], largest[kBlock];
      for (int64_t i = 0; i < count; ++i) {
        totals[i] = softmax(scores + i * ld, n, scale, largest[i]);
        if (dropout.p > 0) {
          draw(task, first + i, dropout, bits);
          drop(scores + i * ld, n, dropout, bits);
        }
      }
      multiply<false>(count, K, n, scores, ld, 1, values, out, K_wide);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = task.start + first + i;
        T* const to = o_base + (row * shape.H + task.head) * K;
        for (int64_t j = 0; j < K; j += Vec<W>::size()) {
          const Vec<W> value = Vec<W>::loadu(out + i * K_wide + j) / Vec<W>(totals[i]);
          store(to + j, value, std::min<int64_t>(Vec<W>::size(), K - j));
        }
        lse_base[task.head * rows + row] = largest[i] * scale + std::log(totals[i]);
      }
    }
  });
}

template <class T>
void backward(const Tensor& d_o, const Tensor& qkv, const Tensor& o,
              const std::vector<Task>& tasks, const Shape& shape, const Dropout& dropout,
              Tensor& dqkv) {
  if (tasks.empty()) return;
  using W = Wide<T>;
  using V = Vec<W>;
  const int64_t K = shape.K;
  const T* const base = qkv.const_data_ptr<T>();
  const T* const d_o_base = d_o.const_data_ptr<T>();
  const T* const o_base = o.const_data_ptr<T>();
  T* const to_base = dqkv.mutable_data_ptr<T>();
  const int64_t most = longest(tasks), width = tile_width<W>(most), K_wide = tile_width<W>(K);
  const W scale = std::pow(static_cast<W>(K), W(-0.5));
  const int64_t sizes[] = {width * K,       width * K,       most * K_wide,   most * K_wide,
                           most * K_wide,   kBlock * width,  kBlock * width,  kBlock * K_wide,
                           kBlock * K_wide, kBlock * K_wide, most * K,        kBlock * K,
                           kBlock * K,      (most + 7) / 8 * 8};
  const int64_t size = std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0});
  run_tasks<W>(tasks, shape, size, [&](const Task& task, W* scratch) {
    W* parts[std::size(sizes)];
    for (size_t i = 0; i < std::size(sizes); scratch += sizes[i++]) parts[i] = scratch;
    auto [keys_T, values_T, keys, dk, dv, scores, d_scores, queries, d_out, dq, wide, wide_q, wide_do,
          last] = parts;
    auto* const bits = reinterpret_cast<uint16_t*>(last);
    const int64_t n = task.n, ld = tile_width<W>(n), HK = shape.H * K;
    const T* const q = base + task.start * shape.row() + task.head * K;
    const T* const o_first = o_base + (task.start * shape.H + task.head) * K;
    const T* const d_o_first = d_o_base + (task.start * shape.H + task.head) * K;
    T* const to = to_base + task.start * shape.row() + task.head * K;
    int64_t k_row = shape.row(), v_row = shape.row();
    const W* const k = widen(q + HK, k_row, n, K, wide);
    pack_columns(k, k_row, n, K, keys_T);
    const W* const v = widen(q + 2 * HK, v_row, n, K, wide);
    pack_columns(v, v_row, n, K, values_T);
    pack_rows(q + HK, shape.row(), n, K, keys);
    std::fill(dk, dk + n * K_wide, W(0));
    std::fill(dv, dv + n * K_wide, W(0));
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t count = std::min(kBlock, n - first);
      const T* const q_block = q + first * shape.row();
      const T* const d_o_block = d_o_first + first * HK;
      int64_t q_row = shape.row(), d_o_row = HK;
      const W* const left = widen(q_block, q_row, count, K, wide_q);
      const W* const d_left = widen(d_o_block, d_o_row, count, K, wide_do);
      multiply<false>(count, n, K, left, q_row, 1, keys_T, scores, ld);
      multiply<false>(count, n, K, d_left, d_o_row, 1, values_T, d_scores, ld);
      for (int64_t i = 0; i < count; ++i) {
        W* const p = scores + i * ld;
        W* const d = d_scores + i * ld;
        W largest;
        const W inverse = 1 / softmax(p, n, scale, largest);
        if (dropout.p > 0) {
          draw(task, first + i, dropout, bits);
          drop(d, n, dropout, bits);
        }
        V products(W(0));
        for (int64_t j = 0; j < n; j += V::size()) {
          const V prob = V::loadu(p + j) * V(inverse);
          prob.store(p + j);
          products = at::vec::fmadd(prob, V::loadu(d + j), products);
        }
        W total = sum(products);
        if constexpr (sizeof(T) == 2) {
          V sums(W(0));
          for (int64_t k = 0; k < K; k += V::size()) {
            const int64_t here = std::min<int64_t>(V::size(), K - k);
            const int64_t at = (first + i) * HK + k;
            sums = at::vec::fmadd(load(o_first + at, here), load(d_o_first + at, here), sums);
          }
          total = sum(sums);
        }
        const V mean(total), factor(scale);
        for (int64_t j = 0; j < n; j += V::size()) {
          (V::loadu(p + j) * (V::loadu(d + j) - mean) * factor).store(d + j);
        }
        if (dropout.p > 0) drop(p, n, dropout, bits);
      }
      multiply<false>(count, K, n, d_scores, ld, 1, keys, dq, K_wide);
      pack_rows(q_block, shape.row(), count, K, queries);
      pack_rows(d_o_block, HK, count, K, d_out);
      multiply<true>(n, K, count, d_scores, 1, ld, queries, dk, K_wide);
      multiply<true>(n, K, count, scores, 1, ld, d_out, dv, K_wide);
      narrow(dq, K_wide, count, K, to + first * shape.row(), shape.row());
    }
    narrow(dk, K_wide, n, K, to + HK, shape.row());
    narrow(dv, K_wide, n, K, to + 2 * HK, shape.row());
  });
}

void check_rows(const char* op, const char* name, const Tensor& t, at::IntArrayRef sizes,
                at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, op, ": ", name, ": want ", sizes, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", name, ": want ", dtype, ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": ", name, ": want it contiguous");
}

int64_t taken(const Tensor& cu_seqlens) {
  return cu_seqlens.const_data_ptr<int32_t>()[cu_seqlens.size(0) - 1];
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_len,
                                     double p, const std::optional<Tensor>& seed, int64_t site,
                                     const std::optional<Tensor>& work) {
  constexpr auto op = "attention";
  const Shape shape = check_qkv(op, qkv);
  const Dropout dropout = check_dropout(op, p, seed, site);
  const auto tasks = make_tasks(op, cu_seqlens, shape, max_len, kTaskRows);
  const at::ScalarType wide = qkv.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor o = at::empty({shape.T, shape.H, shape.K}, qkv.options());
  Tensor lse = at::empty({shape.H, shape.T}, qkv.options().dtype(wide));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, qkv.scalar_type(), op, [&] {
    forward<scalar_t>(qkv, tasks, shape, dropout, o, lse);
  });
  const int64_t last = taken(cu_seqlens);
  if (last < shape.T) {  // rows of no sequence
    o.narrow(0, last, shape.T - last).zero_();
    lse.narrow(1, last, shape.T - last).zero_();
  }
  return {o, lse};
}

Tensor attention_bwd(const Tensor& d_o, const Tensor& qkv, const Tensor& o, const Tensor& lse,
                     const Tensor& cu_seqlens, int64_t max_len, double p,
                     const std::optional<Tensor>& seed, int64_t site,
                     const std::optional<Tensor>& work) {
  constexpr auto op = "attention_bwd";
  const Shape shape = check_qkv(op, qkv);
  const Dropout dropout = check_dropout(op, p, seed, site);
  const auto tasks = make_tasks(op, cu_seqlens, shape, max_len, shape.T);
  const at::ScalarType wide = qkv.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_rows(op, "do", d_o, {shape.T, shape.H, shape.K}, qkv.scalar_type());
  check_rows(op, "o", o, {shape.T, shape.H, shape.K}, qkv.scalar_type());
  check_rows(op, "lse", lse, {shape.H, shape.T}, wide);
  Tensor dqkv = at::empty_like(qkv);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, qkv.scalar_type(), op, [&] {
    backward<scalar_t>(d_o, qkv, o, tasks, shape, dropout, dqkv);
  });
  const int64_t last = taken(cu_seqlens);
  if (last < shape.T) dqkv.narrow(0, last, shape.T - last).zero_();
  return dqkv;
}

}  // namespace bert_fast::cpu::CPU_CAPABILITY
