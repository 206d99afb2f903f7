"""A corpus on the disk: tokens, sentences and documents in memory-mapped arrays, and a manifest.

    manifest.json               what the directory holds and what it was made of
    train-00000.tokens.npy      (N,) uint16, or uint32 for vocabularies above 65,536 tokens
    train-00000.sentences.npy   (S + 1,) int64: where sentences begin and end among the tokens
    train-00000.documents.npy   (D + 1,) int64: where documents do among the sentences
    held_out-00000...           the same of the documents that are kept for evaluation
    tokenizer.json ...          the tokenizer, as transformers opens it

A document lies in one shard as a whole. The directory takes its name when everything in it is on
the disk, the manifest last, so that a directory with a manifest is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
        self.digest = hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()
        where, got = self.path / MANIFEST, self.manifest.get("format")
        if got != FORMAT or self.manifest.get("version") != VERSION:
            want = f"{FORMAT} of version {VERSION}"
            version = self.manifest.get("version")
            raise ValueError(f"{where}: want a {want}, got {got!r:.200} {version!r:.200}")
        splits = self.manifest.get("splits")
        if not isinstance(splits, dict) or not splits.keys() <= {*SPLITS}:
            raise ValueError(f"{where}: splits: want {', '.join(SPLITS)}, got {splits!r:.200}")
        if verify:
            for name, entry in self.manifest["tokenizer"].items():
                _verify(plain_file(self.path, name), entry)
        self._splits = {
            name: Split(name, tuple(self._shard(entry, verify) for entry in split["shards"]))
            for name, split in splits.items()
        }

    @property
    def vocab_size(self) -> int:
        """Every token is less."""
        return self.manifest["vocab_size"]

    def split(self, name: str) -> Split:
        """Return the documents for a purpose, "train" or "held_out".

        Raises:
            ValueError: there are none.
        """
        if name not in self._splits or not self._splits[name].num_documents:
            raise ValueError(f"{self.path}: want documents for {name!r}, got none")
        return self._splits[name]

    def _shard(self, entry: Mapping[str, Any], verify: bool) -> Shard:
        arrays = {}
        for kind in ARRAYS:
            said = entry["files"][kind]
            path = plain_file(self.path, said["name"])
            if (got := path.stat().st_size) != said["bytes"]:
                raise ValueError(f"{path}: want {said['bytes']} bytes, got {got}")
            if verify:
                _verify(path, said)
            arrays[kind] = np.load(path, mmap_mode="r", allow_pickle=False)
        return Shard(**arrays)


class CorpusWriter:
    """Writes a corpus beside its place and moves it there when all is done.

    with CorpusWriter(target, vocab_size=8000) as writer:
        writer.add("train", [ids of a sentence, ids of the next, ...])
        writer.finish({"sources": ...}, save_tokenizer=tokenizer.save_pretrained)

    Leaving the block without `finish`, or with an exception, leaves nothing behind.
    """

    def __init__(self, target: Path, *, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        """Make the directory in which is written, beside the target.

        Args:
            target: where the corpus goes; there must be nothing, or an empty directory.
            vocab_size: every token is less.
            shard_tokens: a shard ends behind the document with which it has so many.

        Raises:
            FileExistsError: something is there.
        """
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target}: want a new or empty directory, got one with files")
        self.target, self.vocab_size, self._most = target, vocab_size, shard_tokens
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._parts: dict[str, _Part] = {name: _Part() for name in SPLITS}
        self._shards: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
        target.parent.mkdir(parents=True, exist_ok=True)
        self.directory = target.parent / f".{target.name}.{os.getpid()}.tmp"
        shutil.rmtree(self.directory, ignore_errors=True)  # of a process that is dead
        self.directory.mkdir()

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def add(self, split: str, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append a document.

        Args:
            split: "train" or "held_out".
            tokens: (n,) integers, the ids of all its sentences behind one another.
            lengths: how many each of its sentences has; none of them 0.
        """
        part = self._parts[split]
        part.tokens.append(np.asarray(tokens, self._dtype))
        part.lengths.append(np.asarray(lengths, np.int64))
        part.count += len(tokens)
        if part.count >= self._most:
            self._flush(split)

    def finish(self, facts: Mapping[str, Any], save_tokenizer: Any) -> Path:
        """Write the rest and the manifest, and put the directory in its place.

        Args:
            facts: what else the manifest says: sources, problems, options.
            save_tokenizer: called with the directory; returns the paths of the files it wrote.
        """
        for name in SPLITS:
            if self._parts[name].tokens:
                self._flush(name)
        files = [Path(path) for path in save_tokenizer(self.directory)]
        manifest = {"format": FORMAT, "version": VERSION, "vocab_size": self.vocab_size}
        manifest["tokenizer"] = {path.name: _entry(path) for path in files}
        manifest["splits"] = {
            name: {
                **{kind: sum(shard[kind] for shard in shards) for kind in reversed(ARRAYS)},
                "shards": shards,
            }
            for name, shards in self._shards.items()
        }
        with open(self.directory / MANIFEST, "wb") as file:
            file.write((json.dumps(manifest | dict(facts), indent=1) + "\n").encode())
        for path in self.directory.iterdir():
            _sync(path)
        _sync(self.directory)
        if self.target.exists():
            self.target.rmdir()  # it is empty
        os.rename(self.directory, self.target)
        _sync(self.target.parent)
        return self.target

    def _flush(self, split: str) -> None:
        part, self._parts[split] = self._parts[split], _Part()
        shards = self._shards[split]
        lengths = np.concatenate(part.lengths)
        arrays = {
            "tokens": np.concatenate(part.tokens),
            "sentences": np.concatenate([[0], np.cumsum(lengths)]),
            "documents": np.concatenate([[0], np.cumsum([*map(len, part.lengths)])]),
        }
        files = {}
        for kind, array in arrays.items():
            path = self.directory / f"{split}-{len(shards):05}.{kind}.npy"
            with open(path, "wb") as file:
                np.save(file, array if kind == "tokens" else array.astype(np.int64))
            files[kind] = {"name": path.name} | _entry(path)
        counts = {
            "documents": len(part.lengths),
            "sentences": len(lengths),
            "tokens": len(arrays["tokens"]),
        }
        shards.append(counts | {"files": files})


class _Part:
    """What is collected for the next shard."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []
        self.count = 0


def _entry(path: Path) -> dict[str, Any]:
    """Return what the manifest says of a file."""
    digest, size = hashlib.sha256(), 0
    for block in _blocks(path):
        digest.update(block)
        size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _verify(path: Path, said: Mapping[str, Any]) -> None:
    got = _entry(path)
    for what, value in got.items():
        if said.get(what) != value:
            raise ValueError(f"{path}: {what}: want {said.get(what)!r:.200}, got {value}")


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        yield from iter(lambda: file.read(_BLOCK), b"")


def _sync(path: Path) -> None:
    """Have the disk hold a file, or a directory's names, where the system can say so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(handle)
