"""A corpus on the disk: tokens, sentences and documents in memory-mapped arrays, and a manifest.

    manifest.json               what the directory holds and what it was made of
    train-00000.tokens.npy      (N,) uint16, or uint32 for vocabularies above 65,536 tokens
    train-00000.sentences.npy   (S + 1,) int64: where sentences begin and end among the tokens
    train-00000.documents.npy   (D + 1,) int64: where documents do among the sentences
    held_out-00000...           the same of the documents that are kept for evaluation
    tokenizer.json ...          the tokenizer, as transformers opens it

A document lies in one shard as a whole. The manifest comes last, so that a directory that has one
is complete.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.files import plain_file, read_json

MANIFEST = "manifest.json"
FORMAT, VERSION = "bert_fast corpus", 1
SPLITS = ("train", "held_out")
ARRAYS = ("tokens", "sentences", "documents")
SHARD_TOKENS = 2**26
_BLOCK = 1 << 20
_LEFT = re.compile(r"\.[0-9a-f]{16}\.tmp", re.ASCII)  # of writers that were killed


@dataclass(frozen=True)
class Shard:
    """Some documents of a split.

    Attributes:
        tokens: (N,) uint16 or uint32.
        sentences: (S + 1,) int64, where sentences begin and end among the tokens.
        documents: (D + 1,) int64, where documents begin and end among the sentences.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray

    @property
    def num_sentences(self) -> int:
        """S."""
        return len(self.sentences) - 1

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.documents) - 1


@dataclass(frozen=True)
class Split:
    """The documents for one purpose.

    Attributes:
        name: "train" or "held_out".
        shards: in order.
    """

    name: str
    shards: tuple[Shard, ...]

    @cached_property
    def num_documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.num_documents for shard in self.shards)

    @cached_property
    def num_sentences(self) -> int:
        """Sentences in all shards."""
        return sum(shard.num_sentences for shard in self.shards)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return sum(len(shard.tokens) for shard in self.shards)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Return how often each token is there, (vocab_size,) int64."""
        counts = np.zeros(vocab_size, np.int64)
        for shard in self.shards:
            for begin in range(0, len(shard.tokens), _BLOCK):
                block = shard.tokens[begin : begin + _BLOCK]
                counts += np.bincount(block, minlength=vocab_size)
        return counts


class Corpus:
    """A directory of shards, open.

    Attributes:
        path: the directory.
        manifest: what stands in its manifest.json.
        digest: SHA-256 of that file, which holds those of all others: the corpus's identity.
    """

    def __init__(self, path: str | os.PathLike, *, verify: bool = True) -> None:
        """Open a directory that `CorpusWriter` made.

        Args:
            path: of the directory.
            verify: read every file once and compare its SHA-256 with the manifest.

        Raises:
            FileNotFoundError: no directory, or none with a manifest.
            ValueError: a file is not what the manifest says, or the manifest is of something else.
        """
        self.path = Path(path)
        self.manifest = read_json(self.path, MANIFEST)
        self.digest = _entry(self.path / MANIFEST)["sha256"]
        where, get = self.path / MANIFEST, self.manifest.get
        if get("format") != FORMAT or get("version") != VERSION:
            got = f"{get('format')!r:.200} {get('version')!r:.200}"
            raise ValueError(f"{where}: want a {FORMAT} of version {VERSION}, got {got}")
        try:
            if verify:
                for name, said in self.manifest["tokenizer"].items():
                    _verify(plain_file(self.path, name), said)
            self.vocab_size = int(self.manifest["vocab_size"])  # every token is less
            self._splits = {
                name: Split(name, tuple(self._shard(said, verify) for said in split["shards"]))
                for name, split in self.manifest["splits"].items()
            }
        except (AttributeError, KeyError, TypeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where}: want the entries of a {FORMAT}, got {got}") from error

    def num_documents(self, name: str) -> int:
        """Return how many documents there are for a purpose."""
        return self._splits[name].num_documents if name in self._splits else 0

    def split(self, name: str) -> Split:
        """Return the documents for a purpose, "train" or "held_out".

        Raises:
            ValueError: there are none.
        """
        if not self.num_documents(name):
            raise ValueError(f"{self.path}: want documents for {name!r}, got none")
        return self._splits[name]

    def _shard(self, said: Mapping[str, Any], verify: bool) -> Shard:
        arrays = {}
        for kind in ARRAYS:
            file = said["files"][kind]
            path = plain_file(self.path, file["name"])
            if (got := path.stat().st_size) != file["bytes"]:
                raise ValueError(f"{path}: want {file['bytes']} bytes, got {got}")
            if verify:
                _verify(path, file)
            arrays[kind] = _mapped(path)
            self._check(path, kind, arrays[kind], said)
        inner = [len(arrays[kind]) for kind in ARRAYS[:2]]
        for kind, end in zip(ARRAYS[1:], (inner[0], inner[1] - 1), strict=True):
            if arrays[kind][0] != 0 or arrays[kind][-1] != end:
                got = f"{arrays[kind][0]} to {arrays[kind][-1]}"
                raise ValueError(f"{self.path}: {kind}: want borders from 0 to {end}, got {got}")
        return Shard(**arrays)

    def _check(self, path: Path, kind: str, got: np.ndarray, said: Mapping[str, Any]) -> None:
        dtype = _dtype(self.vocab_size) if kind == "tokens" else np.dtype(np.int64)
        length = said[kind] + (kind != "tokens")
        if got.dtype != dtype or got.shape != (length,):
            want = f"{dtype} {[length]}"
            raise ValueError(f"{path}: want {want}, got {got.dtype} {[*got.shape]}")


class CorpusWriter:
    """Writes a corpus under other names, and gives the files their own when all is done.

    with CorpusWriter(target, vocab_size=8000) as writer:
        writer.add("train", tokens of a document, lengths of its sentences)
        writer.finish({"sources": ...}, save_tokenizer=tokenizer.save_pretrained)

    Leaving the block without `finish`, or with an exception, leaves nothing behind.
    """

    def __init__(
        self,
        target: str | os.PathLike,
        *,
        vocab_size: int,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        """Make the directory, and in it one in which is written.

        Args:
            target: where the corpus goes; there must be nothing, or an empty directory.
            vocab_size: every token is less.
            shard_tokens: a shard ends behind the document with which it has so many.

        Raises:
            FileExistsError: something is there.
        """
        self.target, self.vocab_size, self._most = Path(target), vocab_size, shard_tokens
        self._made = not self.target.exists()
        if not self._made:
            if not self.target.is_dir():
                raise FileExistsError(f"{target}: want a new or empty directory, got a file")
            for path in self.target.iterdir():
                if not _LEFT.fullmatch(path.name):
                    want = "a new or empty directory"
                    raise FileExistsError(f"{target}: want {want}, got one with {path.name}")
                shutil.rmtree(path)
        self._directory = self.target / f".{secrets.token_hex(8)}.tmp"
        self._directory.mkdir(parents=True)
        self._parts = {name: _Part(vocab_size) for name in SPLITS}
        self._shards: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._made and not any(self.target.iterdir()):
            self.target.rmdir()

    def add(
        self, split: str, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray
    ) -> None:
        """Append a document.

        Args:
            split: "train" or "held_out".
            tokens: (n,) integers, the ids of all its sentences behind one another.
            lengths: how many each of its sentences has, at least one.

        Raises:
            ValueError: another split, an id out of range, lengths that are not those of n tokens.
        """
        if split not in self._parts:
            raise ValueError(f"split: want {' or '.join(SPLITS)}, got {split!r}")
        part = self._parts[split]
        part.add(np.asarray(tokens), np.asarray(lengths, np.int64))
        if len(part.tokens) >= self._most:
            self._flush(split)

    def finish(
        self,
        facts: Mapping[str, Any],
        save_tokenizer: Callable[[Path], Iterable[str | os.PathLike]],
    ) -> Path:
        """Write the rest, give the files their names, and write the manifest.

        Args:
            facts: what else the manifest says: sources, problems, options.
            save_tokenizer: called with a directory; returns the paths of the files it wrote there.
        """
        for name in SPLITS:
            self._flush(name)
        files = [Path(path) for path in save_tokenizer(self._directory)]
        manifest = {
            **facts,
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": self.vocab_size,
            "tokenizer": {path.name: _entry(path) for path in files},
            "splits": {
                name: {
                    **{kind: sum(shard[kind] for shard in shards) for kind in ARRAYS},
                    "shards": shards,
                }
                for name, shards in self._shards.items()
            },
        }
        with open(self._directory / MANIFEST, "wb") as file:
            file.write((json.dumps(manifest, indent=1) + "\n").encode())
        names = sorted(os.listdir(self._directory), key=lambda name: name == MANIFEST)
        for name in names:
            _sync(self._directory / name)
        for name in names[:-1]:
            os.rename(self._directory / name, self.target / name)
        _sync(self.target)
        os.rename(self._directory / MANIFEST, self.target / MANIFEST)
        _sync(self.target)
        return self.target

    def _flush(self, split: str) -> None:
        """Write what was collected as a shard."""
        part, self._parts[split] = self._parts[split], _Part(self.vocab_size)
        if not part.tokens:
            return
        shards, files = self._shards[split], {}
        for kind in ARRAYS:
            path = self._directory / f"{split}-{len(shards):05}.{kind}.npy"
            values = np.frombuffer(getattr(part, kind), getattr(part, kind).typecode)
            try:
                with open(path, "wb") as file:
                    np.save(file, values)
            except OSError as error:  # NumPy's own, of a full disk, says neither number nor file
                number, reason = error.errno or errno.ENOSPC, error.strerror or str(error)
                raise OSError(number, reason, str(self.target / path.name)) from error
            files[kind] = {"name": path.name} | _entry(path)
        counts = {
            "documents": len(part.documents) - 1,
            "sentences": len(part.sentences) - 1,
            "tokens": len(part.tokens),
        }
        shards.append(counts | {"files": files})


class _Part:
    """What is collected for the next shard: the three arrays, growing."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.tokens = array(_dtype(vocab_size).char)
        self.sentences, self.documents = array("q", [0]), array("q", [0])

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if not len(lengths) or lengths.min() < 1 or lengths.sum() != len(tokens):
            want = f"sentences of 1 token or more, {len(tokens)} together"
            raise ValueError(f"lengths: want {want}, got {[*lengths[:5]]} of {lengths.sum()}")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            got = f"{tokens.min()} to {tokens.max()}"
            raise ValueError(f"tokens: want 0 to {self._vocab_size - 1}, got {got}")
        ends = len(self.tokens) + np.cumsum(lengths)
        self.tokens.frombytes(tokens.astype(self.tokens.typecode).tobytes())
        self.sentences.frombytes(ends.tobytes())
        self.documents.append(len(self.sentences) - 1)


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _entry(path: Path) -> dict[str, Any]:
    """Return what the manifest says of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _mapped(path: Path) -> np.ndarray:
    """Return an array of a file, which is not read yet."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: want an array of NumPy, got something else") from error


def _verify(path: Path, said: Mapping[str, Any]) -> None:
    for what, got in _entry(path).items():
        if said[what] != got:
            raise ValueError(f"{path}: {what}: want {said[what]!r:.200}, got {got}")


def _sync(path: Path) -> None:
    """Have the disk hold a file, or a directory's names, where the system can say so."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if path.is_file():
            raise
