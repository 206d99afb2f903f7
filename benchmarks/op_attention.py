"""The rows for attention and its work list: packed rows beside padded batches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from gate import Case, Work
from op_rows import SITE, Answers, Draw, Inputs, Peer, Row
from torch import Tensor
from workload import normal_lengths

from bert_fast.ops import work_list
from bert_fast.ops.work_list import TILE

SPREAD = normal_lengths(64, 256, 64, 16, 512, seed=1)  # mean and spread 256 and 64, 16 at least


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


# --- the work list -------------------------------------------------------------------------------


def _list_make(draw: Draw, lengths: Sequence[int]) -> dict[str, Any]:
    mixed = [lengths[i] for i in draw.order(len(lengths))]
    return {"cu_seqlens": _borders(mixed, draw.device), "lengths": tuple(mixed)}


def _list_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return (ops.work_list(v["cu_seqlens"], sum(v["lengths"]), TILE),)


def _list_work(e: int, p: float, lengths: Sequence[int]) -> Work:
    T, B = sum(lengths), len(lengths)
    return Work(tokens=T, slots=T, sequences=B, bytes=4 * (B + 1) + 16 * (2 + T // TILE + B))


def _list_torch(v: Inputs, p: float) -> Answers:
    starts, lengths = v["cu_seqlens"][:-1], v["cu_seqlens"].diff()
    order = lengths.sort(descending=True, stable=True).indices
    tiles = (lengths[order] + TILE - 1).div(TILE, rounding_mode="floor")
    before = tiles.cumsum(0) - tiles
    b, first = order.repeat_interleave(tiles), before.repeat_interleave(tiles)
    offsets = (torch.arange(len(b), device=b.device) - first) * TILE
    entries = torch.stack((b, starts[b], lengths[b], offsets), 1)
    found = entries.new_zeros(2 + sum(v["lengths"]) // TILE + len(lengths), 4)
    found[0, :3] = torch.stack((tiles.sum(), tiles.sum(), tiles[lengths[order] > TILE].sum()))
    found[1 : 1 + len(b)] = entries
    return (found.int(),)


# --- rows ----------------------------------------------------------------------------------------

_ODD = {"lengths": (3, 0, 17, 1, 40), "H": 3, "K": 32}


def _sizes(full: Sequence[int], small: Sequence[int]) -> Mapping[str, Mapping[str, Any]]:
    return {
        "full": {"lengths": tuple(full), "H": 16, "K": 64},
        "small": {"lengths": tuple(small), "H": 2, "K": 64},
        "odd": _ODD,
    }


_S128 = _sizes([128] * 128, [128] * 2)
_S256 = _sizes([256] * 64, [256])
_S512 = _sizes([512] * 32, [512])
_MIXED = _sizes(SPREAD, normal_lengths(4, 64, 32, 1, 128, seed=1))


def _forward(sizes: Mapping[str, Mapping[str, Any]], p: float = 0.0) -> Row:
    outputs = ("o", "lse")
    row = Row("attention", sizes, _make, _call, outputs, _work, _peers(), only_ours=("lse",))
    return replace(row, p=p)


def _backward(sizes: Mapping[str, Mapping[str, Any]], p: float = 0.0) -> Row:
    peers = _peers("qkv")
    row = Row("attention_bwd", sizes, _make, _bwd_call, ("dqkv",), _bwd_work, peers, save=_save)
    return replace(row, p=p)


ROWS = {
    "attention s128": _forward(_S128),
    "attention s256": _forward(_S256),
    "attention s512": _forward(_S512),
    "attention mixed": _forward(_MIXED),
    "attention s128 dropout": _forward(_S128, p=0.1),
    "attention s512 dropout": _forward(_S512, p=0.1),
    "attention_bwd s128": _backward(_S128),
    "attention_bwd s512": _backward(_S512),
    "attention_bwd s512 dropout": _backward(_S512, p=0.1),
    "work_list": Row(
        "work_list",
        {
            "full": {"lengths": SPREAD},
            "small": {"lengths": (3, 130, 40)},
            "odd": {"lengths": (3, 0, 300, 1, 128, 129)},
        },
        _list_make,
        _list_call,
        ("entries",),
        _list_work,
        {"torch": Peer(_list_torch)},
        exact=True,
    ),
}
