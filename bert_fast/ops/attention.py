"""softmax(q k^T / sqrt(K)) v within each packed sequence."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import registry


def _fwd_fake(
    qkv: Tensor, cu_seqlens: Tensor, max_len: int, p: float, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    T, _, H, K = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(T, H, K), qkv.new_empty(H, T, dtype=wide)


def _bwd_fake(do: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv)


_fwd = registry.register(
    "attention(Tensor qkv, Tensor cu_seqlens, SymInt max_len, float p, Tensor? seed, int site)"
    " -> (Tensor o, Tensor lse)",
    reference=reference.attention,
    fake=_fwd_fake,
)
_bwd = registry.register(
    "attention_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, Tensor cu_seqlens,"
    " SymInt max_len, float p, Tensor? seed, int site) -> Tensor",
    reference=reference.attention_bwd,
    fake=_bwd_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_len: int,
        p: float,
        seed: Tensor | None,
        site: int,
    ) -> Tensor:
        o, lse = _fwd(qkv, cu_seqlens, max_len, p, seed, site)
        ctx.save_for_backward(qkv, o, lse, cu_seqlens, seed)
        ctx.max_len, ctx.p, ctx.site = max_len, p, site
        return o

    @staticmethod
    @registry.first_order("attention")
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        dqkv = _bwd(do.contiguous(), *tensors, ctx.max_len, ctx.p, seed, ctx.site)
        return dqkv, None, None, None, None, None


def check_cu_seqlens(op: str, cu_seqlens: Tensor, T: int, max_len: int) -> None:
    """Raise unless cu_seqlens is (B + 1,), 0 first, in steps of 0 to max_len, at most T.

    The values are looked at on the CPU only: elsewhere that would wait for the device.
    """
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        raise ValueError(f"{op}: cu_seqlens: want (B + 1,), got {[*cu_seqlens.shape]}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        steps = [last - first for first, last in pairwise(ends)]
        if ends[0] != 0 or ends[-1] > T or not all(0 <= step <= max_len for step in steps):
            raise ValueError(
                f"{op}: cu_seqlens: want 0 first, steps of 0 to {max_len}, at most {T} rows,"
                f" got {ends}"
            )


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Bidirectional attention within each packed sequence, dropout on the probabilities.

    Args:
        qkv: (T, 3, H, K) floating: query, key and value.
        cu_seqlens: (B + 1,) int32, on the device of qkv: sequence b is rows cu_seqlens[b] to
            cu_seqlens[b + 1]; rows past the last are in no sequence, their result is 0.
        max_len: no sequence is longer.
        p: probability of dropping a probability, in steps of 1 / 65536.
        seed: (1,) int64, needed with p > 0; the same seed and site give the same mask.
        site: number of this dropout in the model.

    Returns:
        (T, H, K) in the dtype of qkv; under autocast qkv is cast first, as eager's. Softmax in
        fp32, in fp64 for fp64. An empty sequence has no rows.

    Raises:
        ValueError: a shape, a device, cu_seqlens, p or the seed does not fit.
        TypeError: qkv is not floating or cu_seqlens not int32.
        NotImplementedError: under torch.func transforms; for second derivatives.
    """
    op = "attention"
    registry.check_float(op, qkv=qkv)
    (qkv,) = registry.autocast(qkv)
    registry.check_shape(op, "qkv", qkv, (None, 3, None, None), "(T, 3, H, K)")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: cu_seqlens: want int32, got {cu_seqlens.dtype}")
    check_cu_seqlens(op, cu_seqlens, qkv.shape[0], max_len)
    registry.check_same(op, "device", qkv=qkv, cu_seqlens=cu_seqlens)
    registry.check_dropout(op, p, seed, qkv.device)
    seed = seed if p > 0 else None
    args = qkv.contiguous(), cu_seqlens.contiguous(), max_len, p, seed, site
    if registry.needs_grad(op, qkv):
        return _Attention.apply(*args)
    return _fwd(*args)[0]
