"""bias + GELU (or ReLU)."""

from typing import Any

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.config import ACTIVATIONS
from bert_fast.ops import checks, registry


def _fwd_fake(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(x)


def _bwd_fake(dy: Tensor, x: Tensor, b: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), (x if b is None else b).new_empty(x.shape[1])


def _fwd_cuda(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    from bert_fast.kernels.gelu import bias_gelu_fwd

    return bias_gelu_fwd(x, b, activation)


def _bwd_cuda(dy: Tensor, x: Tensor, b: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    from bert_fast.kernels.gelu import bias_gelu_bwd

    return bias_gelu_bwd(dy, x, b, activation)


bias_gelu = registry.register(
    "bias_gelu(Tensor x, Tensor? b, str activation) -> Tensor",
    reference=reference.bias_gelu,
    fake=_fwd_fake,
    cuda=_fwd_cuda,
    sees_batch=True,  # the last numbers of a thread's share take other instructions
)
bias_gelu_bwd = registry.register(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor? b, str activation) -> (Tensor dx, Tensor db)",
    reference=reference.bias_gelu_bwd,
    fake=_bwd_fake,
    cuda=_bwd_cuda,
    sees_batch=True,
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(x, b)
        ctx.activation = activation
        return bias_gelu(x, b, activation)

    @staticmethod
    @registry.first_order("gelu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, b = ctx.saved_tensors
        dx, db = bias_gelu_bwd(dy.contiguous(), x, b, ctx.activation)
        return dx, None if b is None else db, None


def check_activation(check: checks.Checks, activation: str) -> None:
    """The activation is one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        check.note(f"activation: want {', '.join(ACTIVATIONS)}, got {activation!r}")


def gelu(x: Tensor, b: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """activation(x + b); GELU by Hendrycks and Gimpel, 2016.

    Args:
        x: (T, F) floating.
        b: (F,) bias, or None.
        activation: "gelu" (exact, erf), "gelu_new" or "gelu_pytorch_tanh" (tanh form), "relu".

    Returns:
        (T, F) in the dtype of x.

    Raises:
        ValueError: a shape or a device does not fit, or the activation is unknown.
        TypeError: a tensor is not floating.
        NotImplementedError: under torch.func transforms; for second derivatives; a dtype that the
            kernels do not take, on a GPU.
    """
    op = "gelu"
    check = checks.Checks(op)
    check_activation(check, activation)
    check.floating(x=x, b=b)
    check.shape("x", x, (None, None), "(T, F)")
    check.shape("b", b, (checks.size(x, 1),), "(F,)")
    check.same("device", x=x, b=b)
    check.done()
    x, b = x.contiguous(), None if b is None else b.contiguous()
    if registry.needs_grad(op, x, b):
        return _BiasGelu.apply(x, b, activation)
    return bias_gelu(x, b, activation)
