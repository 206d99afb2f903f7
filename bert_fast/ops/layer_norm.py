"""dropout + residual + LayerNorm."""

from typing import Any

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import registry


def _fwd_fake(
    x: Tensor,
    residual: Tensor | None,
    w: Tensor,
    b: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    wide = wide if residual is None else torch.promote_types(wide, residual.dtype)
    y = x.new_empty(x.shape, dtype=out_dtype)
    z = x.new_empty((0,) if residual is None and p == 0 else x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[0], dtype=wide) for _ in range(2))
    return y, z, mean, rstd


def _bwd_fake(
    dy: Tensor,
    z: Tensor,
    w: Tensor,
    mean: Tensor,
    rstd: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = z.new_empty(z.shape if p > 0 else (0,), dtype=x_dtype)
    return dx, torch.empty_like(z), torch.empty_like(w), torch.empty_like(w)


_fwd = registry.register(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor w, Tensor b, float eps, float p,"
    " Tensor? seed, int site, ScalarType out_dtype)"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    reference=reference.add_layer_norm,
    fake=_fwd_fake,
)
_bwd = registry.register(
    "add_layer_norm_bwd(Tensor dy, Tensor z, Tensor w, Tensor mean, Tensor rstd, float p,"
    " Tensor? seed, int site, ScalarType x_dtype)"
    " -> (Tensor dx, Tensor dz, Tensor dw, Tensor db)",
    reference=reference.add_layer_norm_bwd,
    fake=_bwd_fake,
)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        w: Tensor,
        b: Tensor,
        eps: float,
        p: float,
        seed: Tensor | None,
        site: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        y, z, mean, rstd = _fwd(x, residual, w, b, eps, p, seed, site, out_dtype)
        z = x if residual is None and p == 0 else z
        ctx.save_for_backward(z, w, mean, rstd, seed)
        ctx.p, ctx.site, ctx.x_dtype = p, site, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.b_dtype = b.dtype
        return y

    @staticmethod
    @registry.first_order("add_layer_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, w, mean, rstd, seed = ctx.saved_tensors
        args = dy.contiguous(), z, w, mean, rstd, ctx.p, seed, ctx.site, ctx.x_dtype
        dx, dz, dw, db = _bwd(*args)
        dx = dx if ctx.p > 0 else dz.to(ctx.x_dtype)
        d_residual = None if ctx.residual_dtype is None else dz.to(ctx.residual_dtype)
        return dx, d_residual, dw, db.to(ctx.b_dtype), None, None, None, None, None


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    w: Tensor,
    b: Tensor,
    eps: float = 1e-12,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """LayerNorm(dropout(x) + residual) over the last dimension (Ba et al., 2016).

    Args:
        x: (T, D) floating.
        residual: (T, D) floating, or None for none.
        w: (D,) scale.
        b: (D,) shift.
        eps: added to the variance.
        p: probability of dropping an element of x, in steps of 1 / 65536.
        seed: (1,) int64, needed with p > 0; the same seed and site give the same mask.
        site: number of this dropout in the model.

    Returns:
        (T, D) in the dtype to which x and residual promote; fp32 under CUDA autocast, as eager's.
        Sums are made in fp32, in fp64 for fp64.

    Raises:
        ValueError: a shape, a device, p or the seed does not fit.
        TypeError: a tensor is not floating.
        NotImplementedError: under torch.func transforms; for second derivatives.
    """
    op = "add_layer_norm"
    registry.check_float(op, x=x, residual=residual, w=w, b=b)
    registry.check_shape(op, "w", w, (None,), "(D,)")
    registry.check_shape(op, "x", x, (None, w.shape[0]), "(T, D)")
    if residual is not None:
        registry.check_shape(op, "residual", residual, tuple(x.shape), "(T, D)")
    registry.check_shape(op, "b", b, (x.shape[1],), "(D,)")
    registry.check_same(op, "device", x=x, residual=residual, w=w, b=b)
    registry.check_dropout(op, p, seed, x.device)
    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if x.is_cuda and registry.is_autocast("cuda"):
        out_dtype = torch.promote_types(out_dtype, torch.float32)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    args = x, residual, w, b, eps, p, seed if p > 0 else None, site, out_dtype
    if registry.needs_grad(op, x, residual, w, b):
        return _AddLayerNorm.apply(*args)
    return _fwd(*args)[0]


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-12) -> Tensor:
    """LayerNorm(x): `add_layer_norm` without residual and dropout."""
    return add_layer_norm(x, None, w, b, eps)
