"""What PyTorch asks of an operator, asked of the kernels: schema, fake outputs, tracing."""

import op_cases
import pytest
import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from interpreter_tools import KERNEL_CASES, every_kernel_case
from op_cases import gradients

from bert_fast.ops import registry

poison = op_cases.poison
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


class Recorded(TorchDispatchMode):
    """The calls of bert_fast's operators: (operator, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "bert_fast":
            given = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((function, given))
        return function(*args, **kwargs or {})


def recorded(case):
    """The calls of a case's forward and backward that kernels serve."""
    calls = Recorded()
    with calls:
        gradients(case, case.call)
    return [(function, args) for function, args in calls.calls if has_kernel(function)]


def has_kernel(function):
    return function._opname in registry.kernels


def test_opcheck(kernel_device):
    """One call of every operator that has a kernel, from the cases that all ops share."""
    checked = set()
    for make in KERNEL_CASES.values():
        for function, args in recorded(make().to(torch.float32, kernel_device)):
            if function not in checked:
                library.opcheck(function, tuple(args), test_utils=QUICK)
                checked.add(function)
    names = {function._opname for function in checked}
    work_list = {"work_list"} & registry.kernels.keys()  # the layers call it, no op of the cases
    if work_list:
        cu_seqlens = op_cases.borders((3, 0, 130)).to(kernel_device)
        library.opcheck(torch.ops.bert_fast.work_list.default, (cu_seqlens, 135, 128))
    assert names | work_list == registry.kernels.keys()


@pytest.mark.long
@every_kernel_case
def test_opcheck_of_every_case(make, kernel_device):
    for function, args in recorded(make().to(torch.float32, kernel_device)):
        library.opcheck(function, tuple(args))


@every_kernel_case
@pytest.mark.parametrize("weights", [torch.float16, torch.float32], ids=["fp16", "mixed"])
def test_outputs_are_those_of_the_fake(make, weights, kernel_device):
    """Shapes, dtypes and strides, the empty ones too, forward and backward."""
    case = make().to(torch.float16, kernel_device)
    if weights == torch.float32:
        if case.name not in ("embed", "add_layer_norm", "gelu"):
            return  # one dtype for all
        case = case.with_inputs(**{n: case.inputs[n].float() for n in case.leaves if n in "wb"})
    for function, args in recorded(case):
        real = function(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            given = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = function(*given)
        pairs = [(real, fake)] if isinstance(real, torch.Tensor) else zip(real, fake, strict=True)
        for got, want in pairs:
            assert (got.shape, got.dtype) == (want.shape, want.dtype), function
            assert got.stride() == want.stride() or not got.numel(), function
