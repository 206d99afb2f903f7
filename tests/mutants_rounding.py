"""Faults that cost digits alone: answers that are nearly right, or right for most numbers."""

from functools import partial

from mutant import Mutant

LAYER_NORM = "tests/test_layer_norm.py"
ATTENTION = "tests/test_attention_kernel.py"
CROSS_ENTROPY = "tests/test_cross_entropy_kernel.py"
EMBEDDING = "tests/test_embedding_kernel.py"

layer_norm = partial(Mutant, file="kernels/layer_norm.py", tests=LAYER_NORM)
layer_norm_rows = partial(Mutant, file="kernels/common.py", tests=LAYER_NORM)
attention = partial(Mutant, file="kernels/attention.py", tests=ATTENTION)
attention_tiles = partial(Mutant, file="kernels/attention_tiles.py", tests=ATTENTION)
attention_bwd = partial(Mutant, file="kernels/attention_bwd.py", tests=ATTENTION)
tables = partial(Mutant, file="kernels/embedding_tables.py", tests=EMBEDDING)
cross_entropy = partial(Mutant, file="kernels/cross_entropy.py", tests=CROSS_ENTROPY)

MUTANTS = [
    layer_norm(
        "rounding: mean and rstd saved in 16 bits",
        "mean, rstd = (torch.empty(T, dtype=torch.float32,",
        "mean, rstd = (torch.empty(T, dtype=out_dtype,",
        "test_outputs_are_those_of_the_fake and add_layer_norm",
        tests="tests/test_kernel_contract.py",
    ),
    layer_norm(
        "rounding: dw summed in 16 bits",
        "dw += dy * x_hat",
        "dw = (dw + dy * x_hat).to(tl.float16).to(tl.float32)",
        "test_kernel_data and float32",
    ),
    layer_norm(
        "rounding: eps of 1e-5 at least",
        "*(T, eps, site, threshold, factor)",
        "*(T, max(eps, 1e-5), site, threshold, factor)",
        "test_kernel_eps and float32",
    ),
    layer_norm_rows(
        "rounding: variance over D - 1",
        "axis=1) / D + eps)",
        "axis=1) / max(D - 1, 1) + eps)",
        "test_kernel_data and float32",
    ),
    layer_norm_rows(
        "rounding: variance as a difference of squares",
        "rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)",
        "rstd = tl.rsqrt(tl.sum(z * z, axis=1) / D - mean * mean + eps)",
        "test_kernel_far_from_zero and float32",
    ),
    attention(
        "rounding: probabilities of 8 bits",
        "acc = tl.dot(p.to(v.dtype),",
        "acc = tl.dot(((p * 256).to(tl.int32) / 256).to(v.dtype),",
        "test_formula and rules and 129 and float16",
        within="_stream_step",
    ),
    attention(
        "rounding: log-sum-exp in 16 bits",
        "lse = qkv.new_empty(plan.H, plan.T, dtype=torch.float32)",
        "lse = qkv.new_empty(plan.H, plan.T)",
        "test_large_scores",
    ),
    attention_bwd(
        "rounding: products of delta in 16 bits",
        "delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)",
        "delta = tl.sum((o.to(tl.float16) * do.to(tl.float16)).to(tl.float32), axis=1)",
        "test_formula and rules and 129 and float32",
        within="_attention_delta_kernel",
    ),
    attention_tiles(
        "rounding: TF32 unasked",
        '"tf32" if tf32 and qkv.dtype == torch.float32 else "ieee"',
        '"tf32"',
        "test_tf32_is_as_pytorch_has_it",
    ),
    attention_tiles(
        "rounding: TF32 asked for in vain",
        '"tf32" if tf32 and qkv.dtype == torch.float32 else "ieee"',
        '"ieee"',
        "test_tf32_is_as_pytorch_has_it",
    ),
    tables(
        "rounding: rows that no id names are not written",
        "grad = torch.zeros_like(table)",
        "grad = torch.empty_like(table)",
        "test_rows_nobody_uses",
    ),
    tables(
        "rounding: partial sums of a run in 16 bits",
        "partials = torch.empty(chunks, 2, D, dtype=torch.float32, device=dz.device)",
        "partials = torch.empty(chunks, 2, D, dtype=table.dtype, device=dz.device)",
        "test_sum_is_rounded_once",
    ),
    cross_entropy(
        "rounding: -1e4 for words past the vocabulary",
        'torch.full((S,), float("-inf"), **narrow)',
        "torch.full((S,), -1e4, **narrow)",
        "test_logits_far_from_zero",
    ),
    cross_entropy(
        "rounding: dw summed over chunks in 16 bits",
        "**(narrow if len(chunks) == 1 else wide)",
        "**narrow",
        "test_sums_over_many_chunks",
    ),
    cross_entropy(
        "rounding: the loss as log-sum-exp less the label's logit",
        "loss = (row_largest - target) + tl.log(row_total)",
        "loss = (row_largest + tl.log(row_total)) - target",
        "test_logits_far_from_zero",
    ),
]
