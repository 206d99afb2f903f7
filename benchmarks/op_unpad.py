"""The rows for what is made of a padded batch's mask: packed rows, and the work list for them."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import lengths as distributions
import torch
import torch.nn.functional as F  # noqa: N812
from gate import Work
from op_inputs import Answers, Draw, Inputs, sizes
from op_peers import Peer
from op_rows import Row
from torch import Tensor

from bert_fast.ops.work_list import TILE

# --- unpad ---------------------------------------------------------------------------------------

_UNPAD_SIZES = sizes(
    lambda model, B: {"B": B, "L": 512},
    128,
    4,
    small={"B": 8, "L": 64},
    odd={"B": 6, "L": 7},
)


def _unpad_lengths(B: int, L: int) -> list[int]:
    """Return lengths of which each pair fills one row: half of B x L; the first pair is 0 and L."""
    halves = [i * (L // 2) // max(1, B // 2 - 1) for i in range(B // 2)]
    return [n for short in halves for n in (short, L - short)]


def _unpad_inputs(draw: Draw, B: int, L: int) -> dict[str, Tensor]:
    lengths = torch.tensor(_unpad_lengths(B, L))[draw.order(B)].to(draw.device)
    return {"mask": torch.arange(L, device=draw.device)[None] < lengths[:, None]}


def _unpad_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return ops.unpad(v["mask"])


def _unpad_work_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return ops.unpad_work(v["mask"], TILE, None, None)


def _unpad_work(e: int, p: float, B: int, L: int) -> Work:
    T = sum(_unpad_lengths(B, L))
    return Work(tokens=T, slots=B * L, sequences=B, bytes=B * L + 8 * T + 4 * (B + 1))


def _unpad_work_work(e: int, p: float, B: int, L: int) -> Work:
    T = sum(_unpad_lengths(B, L))
    moved = _unpad_work(e, p, B, L).bytes + _list_bytes(T, B)
    return Work(tokens=T, slots=B * L, sequences=B, bytes=moved)


def _unpad_torch(v: Inputs, p: float) -> Answers:
    lengths = v["mask"].sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    return v["mask"].flatten().nonzero().flatten(), cu_seqlens, torch.tensor(lengths.max().item())


def _unpad_work_torch(v: Inputs, p: float) -> Answers:
    rows, cu_seqlens, longest = _unpad_torch(v, p)
    return rows, cu_seqlens, _entries(cu_seqlens, rows.shape[0]), longest


_UNPAD = Row(
    "unpad",
    _UNPAD_SIZES,
    _unpad_inputs,
    _unpad_call,
    ("rows", "cu_seqlens", "max_len"),
    _unpad_work,
    {"torch": Peer(_unpad_torch)},
    exact=True,
    lengths="uniform",
)
_UNPAD_WORK = Row(
    "unpad_work",
    _UNPAD_SIZES,
    _unpad_inputs,
    _unpad_work_call,
    ("rows", "cu_seqlens", "work", "max_len"),
    _unpad_work_work,
    {"torch": Peer(_unpad_work_torch)},
    exact=True,
    lengths="uniform",
)

# --- the work list -------------------------------------------------------------------------------

_LIST_SIZES = sizes(
    lambda model, tokens: {"lengths": tuple(distributions.up_to("normal", tokens, 1))},
    16384,
    1024,
    small={"lengths": (3, 130, 40)},
    odd={"lengths": (3, 0, 300, 1, 128, 129)},
)


def _list_make(draw: Draw, lengths: Sequence[int]) -> Mapping[str, Any]:
    mixed = [lengths[i] for i in draw.order(len(lengths))]
    borders = torch.tensor([0, *accumulate(mixed)], dtype=torch.int32)
    return {"cu_seqlens": borders.to(draw.device), "lengths": tuple(mixed)}


def _list_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return (ops.work_list(v["cu_seqlens"], sum(v["lengths"]), TILE),)


def _list_bytes(T: int, B: int) -> int:
    return 16 * (2 + T // TILE + B)


def _list_work(e: int, p: float, lengths: Sequence[int]) -> Work:
    T, B = sum(lengths), len(lengths)
    return Work(tokens=T, slots=T, sequences=B, bytes=4 * (B + 1) + _list_bytes(T, B))


def _entries(cu_seqlens: Tensor, T: int) -> Tensor:
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    order = lengths.sort(descending=True, stable=True).indices
    tiles = (lengths[order] + TILE - 1).div(TILE, rounding_mode="floor")
    before = tiles.cumsum(0) - tiles
    b, first = order.repeat_interleave(tiles), before.repeat_interleave(tiles)
    offsets = (torch.arange(len(b), device=b.device) - first) * TILE
    entries = torch.stack((b, starts[b], lengths[b], offsets), 1)
    found = entries.new_zeros(2 + T // TILE + len(lengths), 4)
    found[0, :3] = torch.stack((tiles.sum(), tiles.sum(), tiles[lengths[order] > TILE].sum()))
    found[1 : 1 + len(b)] = entries
    return found.int()


def _list_torch(v: Inputs, p: float) -> Answers:
    return (_entries(v["cu_seqlens"], sum(v["lengths"])),)


_WORK_LIST = Row(
    "work_list",
    _LIST_SIZES,
    _list_make,
    _list_call,
    ("entries",),
    _list_work,
    {"torch": Peer(_list_torch)},
    exact=True,
    lengths="normal",
)

ROWS = {"unpad": _UNPAD, "work_list": _WORK_LIST, "unpad_work": _UNPAD_WORK}
