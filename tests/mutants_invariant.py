"""Faults in the batch-invariant mode: its state, what it tries out, and its kernel."""

from functools import partial

from mutant import Mutant

INVARIANT = "tests/test_invariant.py"
MEMORY = "tests/test_kernel_memory.py"
OVERFLOW = "tests/test_kernel_overflow.py"

kernel = partial(Mutant, file="kernels/linear.py", tests=INVARIANT, within="_linear_kernel")
launcher = partial(Mutant, file="kernels/linear.py", tests=INVARIANT, within="linear")
op = partial(Mutant, file="bert_fast/ops/linear.py", tests=INVARIANT)
mode = partial(Mutant, file="bert_fast/ops/invariant.py", tests=INVARIANT)

KERNEL_MUTANTS = [
    kernel(
        "product: a column past the end",
        "mask = (rows < T)[:, None] & (cols < F)[None, :]\n    tl.store",
        "mask = (rows < T)[:, None] & (cols <= F)[None, :]\n    tl.store",
        "test_guard_pages and after",
        tests=MEMORY,
    ),
    kernel(
        "product: a row past the end",
        "x_mask = (rows < T)",
        "x_mask = (rows <= T)",
        "test_guard_pages and after",
        tests=MEMORY,
    ),
    kernel(
        "product: a row's number in 32 bits",
        "rows = tl.program_id(0).to(tl.int64)",
        "rows = tl.program_id(0)",
        "test_linear_rows",
        tests=OVERFLOW,
    ),
    kernel(
        "product: a column's number in 32 bits",
        "cols = tl.program_id(1).to(tl.int64)",
        "cols = tl.program_id(1)",
        "test_linear_weight",
        tests=OVERFLOW,
    ),
    kernel(
        "product: the number of a step in 32 bits",
        "at = (first + tl.arange(0, BLOCK_D)).to(tl.int64)",
        "at = first + tl.arange(0, BLOCK_D)",
        "test_linear_weight",
        tests=OVERFLOW,
    ),
    kernel(
        "product: sums in 16 bits",
        'total = tl.dot(x, w, total, input_precision="ieee")',
        'total = tl.dot(x, w, total, input_precision="ieee").to(tl.float16).to(tl.float32)',
        "test_kernel_sums_of_what_cancels and float16",
    ),
    kernel(
        "product: a last step that is not full is left out",
        "range(0, D, BLOCK_D)",
        "range(0, D - BLOCK_D + 1, BLOCK_D)",
        "test_kernel_shapes and float32 and bias and 65",
    ),
    kernel(
        "product: no bias",
        "if b_ptr is not None:",
        "if False:",
        "test_kernel_shapes and float32 and bias and 65",
    ),
    launcher(
        "product: few rows make another tile",
        "[x.element_size()]",
        '[x.element_size()] | ({"BLOCK_D": 32} if T < 8 else {})',
        "test_a_row_alone and linear-invariant",
        tests="tests/test_kernel_batches.py",
    ),
    launcher(
        "product: the strides of a weight are assumed",
        "*w.stride()",
        "D, 1",
        "test_kernel_shapes and float32 and bias and 65",
    ),
    op(
        "mode: the gradient of x is cuBLAS's",
        "_fwd_cuda(dy, w.T, None)",
        "dy @ w",
        "test_kernel_is_what_runs",
    ),
    op(
        "mode: the product before an activation is cuBLAS's",
        "h = _fwd_cuda(x, w, b)",
        "h = reference.linear(x, w, b)",
        "test_kernel_is_what_runs",
    ),
]

MODE_MUTANTS = [
    mode(
        "mode: off after a block, whatever was before",
        "batch_invariant(self._before)",
        "batch_invariant(False)",
        "test_with_puts_back_what_was",
    ),
    mode(
        "mode: the last call has fewer rows",
        "if n < rows:",
        "if n < 0:",
        "test_calls_are_full_and_aligned",
    ),
    mode(
        "mode: rows are multiplied where they lie",
        "part.data_ptr() % _ALIGNED",
        "part.data_ptr() % 1",
        "test_calls_are_full_and_aligned",
    ),
    mode(
        "mode: a row's company is not tried out",
        "return moved and torch.equal(product(x[:1].expand_as(x)), y[:1].expand_as(y))",
        "return moved",
        "test_one_row_where_it_does",
    ),
    mode(
        "mode: sums that 16 bits hide are tried out",
        "t[:, half : 2 * half] = sign * t[:, :half]",
        "t[:, half : 2 * half] = t[:, :half]",
        "test_one_row_where_it_does and bfloat16",
    ),
    mode(
        "mode: any packed weight will do",
        "packs = packs and torch.equal(multiply(x, pack(w), b), multiply(x, w, b))",
        "packs = packs and True",
        "test_many_rows_where_no_row_sees_another",
    ),
]

MUTANTS = [*KERNEL_MUTANTS, *MODE_MUTANTS]
