"""Which implementation runs, and why not a better one."""

from dataclasses import dataclass

import torch
from torch import nn

from bert_fast import ops
from bert_fast.layers import Activation, BertEncoder, BertSelfAttention, is_plain
from bert_fast.ops import invariant


@dataclass(frozen=True)
class OpReport:
    """One op.

    Attributes:
        op: its name in torch.ops.bert_fast.
        implementation: "triton", "cublas", "csrc", "pytorch" (its fused operators) or "reference"
            (eager PyTorch).
        reason: why nothing faster serves it; empty if this is the fastest there is.
    """

    op: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `report` finds; printing it gives a table.

    Attributes:
        device: kind of device the report is for.
        ops: one entry an op.
        notes: what else decides how a model runs, such as modules called as they are.
    """

    device: str
    ops: tuple[OpReport, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len(entry.op) for entry in self.ops)
        lines = [f"bert_fast on {self.device}"]
        for entry in self.ops:
            reason = f"  ({entry.reason})" if entry.reason else ""
            lines.append(f"  {entry.op:<{width}}  {entry.implementation}{reason}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


_FUSED = {  # names in the module tree -> the class that is not called, but read by an op
    **dict.fromkeys(("query", "key", "value", "dense", "decoder"), nn.Linear),
    **dict.fromkeys(("classifier", "qa_outputs", "seq_relationship"), nn.Linear),
    **dict.fromkeys(("word_embeddings", "position_embeddings"), nn.Embedding),
    "token_type_embeddings": nn.Embedding,
    "LayerNorm": nn.LayerNorm,
    "dropout": nn.Dropout,
    **dict.fromkeys(("intermediate_act_fn", "transform_act_fn"), Activation),
}


def report(model: nn.Module | None = None) -> Report:
    """Say what serves each op, and which modules of a model are not fused.

    Args:
        model: a model of this package, also inside a larger module; None: for this machine.

    Returns:
        A `Report` for the device of the model, or for CUDA if this machine has it, else the CPU.
    """
    notes: list[str] = []
    if model is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        parameter = next(model.parameters(), None)
        device = "cpu" if parameter is None else parameter.device.type
        notes = _notes(model)
    notes += invariant.notes()
    entries = []
    for name, by_device in sorted(ops.implementations().items()):
        if device in by_device:
            entries.append(OpReport(name, *by_device[device]))
    if not entries:
        notes.append(f"no op runs on {device}: want cpu or cuda")
        entries = [OpReport(n, "none", "") for n in sorted(ops.implementations())]
    return Report(device, tuple(entries), tuple(notes))


def _notes(model: nn.Module) -> list[str]:
    if not any(isinstance(m, BertSelfAttention) for m in model.modules()):
        return [f"{type(model).__name__} has no encoder of bert_fast: nothing is accelerated"]
    notes = []
    called: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        # of attention's dropout only p is used, by transformers too
        if name.endswith("attention.self.dropout"):
            continue
        fused = _FUSED.get(name.rpartition(".")[2])
        if fused is not None and not is_plain(module, fused):
            kind = type(module)
            called.setdefault(f"{kind.__module__}.{kind.__qualname__}", []).append(name)
    for kind, names in called.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(f"called as it is, not fused ({kind}, or with hooks): {names[0]}{more}")
    if any(m.checkpoint_options is not None for m in model.modules() if isinstance(m, BertEncoder)):
        notes.append("gradient checkpointing: layers run twice in training")
    return notes
