"""The rows for matrix products and GELU, alone and together, and for the gradient of a bias."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F  # noqa: N812
from gate import Work
from op_inputs import Answers, Draw, Inputs, sizes
from op_peers import Peer, compiled
from op_rows import Row, both
from torch import Tensor

from bert_fast import batch_invariant

_TOKENS, _ON_CPU = 16384, 1024
_LINEAR_SIZES = sizes(
    lambda model, T: {"T": T, "D": model.D, "F": model.F},
    _TOKENS,
    _ON_CPU,
    small={"T": 128, "D": 96, "F": 384},
    odd={"T": 67, "D": 101, "F": 37},
)
_ACTIVATION = "gelu"


def _linear_inputs(draw: Draw, T: int, D: int, F: int) -> dict[str, Tensor]:
    return {
        "x": draw.normal(T, D),
        "w": draw.normal(F, D, mean=0.0, spread=D**-0.5),
        "b": draw.normal(F),
        "dy": draw.normal(T, F, mean=0.25),
    }


def _linear_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return (ops.linear(v["x"], v["w"], v["b"]),)


def _linear_invariant_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    """By the product of the batch-invariant mode."""
    with batch_invariant():
        return _linear_call(ops, v, p, saved)


def _linear_save(ops: Any, v: Inputs, p: float) -> Answers:
    """Run the forward; its backward needs nothing of it."""
    return _linear_call(ops, v, p, None)


def _linear_bwd_call(ops: Any, v: Inputs, p: float, saved: Answers) -> Answers:
    return ops.linear_bwd(v["dy"], v["x"], v["w"], [True] * 2)


def _linear_gelu_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return ops.linear_gelu(v["x"], v["w"], v["b"], _ACTIVATION)


def _linear_work(e: int, p: float, T: int, D: int, F: int) -> Work:
    moved = e * (T * D + F * D + F + T * F)
    return Work(tokens=T, slots=T, bytes=moved, flops=2 * T * D * F)


def _linear_bwd_work(e: int, p: float, T: int, D: int, F: int) -> Work:
    moved = e * (T * F + 2 * T * D + 2 * F * D)
    return Work(tokens=T, slots=T, bytes=moved, flops=4 * T * D * F)


def _linear_gelu_work(e: int, p: float, T: int, D: int, F: int) -> Work:
    work = _linear_work(e, p, T, D, F)
    return replace(work, bytes=work.bytes + e * T * F)  # what a backward needs is written too


def _linear_torch(v: Inputs, p: float) -> Tensor:
    return F.linear(v["x"], v["w"], v["b"])


def _linear_gelu_torch(v: Inputs, p: float) -> Answers:
    h = F.linear(v["x"], v["w"], v["b"])
    return F.gelu(h), h


LINEAR = Row(
    "linear",
    _LINEAR_SIZES,
    _linear_inputs,
    _linear_call,
    ("y",),
    _linear_work,
    {"torch": Peer(_linear_torch)},
)
LINEAR_INVARIANT = replace(LINEAR, call=_linear_invariant_call)
LINEAR_BWD = Row(
    "linear_bwd",
    _LINEAR_SIZES,
    _linear_inputs,
    _linear_bwd_call,
    ("dx", "dw"),
    _linear_bwd_work,
    {"torch": Peer(_linear_torch, ("x", "w"))},
    save=_linear_save,
    direction="backward",
)
LINEAR_GELU = Row(
    "linear_gelu",
    _LINEAR_SIZES,
    _linear_inputs,
    _linear_gelu_call,
    ("y", "h"),
    _linear_gelu_work,
    {"torch": Peer(_linear_gelu_torch)},
)

_ROW_SIZES = sizes(
    lambda model, T: {"T": T, "F": model.F},
    _TOKENS,
    _ON_CPU,
    small={"T": 128, "F": 384},
    odd={"T": 67, "F": 101},
)


def _column_sums_inputs(draw: Draw, T: int, F: int) -> dict[str, Tensor]:
    return {"b": draw.normal(F), "dy": draw.normal(T, F, mean=0.25)}


def _column_sums_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return (ops.column_sums(v["dy"]),)


def _column_sums_work(e: int, p: float, T: int, F: int) -> Work:
    return Work(tokens=T, slots=T, bytes=e * (T * F + F))


def _column_sums_torch(v: Inputs, p: float) -> Tensor:
    return v["b"].expand_as(v["dy"])


COLUMN_SUMS = Row(
    "column_sums",
    _ROW_SIZES,
    _column_sums_inputs,
    _column_sums_call,
    ("db",),
    _column_sums_work,
    {"torch": Peer(_column_sums_torch, ("b",))},
    direction="backward",
)


def _gelu_inputs(draw: Draw, T: int, F: int) -> dict[str, Tensor]:
    return {"x": draw.normal(T, F), "b": draw.normal(F), "dy": draw.normal(T, F, mean=0.25)}


def _gelu_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return (ops.bias_gelu(v["x"], v["b"], _ACTIVATION),)


def _gelu_save(ops: Any, v: Inputs, p: float) -> Answers:
    """Run the forward; its backward needs nothing of it."""
    return _gelu_call(ops, v, p, None)


def _gelu_bwd_call(ops: Any, v: Inputs, p: float, saved: Answers) -> Answers:
    return ops.bias_gelu_bwd(v["dy"], v["x"], v["b"], _ACTIVATION)


def _gelu_work(e: int, p: float, T: int, F: int) -> Work:
    return Work(tokens=T, slots=T, bytes=e * (2 * T * F + F))


def _gelu_bwd_work(e: int, p: float, T: int, F: int) -> Work:
    return Work(tokens=T, slots=T, bytes=e * (3 * T * F + 2 * F))


def _gelu_torch(v: Inputs, p: float) -> Tensor:
    return F.gelu(v["x"] + v["b"])


GELU = Row(
    "bias_gelu",
    _ROW_SIZES,
    _gelu_inputs,
    _gelu_call,
    ("y",),
    _gelu_work,
    {"torch": Peer(_gelu_torch), "torch compile": compiled(Peer(_gelu_torch))},
)
GELU_BWD = Row(
    "bias_gelu_bwd",
    _ROW_SIZES,
    _gelu_inputs,
    _gelu_bwd_call,
    ("dx", "db"),
    _gelu_bwd_work,
    {"torch": Peer(_gelu_torch, ("x", "b"))},
    save=_gelu_save,
    direction="backward",
)

ROWS = {
    "linear": LINEAR,
    "linear invariant": LINEAR_INVARIANT,
    "linear_bwd": LINEAR_BWD,
    "linear fwd+bwd": both(LINEAR, LINEAR_BWD),
    "column_sums": COLUMN_SUMS,
    "linear_gelu": LINEAR_GELU,
    "bias_gelu": GELU,
    "bias_gelu_bwd": GELU_BWD,
    "bias_gelu fwd+bwd": both(GELU, GELU_BWD),
}
