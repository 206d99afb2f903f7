"""The rows for attention, packed rows beside padded batches: equal lengths and mixed ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import lengths as distributions
import torch
import torch.nn.functional as F  # noqa: N812
from gate import Case, Work
from op_inputs import Answers, Draw, Inputs, Model, sizes
from op_peers import Peer
from op_rows import SITE, Row, both
from torch import Tensor

from bert_fast.ops import work_list

_TOKENS, _ON_CPU = 16384, 1024
_DRAWN = 1  # seed of the lengths


def _borders(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


def _make(draw: Draw, lengths: Sequence[int], H: int, K: int) -> dict[str, Any]:
    T = sum(lengths)
    return {
        "qkv": draw.normal(T, 3, H, K),
        "dy": draw.normal(T, H, K, mean=0.25),
        "cu_seqlens": _borders(lengths, draw.device),
        "work": work_list(_borders(lengths, draw.device), T),  # a model makes it once a batch
        "lengths": tuple(lengths),
        "seed": draw.integers(2**62, 1),
    }


def _work(e: int, p: float, lengths: Sequence[int], H: int, K: int) -> Work:
    T = sum(lengths)
    return Work(
        tokens=T,
        slots=len(lengths) * max(lengths),
        sequences=len(lengths),
        bytes=e * 4 * T * H * K + 4 * H * T + 4 * (len(lengths) + 1),
        flops=sum(4 * n * n * H * K for n in lengths),
    )


def _bwd_work(e: int, p: float, lengths: Sequence[int], H: int, K: int) -> Work:
    work, T = _work(e, p, lengths, H, K), sum(lengths)
    moved = e * 8 * T * H * K + 4 * H * T + 4 * (len(lengths) + 1)
    return replace(work, bytes=moved, flops=sum(10 * n * n * H * K for n in lengths))


def _call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    longest = max(v["lengths"])
    return ops.attention(v["qkv"], v["cu_seqlens"], longest, p, v.seed(p), SITE, v["work"])


def _save(ops: Any, v: Inputs, p: float) -> Answers:
    return _call(ops, v, p, None)


def _bwd_call(ops: Any, v: Inputs, p: float, saved: Answers) -> Answers:
    cu_seqlens, longest = v["cu_seqlens"], max(v["lengths"])
    args = cu_seqlens, longest, p, v.seed(p), SITE, v["work"]
    return (ops.attention_bwd(v["dy"], v["qkv"], *saved, *args),)


# --- what users of PyTorch write -----------------------------------------------------------------


def _padded(v: Inputs) -> Inputs:
    """Return the inputs as a padded batch: qkv (B, L, 3, H, K), dy (B, L, H, K), mask (B, L).

    Sequences of one length are a padded batch already: qkv is a view and the mask None.
    """
    lengths = v["lengths"]
    B, L = len(lengths), max(lengths)
    if min(lengths) == L:
        tensors = {n: v[n].unflatten(0, (B, L)) for n in ("qkv", "dy")}
        return v.having(**tensors, mask=None)
    mask = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    mask = mask.to(v["qkv"].device)
    padded = {n: v[n].new_zeros(B, L, *v[n].shape[1:]) for n in ("qkv", "dy")}
    for name, t in padded.items():
        t[mask] = v[name]
    return v.having(**padded, mask=mask)


def _packed(v: Inputs, answers: Answers) -> Answers:
    mask = v["mask"]
    return tuple(t.flatten(0, 1) if mask is None else t[mask] for t in answers)


def _heads(v: Inputs) -> tuple[list[Tensor], Tensor | None]:
    """Return query, key and value (B, H, L, K) and the mask (B, 1, 1, L)."""
    mask = v["mask"]
    return [*v["qkv"].permute(2, 0, 3, 1, 4)], None if mask is None else mask[:, None, None]


def _eager(v: Inputs, p: float) -> Tensor:
    (query, key, value), mask = _heads(v)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (F.dropout(scores.softmax(-1), p) @ value).transpose(1, 2).contiguous()


def _sdpa(v: Inputs, p: float) -> Tensor:
    heads, mask = _heads(v)
    o = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=p)
    return o.transpose(1, 2).contiguous()


def _varlen(v: Inputs, p: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = v["cu_seqlens"], max(v["lengths"])
    return varlen_attn(*v["qkv"].unbind(1), cu_seqlens, cu_seqlens, longest, longest)


def _varlen_lacks(case: Case, p: float) -> str:
    if p:
        return "varlen_attn has no dropout"
    if case.device.type != "cuda" or case.dtype == "fp32":
        return "varlen_attn needs CUDA and 16 bits"
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    return ""


_LAYOUT = {"layout": "a padded batch, made beforehand"}


def _peers(*leaves: str) -> dict[str, Peer]:
    return {
        "torch": Peer(_eager, leaves, _padded, _packed, notes=_LAYOUT),
        "sdpa": Peer(_sdpa, leaves, _padded, _packed, notes=_LAYOUT),
        "varlen_attn": Peer(_varlen, leaves, lacks=_varlen_lacks),
    }


# --- rows ----------------------------------------------------------------------------------------

_ODD = {"lengths": (3, 0, 17, 1, 40), "H": 3, "K": 32}


def _of(model: Model, lengths: Sequence[int]) -> dict[str, Any]:
    return {"lengths": tuple(lengths), "H": model.H, "K": model.K}


def _equal(length: int, on_cpu: int = _ON_CPU) -> Mapping[str, Mapping[str, Any]]:
    full, few = ([length] * (tokens // length) for tokens in (_TOKENS, on_cpu))
    small = {"lengths": (length,) * max(1, 256 // length), "H": 2, "K": 64}
    return sizes(_of, full, few, small=small, odd=_ODD)


def _mixed(name: str) -> Mapping[str, Mapping[str, Any]]:
    full, few = (distributions.up_to(name, n, _DRAWN) for n in (_TOKENS, _ON_CPU))
    small = distributions.draw(name, 4, _DRAWN, longest=128)
    return sizes(_of, full, few, small={"lengths": tuple(small), "H": 2, "K": 64}, odd=_ODD)


_S128, _S256, _S512 = (_equal(length) for length in (128, 256, 512))
_S512_DROPOUT = _equal(512, on_cpu=512)  # the reference draws a factor for each score
_MIXED = {name: _mixed(name) for name in ("glue", "squad", "wikipedia", "lognormal", "normal")}


def _forward(sizes: Mapping[str, Mapping[str, Any]], lengths: str = "full", p: float = 0.0) -> Row:
    outputs = ("o", "lse")
    row = Row("attention", sizes, _make, _call, outputs, _work, _peers(), only_ours=("lse",))
    return replace(row, p=p, lengths=lengths)


def _backward(sizes: Mapping[str, Mapping[str, Any]], lengths: str = "full", p: float = 0.0) -> Row:
    peers = _peers("qkv")
    row = Row("attention_bwd", sizes, _make, _bwd_call, ("dqkv",), _bwd_work, peers, save=_save)
    return replace(row, p=p, lengths=lengths, direction="backward")


def _both(sizes: Mapping[str, Mapping[str, Any]], lengths: str = "full", p: float = 0.0) -> Row:
    return both(_forward(sizes, lengths, p), _backward(sizes, lengths, p))


def _title(lengths: str) -> str:
    return "attention mixed" if lengths == "normal" else f"attention {lengths}"


ROWS = {
    "attention s128": _forward(_S128),
    "attention s256": _forward(_S256),
    "attention s512": _forward(_S512),
    **{_title(name): _forward(sizes, name) for name, sizes in _MIXED.items()},
    "attention s128 dropout": _forward(_S128, p=0.1),
    "attention s512 dropout": _forward(_S512_DROPOUT, p=0.1),
    "attention_bwd s128": _backward(_S128),
    "attention_bwd s512": _backward(_S512),
    "attention_bwd s512 dropout": _backward(_S512_DROPOUT, p=0.1),
    "attention s128 fwd+bwd": _both(_S128),
    "attention s512 fwd+bwd": _both(_S512),
    "attention s512 dropout fwd+bwd": _both(_S512_DROPOUT, p=0.1),
    **{f"{_title(name)} fwd+bwd": _both(sizes, name) for name, sizes in _MIXED.items()},
}
