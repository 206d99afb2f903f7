"""Which implementation runs, and why not a better one."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from bert_fast import ops
from bert_fast.base import BertBase
from bert_fast.functional import Activation, is_plain
from bert_fast.hf import families
from bert_fast.hf.marks import MARK
from bert_fast.layers import BertEncoder
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
class ModuleReport:
    """A module, or those of one name in several layers.

    Attributes:
        name: in the model; "0-11" stands for these layers.
        runs: the op that reads its weights, or "as it is": it is called.
        reason: why it is not read by an op; empty if it is.
    """

    name: str
    runs: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `report` finds; printing it gives tables.

    Attributes:
        device: kind of device the report is for.
        ops: one entry an op.
        modules: what runs for each module of the model, in its order.
        notes: what else decides how a model runs.
    """

    device: str
    ops: tuple[OpReport, ...]
    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = [(entry.op, entry.implementation, entry.reason) for entry in self.ops]
        lines = [f"bert_fast on {self.device}", *_table(rows)]
        lines += _table([(entry.name, entry.runs, entry.reason) for entry in self.modules])
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    width = max((len(name) for name, _, _ in rows), default=0)
    return [
        f"  {n:<{width}}  {what}{f'  ({reason})' if reason else ''}" for n, what, reason in rows
    ]


def report(model: nn.Module | None = None) -> Report:
    """Say what serves each op, what runs for each module of a model, and why nothing faster.

    Args:
        model: a model of this package, or one of transformers, accelerated or not; also inside a
            larger module; None: for this machine.

    Returns:
        A `Report` for the device of the model, or for CUDA if this machine has it, else the CPU.
    """
    notes: list[str] = []
    modules: list[ModuleReport] = []
    if model is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        parameter = next(model.parameters(), None)
        device = "cpu" if parameter is None else parameter.device.type
        modules = _grouped([*_modules("", model, False)])
        notes = _notes(model, modules)
    notes += invariant.notes()
    entries = []
    for name, by_device in sorted(ops.implementations().items()):
        if device in by_device:
            entries.append(OpReport(name, *by_device[device]))
    if not entries:
        notes.append(f"no op runs on {device}: want cpu or cuda")
        entries = [OpReport(n, "none", "") for n in sorted(ops.implementations())]
    return Report(device, tuple(entries), tuple(modules), tuple(notes))


def _notes(model: nn.Module, modules: list[ModuleReport]) -> list[str]:
    if not any(entry.runs in _OPS for entry in modules):
        return [f"{type(model).__name__}: nothing is accelerated"]
    notes = []
    for name, module in model.named_modules():
        mark = module.__dict__.get(MARK)
        for reason in sorted(mark.reasons) if mark is not None else ():
            notes.append(
                f"{name or type(module).__name__} has run its original code, since {reason}"
            )
    if any(m.checkpoint_options is not None for m in model.modules() if isinstance(m, BertEncoder)):
        notes.append("gradient checkpointing: layers run twice in training")
    return notes


# --- modules -------------------------------------------------------------------------------------


class _Role(NamedTuple):
    """What a module of some name is for: the class that is not called, but read by an op."""

    cls: type[nn.Module]
    op: str


_LINEAR, _EMBED = _Role(nn.Linear, "linear"), _Role(nn.Embedding, "embed")
_NORM, _DROPOUT = _Role(nn.LayerNorm, "add_layer_norm"), _Role(nn.Dropout, "add_layer_norm")
_ACTIVATION = _Role(Activation, "linear_gelu")
_ROLES = {  # by the last name in the module tree: ours and BERT's, then DistilBERT's and RoBERTa's
    **dict.fromkeys(("query", "key", "value", "dense", "decoder"), _LINEAR),
    **dict.fromkeys(("classifier", "qa_outputs", "seq_relationship"), _LINEAR),
    **dict.fromkeys(("word_embeddings", "position_embeddings"), _EMBED),
    "token_type_embeddings": _EMBED,
    "LayerNorm": _NORM,
    "dropout": _DROPOUT,
    **dict.fromkeys(("intermediate_act_fn", "transform_act_fn"), _ACTIVATION),
    **dict.fromkeys(("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"), _LINEAR),
    **dict.fromkeys(("sa_layer_norm", "output_layer_norm", "layer_norm"), _NORM),
    "embeddings_project": _LINEAR,
}
_PLACES = {  # where the end of a name says more than its last part
    r"(intermediate|transform|lm_head)\.dense|ffn\.lin1": _Role(nn.Linear, "linear_gelu"),
    r"ffn\.activation": _ACTIVATION,
    r"embeddings\.LayerNorm": _Role(nn.LayerNorm, "embed"),
    r"embeddings\.dropout": _Role(nn.Dropout, "embed"),
    r"attention(\.self)?\.dropout": _Role(nn.Module, "attention"),  # only its p is used
}
_OPS = {role.op for role in (*_ROLES.values(), *_PLACES.values())}


def _role(name: str) -> _Role | None:
    for place, role in _PLACES.items():
        if re.search(rf"(^|\.)({place})$", name):
            return role
    return _ROLES.get(name.rpartition(".")[2])


def _modules(name: str, module: nn.Module, fused: bool) -> Iterator[ModuleReport]:
    """Yield what runs for a module or the modules in it; `fused`: for one that we run."""
    owner = families.known(type(module))
    if owner is not None:
        fused, reason = _taken(module, owner)
        if not fused and families.family(owner) is not None:
            yield ModuleReport(name or type(module).__name__, "as it is", reason)
            return
    elif isinstance(module, BertBase):
        fused = True
    role = _role(name) if fused else None
    if role is not None:
        plain = role.cls is nn.Module or is_plain(module, role.cls)
        if role is _ACTIVATION:
            plain = plain or families.activation(module) is not module
        yield ModuleReport(name, *((role.op, "") if plain else ("as it is", _why_called(module))))
        return
    if module._parameters and not (fused and module._modules):
        yield ModuleReport(name or type(module).__name__, "as it is", "it is no part of an encoder")
    for part, child in module._modules.items():
        if child is not None:
            yield from _modules(f"{name}.{part}" if name else part, child, fused)


def _taken(module: nn.Module, owner: type) -> tuple[bool, str]:
    """Return whether a known module of transformers is accelerated, and why not."""
    mark, family = module.__dict__.get(MARK), families.family(owner)
    if mark is None:
        return False, "accelerate was not called for it"
    reason = "" if family is None else families.why_not(module, owner, family)
    return not reason, f"the original code, since {reason}"


def _why_called(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}, or with hooks"


def _grouped(entries: list[ModuleReport]) -> list[ModuleReport]:
    """Return the entries with those that differ in the number of their layer alone in one."""
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for entry in entries:
        before, number, after = re.fullmatch(r"(.*?\blayer\.)?(\d+)?(.*)", entry.name).groups("")
        if not before:
            number, after = "", number + after
        places = groups.setdefault((before, after, entry.runs, entry.reason), [])
        places += [int(number)] if number else []
    return [
        ModuleReport(f"{before}{_ranges(places)}{after}", runs, reason)
        for (before, after, runs, reason), places in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Return 0-3,5 for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)
