"""bias + dropout + residual + LayerNorm."""

from typing import Any

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import checks, registry


def _fwd_fake(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    w: Tensor,
    b: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    out_dtype: torch.dtype,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float32
    for t in (x, bias, residual, w):
        wide = wide if t is None else torch.promote_types(wide, t.dtype)
    is_x = bias is None and residual is None and p == 0
    y = x.new_empty(x.shape, dtype=out_dtype)
    z = x.new_empty((0,) if is_x or not save else x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[0] if save else 0, dtype=wide) for _ in range(2))
    return y, z, mean, rstd


def _bwd_fake(
    dy: Tensor,
    z: Tensor,
    w: Tensor,
    mean: Tensor,
    rstd: Tensor,
    with_bias: bool,
    p: float,
    seed: Tensor | None,
    site: int,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = z.new_empty((0,) if p == 0 and x_dtype == z.dtype else z.shape, dtype=x_dtype)
    dbias_dtype = torch.promote_types(x_dtype, w.dtype)
    dbias = w.new_empty(w.shape if with_bias else (0,), dtype=dbias_dtype)
    return dx, torch.empty_like(z), torch.empty_like(w), torch.empty_like(w), dbias


def _fwd_cuda(*args: Any) -> tuple[Tensor, ...]:
    from bert_fast.kernels.layer_norm import add_layer_norm_fwd

    return registry.saved(add_layer_norm_fwd(*args[:10]), *args[10:])


def _bwd_cuda(*args: Any) -> tuple[Tensor, ...]:
    from bert_fast.kernels.layer_norm import add_layer_norm_bwd

    return add_layer_norm_bwd(*args)


_fwd = registry.register(
    "add_layer_norm(Tensor x, Tensor? bias, Tensor? residual, Tensor w, Tensor b, float eps,"
    " float p, Tensor? seed, int site, ScalarType out_dtype, bool save=True)"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    reference=reference.add_layer_norm,
    fake=_fwd_fake,
    cuda=_fwd_cuda,
)
_bwd = registry.register(
    "add_layer_norm_bwd(Tensor dy, Tensor z, Tensor w, Tensor mean, Tensor rstd, bool with_bias,"
    " float p, Tensor? seed, int site, ScalarType x_dtype)"
    " -> (Tensor dx, Tensor dz, Tensor dw, Tensor db, Tensor dbias)",
    reference=reference.add_layer_norm_bwd,
    fake=_bwd_fake,
    cuda=_bwd_cuda,
)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        w: Tensor,
        b: Tensor,
        eps: float,
        p: float,
        seed: Tensor | None,
        site: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        y, z, mean, rstd = _fwd(x, bias, residual, w, b, eps, p, seed, site, out_dtype)
        z = x if bias is None and residual is None and p == 0 else z
        ctx.save_for_backward(z, w, mean, rstd, seed)
        ctx.p, ctx.site = p, site
        ctx.dtypes = [None if t is None else t.dtype for t in (x, bias, residual, b)]
        return y

    @staticmethod
    @registry.first_order("add_layer_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, w, mean, rstd, seed = ctx.saved_tensors
        x_dtype, bias_dtype, residual_dtype, b_dtype = ctx.dtypes
        args = z, w, mean, rstd, bias_dtype is not None, ctx.p, seed, ctx.site, x_dtype
        dx, dz, dw, db, dbias = _bwd(dy.contiguous(), *args)
        dx = dz if ctx.p == 0 and x_dtype == z.dtype else dx
        dbias = None if bias_dtype is None else dbias.to(bias_dtype)
        d_residual = None if residual_dtype is None else dz.to(residual_dtype)
        return dx, dbias, d_residual, dw, db.to(b_dtype), None, None, None, None, None


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    w: Tensor,
    b: Tensor,
    eps: float = 1e-12,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """LayerNorm(dropout(x + bias) + residual) over the last dimension (Ba et al., 2016).

    Args:
        x: (T, D) floating.
        residual: (T, D) floating, or None for none.
        w: (D,) scale.
        b: (D,) shift.
        eps: added to the variance.
        bias: (D,) floating, that of the product which made x, or None; added in fp32 even under
            autocast.
        p: probability of dropping an element of x + bias, in steps of 1 / 65536.
        seed: (1,) int64, needed with p > 0; the same seed and site give the same mask.
        site: number of this dropout in the model.

    Returns:
        (T, D) in the dtype to which x and residual promote; fp32 under CUDA autocast, as eager's.
        Sums are made in fp32, in fp64 for fp64.

    Raises:
        ValueError: a shape, a device, p or the seed does not fit.
        TypeError: a tensor is not floating.
        NotImplementedError: under torch.func transforms; for second derivatives; a dtype or D that
            the kernels do not take, on a GPU.
    """
    op = "add_layer_norm"
    check = checks.Checks(op)
    D = checks.size(w, 0)
    check.floating(x=x, residual=residual, w=w, b=b, bias=bias)
    check.shape("w", w, (None,), "(D,)")
    check.shape("x", x, (None, D), "(T, D)")
    check.shape("residual", residual, tuple(x.shape), "(T, D)")
    check.shape("b", b, (D,), "(D,)")
    check.shape("bias", bias, (D,), "(D,)")
    check.same("device", x=x, residual=residual, w=w, b=b, bias=bias)
    check.dropout(p, seed, x.device)
    check.done()
    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if x.is_cuda and registry.is_autocast("cuda"):
        out_dtype = torch.promote_types(out_dtype, torch.float32)
    x, w, b = x.contiguous(), w.contiguous(), b.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    args = x, bias, residual, w, b, eps, p, seed if p > 0 else None, site, out_dtype
    if registry.needs_grad(op, x, bias, residual, w, b):
        return _AddLayerNorm.apply(*args)
    return _fwd(*args, False)[0]


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-12) -> Tensor:
    """LayerNorm(x): `add_layer_norm` without bias, residual and dropout."""
    return add_layer_norm(x, None, w, b, eps)
