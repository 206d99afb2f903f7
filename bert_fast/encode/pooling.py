"""From the rows of a batch to one vector a text, as sentence-transformers' files say."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.files import read_json
from bert_fast.ops.invariant import is_batch_invariant

MODULES_FILE = "modules.json"
_PROMPTS_FILE = "config_sentence_transformers.json"
_LENGTH_FILE = "sentence_bert_config.json"
# names of the flags in older files, of modes in newer ones -> ours
_MODES = {
    **{"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"},
    **{"pooling_mode_max_tokens": "max", "cls": "cls", "mean": "mean", "max": "max"},
}
POOLING = "cls", "mean", "max"
_LEAST_LENGTH = 1e-12  # as in torch.nn.functional.normalize


@dataclass(frozen=True)
class Pipeline:
    """What sentence-transformers' files say beside the model's own.

    Attributes:
        pooling: "cls", "mean" or "max"; of several the vectors are joined.
        normalize: whether vectors get length 1.
        max_seq_length: tokens that are kept of a text; None: as many as the model takes.
        lower_case: whether a text is put into lower case first.
        prompts: texts that go before a text, by name.
        default_prompt_name: the one to use where none is asked for, or None.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_seq_length: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


def read_pipeline(directory: Path) -> tuple[Pipeline, str]:
    """Return what modules.json and the files beside it say, and the model's folder in `directory`.

    Without modules.json: the mean of the tokens, and "".

    Raises:
        ValueError: a file is damaged, or is not what sentence-transformers writes.
        NotImplementedError: there is a module or a pooling mode that is not supported.
    """
    if not (directory / MODULES_FILE).exists():
        return Pipeline(), ""
    listed = read_json(directory, MODULES_FILE, kind=list)
    where = directory / MODULES_FILE
    kinds = [_entry(where, entry, "type").rpartition(".")[2] for entry in listed]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        want = "Transformer, Pooling and perhaps Normalize"
        raise NotImplementedError(f"{where}: want the modules {want}, got {', '.join(kinds)}")
    folders = [_entry(where, entry, "path") for entry in listed]
    for folder in folders:
        real = (directory / folder).resolve()  # a link may not lead elsewhere either
        if folder and real.parent != directory.resolve():
            raise ValueError(f"{where}: path: want a folder beside it, got {folder!r:.200}")
    length: dict[str, Any] = {}
    if (directory / folders[0] / _LENGTH_FILE).exists():
        length = read_json(directory / folders[0], _LENGTH_FILE)
    prompts: dict[str, Any] = {}
    if (directory / _PROMPTS_FILE).exists():
        prompts = read_json(directory, _PROMPTS_FILE)
    pipeline = Pipeline(
        pooling=_modes(directory / folders[1]),
        normalize="Normalize" in kinds,
        max_seq_length=length.get("max_seq_length"),
        lower_case=bool(length.get("do_lower_case")),
        prompts=prompts.get("prompts") or {},
        default_prompt_name=prompts.get("default_prompt_name"),
    )
    _check(directory, pipeline)
    return pipeline, folders[0]


def _entry(where: Path, entry: Any, key: str) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{where}: want a text at {key!r} of each module, got {value!r:.200}")
    return value


def _modes(folder: Path) -> tuple[str, ...]:
    """Return the pooling modes in a folder's config.json, in sentence-transformers' order."""
    found = read_json(folder, "config.json")
    where = folder / "config.json"
    named = found.get("pooling_mode")
    if named is None:
        named = [n for n, v in found.items() if n.startswith("pooling_mode_") and v]
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not named or any(n not in _MODES for n in named):
        raise NotImplementedError(f"{where}: want pooling by {POOLING}, got {named!r:.200}")
    if found.get("include_prompt") is False:
        raise NotImplementedError(f"{where}: include_prompt: want true, got false")
    return tuple(_MODES[name] for name in named)


def _check(directory: Path, pipeline: Pipeline) -> None:
    length, name = pipeline.max_seq_length, pipeline.default_prompt_name
    if length is not None and (type(length) is not int or length < 3):
        raise ValueError(f"{directory}: max_seq_length: want 3 or more, got {length!r:.200}")
    prompts = pipeline.prompts
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise ValueError(f"{directory}: prompts: want texts by name, got {prompts!r:.200}")
    if name is not None and name not in prompts:
        raise ValueError(f"{directory}: default_prompt_name: want one of prompts, got {name!r}")


def pool(x: Tensor, lengths: Tensor, modes: Sequence[str], normalize: bool) -> Tensor:
    """Return one vector a sequence, from packed rows.

    A vector depends on its own rows only, to the bit.

    Args:
        x: (T, D) floating.
        lengths: (B,) integers of 1 or more, on the device of x; their sum is T.
        modes: of "cls" (the first row), "mean" and "max" (over the rows).
        normalize: whether to divide by the length of the vector.

    Returns:
        (B, D * number of modes) fp32, fp64 for fp64.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = []
    for mode in modes:
        if mode == "cls":
            parts.append(x.index_select(0, lengths.cumsum(0) - lengths))
        else:  # adds in order, without the atomics of index_add
            parts.append(torch.segment_reduce(x, mode, lengths=lengths, unsafe=True))
    pooled = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return _normalized(pooled) if normalize else pooled


def _normalized(x: Tensor) -> Tensor:
    """Return the rows (B, D) divided by their lengths."""
    if not is_batch_invariant():
        return nn.functional.normalize(x, dim=1)
    # as a product: PyTorch's sum over a row is shared by threads that the number of rows decides
    ones = x.new_ones(1, x.shape[1])
    squares = torch.ops.bert_fast.linear(x.square(), ones, None)  # the op: autocast would round
    return x / squares.sqrt().clamp_min(_LEAST_LENGTH)
