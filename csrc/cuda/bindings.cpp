// The CUDA operators: tensors are checked here, and launched where they are, on the current stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_launch.h"
#include "optimizer_lists.h"

namespace bert_fast::cuda {
namespace {

using at::Tensor;

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// --- unpad ---------------------------------------------------------------------------------------

struct Unpadded {
  Tensor rows, cu_seqlens, work, max_len;
};

// What the caller knows is not asked of the device; tile 0: no work list.
Unpadded unpad_mask(const char* op, const Tensor& mask, int64_t tile,
                    std::optional<int64_t> num_rows, std::optional<int64_t> max_len) {
  TORCH_CHECK_VALUE(mask.dim() == 2, op, ": mask: want (B, L) [*, *], got ", mask.sizes());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, op, ": mask: want bool, got torch.",
                   c10::getDtypeNames(mask.scalar_type()).first);
  const int64_t B = mask.size(0), L = mask.size(1), most = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(B < most && (L == 0 || B <= most / L), op,
                    ": mask: want less than 2**31 columns in all rows, got ", mask.sizes());
  TORCH_CHECK_VALUE(num_rows.has_value() == max_len.has_value(), op,
                    ": want both num_rows and max_len or neither, got one");
  TORCH_CHECK_VALUE(!num_rows.has_value() || (*num_rows >= 0 && *num_rows <= B * L), op,
                    ": num_rows: want 0 to ", B * L, ", got ", num_rows.value_or(0));
  TORCH_CHECK_VALUE(!max_len.has_value() || (*max_len >= 0 && *max_len <= L), op,
                    ": max_len: want 0 to ", L, ", got ", max_len.value_or(0));
  TORCH_CHECK_VALUE(tile >= 0 && tile <= most, op, ": tile: want 1 to ", most, ", got ", tile);

  const c10::cuda::CUDAGuard guard(mask.device());
  const auto ints = mask.options().dtype(at::kInt), longs = mask.options().dtype(at::kLong);
  const int64_t room = num_rows.value_or(B * L);
  const int64_t work_rows = tile ? 2 + room / tile + B : 0;
  Unpadded out = {at::empty({room}, longs), at::empty({B + 1}, ints),
                  at::empty({work_rows, 4}, ints), Tensor()};
  const Tensor scratch = at::empty({2, B}, ints);
  Tensor totals;
  if (!num_rows.has_value()) totals = at::empty({2}, longs);

  BertFastUnpad args = {};
  args.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  args.B = B;
  args.L = L;
  args.stride_B = mask.stride(0);
  args.stride_L = mask.stride(1);
  args.rows = out.rows.mutable_data_ptr<int64_t>();
  args.num_rows = room;
  args.cu_seqlens = out.cu_seqlens.mutable_data_ptr<int32_t>();
  args.work = tile ? out.work.mutable_data_ptr<int32_t>() : nullptr;
  args.work_rows = work_rows;
  args.tile = tile ? static_cast<int32_t>(tile) : 1;
  args.scratch = scratch.mutable_data_ptr<int32_t>();
  args.totals = totals.defined() ? totals.mutable_data_ptr<int64_t>() : nullptr;
  C10_CUDA_CHECK(bert_fast_unpad(&args, stream()));

  const auto on_host = at::TensorOptions().dtype(at::kLong);
  int64_t longest = max_len.value_or(0);
  if (totals.defined()) {  // the one copy, and the one wait
    const Tensor pinned = at::empty({2}, on_host.pinned_memory(true));
    const auto* found = pinned.const_data_ptr<int64_t>();
    C10_CUDA_CHECK(cudaMemcpyAsync(pinned.mutable_data_ptr(), totals.const_data_ptr(),
                                   2 * sizeof(int64_t), cudaMemcpyDeviceToHost, stream()));
    c10::cuda::getCurrentCUDAStream().synchronize();
    out.rows = out.rows.narrow(0, 0, found[0]);
    if (tile) out.work = out.work.narrow(0, 0, 2 + found[0] / tile + B);
    longest = found[1];
  }
  out.max_len = at::scalar_tensor(longest, on_host);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> unpad(const Tensor& mask) {
  const Unpadded out = unpad_mask("unpad", mask, 0, std::nullopt, std::nullopt);
  return {out.rows, out.cu_seqlens, out.max_len};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> unpad_work(const Tensor& mask, int64_t tile,
                                                      std::optional<int64_t> num_rows,
                                                      std::optional<int64_t> max_len) {
  TORCH_CHECK_VALUE(tile > 0, "unpad_work: tile: want 1 or more, got ", tile);
  const Unpadded out = unpad_mask("unpad_work", mask, tile, num_rows, max_len);
  return {out.rows, out.cu_seqlens, out.work, out.max_len};
}

// --- optimizer -----------------------------------------------------------------------------------

int32_t dtype_of(const Tensor& t) {
  return t.scalar_type() == at::kHalf       ? BERT_FAST_HALF
         : t.scalar_type() == at::kBFloat16 ? BERT_FAST_BFLOAT16
                                            : BERT_FAST_FLOAT;
}

Tensor grad_norm(at::TensorList grads, const std::optional<Tensor>& grad_scale) {
  const auto dense = optimizer::check_grads("grad_norm", grads, grad_scale, /*doubles=*/false);
  const c10::cuda::CUDAGuard guard(dense[0].device());
  std::vector<BertFastParam> params(dense.size());
  for (size_t i = 0; i < dense.size(); ++i) {
    params[i].grad = dense[i].const_data_ptr();
    params[i].grad_dtype = dtype_of(dense[i]);
    params[i].numel = dense[i].numel();
  }
  const auto count = static_cast<int64_t>(params.size());
  const auto floats = at::TensorOptions().dtype(at::kFloat).device(dense[0].device());
  const Tensor sums = at::empty({bert_fast_num_chunks(params.data(), count)}, floats);
  Tensor norm = at::empty({}, floats);
  C10_CUDA_CHECK(bert_fast_grad_norm(params.data(), count, optimizer::scalar(grad_scale),
                                     sums.mutable_data_ptr<float>(),
                                     norm.mutable_data_ptr<float>(), stream()));
  return norm;
}

// The arguments of a launch; the tensors of `grads` must outlive the call of the launcher.
std::vector<BertFastParam> params_of(const optimizer::Lists& lists,
                                     const std::vector<Tensor>& grads) {
  std::vector<BertFastParam> params;
  params.reserve(lists.params.size());
  for (size_t g = 0; g < lists.sizes.size(); ++g) {
    const Tensor lr = optimizer::lr_tensor(lists, g);
    for (int64_t left = lists.sizes[g]; left > 0; --left) {
      const size_t i = params.size();
      BertFastParam p = {};
      p.param = lists.params[i].mutable_data_ptr();
      p.grad = grads[i].const_data_ptr();
      p.exp_avg = lists.exp_avgs[i].mutable_data_ptr<float>();
      p.exp_avg_sq = lists.exp_avg_sqs[i].mutable_data_ptr<float>();
      p.master = optimizer::has_master(lists, i) ? lists.masters[i].mutable_data_ptr<float>()
                                                 : nullptr;
      p.step = lists.steps[i].mutable_data_ptr<float>();
      p.lr_dev = lr.defined() ? lr.const_data_ptr<float>() : nullptr;
      p.numel = lists.params[i].numel();
      p.lr = static_cast<float>(lists.lrs[g]);
      p.weight_decay = static_cast<float>(lists.weight_decays[g]);
      p.param_dtype = dtype_of(lists.params[i]);
      p.grad_dtype = dtype_of(grads[i]);
      params.push_back(p);
    }
  }
  return params;
}

BertFastStep step_of(const optimizer::Options& o, bool always_adapt) {
  BertFastStep step = {};
  step.beta1 = o.beta1;
  step.beta2 = o.beta2;
  step.eps = o.eps;
  step.max_norm = o.max_norm;
  step.norm = optimizer::scalar(o.norm);
  step.grad_scale = optimizer::scalar(o.grad_scale);
  step.found_inf = optimizer::scalar(o.found_inf);
  step.always_adapt = always_adapt;
  return step;
}

void run(const char* op, const optimizer::Lists& lists, const optimizer::Options& options,
         bool lamb, bool always_adapt) {
  TORCH_CHECK_VALUE(!lists.params.empty(), op, ": params: want at least one, got 0");
  const at::Device device = lists.params[0].device();
  const auto grads = optimizer::check_lists(op, lists, options, device, /*doubles=*/false);
  const c10::cuda::CUDAGuard guard(device);
  const auto params = params_of(lists, grads);
  const auto count = static_cast<int64_t>(params.size());
  const BertFastStep step = step_of(options, always_adapt);
  const auto floats = at::TensorOptions().dtype(at::kFloat).device(device);
  const Tensor scalars = at::empty({count, 4}, floats);
  auto* made = scalars.mutable_data_ptr<float>();
  if (!lamb) {
    C10_CUDA_CHECK(bert_fast_adamw(params.data(), count, &step, made, stream()));
    return;
  }
  const Tensor sums = at::empty({bert_fast_num_chunks(params.data(), count), 2}, floats);
  C10_CUDA_CHECK(bert_fast_lamb(params.data(), count, &step, made, sums.mutable_data_ptr<float>(),
                                stream()));
}

void adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
            at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList masters,
            at::IntArrayRef sizes, at::ArrayRef<double> lrs, at::ArrayRef<double> weight_decays,
            at::TensorList lr_tensors, double beta1, double beta2, double eps, double max_norm,
            const std::optional<Tensor>& norm, const std::optional<Tensor>& grad_scale,
            const std::optional<Tensor>& found_inf) {
  run("adamw_",
      {params, grads, exp_avgs, exp_avg_sqs, steps, masters, sizes, lrs, weight_decays, lr_tensors},
      {beta1, beta2, eps, max_norm, norm, grad_scale, found_inf}, false, false);
}

void lamb_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
           at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList masters,
           at::IntArrayRef sizes, at::ArrayRef<double> lrs, at::ArrayRef<double> weight_decays,
           at::TensorList lr_tensors, double beta1, double beta2, double eps, double max_norm,
           const std::optional<Tensor>& norm, const std::optional<Tensor>& grad_scale,
           const std::optional<Tensor>& found_inf, bool always_adapt) {
  run("lamb_",
      {params, grads, exp_avgs, exp_avg_sqs, steps, masters, sizes, lrs, weight_decays, lr_tensors},
      {beta1, beta2, eps, max_norm, norm, grad_scale, found_inf}, true, always_adapt);
}

}  // namespace

// The operators of CUDA, by their schemas' names.
#define FOR_EACH_CUDA_OP(OP) OP(unpad) OP(unpad_work) OP(grad_norm) OP(adamw_) OP(lamb_)

#define NAME(name) #name,
std::vector<std::string> ops() { return {FOR_EACH_CUDA_OP(NAME)}; }

#define REGISTER(name) m.impl(#name, &name);
TORCH_LIBRARY_IMPL(bert_fast, CUDA, m) { FOR_EACH_CUDA_OP(REGISTER) }

}  // namespace bert_fast::cuda
