"""Faults in the kernels that go through rows: LayerNorm, activations, linear."""

from functools import partial

from mutant import Mutant

LAYER_NORM = "tests/test_layer_norm.py"
GELU = "tests/test_gelu.py"
LINEAR = "tests/test_linear.py"
LAYOUTS = "tests/test_kernel_layouts.py"
OVERFLOW = "tests/test_kernel_overflow.py"
MEMORY = "tests/test_kernel_memory.py"
FORWARD = "_add_layer_norm_fwd_kernel"
BACKWARD = "_add_layer_norm_bwd_kernel"

layer_norm = partial(Mutant, file="kernels/layer_norm.py", tests=LAYER_NORM)
layer_norm_rows = partial(Mutant, file="kernels/common.py", tests=LAYER_NORM)
layer_norm_op = partial(Mutant, file="bert_fast/ops/layer_norm.py", tests=LAYER_NORM)
gelu = partial(Mutant, file="kernels/gelu.py", tests=GELU)
gelu_op = partial(Mutant, file="bert_fast/ops/gelu.py", tests=GELU)
linear = partial(Mutant, file="kernels/linear.py", tests=LINEAR)
linear_op = partial(Mutant, file="bert_fast/ops/linear.py", tests=LINEAR)

LAYER_NORM_MUTANTS = [
    layer_norm_rows(
        "LayerNorm: variance over the tile's columns",
        "rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)",
        "rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / BLOCK_D + eps)",
        "test_kernel_data and float32 and plain",
    ),
    layer_norm_rows(
        "LayerNorm: eps outside the root",
        "axis=1) / D + eps)",
        "axis=1) / D) + eps",
        "test_kernel_eps and float32",
    ),
    layer_norm_rows(
        "LayerNorm: columns past the end hold minus the mean",
        "centred = tl.where(in_row, z - mean[:, None], 0.0)",
        "centred = z - mean[:, None]",
        "test_kernel_data and float32 and plain",
    ),
    layer_norm_rows(
        "LayerNorm: the rounding of a large mean stays in the row",
        "rest = tl.sum(centred, axis=1) / D",
        "rest = 0.0 * mean",
        "test_kernel_far_from_zero and float32",
    ),
    layer_norm(
        "LayerNorm: one column of the next row",
        "mask = (rows < T)[:, None] & in_row",
        "mask = (rows < T)[:, None] & (cols <= D)[None, :]",
        "test_kernel_data and float32 and plain",
        within=FORWARD,
    ),
    layer_norm(
        "LayerNorm: a row past the end",
        "mask = (rows < T)[:, None] & in_row",
        "mask = (rows <= T)[:, None] & in_row",
        "test_guard_pages and after",
        tests=MEMORY,
        within=FORWARD,
    ),
    layer_norm(
        "LayerNorm: what is kept is not scaled",
        "z *= common.row_dropout(rows, key, threshold, factor,",
        "z *= common.row_dropout(rows, key, threshold, 1.0,",
        "test_kernel_mask",
    ),
    layer_norm(
        "LayerNorm: key without the site",
        "key = tl.load(seed_ptr) + site",
        "key = tl.load(seed_ptr)",
        "test_kernel_mask",
        within=FORWARD,
    ),
    layer_norm(
        "LayerNorm: residual before dropout",
        "z *= common.row_dropout(rows, key, threshold, factor, ROWS, BLOCK_D)\n"
        "    if residual_ptr is not None:\n"
        "        z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)",
        "z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)\n"
        "        z *= common.row_dropout(rows, key, threshold, factor, ROWS, BLOCK_D)\n"
        "    elif residual_ptr is not None:\n"
        "        z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)",
        "test_kernel_forms and float32 and True",
    ),
    layer_norm(
        "LayerNorm: a row's number in 32 bits",
        "rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)",
        "rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)",
        "test_add_layer_norm",
        tests=OVERFLOW,
        within=FORWARD,
    ),
    layer_norm(
        "LayerNorm: a bias alone is taken for nothing",
        "is_x = bias is None and residual is None and",
        "is_x = residual is None and",
        "test_kernel_forms and float32 and True and False",
    ),
    layer_norm_rows(
        "LayerNorm backward: mean of g missing",
        "rstd * (g - g_mean - x_hat * gx_mean)",
        "rstd * (g - x_hat * gx_mean)",
        "test_kernel_data and float32 and plain",
    ),
    layer_norm_rows(
        "LayerNorm backward: mean of g x_hat missing",
        "rstd * (g - g_mean - x_hat * gx_mean)",
        "rstd * (g - g_mean)",
        "test_kernel_data and float32 and plain",
    ),
    layer_norm_rows(
        "LayerNorm backward: mean of g over the tile's columns",
        "g_mean = (tl.sum(g, axis=1) / D)[:, None]",
        "g_mean = (tl.sum(g, axis=1) / BLOCK_D)[:, None]",
        "test_kernel_data and float32 and plain",
    ),
    layer_norm(
        "LayerNorm backward: dw without x_hat",
        "dw += dy * x_hat",
        "dw += dy",
        "test_kernel_data and float32 and plain",
    ),
    layer_norm(
        "LayerNorm backward: dw of the last tile alone",
        "dw += dy * x_hat",
        "dw = dy * x_hat",
        "test_kernel_partial_sums",
    ),
    layer_norm(
        "LayerNorm backward: each program leaves its last row out",
        "end = tl.minimum(begin + rows_per_program, T)",
        "end = tl.minimum(begin + rows_per_program - 1, T)",
        "test_kernel_data and float32 and plain",
    ),
    layer_norm(
        "LayerNorm backward: bias gradient before dropout",
        "dbias += tl.where(mask, dx, 0.0)",
        "dbias += tl.where(mask, dz, 0.0)",
        "test_kernel_data and float32 and plain",
    ),
    layer_norm(
        "LayerNorm backward: what is kept is not scaled",
        "dx *= common.row_dropout(rows, key, threshold, factor,",
        "dx *= common.row_dropout(rows, key, threshold, 1.0,",
        "test_kernel_mask",
    ),
    layer_norm(
        "LayerNorm backward: key without the site",
        "key = tl.load(seed_ptr) + site",
        "key = tl.load(seed_ptr)",
        "test_kernel_mask",
        within=BACKWARD,
    ),
    layer_norm(
        "LayerNorm backward: another dtype is no reason for a dx",
        "is_dz = (seed is None or p == 0) and x_dtype == z.dtype",
        "is_dz = seed is None or p == 0",
        "test_kernel_mixed_dtypes",
    ),
    layer_norm(
        "LayerNorm backward: partial sums two apart for three",
        "out = partials_ptr + program.to(tl.int64) * S * D + cols",
        "out = partials_ptr + program.to(tl.int64) * 2 * D + cols",
        "test_kernel_data and float32 and plain",
    ),
    layer_norm(
        "LayerNorm backward: bias gradient in the dtype of x",
        "dbias_dtype = torch.promote_types(x_dtype, w.dtype)",
        "dbias_dtype = x_dtype",
        "test_outputs_are_those_of_the_fake and add_layer_norm and mixed",
        tests="tests/test_kernel_contract.py",
    ),
    layer_norm_op(
        "LayerNorm: z is recovered from y",
        "ctx.save_for_backward(z, w,",
        "ctx.save_for_backward(y, w,",
        "test_kernel_keeps_z and float32",
    ),
    layer_norm_op(
        "LayerNorm: dx is dz under dropout",
        "dx = dz if ctx.p == 0 and x_dtype == z.dtype else dx",
        "dx = dz if x_dtype == z.dtype else dx",
        "test_kernel_forms and float32 and True",
    ),
    layer_norm_op(
        "LayerNorm: the gradient is taken as it lies",
        "dy.contiguous()",
        "dy",
        "test_layouts_of_the_gradient and layer_norm",
        tests=LAYOUTS,
    ),
]

GELU_MUTANTS = [
    gelu(
        "activation: one column of the next row",
        "mask = (rows < T)[:, None] & (cols < F)[None, :]",
        "mask = (rows < T)[:, None] & (cols <= F)[None, :]",
        "test_program_order and gelu",
        tests="tests/test_kernel_order.py",
        within="_bias_gelu_fwd_kernel",
    ),
    gelu(
        "activation: a row's number in 32 bits",
        "rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)",
        "rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)",
        "test_gelu",
        tests=OVERFLOW,
    ),
    gelu(
        "activation backward: derivative without the bias",
        ".to(tl.float32) + bias[None, :]",
        ".to(tl.float32)",
        "test_kernel_shapes and bias and float32 and 37",
    ),
    gelu(
        "activation backward: relu has a slope at 0",
        "dx = tl.where(h > 0, dy, 0.0)",
        "dx = tl.where(h >= 0, dy, 0.0)",
        "test_kernel_special_values and relu",
    ),
    gelu(
        "activation backward: relu multiplies",
        "dx = tl.where(h > 0, dy, 0.0)",
        "dx = dy * common.activate_derivative(h, ACTIVATION)",
        "test_kernel_infinite_gradient",
    ),
    gelu(
        "activation backward: each program leaves its last row out",
        "end = tl.minimum(begin + rows_per_program, T)",
        "end = tl.minimum(begin + rows_per_program - 1, T)",
        "test_kernel_shapes and bias and float32 and 37",
    ),
    gelu(
        "activation backward: rows past the end in the bias gradient",
        "db += tl.sum(tl.where(mask, dx, 0.0), axis=0)",
        "db += tl.sum(dx, axis=0)",
        "test_kernel_rows_past_the_end",
    ),
    gelu_op(
        "activation backward: the op forgets the bias",
        "return bias_gelu_bwd(dy, x, b, activation)",
        "return bias_gelu_bwd(dy, x, None, activation)",
        "test_kernel_shapes and bias and float32 and 37",
    ),
    gelu_op(
        "activation backward: eager on a GPU",
        "cuda=_bwd_cuda",
        "cuda=reference.bias_gelu_bwd",
        "test_every_op_has_a_kernel",
        tests="tests/test_kernel_model.py",
    ),
]

LINEAR_MUTANTS = [
    linear(
        "linear: every second tile of rows",
        "for first in range(begin, end, ROWS):",
        "for first in range(begin, end, 2 * ROWS):",
        "test_kernel_sums and float32 and plain",
    ),
    linear(
        "linear: sums in 16 bits",
        "total += tl.sum(dy.to(tl.float32), axis=0)",
        "total = (total + tl.sum(dy.to(tl.float32), axis=0)).to(tl.float16).to(tl.float32)",
        "test_kernel_sums_of_what_cancels and float16",
    ),
    linear(
        "linear: partial sums a column too near",
        ".to(tl.int64) * F + cols",
        ".to(tl.int64) * (F - 1) + cols",
        "test_kernel_sums and float32 and plain",
    ),
    linear(
        "linear: one row of the next program twice",
        "mask = (rows < end)[:, None] & (cols < F)[None, :]",
        "mask = (rows <= end)[:, None] & (cols < F)[None, :]",
        "test_kernel_sums and float32 and plain",
    ),
    linear_op(
        "linear: bias twice before the activation",
        "(bias_gelu_fwd(h, None, activation), h)",
        "(bias_gelu_fwd(h, b, activation), h)",
        "test_kernel_shapes and gelu and bias and float32 and 37",
    ),
    linear_op(
        "linear: derivative at the activation's result",
        "(bias_gelu_fwd(h, None, activation), h)",
        "(bias_gelu_fwd(h, None, activation), bias_gelu_fwd(h, None, activation))",
        "test_kernel_shapes and gelu and bias and float32 and 37",
    ),
]

MUTANTS = [*LAYER_NORM_MUTANTS, *GELU_MUTANTS, *LINEAR_MUTANTS]
