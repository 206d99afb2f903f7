"""The checkpoints of a run on the disk, which may be killed, full or damaged at any moment.

    step-00000100/
        config.json, model.safetensors, bert_fast.json   the model in fp32, as transformers opens it
        tokenizer.json ...                               the tokenizer
        optimizer.safetensors                            its moments, by the parameters' names
        state.json                                       step, position in the data, facts
        manifest.json                                    size and SHA-256 of every other file

A checkpoint is written under another name, the manifest last, and takes its own when all of it is
on the disk: one that is there is whole, and damage that comes later is seen when it is read. It
goes in the same way, by another name. One of the same step steps aside to `step-00000100.old`
until the new one is in its place.
"""

import copy
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bert_fast import checkpoint
from bert_fast.config import CONFIG_FILE, BertConfig, read_config
from bert_fast.files import plain_file, read_json, read_safetensors, staged
from bert_fast.train.state import TrainingState
from bert_fast.weights import SAFETENSORS, nonfinite, read_weights, some

MANIFEST, OPTIMIZER, STATE = "manifest.json", "optimizer.safetensors", "state.json"
FORMAT, VERSION = "bert_fast training checkpoint", 1
MARGIN = 2**23  # bytes for the tokenizer, headers and JSON

_ENTRIES = {"format", "version", "step", "config_fingerprint", "files"}
_REQUIRED = {CONFIG_FILE, SAFETENSORS, OPTIMIZER, STATE}
ASIDE = ".old"
_NAME = re.compile(rf"step-(\d{{8,15}})({re.escape(ASIDE)})?", re.ASCII)
_LEFT = re.compile(r"\.step-\d{8,15}\.[0-9a-f]{16}\.tmp", re.ASCII)
_OURS = re.compile(
    r"(config|bert_fast|state|manifest|tokenizer|tokenizer_config|special_tokens_map|added_tokens)"
    r"\.json|vocab\.txt|(model|optimizer)\.safetensors"
)


class Tokenizer(Protocol):
    """What a tokenizer, ours or transformers', is asked here."""

    def save_pretrained(self, save_directory: str | os.PathLike, /) -> Any:
        """Write its files into a directory."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read and found whole.

    Attributes:
        path: its directory.
        state: on the CPU.
        config: of its model.
    """

    path: Path
    state: TrainingState
    config: BertConfig

    @property
    def aside(self) -> bool:
        """Whether it has stepped aside for another of its step, which never came."""
        return self.path.suffix == ASIDE


class Checkpoints:
    """The directory with the checkpoints of a run; one process at a time writes there.

    Attributes:
        directory: made by the first save.
        keep: how many a save leaves.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3) -> None:
        """Name the directory.

        Raises:
            ValueError: keep is less than 1.
        """
        if keep < 1:
            raise ValueError(f"keep: want at least 1, got {keep}")
        self.directory, self.keep = Path(directory), keep

    def save(self, state: TrainingState, *, config: BertConfig, tokenizer: Tokenizer) -> Path:
        """Write a checkpoint and return its directory; when it is on the disk, old ones go.

        Kept are the newest up to this step; later ones are of a run that was taken back, and stay
        until this one comes by. Removed are also what killed saves have left, and nothing else:
        a directory with other files in it stays.

        Args:
            state: what `capture` returned.
            config: the model's.
            tokenizer: its files go beside the model.

        Raises:
            OSError: the disk is full (ENOSPC, before anything is written, where its free space
                says so), read-only or broken; the checkpoints there before are as they were.
            FileExistsError: in its place is something else.
            ValueError: a weight is not finite, facts or position are not JSON, or the configuration
                is not valid.
        """
        if bad := nonfinite(state.weights):
            raise ValueError(f"weights: want finite ones, got NaN or infinity in {some(bad)}")
        config = copy.deepcopy(config)
        config.architectures = config.architectures or ["BertForPreTraining"]
        config.dtype = torch.float32
        described = _json({"step": state.step, "position": state.position, "facts": state.facts})
        path = self.path_of(state.step)
        if os.path.lexists(path) and (other := _foreign(path)):
            raise FileExistsError(f"{path}: want a checkpoint or nothing, got {other}")
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            _sync(self.directory.parent)
        self._tidy()
        self._check_space(state.nbytes + len(described) + MARGIN)
        temporary, old = _temporary(path), self.path_of(state.step, aside=True)
        try:
            temporary.mkdir()
            _write(temporary, state, described, config, tokenizer)
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                if old.exists() and not path.exists():
                    os.rename(old, path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(self.directory)
        self._tidy()
        kept = [p for p in self._found() if _step(p) <= state.step and not _foreign(p)]
        for other in kept[self.keep :]:
            _remove(other)
        return path

    def newest(
        self,
        note: Callable[[str], object],
        *,
        config: BertConfig | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and of this run, None where there is none.

        Args:
            note: called with file and reason for each that is passed over.
            config: see `load`.
            facts: see `load`.
        """
        for path in self._found():
            try:
                if path.is_symlink():
                    raise ValueError(f"{path}: want a directory, got a link")
                found = load(path, config=config, facts=facts)
                if found.state.step != _step(path):
                    want = f"a name with its step {found.state.step}"
                    raise ValueError(f"{path}: want {want}, got {path.name}")
                return found
            except (ValueError, OSError) as error:
                note(str(error))
        return None

    def path_of(self, step: int, aside: bool = False) -> Path:
        """Return the directory of a step's checkpoint, or of one that has stepped aside."""
        return self.directory / f"step-{step:08}{ASIDE if aside else ''}"

    def _found(self) -> list[Path]:
        """Return what has the name of a checkpoint, the newest first."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        paths = [self.directory / name for name in names if _NAME.fullmatch(name)]
        return sorted(paths, key=lambda path: (_step(path), path.suffix != ASIDE), reverse=True)

    def _tidy(self) -> None:
        """Clear away what killed saves have left; a checkpoint that stepped aside comes back."""
        for name in os.listdir(self.directory):
            path = self.directory / name
            if _LEFT.fullmatch(name) and path.is_dir() and not path.is_symlink():
                _remove_tree(path)
        for path in self._found():
            if path.suffix == ASIDE and not _foreign(path):
                if os.path.lexists(path.with_suffix("")):
                    _remove(path)
                else:
                    os.rename(path, path.with_suffix(""))

    def _check_space(self, need: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < need:
            want = f"{self.directory}: want {need} bytes on the disk for a checkpoint, got {free}"
            raise OSError(errno.ENOSPC, want)


def load(
    path: str | os.PathLike,
    *,
    config: BertConfig | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Read a checkpoint; every byte of it is compared with its manifest.

    Args:
        path: its directory.
        config: of the model it must be of: what decides the results of given weights.
        facts: entries that its facts must have.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another checkpoint, or outside the directory; a weight is
            not finite; it is of another model or run. The message names file, wanted and found.
    """
    path = Path(path)
    manifest = _verify(path)
    found, _ = read_config(path)
    _equal(path / MANIFEST, "config_fingerprint", found.fingerprint(), manifest)
    if config is not None and config.fingerprint() != found.fingerprint():
        others = ", ".join(_differences(config, found))
        raise ValueError(f"{path / CONFIG_FILE}: want the run's model, got one with {others}")
    described = read_json(path, STATE)
    _check_described(path / STATE, described)
    _equal(path / STATE, "step", manifest["step"], described)
    for name, value in (facts or {}).items():
        _equal(path / STATE, name, value, described["facts"])
    state = TrainingState(
        **described,
        weights=read_weights(path),
        moments=read_safetensors(plain_file(path, OPTIMIZER)),
    )
    return Checkpoint(path=path, state=state, config=found)


def _write(
    directory: Path,
    state: TrainingState,
    described: bytes,
    config: BertConfig,
    tokenizer: Tokenizer,
) -> None:
    """Write all files, the manifest last; all of it is on the disk at the end."""
    checkpoint.save_tensors(directory, state.weights, config=config, max_shard_size=2**60)
    tokenizer.save_pretrained(directory)
    with staged(directory) as write:
        sums = checkpoint.write_weights(write, {OPTIMIZER: state.moments})
        write(STATE, [described])
    sums |= read_json(directory, checkpoint.MANIFEST)["files"]
    for name in sorted(os.listdir(directory)):
        _sync(directory / name)  # other tokenizers do not
        if name not in sums:
            sums[name] = _sum(directory / name)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": state.step,
        "config_fingerprint": config.fingerprint(),
        "files": sums,
    }
    with staged(directory) as write:
        write(MANIFEST, [_json(manifest)])


def _verify(directory: Path) -> dict[str, Any]:
    """Return the manifest of a directory whose files are what it says."""
    path, manifest = directory / MANIFEST, read_json(directory, MANIFEST)
    _equal(path, "format", FORMAT, manifest)
    _equal(path, "version", VERSION, manifest)
    if manifest.keys() != _ENTRIES:
        raise ValueError(f"{path}: want {some(_ENTRIES)}, got {some(manifest)}")
    files = manifest["files"]
    if not isinstance(files, dict) or not files.keys() >= _REQUIRED:
        raise ValueError(f"{path}: files: want {some(_REQUIRED)}, got {files!r:.200}")
    for name, want in files.items():
        file = plain_file(directory, name)
        size = file.stat().st_size
        if isinstance(want, dict) and size != want.get("bytes"):
            raise ValueError(f"{file}: want {want.get('bytes')!r:.200} bytes, got {size}")
        if (got := _sum(file)) != want:
            raise ValueError(f"{file}: want {want!r:.200}, got {got}")
    return manifest


def _check_described(path: Path, described: Mapping[str, Any]) -> None:
    """Check the kinds in state.json."""

    def counts(*values: Any) -> bool:
        return all(type(value) is int and value >= 0 for value in values)

    rules = {
        "step": ("an int", counts),
        "position": ("ints", lambda p: isinstance(p, dict) and counts(*p.values())),
        "facts": ("an object", lambda facts: isinstance(facts, dict)),
    }
    if described.keys() != rules.keys():
        raise ValueError(f"{path}: want {some(rules)}, got {some(described)}")
    for name, (want, fits) in rules.items():
        if not fits(described[name]):
            raise ValueError(f"{path}: {name}: want {want}, got {described[name]!r:.200}")


def _equal(path: Path, name: str, want: Any, values: Mapping[str, Any]) -> None:
    if (got := values.get(name)) != want:
        raise ValueError(f"{path}: {name}: want {want!r:.200}, got {got!r:.200}")


def _differences(config: BertConfig, found: BertConfig) -> list[str]:
    """Return the entries of `found` for which its fingerprint is not that of `config`."""
    names = []
    for name in sorted(config.field_names()):
        other = copy.deepcopy(config)
        other.update({name: found.get(name)})
        if other.fingerprint() != config.fingerprint():
            names.append(f"{name} {found.get(name)!r:.50}")
    return names


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _temporary(path: Path) -> Path:
    """Return a name beside a checkpoint for what is not yet, or no longer, one."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp")


def _foreign(path: Path) -> str | None:
    """Return what shows that a directory is not, or not only, a checkpoint of ours."""
    if path.is_symlink() or not path.is_dir():
        return "a link or a file"
    names = set(os.listdir(path))
    if names and MANIFEST not in names and STATE not in names:
        return f"a directory without {MANIFEST} and {STATE}"
    listed = None
    with suppress(ValueError, OSError):
        listed = read_json(path, MANIFEST).get("files")
    other = {name for name in names if not _OURS.fullmatch(name)}
    other -= listed.keys() if isinstance(listed, dict) else set()
    return f"a directory with {some(other)}" if other else None


def _remove(path: Path) -> None:
    """Remove a checkpoint of ours; at no moment it is half there."""
    temporary = _temporary(path)
    try:
        os.rename(path, temporary)
    except OSError as error:
        warnings.warn(f"{path}: cannot be removed: {error}", stacklevel=2)
        return
    _remove_tree(temporary)


def _remove_tree(path: Path) -> None:
    """Remove a directory; what cannot be is tried again at the next save."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        warnings.warn(f"{path}: cannot be removed: {error}", stacklevel=2)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _sum(path: Path) -> dict[str, Any]:
    """Return what the manifest says of a file."""
    digest, count = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
            count += len(block)
    return {"bytes": count, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    """Have the disk hold a file, or a directory's names where the system can do that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows, of a directory
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(handle)
