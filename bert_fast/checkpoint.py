"""Files <-> tensors: what a directory holds, checked, under Hugging Face's names.

    directory = locate("path-or-hub-id")
    tensors = read_tensors(directory)
    found = match(tensors, model.state_dict(), tied={...}, new_allowed=is_head)
    save_tensors(directory, model.state_dict(), config=config)

What `save_tensors` writes carries a manifest with SHA-256 sums, because no weight format notices
a flipped bit; the files of others have none and load as they are.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.config import CONFIG_FILE, CONFIG_FILES, BertConfig, read_config
from bert_fast.files import (
    CODE_OF,
    CODES,
    find_directory,
    plain_file,
    read_json,
    safetensors_chunks,
    staged,
)
from bert_fast.names import bare, is_buffer
from bert_fast.weights import BUNDLE, PICKLED, SAFETENSORS, read_weights, some

MANIFEST = "bert_fast.json"
FORMAT_VERSION = 1

_ROWS = {  # of this tensor are given by the configuration's field
    "embeddings.word_embeddings.weight": "vocab_size",
    "embeddings.position_embeddings.weight": "max_position_embeddings",
    "embeddings.token_type_embeddings.weight": "type_vocab_size",
}

_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(kw_only=True)
class Match:
    """How the tensors of a file and the state dict of a model fit together.

    Attributes:
        tensors: the model's name -> tensor, to be loaded; the tied names are not among them.
        tied: name -> the name whose tensor it shares; in the file it was equal or absent.
        untied: names that may be tied but have a tensor of their own in the file.
        new: the model's names that the file cannot fill, to be initialised.
        unexpected: the file's names that the model has no use for.
        mismatched: name -> (shape in the file, shape in the model), each also in `new`.
    """

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    untied: list[str]
    new: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def locate(
    name_or_path: str | os.PathLike,
    *,
    subfolder: str = "",
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the directory of a model; configuration and weights on the hub are downloaded.

    From the hub come config.json, safetensors and our manifest, pytorch_model.bin only where
    there are no safetensors, and Google's files only where there is neither. Args and errors are
    those of `files.find_directory`.
    """
    for names in (
        (SAFETENSORS, f"{SAFETENSORS}.index.json", "model-*.safetensors"),
        (PICKLED, f"{PICKLED}.index.json", "pytorch_model-*.bin"),
        (f"{BUNDLE}.index", f"{BUNDLE}.data-*"),
    ):
        directory = find_directory(
            name_or_path,
            [*CONFIG_FILES, MANIFEST, *names],
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        if any(os.path.lexists(directory / name) for name in names):
            break
    return directory


def read_tensors(
    directory: str | os.PathLike, *, allow_nonfinite: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of a directory under the names and in the dtypes that the files have.

    Read is the first there is of model.safetensors, its index, pytorch_model.bin, its index, and
    TensorFlow's bert_model.ckpt.index or the only other *.index. Google's weights come under
    Hugging Face's names and in torch's layout, without the optimizer's variables.

    Args:
        directory: as `locate` returns it.
        allow_nonfinite: accept NaN and infinity.

    Raises:
        FileNotFoundError: no weights, or one of several files is missing.
        ValueError: a file is truncated, malformed, outside the directory, or not the one in the
            manifest; a CRC of TensorFlow's does not fit; a pickle holds more than tensors; a weight
            is NaN or infinite. The message names file and tensor, what was wanted and found.
        NotImplementedError: pytorch_model.bin, and torch is older than 2.10.
    """
    directory = Path(directory)
    if os.path.lexists(directory / MANIFEST):
        _verify(directory)
    return read_weights(directory, allow_nonfinite=allow_nonfinite)


def match(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor | tuple[int, ...]],
    *,
    tied: Mapping[str, str],
    new_allowed: Callable[[str], bool],
    strict: bool = False,
    ignore_mismatched_sizes: bool = False,
    source: str | os.PathLike = "checkpoint",
) -> Match:
    """Fit the tensors of a file to the state dict of a model.

    Args:
        found: what `read_tensors` returned.
        wanted: the model's names -> tensors (on any device, meta too) or shapes.
        tied: name -> the name whose tensor it shares, both the model's. A name whose tensor in
            the file differs from the other's comes back as untied and keeps its own.
        new_allowed: whether the file may lack the model's name (heads, pooler).
        strict: refuse new and unexpected names.
        ignore_mismatched_sizes: initialise a tensor of another shape, where new_allowed.
        source: where `found` is from, for errors.

    Returns:
        A Match; it is for the caller to warn about `new` and `unexpected`.

    Raises:
        ValueError: encoder weights are missing, a tensor has another shape or two have one name;
            with strict, new or unexpected names.
        TypeError: a weight is not of a floating dtype.
    """
    in_file: dict[str, str] = {}  # name without `bert.` -> name in the file
    for name in found:
        if is_buffer(name):
            continue
        if (other := in_file.setdefault(bare(name), name)) != name:
            raise ValueError(f"{source}: want each weight once, got {other} and {name}")
    shapes = {n: tuple(w.shape if isinstance(w, Tensor) else w) for n, w in wanted.items()}
    chosen = {name: found[in_file[bare(name)]] for name in shapes if bare(name) in in_file}
    for name, tensor in chosen.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{source}: {name}: want a floating dtype, got {tensor.dtype}")
    ties, untied = {}, []
    for name, original in tied.items():
        if name in chosen and original in chosen and not _same(chosen[name], chosen[original]):
            untied.append(name)
            continue
        ties[name] = original
        if name in chosen:  # some tools write the other of two names
            chosen.setdefault(original, chosen.pop(name))
    mismatched = {
        name: (tuple(tensor.shape), shapes[name])
        for name, tensor in chosen.items()
        if tuple(tensor.shape) != shapes[name]
    }
    if wrong := [
        _describe(name, *pair)
        for name, pair in mismatched.items()
        if not (ignore_mismatched_sizes and new_allowed(name))
    ]:
        raise ValueError(f"{source}: weights and {CONFIG_FILE} do not fit: {'; '.join(wrong)}")
    tensors = {n: chosen[n] for n in shapes if n in chosen and n not in mismatched}
    new = [name for name in shapes if name not in tensors and name not in ties]
    if missing := [name for name in new if not new_allowed(name)]:
        raise ValueError(f"{source}: want every encoder weight, got none for {some(missing, 400)}")
    used = {bare(name) for name in shapes}
    unexpected = [name for key, name in in_file.items() if key not in used]
    if strict and (new or unexpected):
        raise ValueError(
            f"{source}: strict: want exactly the model's weights, got none for {some(new)}, "
            f"beside them {some(unexpected)}"
        )
    return Match(
        tensors=tensors,
        tied=ties,
        untied=untied,
        new=new,
        unexpected=unexpected,
        mismatched=mismatched,
    )


def checkpoint_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the first floating dtype among the tensors.

    Raises:
        ValueError: there is none.
    """
    for tensor in tensors.values():
        if tensor.is_floating_point():
            return tensor.dtype
    raise ValueError(f"tensors: want a floating dtype, got none in {len(tensors)} tensors")


def save_tensors(
    directory: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    config: BertConfig,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config.json, the weights as safetensors, and the manifest.

    Everything is on the disk before the first old file is replaced: when writing fails, the
    directory is as before. Weight files of an earlier save that this one does not have are
    removed at the end. A process that dies between the first replacement and that end leaves
    files that do not fit the manifest, and `read_tensors` refuses them.

    Args:
        directory: made if need be.
        tensors: of any device and layout. Where `config.tie_word_embeddings`, only the first of
            several names that share one tensor is written, as in Hugging Face's files.
        config: validated and written; the manifest has its fingerprint.
        max_shard_size: bytes, or a text such as "5GB" or "500MiB"; a larger model is written as
            several files with an index.

    Raises:
        ValueError, NotImplementedError: there are no tensors, or the configuration is not valid.
        TypeError: a tensor is of a dtype that cannot be written.
        OSError: the disk is full, the directory read-only.
    """
    config.validate()
    kept = _without_ties(tensors) if config.tie_word_embeddings else dict(tensors)
    shards = weight_shards(kept, max_shard_size)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with staged(directory) as write:
        sums = write_weights(write, shards)
        write(CONFIG_FILE, [config.to_json_string().encode()])
        manifest = {
            "format_version": FORMAT_VERSION,
            "config_fingerprint": config.fingerprint(),
            "files": sums,
        }
        write(MANIFEST, [_json(manifest)])
    remove_other_weights(directory, sums)


def weight_shards(
    tensors: Mapping[str, Tensor], max_shard_size: int | str
) -> dict[str, dict[str, Tensor]]:
    """Return file name -> tensors: model.safetensors, or several files of at most that size.

    Raises:
        ValueError: there are no tensors, or max_shard_size is no size.
        TypeError: a tensor is of a dtype that cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in CODE_OF:
            raise TypeError(f"{name}: want one of {', '.join(CODES)}, got {tensor.dtype}")
    limit = _byte_count(max_shard_size)
    if not tensors:
        raise ValueError("tensors: want at least one, got none")
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    count = len(shards)
    if count == 1:
        return {SAFETENSORS: shards[0]}
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def write_weights(
    write: Callable[[str, Iterable[bytes | memoryview]], None],
    shards: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, dict[str, Any]]:
    """Write what `weight_shards` returned, and an index where it is several files.

    Args:
        write: of `files.staged`.
        shards: file name -> tensors by name.

    Returns:
        File name -> its size and SHA-256.
    """
    sums: dict[str, dict[str, Any]] = {}
    for name, shard in shards.items():
        write(name, _summed(safetensors_chunks(shard), sums.setdefault(name, {})))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for s in shards.values() for t in s.values())},
            "weight_map": {tensor: name for name, shard in shards.items() for tensor in shard},
        }
        name = f"{SAFETENSORS}.index.json"
        write(name, _summed([_json(index)], sums.setdefault(name, {})))
    return sums


def remove_other_weights(directory: Path, kept: Collection[str]) -> None:
    """Remove what an earlier save wrote: safetensors and their index, but not those in `kept`."""
    for entry in os.listdir(directory):
        if _OURS.fullmatch(entry) and entry not in kept:
            (directory / entry).unlink()


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit: NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))


def _describe(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    text = f"{name}: want {[*want]}, got {[*got]}"
    if (field := _ROWS.get(bare(name))) and got and got[0] != want[0]:
        text += f" ({field}: the configuration says {want[0]}, the file has {got[0]})"
    return text


def _verify(directory: Path) -> None:
    """Compare the files of a directory with its manifest."""
    path = directory / MANIFEST
    manifest = read_json(directory, MANIFEST)
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version: want {FORMAT_VERSION}, got {version!r:.200}")
    sums = manifest.get("files")
    if not isinstance(sums, dict) or not sums or not all(map(_OURS.fullmatch, sums)):
        raise ValueError(f"{path}: files: want sums of weight files, got {sums!r:.200}")
    hint = f"({MANIFEST} may be of another save; without it the files load unchecked)"
    there = {name for name in os.listdir(directory) if _OURS.fullmatch(name)}
    if there != sums.keys():
        raise ValueError(
            f"{directory}: want the files in {MANIFEST}, got none for "
            f"{some(sums.keys() - there)}, beside them {some(there - sums.keys())} {hint}"
        )
    for name, want in sums.items():
        got: dict[str, Any] = {}
        with open(plain_file(directory, name), "rb") as file:
            for _ in _summed(iter(lambda f=file: f.read(2**20), b""), got):
                pass
        if got != want:
            raise ValueError(f"{directory / name}: want {want!r:.200}, got {got} {hint}")
    want, got = manifest.get("config_fingerprint"), read_config(directory)[0].fingerprint()
    if want != got:
        want = f"the fingerprint {want!r:.200} that was saved with the weights"
        raise ValueError(f"{directory / CONFIG_FILE}: want {want}, got {got} {hint}")


def _summed(chunks: Iterable[bytes | memoryview], into: dict[str, Any]) -> Iterator:
    """Pass chunks on; their size and SHA-256 are in `into` after the last."""
    digest, count = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        count += len(chunk)
        yield chunk
    into.update(bytes=count, sha256=digest.hexdigest())


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _byte_count(size: int | str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", str(size).strip().upper(), re.ASCII)
    if not found or not (count := int(found[1]) * _UNITS[found[2] or ""]):
        raise ValueError(f'max_shard_size: want bytes or a text such as "5GB", got {size!r}')
    return count


def _without_ties(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept: dict[tuple, str] = {}
    for name, t in tensors.items():
        where = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
        kept.setdefault(where if t.data_ptr() else name, name)
    return {name: tensors[name] for name in kept.values()}
