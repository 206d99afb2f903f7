"""bias + GELU (or ReLU)."""

from typing import Any

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.config import ACTIVATIONS
from bert_fast.ops import registry


def _fwd_fake(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(x)


def _bwd_fake(dy: Tensor, x: Tensor, b: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), (x if b is None else b).new_empty(x.shape[1])


_fwd = registry.register(
    "bias_gelu(Tensor x, Tensor? b, str activation) -> Tensor",
    reference=reference.bias_gelu,
    fake=_fwd_fake,
)
bias_gelu_bwd = registry.register(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor? b, str activation) -> (Tensor dx, Tensor db)",
    reference=reference.bias_gelu_bwd,
    fake=_bwd_fake,
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(x, b)
        ctx.activation = activation
        return _fwd(x, b, activation)

    @staticmethod
    @registry.first_order("gelu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, b = ctx.saved_tensors
        dx, db = bias_gelu_bwd(dy.contiguous(), x, b, ctx.activation)
        return dx, None if b is None else db, None


def check_activation(op: str, activation: str) -> None:
    """Raise ValueError unless the activation is one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: want {', '.join(ACTIVATIONS)}, got {activation!r}")


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
        NotImplementedError: under torch.func transforms; for second derivatives.
    """
    op = "gelu"
    check_activation(op, activation)
    registry.check_float(op, x=x, b=b)
    registry.check_shape(op, "x", x, (None, None), "(T, F)")
    if b is not None:
        registry.check_shape(op, "b", b, (x.shape[1],), "(F,)")
    registry.check_same(op, "device", x=x, b=b)
    x = x.contiguous()
    if registry.needs_grad(op, x, b):
        return _BiasGelu.apply(x, b, activation)
    return _fwd(x, b, activation)
