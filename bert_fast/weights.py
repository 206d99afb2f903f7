"""The weight files of a directory -> tensors, in any of the formats that BERT was published in.

    model.safetensors, or its index and shards      Hugging Face, now
    pytorch_model.bin, or its index and shards      Hugging Face, earlier
    bert_model.ckpt.index and .data-...             Google

The first there is of these is read. A manifest's sums are checkpoint.py's.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.files import plain_file, read_json, read_pickled, read_safetensors
from bert_fast.names import from_google, is_optimizer
from bert_fast.tensor_bundle import bundle_items

SAFETENSORS, PICKLED, BUNDLE = "model.safetensors", "pytorch_model.bin", "bert_model.ckpt"
_INDEX = ("", ".index.json")


def read_weights(directory: Path, *, allow_nonfinite: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a directory; what it holds and raises, see checkpoint.read_tensors."""
    file = weight_file(directory)
    if file.endswith(".index"):
        return _read_google(directory / file.removesuffix(".index"), allow_nonfinite)
    files: dict[str, set[str] | None] = {file: None}
    if file.endswith(".json"):
        files = dict(_read_index(directory, file, Path(file.removesuffix(".index.json")).suffix))
    tensors: dict[str, Tensor] = {}
    for name, listed in files.items():
        path = plain_file(directory, name)
        found = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
        if listed is not None and found.keys() != listed:
            raise ValueError(
                f"{path}: want the tensors that the index lists, got none for "
                f"{some(listed - found.keys())}, beside them {some(found.keys() - listed)}"
            )
        if not allow_nonfinite:
            _check_finite(found, path)
        tensors |= found
    return tensors


def weight_file(directory: Path) -> str:
    """Return the name of the file to begin with: weights, or an index.

    Raises:
        FileNotFoundError: there is none.
        ValueError: as `bundle_file`.
    """
    names = [f"{single}{index}" for single in (SAFETENSORS, PICKLED) for index in _INDEX]
    for name in names:
        if os.path.lexists(directory / name):
            return name
    if file := bundle_file(directory):
        return file
    got = some(os.listdir(directory)) if directory.is_dir() else "no such directory"
    want = ", ".join([*names, f"{BUNDLE}.index"])
    raise FileNotFoundError(f"{directory}: want one of {want}, got {got}")


def bundle_file(directory: Path) -> str | None:
    """Return the name of the index of TensorFlow's checkpoint, None where there is none.

    Raises:
        ValueError: there are several, none of them bert_model.ckpt.index.
    """
    there = os.listdir(directory) if directory.is_dir() else []
    found = sorted(name for name in there if name.endswith(".index"))
    if f"{BUNDLE}.index" in found:
        return f"{BUNDLE}.index"
    if len(found) > 1:
        raise ValueError(f"{directory}: want one checkpoint or {BUNDLE}, got {some(found)}")
    return found[0] if found else None


def google_items(prefix: Path) -> Iterator[tuple[str, str | None, Tensor]]:
    """Yield (name in the file, present name, tensor in torch's layout) of Google's checkpoint.

    The present name is None, and the tensor as it is, for what is no weight of BERT.

    Raises:
        FileNotFoundError, ValueError: as `tensor_bundle.read_bundle`; or a kernel is no matrix,
            or two names become one.
    """
    origin: dict[str, str] = {}
    for name, tensor in bundle_items(prefix):
        now, transposed = from_google(name) or (None, False)
        if (other := origin.setdefault(now or name, name)) != name:
            raise ValueError(f"{prefix}.index: want each weight once, got {other} and {name}")
        if transposed:
            if tensor.dim() != 2:
                got = [*tensor.shape]
                raise ValueError(f"{prefix}.index: {name}: want two dimensions, got {got}")
            tensor = tensor.T.contiguous()
        yield name, now, tensor


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    # Both extremes are NaN where any element is; no copy of a tensor is made.
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel()
        if not torch.isfinite(torch.stack(tensor.aminmax())).all()
    ]


def some(names: Iterable[str], limit: int = 20) -> str:
    """Return the names in order, as one text; of very many the first, and how many more."""
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest if names else "nothing"


def _read_google(prefix: Path, allow_nonfinite: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, now, tensor in google_items(prefix):
        if not is_optimizer(name):
            if not allow_nonfinite:
                _check_finite({name: tensor}, f"{prefix}.index")
            tensors[now or name] = tensor
    return tensors


def _read_index(directory: Path, index: str, suffix: str) -> dict[str, set[str]]:
    """Return file name -> the tensors that an index says it holds."""
    weight_map = read_json(directory, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{directory / index}: weight_map: want a map, got {weight_map!r:.200}")
    listed: dict[str, Any] = {}
    for name, file in weight_map.items():
        # An index of safetensors must not lead to a pickle.
        if not isinstance(file, str) or not file.endswith(suffix):
            want = f"the name of a {suffix} file"
            raise ValueError(f"{directory / index}: {name:.200}: want {want}, got {file!r:.200}")
        listed.setdefault(file, set()).add(name)
    for file in listed:
        plain_file(directory, file)
    return listed


def _check_finite(tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    if bad := nonfinite(tensors):
        want = "finite weights (allow_nonfinite=True takes others)"
        raise ValueError(f"{source}: want {want}, got NaN or infinity in {some(bad)}")
