"""x w^T + b, alone and followed by an activation.

On a GPU the products are cuBLAS's, through PyTorch, and stay so until one of ours with an epilogue
is measurably faster; in the batch-invariant mode (invariant.py) all but the gradient of the weight
are ours. The activation and the sums over rows are kernels. On the CPU the products are the better
library's (products.py). `save` says whether a backward pass follows.
"""

from typing import Any

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import checks, invariant, products, registry
from bert_fast.ops.gelu import bias_gelu, bias_gelu_bwd, check_activation


def _fwd_fake(x: Tensor, w: Tensor, b: Tensor | None, save: bool = True) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


def _bwd_fake(dy: Tensor, x: Tensor, w: Tensor, need: list[bool]) -> tuple[Tensor, Tensor]:
    dx, dw = (t.new_empty(t.shape if n else (0,)) for t, n in zip((x, w), need, strict=True))
    return dx, dw


def _column_sums_fake(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1])


def _gelu_fake(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, save: bool = True
) -> tuple[Tensor, Tensor]:
    return _fwd_fake(x, w, b), _fwd_fake(x, w, b) if save else x.new_empty(0)


def _column_sums_cuda(dy: Tensor) -> Tensor:
    from bert_fast.kernels.linear import column_sums

    return column_sums(dy)


def _fwd_cuda(x: Tensor, w: Tensor, b: Tensor | None, save: bool = True) -> Tensor:
    if not invariant.is_batch_invariant():
        return reference.linear(x, w, b)
    from bert_fast.kernels.linear import linear

    return linear(x.contiguous(), w, None if b is None else b.contiguous())


def _bwd_cuda(dy: Tensor, x: Tensor, w: Tensor, need: list[bool]) -> tuple[Tensor, Tensor]:
    if not (need[0] and invariant.is_batch_invariant()):
        return reference.linear_bwd(dy, x, w, need)
    return _fwd_cuda(dy, w.T, None), reference.linear_bwd(dy, x, w, [False, need[1]])[1]


def _gelu_cuda(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, save: bool = True
) -> tuple[Tensor, Tensor]:
    from bert_fast.kernels.gelu import bias_gelu_fwd

    h = _fwd_cuda(x, w, b)
    return registry.saved((bias_gelu_fwd(h, None, activation), h), save)


def _gelu_without_triton(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, save: bool = True
) -> tuple[Tensor, Tensor]:
    if invariant.is_batch_invariant():
        raise NotImplementedError("linear_gelu: want Triton for the batch-invariant mode, got none")
    return reference.linear_gelu(x, w, b, activation, save)


def _fwd_cpu(x: Tensor, w: Tensor, b: Tensor | None, save: bool = True) -> Tensor:
    return products.linear(x, w.contiguous(), b, reuse=not save)


def _bwd_cpu(dy: Tensor, x: Tensor, w: Tensor, need: list[bool]) -> tuple[Tensor, Tensor]:
    """The library of the forward product for dx; for dw BLAS, which need not transpose first."""
    dx = products.linear(dy, w.contiguous().T, None) if need[0] else x.new_empty(0)
    return dx, reference.linear_bwd(dy, x, w, [False, need[1]])[1]


def _gelu_cpu(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, save: bool = True
) -> tuple[Tensor, Tensor]:
    h = _fwd_cpu(x, w, b, save)
    return registry.saved((bias_gelu(h, None, activation), h), save)


_fwd = registry.register(
    "linear(Tensor x, Tensor w, Tensor? b, bool save=True) -> Tensor",
    reference=reference.linear,
    fake=_fwd_fake,
    cuda=_fwd_cuda,
    by="cublas",
    cpu=_fwd_cpu,
    cpu_reason="",
)
_bwd = registry.register(
    "linear_bwd(Tensor dy, Tensor x, Tensor w, bool[] need) -> (Tensor dx, Tensor dw)",
    reference=reference.linear_bwd,
    fake=_bwd_fake,
    cuda=_bwd_cuda,
    by="cublas",
    cpu=_bwd_cpu,
    cpu_reason="",
)
_column_sums = registry.register(
    "column_sums(Tensor dy) -> Tensor",
    reference=reference.column_sums,
    fake=_column_sums_fake,
    cuda=_column_sums_cuda,
)
_gelu_fwd = registry.register(
    "linear_gelu(Tensor x, Tensor w, Tensor? b, str activation, bool save=True)"
    " -> (Tensor y, Tensor h)",
    reference=_gelu_without_triton,
    fake=_gelu_fake,
    cuda=_gelu_cuda,
    cpu=_gelu_cpu,
)


def _product_grads(ctx: Any, dy: Tensor, x: Tensor, w: Tensor) -> list[Tensor | None]:
    need = list(ctx.needs_input_grad[:2])
    return [g if n else None for g, n in zip(_bwd(dy, x, w, need), need, strict=True)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _fwd(x, w, b)

    @staticmethod
    @registry.first_order("linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy = dy.contiguous()
        db = _column_sums(dy) if ctx.needs_input_grad[2] else None  # first: it may refuse
        return *_product_grads(ctx, dy, *ctx.saved_tensors), db


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, activation: str) -> Tensor:
        y, h = _gelu_fwd(x, w, b, activation)
        ctx.save_for_backward(x, w, h)
        ctx.activation = activation
        return y

    @staticmethod
    @registry.first_order("linear_gelu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, h = ctx.saved_tensors
        dh, db = bias_gelu_bwd(dy.contiguous(), h, None, ctx.activation)
        return *_product_grads(ctx, dh, x, w), db if ctx.needs_input_grad[2] else None, None


def _check(
    op: str, x: Tensor, w: Tensor, b: Tensor | None, activation: str = "gelu"
) -> list[Tensor | None]:
    """Return x, w and b as the op takes them: checked, in autocast's dtype, x contiguous."""
    check = checks.Checks(op)
    check_activation(check, activation)
    check.floating(x=x, w=w, b=b)
    check.shape("w", w, (None, None), "(F, D)")
    check.shape("x", x, (None, checks.size(w, 1)), "(T, D)")
    check.shape("b", b, (checks.size(w, 0),), "(F,)")
    check.same("device", x=x, w=w, b=b)
    if registry.is_autocast(x.device.type):
        check.done()
        x, w, b = registry.autocast(x, w, b)  # leaves fp64 as it is
    check.same("dtype", x=x, w=w, b=b)
    check.done()
    return [x.contiguous(), w, b]


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """X w^T + b.

    Args:
        x: (T, D) floating.
        w: (F, D), dtype of x.
        b: (F,), dtype of x, or None.

    Returns:
        (T, F) in the dtype of x; under autocast all are cast first, as eager's.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a tensor is not floating, or of another dtype than x.
        NotImplementedError: under torch.func transforms; for second derivatives; a dtype that the
            kernels do not take, on a GPU.
    """
    args = _check("linear", x, w, b)
    if registry.needs_grad("linear", *args):
        return _Linear.apply(*args)
    return _fwd(*args, False)


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """activation(x w^T + b).

    Args:
        x: (T, D) floating.
        w: (F, D), dtype of x.
        b: (F,), dtype of x, or None.
        activation: as `gelu` takes it.

    Returns:
        (T, F) in the dtype of x; under autocast x, w and b are cast first, as eager's.

    Raises:
        ValueError: a shape or a device does not fit, or the activation is unknown.
        TypeError: a tensor is not floating, or of another dtype than x.
        NotImplementedError: under torch.func transforms; for second derivatives; a dtype that the
            kernels do not take, on a GPU.
    """
    op = "linear_gelu"
    args = _check(op, x, w, b, activation)
    if registry.needs_grad(op, *args):
        return _LinearGelu.apply(*args, activation)
    return _gelu_fwd(*args, activation, False)[0]
