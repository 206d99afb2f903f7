"""Faults in what all kernels share: dropout, activations, sums over rows, launches."""

from functools import partial

from mutant import Mutant

LAYER_NORM = "tests/test_layer_norm.py"
DROPOUT = "tests/test_kernel_dropout.py"
LAUNCH = "tests/test_kernel_launch.py"

common = partial(Mutant, file="kernels/common.py", tests="tests/test_gelu.py")

MUTANTS = [
    common(
        "common: what equals the threshold is dropped",
        "bits >= threshold",
        "bits > threshold",
        "test_the_threshold_is_kept and not attention",
        tests=DROPOUT,
    ),
    common(
        "common: every tile has the first one's mask",
        "counters = rows.to(tl.int32)[:, None]",
        "counters = tl.arange(0, ROWS)[:, None]",
        "test_kernel_mask",
        tests=LAYER_NORM,
    ),
    common(
        "common: a row's number and group swapped",
        "dropout_bits(key, counters, groups, 0, 0,",
        "dropout_bits(key, groups, counters, 0, 0,",
        "test_kernel_mask",
        tests=LAYER_NORM,
    ),
    common(
        "common: rows left over have no program",
        "return each, max(1, triton.cdiv(T, each))",
        "return each, max(1, T // each)",
        "test_kernel_partial_sums",
    ),
    common(
        "common: tanh form's constant",
        "(x + 0.044715 * x * x * x)",
        "(x + 0.04471 * x * x * x)",
        "test_kernel_activations and float32 and plain",
    ),
    common(
        "common: derivative of the tanh form's cube",
        "(1 + 0.134145 * x * x)",
        "(1 + 0.044715 * x * x)",
        "test_kernel_activations and float32 and plain",
    ),
    common(
        "common: derivative of gelu without the density",
        " + x * density",
        "",
        "test_kernel_activations and float32 and plain",
    ),
    common(
        "common: half of the density's exponent",
        "tl.exp(-0.5 * x * x)",
        "tl.exp(-x * x)",
        "test_kernel_activations and float32 and plain",
    ),
    common(
        "common: erf of x",
        "y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))",
        "y = 0.5 * x * (1 + tl.erf(x))",
        "test_kernel_activations and float32 and plain",
    ),
    common(
        "common: relu swallows NaN",
        "y = tl.where(x < 0, 0.0, x)",
        "y = tl.where(x > 0, x, 0.0)",
        "test_kernel_special_values and relu",
    ),
    common(
        "common: every second block of partial sums",
        "for first in range(0, P, BLOCK_P):",
        "for first in range(0, P, 2 * BLOCK_P):",
        "test_kernel_partial_sums_of_more_rows",
        tests=LAYER_NORM,
    ),
    common(
        "common: the last partial sum is lost",
        "mask = (rows < P)[:, None]",
        "mask = (rows < P - 1)[:, None]",
        "test_kernel_partial_sums",
    ),
    common(
        "common: the first of two sums twice",
        "offs = (rows * S + which)[:, None] * N",
        "offs = (rows * S)[:, None] * N",
        "test_kernel_data and float32 and plain",
        tests=LAYER_NORM,
    ),
    common(
        "common: high half-words first",
        "tl.join(low, high)",
        "tl.join(high, low)",
        "test_kernel_mask",
        tests=LAYER_NORM,
    ),
    common(
        "common: words of random bits in another order",
        "low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))",
        "low = tl.join(tl.join(w0 & 0xFFFF, w1 & 0xFFFF), tl.join(w2 & 0xFFFF, w3 & 0xFFFF))",
        "test_kernel_mask",
        tests=LAYER_NORM,
    ),
    common(
        "common: row and group swapped in the counters",
        "tl.philox(key, row, group, c2, c3)",
        "tl.philox(key, group, row, c2, c3)",
        "test_kernel_mask",
        tests=LAYER_NORM,
    ),
    common(
        "common: scaled by the share that is dropped",
        "65536 / (65536 - threshold) if",
        "65536 / threshold if",
        "test_kernel_mask",
        tests=LAYER_NORM,
    ),
    common(
        "common: threshold rounded down",
        "threshold = round(p * 65536)",
        "threshold = int(p * 65536)",
        "test_kernel_mask",
        tests=LAYER_NORM,
    ),
    common(
        "common: nothing is refused",
        "    if reasons:\n        raise NotImplementedError",
        "    if reasons is None:\n        raise NotImplementedError",
        "test_refused_sizes",
        tests="tests/test_kernel_refusals.py",
    ),
    common(
        "common: launched on whatever device is current",
        "with torch.cuda.device_of(args[0]):",
        "if True:",
        "test_launch",
        tests=LAUNCH,
    ),
    common(
        "common: an empty grid is launched",
        "if 0 not in grid:",
        "if grid:",
        "test_an_empty_grid",
        tests=LAUNCH,
    ),
    common(
        "common: fusion is Triton's choice",
        ", enable_fp_fusion=True",
        "",
        "test_launch",
        tests=LAUNCH,
    ),
    common(
        "common: the oldest GPU's rules for all",
        "return rules[max(g for g in rules if g <= mine)]",
        "return rules[min(rules)]",
        "test_an_entry_serves",
        tests=LAUNCH,
    ),
    common(
        "common: no rules for a GPU that is older than all",
        "mine = max(generation(t), min(rules))",
        "mine = generation(t)",
        "test_an_entry_serves",
        tests=LAUNCH,
    ),
    common(
        "common: the minor capability in tens",
        "return 10 * major + minor",
        "return 10 * (major + minor)",
        "test_generation",
        tests=LAUNCH,
    ),
]
