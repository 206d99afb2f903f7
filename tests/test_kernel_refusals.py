"""What kernels cannot take they refuse, with every reason, before they allocate anything."""

from functools import partial
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from interpreter_tools import FUNCTIONS, KERNEL_CASES, PRODUCTS, every_function
from op_cases import (
    attention_case,
    cross_entropy_case,
    embed_case,
    gradients,
    layer_norm_case,
    random_gradient,
)

ALLOCATE = ("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "empty_strided")
ALLOCATE_NEW = ("new_empty", "new_zeros", "new_full", "new_ones", "new_empty_strided")


def refusal(call) -> str:
    """The message of the NotImplementedError that `call` raises before any allocation."""
    allocated = []

    def noted(original):
        def make(*args, **kwargs):
            allocated.append(original.__name__)
            return original(*args, **kwargs)

        return make

    with (
        mock.patch.multiple(torch, **{n: noted(getattr(torch, n)) for n in ALLOCATE}),
        mock.patch.multiple(
            torch.Tensor, **{n: noted(getattr(torch.Tensor, n)) for n in ALLOCATE_NEW}
        ),
        pytest.raises(NotImplementedError) as caught,
    ):
        call()
    message = str(caught.value)
    assert "want " in message and "got " in message.partition("want ")[2], message
    assert not allocated, allocated
    return message


def test_an_allocation_shows():
    def call():
        torch.zeros(3)
        raise NotImplementedError("planted: want nothing, got zeros")

    with pytest.raises(AssertionError, match="zeros"):
        refusal(call)


REFUSED = {  # call, and what the message says of each reason
    "layer_norm": (partial(layer_norm_case, 2, 8193, residual=False), ["8193"]),
    "add_layer_norm": (partial(layer_norm_case, 2, 8193), ["8193"]),
    "embed": (partial(embed_case, 2, 8193), ["8193"]),
    "attention": (partial(attention_case, (3,), H=1, K=12), ["12"]),
    "attention-4": (partial(attention_case, (3,), H=1, K=4), ["4"]),
    "attention-136": (partial(attention_case, (3,), H=1, K=136), ["136"]),
}
REFUSED = {n: value for n, value in REFUSED.items() if n.partition("-")[0] in FUNCTIONS}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_sizes(name, kernel_device):
    make, reasons = REFUSED[name]
    case = make().to(torch.float32, kernel_device)
    for call in (case.call, partial(gradients, case, case.call, torch.ones(1))):
        message = refusal(call)
        assert all(f"got {reason}" in message for reason in reasons), message


@every_function
def test_refused_float64(name, kernel_device):
    """Each tensor of float64 is named; PyTorch's product takes it, and the kernels after it not."""
    case = KERNEL_CASES[name]().to(torch.float64, kernel_device)
    if name in PRODUCTS:
        dy = random_gradient(case.by_formula())
        with pytest.raises(NotImplementedError, match=r"want .*, got torch\.float64"):
            gradients(case, case.call, dy)
        return
    message = refusal(case.call)
    assert message.count("got torch.float64") >= min(2, len(case.leaves)), message
    assert all(f"{n}: " in message for n in case.leaves), message


@pytest.mark.parametrize("name", REFUSED)
def test_every_reason_is_listed(name, kernel_device):
    """float64, and the size too."""
    make, reasons = REFUSED[name]
    message = refusal(make().to(torch.float64, kernel_device).call)
    assert "got torch.float64" in message
    assert all(f"got {reason}" in message for reason in reasons), message


@pytest.mark.parametrize("name", ["embed", "layer_norm", "add_layer_norm"])
def test_the_largest_is_taken(name, kernel_device):
    if name not in FUNCTIONS:
        pytest.skip(f"no kernel of {name}")
    make = REFUSED[name][0]
    case = partial(make.func, 2, 8192, **make.keywords)().to(torch.float32, kernel_device)
    assert case.call().isfinite().all()


@pytest.mark.skipif("linear_cross_entropy" not in FUNCTIONS, reason="no kernel of it")
def test_a_product_takes_any_width(kernel_device):
    """The vocabulary is taken in blocks, the hidden size is the product's."""
    case = cross_entropy_case(T=2, D=3, V=9000).to(torch.float32, kernel_device)
    assert case.call().isfinite()
