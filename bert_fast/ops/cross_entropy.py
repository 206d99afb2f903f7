"""Masked-LM projection and loss, without holding the logits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import checks, products, registry


def _fake(
    x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    shapes = (x.shape, w.shape, (w.shape[0],)) if with_grad else ((0,),) * 3
    dx, dw, db = (x.new_empty(s) for s in shapes)
    return loss, dx, dw, db


def _fwd_cuda(
    x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bert_fast.kernels.cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, w, b, labels, with_grad)


_fwd = registry.register(
    "linear_cross_entropy(Tensor x, Tensor w, Tensor? b, Tensor labels, bool with_grad)"
    " -> (Tensor loss, Tensor dx, Tensor dw, Tensor db)",
    reference=reference.linear_cross_entropy,
    fake=_fake,
    cuda=_fwd_cuda,
    cpu=partial(reference.linear_cross_entropy, linear=products.linear),
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor) -> Tensor:
        loss, *grads = _fwd(x, w, b, labels, True)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @registry.first_order("linear_cross_entropy")
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        grads = zip(ctx.saved_tensors, need, strict=True)
        # in the loss's dtype: its gradient need not fit into 16 bits (a mean, a loss scale)
        return *(_scaled(g, d_loss) if n else None for g, n in grads), None


def _scaled(g: Tensor, d_loss: Tensor) -> Tensor:
    """Return g d_loss in the dtype of g, the product itself in the wider of both."""
    return torch.mul(g, d_loss.expand_as(g), out=torch.empty_like(g))


def linear_cross_entropy(x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor) -> Tensor:
    """Cross entropy of the logits x w^T + b, summed over the labelled rows.

    The gradients are made in the forward pass, so that the logits are never kept.

    Args:
        x: (N, D) floating.
        w: (V, D), dtype of x.
        b: (V,), dtype of x, or None.
        labels: (N,) int64: 0 to V - 1, or -100 for none.

    Returns:
        () fp32 (fp64 for fp64): 0 without a labelled row.

    Raises:
        ValueError: a shape or a device does not fit; a label is out of range (seen on the CPU; on
            a GPU it makes the loss NaN).
        TypeError: a tensor is not floating, or of another dtype than x; labels are not int64.
        NotImplementedError: under torch.func transforms; for second derivatives; a dtype that the
            kernels do not take, on a GPU.
    """
    op = "linear_cross_entropy"
    check = checks.Checks(op)
    check.floating(x=x, w=w, b=b)
    check.dtype("labels", labels, torch.int64)
    check.shape("w", w, (None, None), "(V, D)")
    check.shape("x", x, (None, checks.size(w, 1)), "(N, D)")
    check.shape("b", b, (checks.size(w, 0),), "(V,)")
    check.shape("labels", labels, (checks.size(x, 0),), "(N,)")
    check.same("device", x=x, w=w, b=b, labels=labels)
    if not registry.is_autocast(x.device.type):
        check.same("dtype", x=x, w=w, b=b)
    check.done()
    x, w, b = registry.autocast(x, w, b)
    check.same("dtype", x=x, w=w, b=b)  # autocast leaves fp64 as it is
    check.range("labels", labels, w.shape[0], ignore=reference.IGNORE)
    check.done()
    args = x.contiguous(), w.contiguous(), b if b is None else b.contiguous(), labels.contiguous()
    if registry.needs_grad(op, x, w, b):
        return _LinearCrossEntropy.apply(*args)
    return _fwd(*args, False)[0]
