"""How an operator of `torch.ops.bert_fast` is defined, and which implementation it has where.

Through PyTorch's class Library, whose calls cost less than those of its decorator custom_op: a
forward has 50 to 100 of them.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from bert_fast import extension
from bert_fast.ops import invariant

_lib = library.Library("bert_fast", "FRAGMENT")


class Implementation(NamedTuple):
    """What serves an op on a kind of device.

    Attributes:
        name: "triton", "cublas", "csrc", "pytorch" (its fused operators) or "reference" (eager).
        reason: why nothing faster does; empty if this is the fastest there is.
    """

    name: str
    reason: str


_extension, _no_extension = extension.load()
_compiled = frozenset() if _extension is None else frozenset(_extension.cpu_ops())
_compiled_cuda = frozenset() if _extension is None else frozenset(_extension.cuda_ops())
_no_cuda_extension = _no_extension or "the C++ extension was built without CUDA"
_no_triton = "" if importlib.util.find_spec("triton") else "Triton is not installed"
_implementations: dict[str, dict[str, Implementation]] = {}
kernels: dict[str, Callable[..., Any]] = {}  # what CUDA tensors run, by op


def _without_autocast(function: Callable[..., Any], device: str = "") -> Callable[..., Any]:
    """Keep autocast out of an implementation: its arithmetic has fixed dtypes.

    Without a device it is that of the first tensor.
    """

    def device_of(args: tuple[Any, ...]) -> str:
        tensors = (t for a in args for t in (a if isinstance(a, list) else (a,)))
        return next(t.device.type for t in tensors if isinstance(t, Tensor))

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        on = device or device_of(args)
        if not is_autocast(on):
            return function(*args)
        with torch.autocast(on, enabled=False):
            return function(*args)

    return run


def _refused_if_invariant(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep an implementation out of the batch-invariant mode."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if invariant.is_batch_invariant():
            raise RuntimeError(
                f"{op}: want the compiled extension in the batch-invariant mode, got PyTorch's own"
                f" operators, which give a row other bits in another batch ({_no_extension})"
            )
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
    cpu_reason: str | None = None,
    sees_batch: bool = False,
) -> torch._ops.OpOverload:
    """Define an operator of the namespace bert_fast and return it.

    Args:
        schema: "name(Tensor x, ...) -> ...".
        reference: the eager implementation: on the CPU where nothing else is, and on CUDA where
            there is no Triton.
        fake: makes outputs of the right shape, dtype and device, for tracing.
        cuda: the implementation for a GPU, which imports kernels when called; None: none.
        by: what `cuda` is made of: "triton", "cublas" where PyTorch's product is all of it, or
            "pytorch", its fused operators. Where csrc serves CUDA, `cuda` is not used.
        cpu: the implementation for the CPU by operators of PyTorch, unless csrc has one.
        cpu_reason: why csrc has none, empty if `cpu` is the fastest there is; None: it should.
        sees_batch: whether rows have other bits in another batch where csrc does not serve the CPU:
            the batch-invariant mode refuses the op there.
    """
    name = schema.partition("(")[0]
    _lib.define(schema)
    eager = _without_autocast(reference)
    if name in _compiled_cuda:
        on_cuda = Implementation("csrc", "")
    elif cuda is None:
        on_cuda = Implementation("reference", "there is no kernel for it")
        _lib.impl(name, eager, "CUDA")
    elif by == "triton" and _no_triton:
        on_cuda = Implementation("reference", _no_triton)
        _lib.impl(name, eager, "CUDA")
    else:
        on_cuda = Implementation(by, _no_cuda_extension if by == "pytorch" else "")
        run = _without_autocast(cuda)
        if by != "pytorch":
            kernels[name] = run
        _lib.impl(name, run, "CUDA")
    if name in _compiled:
        on_cpu = Implementation("csrc", "")
    else:
        run = eager if cpu is None else _without_autocast(cpu, "cpu")
        _lib.impl(name, _refused_if_invariant(name, run) if sees_batch else run, "CPU")
        served = "reference" if cpu is None else "pytorch"
        if cpu_reason is None:
            cpu_reason = _no_extension or "csrc has no implementation of it"
        on_cpu = Implementation(served, cpu_reason)
    _implementations[name] = {"cpu": on_cpu, "cuda": on_cuda}
    library.register_fake(f"bert_fast::{name}", fake, lib=_lib)
    return getattr(torch.ops.bert_fast, name).default


def implementations() -> dict[str, dict[str, Implementation]]:
    """Return, for each op by name, what serves it on "cpu" and "cuda"."""
    return {name: dict(by_device) for name, by_device in _implementations.items()}


def saved(outputs: tuple[Tensor, ...], save: bool = True) -> tuple[Tensor, ...]:
    """Return the outputs of a forward op; unless `save`, all but the first empty."""
    return outputs if save else (outputs[0], *(t.new_empty(0) for t in outputs[1:]))


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
