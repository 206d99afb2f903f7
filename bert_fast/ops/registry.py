"""How an operator of `torch.ops.bert_fast` is defined, and which implementation it has where.

Through `torch.library.Library`, whose calls cost less than those of `torch.library.custom_op`: a
forward has 50 to 100 of them.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_lib = torch.library.Library("bert_fast", "FRAGMENT")


class Implementation(NamedTuple):
    """What serves an op on a kind of device.

    Attributes:
        name: "triton", "cublas", "csrc", "pytorch" (its fused operators) or "reference" (eager).
        reason: why nothing faster does; empty if this is the fastest there is.
    """

    name: str
    reason: str


def _load_extension() -> tuple[frozenset[str], str]:
    """Return the ops that csrc implements for the CPU, and why there are none."""
    if importlib.util.find_spec("bert_fast._C") is None:
        return frozenset(), "the C++ extension is not built"
    try:
        extension = importlib.import_module("bert_fast._C")
    except ImportError as error:  # as after an upgrade of torch
        reason = f"the C++ extension does not load: {error}"
        warnings.warn(f"bert_fast: {reason}; build it again", stacklevel=2)
        return frozenset(), reason
    return frozenset(extension.cpu_ops()), ""


_compiled, _no_extension = _load_extension()
_no_triton = "" if importlib.util.find_spec("triton") else "Triton is not installed"
_implementations: dict[str, dict[str, Implementation]] = {}
kernels: dict[str, Callable[..., Any]] = {}  # what CUDA tensors run, by op


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast out of an implementation: its arithmetic has fixed dtypes."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if not is_autocast(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    by: str = "triton",
    cpu: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Define an operator of the namespace bert_fast and return it.

    Args:
        schema: "name(Tensor x, ...) -> ...".
        reference: the eager implementation: on the CPU where nothing else is, and on CUDA where
            there is no Triton.
        fake: makes outputs of the right shape, dtype and device, for tracing.
        cuda: the implementation for a GPU, which imports kernels when called; None: none.
        by: what `cuda` is made of: "triton", or "cublas" where PyTorch's product is all of it.
        cpu: the implementation for the CPU by fused operators of PyTorch, unless csrc has one.
    """
    name = schema.partition("(")[0]
    _lib.define(schema)
    eager = _without_autocast(reference)
    if cuda is None:
        on_cuda = Implementation("reference", "there is no kernel for it")
        _lib.impl(name, eager, "CUDA")
    elif by == "triton" and _no_triton:
        on_cuda = Implementation("reference", _no_triton)
        _lib.impl(name, eager, "CUDA")
    else:
        on_cuda = Implementation(by, "")
        kernels[name] = _without_autocast(cuda)
        _lib.impl(name, kernels[name], "CUDA")
    if name in _compiled:
        on_cpu = Implementation("csrc", "")
    else:
        _lib.impl(name, eager if cpu is None else _without_autocast(cpu), "CPU")
        served = "reference" if cpu is None else "pytorch"
        on_cpu = Implementation(served, _no_extension or "csrc has no implementation of it")
    _implementations[name] = {"cpu": on_cpu, "cuda": on_cuda}
    torch.library.register_fake(f"bert_fast::{name}", fake, lib=_lib)
    return getattr(torch.ops.bert_fast, name).default


def implementations() -> dict[str, dict[str, Implementation]]:
    """Return, for each op by name, what serves it on "cpu" and "cuda"."""
    return {name: dict(by_device) for name, by_device in _implementations.items()}


# --- what every public function does first ------------------------------------------------------


def needs_grad(op: str, *tensors: Tensor | None) -> bool:
    """Return whether autograd must record the call.

    Raises:
        NotImplementedError: under vmap, jvp, func.grad or forward-mode differentiation.
    """
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        raise NotImplementedError(
            f"{op}: want a call outside torch.func transforms, got one inside vmap, jvp or grad;"
            " only reverse-mode autograd is supported"
        )
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the backward of an op's autograd.Function refuse create_graph=True."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise NotImplementedError(
                    f"{op}: want a first derivative, got create_graph=True;"
                    " second derivatives are not supported"
                )
            return backward(ctx, *grads)

        return run

    return decorate


def is_autocast(device: str) -> bool:
    """Return whether autocast is on for that type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors in the dtype autocast gives matrix products; as they are without it."""
    device = next(t.device.type for t in tensors if t is not None)
    if not is_autocast(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
