"""A row for every registered op, with the bytes or FLOPs it must move.

    python benchmarks/ops.py --device cpu|cuda

is suite `kernels` of run.py, whose options it takes.

A row is a call of an op at the widths of BERT-base or -large ("base", "large"), with as many tokens
as its device is fit for; at sizes that a CPU does at once ("small"); or at odd ones ("odd"), where
only the answers matter. Bytes count every tensor once that must be read or written, of a table only
the rows that are looked up. FLOPs count matrix products alone.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import op_attention
import op_linear
import op_optimizer
import op_unpad
import targets
import torch
import torch.nn.functional as F  # noqa: N812
from gate import Candidate, Case, Work
from op_inputs import Answers, Draw, Inputs, sizes
from op_peers import Peer, compiled, liger_lacks
from op_rows import SITE, Row, both, build
from torch import Tensor

from bert_fast.reference import IGNORE

EPS = 1e-12  # BERT's, of LayerNorm

# --- dropout + residual + LayerNorm --------------------------------------------------------------

_ROWS_TD = sizes(
    lambda model, T: {"T": T, "D": model.D},
    32768,
    1024,
    small={"T": 256, "D": 256},
    odd={"T": 67, "D": 101},
)


def _layer_norm_inputs(draw: Draw, T: int, D: int) -> dict[str, Tensor]:
    return {
        "x": draw.normal(T, D),
        "residual": draw.normal(T, D, mean=-0.25),
        "w": draw.normal(D, mean=1.0, spread=0.25),
        "b": draw.normal(D),
        "dy": draw.normal(T, D, mean=0.25),
        "seed": draw.integers(2**62, 1),
    }


def _layer_norm_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    args = v["x"], None, v["residual"], v["w"], v["b"], EPS, p, v.seed(p), SITE, v["x"].dtype
    return ops.add_layer_norm(*args)


def _layer_norm_alone_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    """Without residual and dropout z is x, and the op leaves it empty."""
    args = v["x"], None, None, v["w"], v["b"], EPS, p, None, SITE, v["x"].dtype
    y, _, mean, rstd = ops.add_layer_norm(*args)
    return y, mean, rstd


def _layer_norm_save(ops: Any, v: Inputs, p: float) -> Answers:
    return _layer_norm_call(ops, v, p, None)[1:]


def _layer_norm_alone_save(ops: Any, v: Inputs, p: float) -> Answers:
    _, mean, rstd = _layer_norm_alone_call(ops, v, p, None)
    return v["x"], mean, rstd


def _layer_norm_bwd_call(ops: Any, v: Inputs, p: float, saved: Answers) -> Answers:
    z, mean, rstd = saved
    args = v["dy"], z, v["w"], mean, rstd, False, p, v.seed(p), SITE, v["x"].dtype
    dx, dz, dw, db, _ = ops.add_layer_norm_bwd(*args)
    return dx if p else dz, dz, dw, db


def _layer_norm_alone_bwd_call(ops: Any, v: Inputs, p: float, saved: Answers) -> Answers:
    return _layer_norm_bwd_call(ops, v, p, saved)[1:]


def _layer_norm_work(e: int, p: float, T: int, D: int) -> Work:
    return Work(tokens=T, slots=T, bytes=e * (4 * T * D + 2 * D) + 8 * T)


def _layer_norm_alone_work(e: int, p: float, T: int, D: int) -> Work:
    return Work(tokens=T, slots=T, bytes=e * (2 * T * D + 2 * D) + 8 * T)


def _layer_norm_bwd_work(e: int, p: float, T: int, D: int) -> Work:
    written = 2 if p else 1  # without dropout x and residual share a gradient
    return Work(tokens=T, slots=T, bytes=e * ((2 + written) * T * D + 3 * D) + 8 * T)


def _layer_norm_torch(v: Inputs, p: float) -> Tensor:
    z = F.dropout(v["x"], p) + v["residual"]
    return F.layer_norm(z, v["w"].shape, v["w"], v["b"], EPS)


def _layer_norm_alone_torch(v: Inputs, p: float) -> Tensor:
    return F.layer_norm(v["x"], v["w"].shape, v["w"], v["b"], EPS)


def _layer_norm_liger(v: Inputs, p: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(F.dropout(v["x"], p) + v["residual"], v["w"], v["b"], EPS)


def _layer_norm_alone_liger(v: Inputs, p: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(v["x"], v["w"], v["b"], EPS)


_LAYER_NORM = Row(
    "add_layer_norm",
    _ROWS_TD,
    _layer_norm_inputs,
    _layer_norm_call,
    ("y", "z", "mean", "rstd"),
    _layer_norm_work,
    {
        "torch": Peer(_layer_norm_torch),
        "torch compile": compiled(Peer(_layer_norm_torch)),
        "liger": Peer(_layer_norm_liger, lacks=liger_lacks),
    },
    only_ours=("z", "mean", "rstd"),
)
_LAYER_NORM_ALONE = Row(
    "add_layer_norm",
    _ROWS_TD,
    _layer_norm_inputs,
    _layer_norm_alone_call,
    ("y", "mean", "rstd"),
    _layer_norm_alone_work,
    {
        "torch": Peer(_layer_norm_alone_torch),
        "torch compile": compiled(Peer(_layer_norm_alone_torch)),
        "liger": Peer(_layer_norm_alone_liger, lacks=liger_lacks),
    },
    only_ours=("mean", "rstd"),
)
_LAYER_NORM_BWD = Row(
    "add_layer_norm_bwd",
    _ROWS_TD,
    _layer_norm_inputs,
    _layer_norm_bwd_call,
    ("dx", "dz", "dw", "db"),
    _layer_norm_bwd_work,
    {"torch": Peer(_layer_norm_torch, ("x", "residual", "w", "b"))},
    save=_layer_norm_save,
    direction="backward",
)
_LAYER_NORM_ALONE_BWD = Row(
    "add_layer_norm_bwd",
    _ROWS_TD,
    _layer_norm_inputs,
    _layer_norm_alone_bwd_call,
    ("dx", "dw", "db"),
    _layer_norm_bwd_work,
    {"torch": Peer(_layer_norm_alone_torch, ("x", "w", "b"))},
    save=_layer_norm_alone_save,
    direction="backward",
)

# --- embeddings ----------------------------------------------------------------------------------

_TABLES = sizes(
    lambda model, T: {"T": T, "D": model.D, "V": model.V, "P": 512},
    16384,
    1024,
    small={"T": 256, "D": 64, "V": 997, "P": 128},
    odd={"T": 67, "D": 101, "V": 53, "P": 71},  # more words than rows of their table
)
_PAD = 0  # row of the word table that has no gradient
_TYPES = 2


def _embed_inputs(draw: Draw, T: int, D: int, V: int, P: int) -> dict[str, Tensor]:
    return {
        "tokens": draw.words(V, T),
        "positions": torch.arange(T, device=draw.device) % P,
        "types": draw.integers(_TYPES, T),
        "word": draw.normal(V, D),
        "position": draw.normal(P, D, mean=-0.25),
        "type_": draw.normal(_TYPES, D, mean=0.25),
        "w": draw.normal(D, mean=1.0, spread=0.25),
        "b": draw.normal(D),
        "dy": draw.normal(T, D, mean=0.25),
    }


def _ids_and_tables(v: Inputs) -> list[Tensor]:
    names = "tokens", "positions", "types", "word", "position", "type_", "w"
    return [v[name] for name in names]


def _embed_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return ops.embed(*_ids_and_tables(v), v["b"], EPS, p, None, SITE, v["word"].dtype)


def _embed_save(ops: Any, v: Inputs, p: float) -> Answers:
    return _embed_call(ops, v, p, None)[1:]


def _embed_bwd_call(ops: Any, v: Inputs, p: float, saved: Answers) -> Answers:
    return ops.embed_bwd(v["dy"], *_ids_and_tables(v), *saved, _PAD, p, None, SITE)


def _embed_work(e: int, p: float, T: int, D: int, V: int, P: int) -> Work:
    tables = min(T, P) * D + _TYPES * D + 2 * D
    return Work(tokens=T, slots=T, bytes=e * (3 * T * D + tables) + 24 * T + 8 * T)


def _embed_bwd_work(e: int, p: float, T: int, D: int, V: int, P: int) -> Work:
    written = (V + P + _TYPES + 2) * D
    return Work(tokens=T, slots=T, bytes=e * (2 * T * D + D + written) + 24 * T + 8 * T)


def _embed_torch(v: Inputs, p: float) -> Tensor:
    z = F.embedding(v["tokens"], v["word"], padding_idx=_PAD)
    z = z + F.embedding(v["types"], v["type_"]) + F.embedding(v["positions"], v["position"])
    return F.layer_norm(z, v["w"].shape, v["w"], v["b"], EPS)


_EMBED = Row(
    "embed",
    _TABLES,
    _embed_inputs,
    _embed_call,
    ("y", "z", "mean", "rstd"),
    _embed_work,
    {"torch": Peer(_embed_torch), "torch compile": compiled(Peer(_embed_torch))},
    only_ours=("z", "mean", "rstd"),
)
_EMBED_BWD = Row(
    "embed_bwd",
    _TABLES,
    _embed_inputs,
    _embed_bwd_call,
    ("dword", "dposition", "dtype", "dw", "db"),
    _embed_bwd_work,
    {"torch": Peer(_embed_torch, ("word", "position", "type_", "w", "b"))},
    save=_embed_save,
    direction="backward",
)

# --- masked-LM loss ------------------------------------------------------------------------------

_LOSS_SIZES = sizes(
    lambda model, N: {"N": N, "D": model.D, "V": model.V, "every": 0},
    2458,  # 15 % of 16384 tokens
    154,
    small={"N": 48, "D": 64, "V": 1009, "every": 0},
    odd={"N": 67, "D": 37, "V": 101, "every": 3},
)


def _loss_inputs(draw: Draw, N: int, D: int, V: int, every: int) -> dict[str, Tensor]:
    """Of each `every` rows the last has no label; 0: all have one."""
    labels = draw.words(V, N)
    if every:
        labels[every - 1 :: every] = IGNORE
    w = draw.normal(V, D, mean=0.0, spread=D**-0.5)
    return {"x": draw.normal(N, D), "w": w, "b": draw.normal(V), "labels": labels}


def _loss_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    """By one op, which gives the gradients with the loss."""
    return ops.linear_cross_entropy(v["x"], v["w"], v["b"], v["labels"], True)


def _loss_forward_call(ops: Any, v: Inputs, p: float, saved: None) -> Answers:
    return ops.linear_cross_entropy(v["x"], v["w"], v["b"], v["labels"], False)[:1]


def _loss_work(e: int, p: float, N: int, D: int, V: int, every: int) -> Work:
    moved = 2 * e * (N * D + V * D + V) + 8 * N + 4  # the logits are not among it
    return Work(tokens=N, slots=N, bytes=moved, flops=6 * N * D * V)


def _loss_forward_work(e: int, p: float, N: int, D: int, V: int, every: int) -> Work:
    moved = e * (N * D + V * D + V) + 8 * N + 4
    return Work(tokens=N, slots=N, bytes=moved, flops=2 * N * D * V)


def _loss_torch(v: Inputs, p: float) -> Tensor:
    """Logits in fp32, as under autocast: 16 bits would round the sum."""
    logits = F.linear(v["x"], v["w"], v["b"])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, v["labels"], reduction="sum", ignore_index=IGNORE)


def _loss_liger(v: Inputs, p: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    tensors = v["x"], v["w"], v["labels"], v["b"]
    return liger_fused_linear_cross_entropy(*tensors, ignore_index=IGNORE, reduction="sum")


def _loss_peers(**how: Any) -> dict[str, Peer]:
    return {
        "torch": Peer(_loss_torch, **how),
        "torch compile": compiled(Peer(_loss_torch, **how)),
        "liger": Peer(_loss_liger, lacks=liger_lacks, **how),
    }


_LOSS = Row(
    "linear_cross_entropy",
    _LOSS_SIZES,
    _loss_inputs,
    _loss_call,
    ("loss", "dx", "dw", "db"),
    _loss_work,
    _loss_peers(leaves=("x", "w", "b"), value=True),
    direction="both",
)
_LOSS_FORWARD = Row(
    "linear_cross_entropy",
    _LOSS_SIZES,
    _loss_inputs,
    _loss_forward_call,
    ("loss",),
    _loss_forward_work,
    _loss_peers(),
)

# --- all of them ---------------------------------------------------------------------------------

_LAYER_NORM_DROPOUT = replace(_LAYER_NORM, p=0.1)
_LAYER_NORM_BWD_DROPOUT = replace(_LAYER_NORM_BWD, p=0.1)

ROWS: Mapping[str, Row] = {
    **op_attention.ROWS,
    "layer_norm": _LAYER_NORM_ALONE,
    "layer_norm fwd+bwd": both(_LAYER_NORM_ALONE, _LAYER_NORM_ALONE_BWD),
    "add_layer_norm": _LAYER_NORM,
    "add_layer_norm dropout": _LAYER_NORM_DROPOUT,
    "add_layer_norm_bwd": _LAYER_NORM_BWD,
    "add_layer_norm_bwd dropout": _LAYER_NORM_BWD_DROPOUT,
    "add_layer_norm fwd+bwd": both(_LAYER_NORM, _LAYER_NORM_BWD),
    "add_layer_norm dropout fwd+bwd": both(_LAYER_NORM_DROPOUT, _LAYER_NORM_BWD_DROPOUT),
    "embed": _EMBED,
    "embed_bwd": _EMBED_BWD,
    "embed fwd+bwd": both(_EMBED, _EMBED_BWD),
    **op_linear.ROWS,
    "linear_cross_entropy": _LOSS,
    "linear_cross_entropy forward": _LOSS_FORWARD,
    **op_unpad.ROWS,
    **op_optimizer.ROWS,
}
CASES: Mapping[str, Callable[..., tuple[Case, list[Candidate]]]] = {
    name: partial(build, name, row) for name, row in ROWS.items()
}


def names() -> list[str]:
    """Return the names of all rows."""
    return [*CASES]


def odd_names() -> list[str]:
    """Return the names of rows that differ at odd sizes: of those with other lengths one."""
    rows = ROWS.items()
    return [*{(row.op, row.call, row.p, row.direction): name for name, row in rows}.values()]


def ledger_names() -> list[tuple[str, str]]:
    """Return (row, size) of the cases that the ledger's rows for kernels read."""
    return [(name, size) for name, size in (c.rsplit(", ", 1) for c in targets.kernel_cases())]


def case(
    name: str, device: torch.device | str, dtype: torch.dtype, size: str
) -> tuple[Case, list[Candidate]]:
    """Return a row's case and its candidates.

    Args:
        name: one of `names()`.
        device: where it runs.
        dtype: torch.float32, bfloat16 or float16.
        size: "base", "large", "small" or "odd".
    """
    return CASES[name](device, dtype, size)


if __name__ == "__main__":
    from run import main

    raise SystemExit(main(["kernels", *sys.argv[1:]]))
