"""softmax(q k^T / sqrt(K)) v within each packed sequence."""

from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import checks, registry
from bert_fast.ops.work_list import TILE


def _fwd_fake(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    p: float,
    seed: Tensor | None,
    site: int,
    work: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    T, _, H, K = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(T, H, K), qkv.new_empty(H, T, dtype=wide)


def _bwd_fake(do: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv)


def _tf32() -> bool:
    """Return whether PyTorch may round the operands of fp32 products to TF32: then so may we."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _fwd_cuda(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    p: float,
    seed: Tensor | None,
    site: int,
    work: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from bert_fast.kernels import attention

    return attention.attention_fwd(qkv, cu_seqlens, work, max_len, TILE, p, seed, site, _tf32())


def _bwd_cuda(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    p: float,
    seed: Tensor | None,
    site: int,
    work: Tensor | None = None,
) -> Tensor:
    from bert_fast.kernels import attention_bwd

    layout = cu_seqlens, work, max_len, TILE
    return attention_bwd.attention_bwd(do, qkv, o, lse, *layout, p, seed, site, _tf32())


def _fwd_cpu(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    p: float,
    seed: Tensor | None,
    site: int,
    work: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention, for sequences of one length that follow one another in one call.

    Its tiles depend on that length alone, if only every head begins at a multiple of 16 bytes:
    elsewhere its products sum in another order. So with one thread no sequence sees its batch; with
    several, one that shares a call may have other last bits than alone. The reference computes what
    cannot, what has dropout, for which there is no mask of ours, and 16 bits, where it is more
    exact at large scores.
    """
    _, _, H, K = qkv.shape
    size = qkv.dtype.itemsize
    if (seed is not None and p > 0) or size == 2 or K * size % 16:
        return reference.attention(qkv, cu_seqlens, max_len, p, seed, site, work)
    if qkv.data_ptr() % 16:
        qkv = qkv.clone()
    o, lse = _fwd_fake(qkv, cu_seqlens, max_len, p, seed, site)
    first = 0
    lengths = (last - first for _, first, last in reference.sequences(cu_seqlens))
    for n, alike in groupby(lengths):
        last = first + n * len([*alike])
        q, k, v = qkv[first:last].view(-1, n, 3, H, K).permute(2, 0, 3, 1, 4)  # each (B, H, n, K)
        o_part, lse_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        o[first:last] = o_part.transpose(1, 2).reshape(last - first, H, K)
        lse[:, first:last] = lse_part.transpose(0, 1).reshape(H, last - first)
        first = last
    o[first:], lse[:, first:] = 0, 0  # rows of no sequence
    return o, lse


_fwd = registry.register(
    "attention(Tensor qkv, Tensor cu_seqlens, SymInt max_len, float p, Tensor? seed, int site,"
    " Tensor? work=None) -> (Tensor o, Tensor lse)",
    reference=reference.attention,
    fake=_fwd_fake,
    cuda=_fwd_cuda,
    cpu=_fwd_cpu,
    sees_batch=True,  # sequences of one length, by several threads
)
_bwd = registry.register(
    "attention_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, Tensor cu_seqlens,"
    " SymInt max_len, float p, Tensor? seed, int site, Tensor? work=None) -> Tensor",
    reference=reference.attention_bwd,
    fake=_bwd_fake,
    cuda=_bwd_cuda,
    sees_batch=True,
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
        work: Tensor | None,
    ) -> Tensor:
        o, lse = _fwd(qkv, cu_seqlens, max_len, p, seed, site, work)
        ctx.save_for_backward(qkv, o, lse, cu_seqlens, seed, work)
        ctx.max_len, ctx.p, ctx.site = max_len, p, site
        return o

    @staticmethod
    @registry.first_order("attention")
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seed, work = ctx.saved_tensors
        dqkv = _bwd(do.contiguous(), *tensors, ctx.max_len, ctx.p, seed, ctx.site, work)
        return dqkv, None, None, None, None, None, None


def check_cu_seqlens(
    check: checks.Checks, name: str, cu_seqlens: Tensor, T: int | None, max_len: int, slack: bool
) -> None:
    """cu_seqlens is (B + 1,), 0 first, in steps of 0 to max_len, T last; with slack at most T.

    The values are looked at on the CPU only: elsewhere that would wait for the device.
    """
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        check.note(f"{name}: want (B + 1,), got {[*cu_seqlens.shape]}")
        return
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or T is None:
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        check.note(f"{name}: want 0 first, got {ends[0]}")
    if not all(0 <= last - first <= max_len for first, last in pairwise(ends)):
        check.note(f"{name}: want steps of 0 to {max_len}, got {ends}")
    if ends[-1] > T or (ends[-1] < T and not slack):
        most = "at most " if slack else ""
        check.note(f"{name}: want {most}{T} (T) last, got {ends[-1]}")


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    work: Tensor | None = None,
    slack: bool = False,
    checked: bool = False,
) -> Tensor:
    """Bidirectional attention within each packed sequence, dropout on the probabilities.

    Args:
        qkv: (T, 3, H, K) floating: query, key and value. On a GPU fp32, fp16 or bf16, K a multiple
            of 8 from 8 to 128.
        cu_seqlens: (B + 1,) int32, on the device of qkv: sequence b is rows cu_seqlens[b] to
            cu_seqlens[b + 1]. On a GPU nobody looks at its values.
        max_len: no sequence is longer.
        p: probability of dropping a probability, in steps of 1 / 65536.
        seed: (1,) int64, needed with p > 0; the same seed and site give the same mask.
        site: number of this dropout in the model.
        work: `work_list` of cu_seqlens and T, so that not every layer makes it; only a GPU uses it.
        slack: whether there may be rows past the last sequence; their result is 0.
        checked: whether the values of cu_seqlens are known to fit, as `pack` makes them, so that
            not every layer looks at each.

    Returns:
        (T, H, K) in the dtype of qkv; under autocast qkv is cast first, as eager's. Softmax in
        fp32, in fp64 for fp64. An empty sequence has no rows.

    Raises:
        ValueError: a shape, a device, cu_seqlens, p or the seed does not fit.
        TypeError: qkv is not floating or cu_seqlens not int32.
        NotImplementedError: a dtype or head size that the GPU's kernels do not take; under
            torch.func transforms; for second derivatives.
    """
    op = "attention"
    check = checks.Checks(op)
    check.floating(qkv=qkv)
    check.shape("qkv", qkv, (None, 3, None, None), "(T, 3, H, K)")
    check.dtype("cu_seqlens", cu_seqlens, torch.int32)
    T = checks.size(qkv, 0)
    check_cu_seqlens(check, "cu_seqlens", cu_seqlens, None if checked else T, max_len, slack)
    check.same("device", qkv=qkv, cu_seqlens=cu_seqlens, work=work)
    check.dtype("work", work, torch.int32)
    B = cu_seqlens.numel() - 1
    if work is not None and T is not None:  # of this batch: its entries are addresses
        check.shape("work", work, (2 + T // TILE + B, 4), "(2 + T // 128 + B, 4)")
    check.dropout(p, seed, qkv.device)
    check.done()
    (qkv,) = registry.autocast(qkv)
    seed = seed if p > 0 else None
    work = None if work is None else work.contiguous()
    args = qkv.contiguous(), cu_seqlens.contiguous(), max_len, p, seed, site, work
    if registry.needs_grad(op, qkv):
        return _Attention.apply(*args)
    return _fwd(*args)[0]
