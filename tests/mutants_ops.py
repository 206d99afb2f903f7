"""Faults in what stands between the public functions and the kernels: layouts, dtypes, refusals."""

from mutant import Mutant

LAYOUTS = "tests/test_kernel_layouts.py"
REFUSALS = "tests/test_kernel_refusals.py"
CONTRACT = "tests/test_kernel_contract.py"
OVERFLOW = "tests/test_kernel_overflow.py"
DROPOUT = "tests/test_kernel_dropout.py"

MUTANTS = [
    Mutant(
        "ops: attention takes qkv as it lies",
        "args = qkv.contiguous(), cu_seqlens",
        "args = qkv, cu_seqlens",
        "test_layouts_of_all_inputs and attention",
        file="bert_fast/ops/attention.py",
        tests=LAYOUTS,
    ),
    Mutant(
        "ops: embed takes its tensors as they lie",
        "(t if t is None else t.contiguous() for t in tensors)",
        "tensors",
        "test_layouts_of_all_inputs and embed",
        file="bert_fast/ops/embedding.py",
        tests=LAYOUTS,
    ),
    Mutant(
        "ops: LayerNorm takes the residual as it lies",
        "residual = None if residual is None else residual.contiguous()",
        "residual = residual",
        "test_layouts_of_all_inputs and layer_norm",
        file="bert_fast/ops/layer_norm.py",
        tests=LAYOUTS,
    ),
    Mutant(
        "ops: LayerNorm takes x as it lies",
        "x, w, b = x.contiguous(), w.contiguous(), b.contiguous()",
        "x, w, b = x, w.contiguous(), b.contiguous()",
        "test_layouts_of_all_inputs and layer_norm",
        file="bert_fast/ops/layer_norm.py",
        tests=LAYOUTS,
    ),
    Mutant(
        "ops: the loss takes labels as they lie",
        "labels.contiguous()",
        "labels",
        "test_layouts_of_all_inputs and cross_entropy",
        file="bert_fast/ops/cross_entropy.py",
        tests=LAYOUTS,
    ),
    Mutant(
        "ops: autocast reaches into a kernel's launcher",
        "with torch.autocast(on, enabled=False):",
        "with torch.autocast(device, enabled=True):",
        "test_kernel_products_know_no_autocast",
        file="bert_fast/ops/registry.py",
        tests="tests/test_linear.py",
    ),
    Mutant(
        "ops: the bias gradient of an activation in the dtype of x",
        "dtype=x.dtype if b is None else b.dtype,",
        "dtype=x.dtype,",
        "test_outputs_are_those_of_the_fake and gelu and mixed",
        file="kernels/gelu.py",
        tests=CONTRACT,
    ),
    Mutant(
        "ops: attention takes head sizes of 12",
        "or K % 8:",
        "or K % 4:",
        "test_refused_sizes and attention",
        file="kernels/attention_tiles.py",
        tests=REFUSALS,
    ),
    Mutant(
        "ops: attention takes head sizes beyond 128",
        "if not 8 <= K <= 128",
        "if not 8 <= K <= 256",
        "test_refused_sizes and attention",
        file="kernels/attention_tiles.py",
        tests=REFUSALS,
    ),
    Mutant(
        "ops: embed takes any number of columns",
        "if not 1 <= D <= MOST_COLUMNS:",
        "if not 1 <= D:",
        "test_refused_sizes and embed",
        file="kernels/common.py",
        tests=REFUSALS,
    ),
    Mutant(
        "ops: float64 is taken",
        "takes = torch.float32, torch.float16, torch.bfloat16",
        "takes = torch.float32, torch.float16, torch.bfloat16, torch.float64",
        "test_refused_float64",
        file="kernels/common.py",
        tests=REFUSALS,
    ),
    Mutant(
        "ops: a sequence's first row in 32 bits",
        "begin = tl.load(ptr + 1).to(tl.int64)",
        "begin = tl.load(ptr + 1)",
        "test_attention and short",
        file="kernels/attention_tiles.py",
        tests=OVERFLOW,
    ),
    Mutant(
        "ops: a seed of 32 bits",
        "key = tl.load(seed_ptr) + site",
        "key = (tl.load(seed_ptr) + site).to(tl.int32)",
        "test_seeds_at_the_ends and attention",
        file="kernels/attention.py",
        tests=DROPOUT,
        within="_attention_long_fwd_kernel",
    ),
    Mutant(
        "ops: the log-sum-exp of no sequence is not written",
        "tl.store(lse_ptr + rows, tl.zeros((BLOCK_M,), dtype=tl.float32), mask=rows < n)",
        "tl.store(lse_ptr + rows, tl.zeros((BLOCK_M,), dtype=tl.float32), mask=rows < 0)",
        "test_the_log_sum_exp",
        file="kernels/attention.py",
        tests="tests/test_attention_kernel.py",
    ),
]
