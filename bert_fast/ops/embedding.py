"""Word + position + type embeddings, LayerNorm, dropout."""

import functools
from typing import Any

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import checks, registry


def _fwd_fake(
    input_ids: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    w: Tensor,
    b: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    out_dtype: torch.dtype,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, D = position_ids.shape[0], word.shape[1]
    wide = functools.reduce(torch.promote_types, (t.dtype for t in (word, position, type_, w)))
    wide = torch.promote_types(wide, torch.float32)
    y = word.new_empty(T, D, dtype=out_dtype)
    z = word.new_empty((T, D) if save else (0,), dtype=out_dtype)
    mean, rstd = (word.new_empty(T if save else 0, dtype=wide) for _ in range(2))
    return y, z, mean, rstd


def _bwd_fake(
    dy: Tensor,
    input_ids: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    w: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dword, dposition, dtype, dw, db = (
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (word, position, type_, w, w)
    )
    return dword, dposition, dtype, dw, db


def _fwd_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bert_fast.kernels.embedding import embed_fwd

    return registry.saved(embed_fwd(*args[:13]), *args[13:])


def _bwd_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from bert_fast.kernels.embedding import embed_bwd

    return embed_bwd(*args)


_fwd = registry.register(
    "embed(Tensor? input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word,"
    " Tensor position, Tensor type_, Tensor w, Tensor b, float eps, float p, Tensor? seed,"
    " int site, ScalarType out_dtype, bool save=True)"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    reference=reference.embed,
    fake=_fwd_fake,
    cuda=_fwd_cuda,
)
_bwd = registry.register(
    "embed_bwd(Tensor dy, Tensor? input_ids, Tensor position_ids, Tensor token_type_ids,"
    " Tensor word, Tensor position, Tensor type_, Tensor w, Tensor z, Tensor mean, Tensor rstd,"
    " int pad_id, float p, Tensor? seed, int site)"
    " -> (Tensor dword, Tensor dposition, Tensor dtype, Tensor dw, Tensor db)",
    reference=reference.embed_bwd,
    fake=_bwd_fake,
    cuda=_bwd_cuda,
)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_ids: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor,
        word: Tensor,
        position: Tensor,
        type_: Tensor,
        w: Tensor,
        b: Tensor,
        eps: float,
        pad_id: int,
        p: float,
        seed: Tensor | None,
        site: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        inputs = input_ids, position_ids, token_type_ids, word, position, type_, w
        y, *saved = _fwd(*inputs, b, eps, p, seed, site, out_dtype)
        ctx.save_for_backward(*inputs, *saved, seed)
        ctx.pad_id, ctx.p, ctx.site, ctx.b_dtype = pad_id, p, site, b.dtype
        return y

    @staticmethod
    @registry.first_order("embed")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        args = dy.contiguous(), *tensors, ctx.pad_id, ctx.p, seed, ctx.site
        dword, dposition, dtype, dw, db = _bwd(*args)
        grads = dword, dposition, dtype, dw, db.to(ctx.b_dtype)
        return None, None, None, *grads, None, None, None, None, None, None


def embed(
    input_ids: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    w: Tensor,
    b: Tensor,
    eps: float = 1e-12,
    *,
    pad_id: int | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + type_[token_type_ids] + position[position_ids])).

    Args:
        input_ids: (T,) int64 or int32, or None when `word` holds one row a token already.
        position_ids: (T,) int64 or int32.
        token_type_ids: (T,) int64 or int32.
        word: (V, D) table, or (T, D) rows without input_ids.
        position: (P, D) table.
        type_: (C, D) table.
        w: (D,) LayerNorm scale.
        b: (D,) LayerNorm shift.
        eps: added to the variance.
        pad_id: row of `word` that gets no gradient; None: every row gets one.
        p: probability of dropping an element of the result, in steps of 1 / 65536.
        seed: (1,) int64, needed with p > 0.
        site: number of this dropout in the model.

    Returns:
        (T, D) in the dtype to which the tables promote; fp32 under CUDA autocast, as eager's.

    Raises:
        ValueError: a shape, a device, p or the seed does not fit; an id is out of range (seen on
            the CPU; on a GPU it makes its row NaN).
        TypeError: a table is not floating, or ids are not integers.
        NotImplementedError: under torch.func transforms; for second derivatives; a dtype or D that
            the kernels do not take, on a GPU.
    """
    op = "embed"
    tables = {"word": word, "position": position, "type_": type_}
    check = checks.Checks(op)
    D = checks.size(w, 0)
    check.floating(**tables, w=w, b=b)
    check.shape("w", w, (None,), "(D,)")
    for name, table in tables.items():
        check.shape(name, table, (None, D), "(rows, D)")
    check.shape("b", b, (D,), "(D,)")
    T = checks.size(word if input_ids is None else input_ids, 0)
    ids = {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
    for name, t in ids.items():
        check.dtype(name, t, torch.int64, torch.int32)
        check.shape(name, t, (T,), "(T,)")
    check.same("device", **ids, **tables, w=w, b=b)
    check.dropout(p, seed, word.device)
    check.done()
    for (name, t), table in zip(ids.items(), tables.values(), strict=True):
        if t is not None:
            check.range(name, t, table.shape[0])
    check.done()
    seed = seed if p > 0 else None
    out_dtype = functools.reduce(torch.promote_types, (t.dtype for t in tables.values()))
    if word.is_cuda and registry.is_autocast("cuda"):
        out_dtype = torch.promote_types(out_dtype, torch.float32)
    tensors = *ids.values(), *tables.values(), w, b
    inputs = *(t if t is None else t.contiguous() for t in tensors), eps
    if registry.needs_grad(op, word, position, type_, w, b):
        pad_id = -1 if pad_id is None else pad_id
        return _Embed.apply(*inputs, pad_id, p, seed, site, out_dtype)
    return _fwd(*inputs, p, seed, site, out_dtype, False)[0]
