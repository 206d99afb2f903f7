"""How a tensor lies in memory does not show in what the kernels give."""

import random
from functools import partial

import op_cases
import pytest
import torch

pytest.importorskip("triton")

from interpreter_tools import (
    KERNEL_CASES,
    PRODUCTS,
    draw,
    every_function,
    every_kernel_case,
    function,
    in_long,
    some_dtypes,
)
from op_cases import assert_same_bits, gradients, random_gradient

poison = op_cases.poison

FULL = {"add_layer_norm": "add_layer_norm-bias"}  # the cases with every tensor there may be

# --- layouts -------------------------------------------------------------------------------------


def nan_like(t: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What nobody may read: NaN, or an integer far out of any range."""
    fill = torch.nan if t.is_floating_point() else 2**30
    return torch.full(shape, fill, dtype=t.dtype, device=t.device)


def every_second(t: torch.Tensor) -> torch.Tensor:
    """Every second element of every dimension of a larger tensor."""
    large = nan_like(t, tuple(2 * s for s in t.shape))
    return large[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def columns_of_a_wider(t: torch.Tensor) -> torch.Tensor:
    """Rows that are contiguous, farther apart than they are long."""
    return nan_like(t, (*t.shape[:-1], t.shape[-1] + 5))[..., 3:-2].copy_(t)


def rows_of_a_taller(t: torch.Tensor) -> torch.Tensor:
    """Contiguous, in the midst of a larger tensor."""
    return nan_like(t, (t.shape[0] + 3, *t.shape[1:]))[1:-2].copy_(t)


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The dimensions lie in memory in the opposite order."""
    order = list(range(t.ndim))[::-1]
    return t.permute(order).contiguous().permute(order)


def expanded(t: torch.Tensor) -> torch.Tensor:
    """The first entry of the first dimension, repeated without memory."""
    return t[:1].expand(t.shape)


def offset(t: torch.Tensor, by: int) -> torch.Tensor:
    """Begins `by` elements after an aligned address."""
    return nan_like(t, (t.numel() + by,))[by:].copy_(t.flatten()).view(t.shape)


LAYOUTS = {f.__name__: f for f in (every_second, columns_of_a_wider, rows_of_a_taller)}
LAYOUTS |= {"transposed": transposed, "expanded": expanded}
LAYOUTS |= {f"offset {by}": partial(offset, by=by) for by in range(1, 16)}


def assert_layouts_do_not_show(name, case, layouts, dy_layout):
    """Inputs and dy laid out against what they are when contiguous, to the bit.

    PyTorch's product sums in another order where another layout makes it choose another kernel.
    """
    dy = random_gradient(case.call())
    laid = {n: LAYOUTS[layout](case.inputs[n]) for n, layout in layouts.items()}
    laid_dy = LAYOUTS[dy_layout](dy) if dy.ndim else dy
    plain = {n: t.contiguous().clone() for n, t in laid.items()}
    got, expected = (
        gradients(case.with_inputs(**inputs), case.with_inputs(**inputs).call, d)
        for inputs, d in ((laid, laid_dy), (plain, laid_dy.contiguous().clone()))
    )
    if function(name) not in PRODUCTS:
        return assert_same_bits(got, expected)
    for key, value in expected.items():
        eps = torch.finfo(case.inputs["w"].dtype).eps
        error, largest = ((t.abs().max() if t.numel() else 0) for t in (got[key] - value, value))
        assert error <= 16 * eps * max(1, largest), key
    return None


def drawn_layouts(case, rng):
    """One for each input, and one for dy; contiguous where there is none."""
    layouts = {}
    for name, t in case.inputs.items():
        if t is not None and rng.random() < 0.8:
            layout = rng.choice(list(LAYOUTS))
            if layout != "expanded" or name != "cu_seqlens":
                layouts[name] = layout
    return layouts, rng.choice(list(LAYOUTS))


@every_kernel_case
@some_dtypes
def test_drawn_layouts(make, dtype, kernel_device):
    name = next(n for n, m in KERNEL_CASES.items() if m is make)
    case = make().to(dtype, kernel_device)
    rng = random.Random(f"layouts {name} {dtype}")
    assert_layouts_do_not_show(name, case, *drawn_layouts(case, rng))


@every_function
@pytest.mark.parametrize("layout", ["expanded", "transposed", "offset 1", *in_long("every_second")])
def test_layouts_of_the_gradient(name, layout, kernel_device):
    """Expanded too: what the backward of a sum gives."""
    case = KERNEL_CASES[name]().to(torch.float32, kernel_device)
    assert_layouts_do_not_show(name, case, {}, layout)


@every_function
@pytest.mark.parametrize("layout", ["every_second", *in_long("transposed", "rows_of_a_taller")])
def test_layouts_of_all_inputs(name, layout, kernel_device):
    case = KERNEL_CASES[FULL.get(name, name)]().to(torch.float32, kernel_device)
    layouts = {n: layout for n, t in case.inputs.items() if t is not None}
    assert_layouts_do_not_show(name, case, layouts, layout)


@pytest.mark.long
@every_function
@pytest.mark.parametrize("number", range(32))  # 256 layouts of 8 functions
def test_more_drawn_layouts(name, number, kernel_device):
    rng = random.Random(f"{name} {number}")
    torch.manual_seed(number)
    case = draw(name, rng, many=number % 10 == 0)
    case = case.to((torch.float32, torch.float16)[number % 2], kernel_device)
    assert_layouts_do_not_show(name, case, *drawn_layouts(case, rng))


# --- the technique sees what it is for -----------------------------------------------------------


def test_an_assumed_stride_shows():
    """A planted op that takes its input for contiguous."""

    def planted(x, b=None, activation="gelu"):
        return torch.as_strided(x, x.shape, (x.shape[1], 1), x.storage_offset()) * 2

    case = op_cases.gelu_case()
    case = op_cases.Case(planted, case.formula, {"x": case.inputs["x"]})
    assert_layouts_do_not_show("gelu", case, {"x": "offset 3"}, "transposed")
    for layout in ("every_second", "columns_of_a_wider", "transposed", "expanded"):
        with pytest.raises((AssertionError, RuntimeError)):
            assert_layouts_do_not_show("gelu", case, {"x": layout}, "offset 1")
