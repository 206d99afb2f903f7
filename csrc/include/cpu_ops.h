// The compiled CPU operators: a declaration each. bindings.cpp registers them.
//
// No include guard: bindings.cpp includes this once for each instruction set, in a namespace each.
// The bodies (cpu/*.cpp) are compiled as often, and hold no registration and no static state.
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace bert_fast::cpu::CPU_CAPABILITY {

using at::Tensor;

// mask (B, L) bool, any strides -> rows (T,) int64, cu_seqlens (B + 1,) int32, max_len () int64.
std::tuple<Tensor, Tensor, Tensor> unpad(const Tensor& mask);

// The others are as their schemas in bert_fast/ops say, for float, double, BFloat16 and Half.
std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_len,
                                     double p, const std::optional<Tensor>& seed, int64_t site,
                                     const std::optional<Tensor>& work);
Tensor attention_bwd(const Tensor& d_o, const Tensor& qkv, const Tensor& o, const Tensor& lse,
                     const Tensor& cu_seqlens, int64_t max_len, double p,
                     const std::optional<Tensor>& seed, int64_t site,
                     const std::optional<Tensor>& work);

// Without `save` z, mean and rstd are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
    const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& w, const Tensor& b, double eps, double p, const std::optional<Tensor>& seed,
    int64_t site, at::ScalarType out_dtype, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const Tensor& dy, const Tensor& z, const Tensor& w, const Tensor& mean, const Tensor& rstd,
    bool with_bias, double p, const std::optional<Tensor>& seed, int64_t site,
    at::ScalarType x_dtype);
std::tuple<Tensor, Tensor, Tensor, Tensor> embed(
    const std::optional<Tensor>& input_ids, const Tensor& position_ids,
    const Tensor& token_type_ids, const Tensor& word, const Tensor& position, const Tensor& type_,
    const Tensor& w, const Tensor& b, double eps, double p, const std::optional<Tensor>& seed,
    int64_t site, at::ScalarType out_dtype, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embed_bwd(
    const Tensor& dy, const std::optional<Tensor>& input_ids, const Tensor& position_ids,
    const Tensor& token_type_ids, const Tensor& word, const Tensor& position, const Tensor& type_,
    const Tensor& w, const Tensor& z, const Tensor& mean, const Tensor& rstd, int64_t pad_id,
    double p, const std::optional<Tensor>& seed, int64_t site);
Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& b, std::string_view activation);
std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dy, const Tensor& x,
                                         const std::optional<Tensor>& b,
                                         std::string_view activation);
Tensor column_sums(const Tensor& dy);
// Without `save` h is empty.
std::tuple<Tensor, Tensor> linear_gelu(const Tensor& x, const Tensor& w,
                                       const std::optional<Tensor>& b,
                                       std::string_view activation, bool save);

// optimizer.cpp; the arguments are told in bert_fast/reference_optimizer.py.
Tensor grad_norm(at::TensorList grads, const std::optional<Tensor>& grad_scale);
void adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
            at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList masters,
            at::IntArrayRef sizes, at::ArrayRef<double> lrs, at::ArrayRef<double> weight_decays,
            at::TensorList lr_tensors, double beta1, double beta2, double eps, double max_norm,
            const std::optional<Tensor>& norm, const std::optional<Tensor>& grad_scale,
            const std::optional<Tensor>& found_inf);
void lamb_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
           at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList masters,
           at::IntArrayRef sizes, at::ArrayRef<double> lrs, at::ArrayRef<double> weight_decays,
           at::TensorList lr_tensors, double beta1, double beta2, double eps, double max_norm,
           const std::optional<Tensor>& norm, const std::optional<Tensor>& grad_scale,
           const std::optional<Tensor>& found_inf, bool always_adapt);

}  // namespace bert_fast::cpu::CPU_CAPABILITY
