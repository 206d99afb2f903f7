"""Files of texts into a file of vectors: in bounded memory, restartable, by several processes.

The texts are taken in chunks of fixed size. Each chunk is encoded by itself and kept as a part
(work.py); at the end the parts become the output. So whatever is killed and started again, and
however many processes share the chunks, the output has the same bytes.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bert_fast.data.readers import STDIN, Reader, Row
from bert_fast.encode.peers import Peers, ranks
from bert_fast.encode.work import Work
from bert_fast.encode.writers import Rows, Writer, check_output, writer_of
from bert_fast.ops.invariant import is_batch_invariant
from bert_fast.ops.products import cpu_library, fixed_cpu_library

CHUNK = 1024
_CHUNK_CHARACTERS = 8_000_000  # a chunk ends with the text that reaches this
_NOTES = 20  # of lines by name; then they are only counted


@dataclass(frozen=True)
class Summary:
    """What was done.

    Attributes:
        output: the file that was written.
        rows: in it, those of skipped lines included.
        dimension: of a vector.
        encoded: rows that this process encoded in this run.
        skipped: lines without a vector.
        replaced: lines in which something became U+FFFD.
        cut: texts of which only the first part was read.
    """

    output: Path
    rows: int
    dimension: int
    encoded: int
    skipped: int
    replaced: int
    cut: int


@dataclass
class _Chunk:
    """Texts that are encoded together.

    Attributes:
        number: of the chunk, from 0.
        rows: what was read.
        sources: index of each row's input.
        position: bytes of all inputs read until its end.
    """

    number: int
    rows: list[Row] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    position: int = 0

    def part(self) -> str:
        """Return the name of its part: another for other texts or line numbers."""
        digest = hashlib.blake2b(digest_size=16)
        for source, (line, text) in zip(self.sources, self.rows, strict=True):
            raw = b"" if text is None else text.encode()
            digest.update(b"%d %d %d\n" % (source, line, -1 if text is None else len(raw)))
            digest.update(raw)
        return f"part-{self.number:08d}-{digest.hexdigest()}"


def check_files(
    sources: Sequence[str],
    target: str | os.PathLike,
    *,
    precision: str = "float32",
    keep_text: bool = False,
    overwrite: bool = False,
) -> None:
    """Check what can be checked before a model is loaded; arguments as for `encode_file`."""
    target = Path(target)
    check_output(target, precision, keep_text)
    if not sources:
        raise ValueError("sources: want at least one input, got none")
    world = ranks()[1]
    for source in sources:
        if source == STDIN:
            if sources.count(source) > 1:
                raise ValueError("-: want the standard input once, got it twice")
        elif os.path.isdir(source):
            raise IsADirectoryError(f"{source}: want a file, got a directory")
        elif not os.path.exists(source):
            raise FileNotFoundError(f"{source}: want a file, got nothing")
        elif target.exists() and os.path.samefile(source, target):
            raise ValueError(f"{target}: want another file than the input")
        if world > 1 and (source == STDIN or not os.path.isfile(source)):
            raise ValueError(f"{source}: want a file, which {world} processes can read, got a pipe")
    Work(target, sources, overwrite).check()


def encode_file(
    encoder: Any,
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    target: str | os.PathLike,
    *,
    format: str | None = None,
    column: str = "text",
    errors: str = "strict",
    batch_size: int = 32,
    prompt: str | None = None,
    prompt_name: str | None = None,
    precision: str = "float32",
    keep_text: bool = False,
    chunk: int = CHUNK,
    overwrite: bool = False,
    fingerprint: str | None = None,
    note: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int, int], None] = lambda position, rows, encoded: None,
    patience: float = 60.0,
) -> Summary:
    """Encode the texts of files into one file of vectors, in the order of the input.

    A run that was killed goes on where it stopped when it is called again with the same arguments.
    Under a launcher that sets RANK and WORLD_SIZE each process encodes its share of the chunks, and
    the first writes the output; every process returns when it is there.

    Args:
        encoder: an `Encoder`, or anything with its `encode`.
        sources: paths, or "-" for the standard input; see readers.py for what a row is.
        target: name of a .npy, .jsonl or .parquet file.
        format: "txt", "jsonl", "csv" or "parquet"; None: by the suffix of each input.
        column: field of a JSON line, column of a CSV or Parquet file.
        errors: "strict", "skip" or "replace", as for `readers.Reader`. A skipped line has a row
            of NaN in .npy and null in .jsonl and .parquet.
        batch_size: as for `Encoder.encode`.
        prompt: as for `Encoder.encode`.
        prompt_name: as for `Encoder.encode`.
        precision: "float32" or "float16".
        keep_text: write the texts into .jsonl and .parquet too.
        chunk: texts that are encoded together: what a kill can cost.
        overwrite: replace an output that is there, and discard another run's work on it.
        fingerprint: what tells one encoder from another; None: a hash of its weights, vocabulary
            and settings.
        note: called with a line of text about lines that were skipped, changed or cut, in the first
            process.
        progress: called after each chunk with bytes read, rows read and rows encoded here.
        patience: seconds after which another process that shows no sign of life counts as dead.

    Returns:
        A `Summary`.

    Raises:
        BadLineError: a line has no text, and errors is not "skip".
        ValueError: an argument; the work directory belongs to a run with other arguments; the
            encoder gives something else than finite vectors.
        OSError: the output is there already, or a file cannot be read or written.
        RuntimeError: another process failed or died.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    names, target = [os.fspath(source) for source in sources], Path(target)
    if chunk < 1:
        raise ValueError(f"chunk: want 1 or more, got {chunk}")
    check_files(names, target, precision=precision, keep_text=keep_text, overwrite=overwrite)
    rank, world = ranks()
    notes = _Notes(note if rank == 0 else lambda message: None)
    readers = [
        Reader(name, format=format, column=column, errors=errors, note=notes) for name in names
    ]
    work = Work(target, names, overwrite)
    settings = {"batch_size": batch_size, "prompt": prompt, "prompt_name": prompt_name}
    with Peers(work.path, rank, world, patience=patience) as peers:
        dimension = encoder.get_sentence_embedding_dimension()
        manifest = {
            "model": fingerprint or fingerprint_of(encoder),
            "software": _software(encoder),
            "inputs": names,
            "output": target.suffix.lower(),
            "precision": precision,
            "keep_text": keep_text,
            "chunk": chunk,
            **settings,
            **({"batch_invariant": True} if is_batch_invariant() else {}),
        }
        writer = writer_of(target, dimension, precision, keep_text, len(names) > 1)
        encode = _Encode(encoder, settings, writer, names)
        parts: list[str] = []
        rows = encoded = 0
        done = work.begin(manifest, peers, lambda: {"cpu_library": cpu_library()})
        for part in _chunks(readers, chunk):
            name = part.part()
            if not done and part.number % world == rank and not work.has(name):
                with fixed_cpu_library(work.measured["cpu_library"]):
                    work.keep(name, encode(part))
                encoded += len(part.rows)
            parts.append(name)
            rows += len(part.rows)
            progress(part.position, rows, encoded)
            if peers.others:
                peers.look(peers.others)
        peers.ready()
        if rank == 0:
            if not done:
                _wait_for(parts, work, peers)
                paths = [work.path / name for name in parts]
                work.publish(lambda file: writer.join(paths, rows, file))
            _leave_together(peers)
            work.remove()
        else:
            peers.wait(lambda: not work.is_there(), of=[0])
    notes.close()
    return Summary(
        output=target,
        rows=rows,
        dimension=dimension,
        encoded=encoded,
        skipped=sum(reader.skipped for reader in readers),
        replaced=sum(reader.replaced for reader in readers),
        cut=sum(reader.cut for reader in readers),
    )


def fingerprint_of(encoder: Any) -> str:
    """Return a hash of what decides the vectors: weights, configuration, vocabulary, settings."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    tokenizer = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of its last call
        tokenizer.pop(state, None)
    settings = [encoder.model.config.to_dict(), repr(encoder.pipeline), encoder.max_seq_length]
    digest.update(json.dumps([tokenizer, *settings], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _software(encoder: Any) -> str:
    """What else has a say in the last bits of a vector."""
    device = torch.device(getattr(encoder, "device", "cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    version = sys.modules["bert_fast"].__version__
    return f"bert_fast {version}, torch {torch.__version__}, {name}"


@dataclass(frozen=True)
class _Encode:
    """From a chunk to the bytes of its part."""

    encoder: Any
    settings: dict[str, Any]
    writer: Writer
    names: Sequence[str]

    def __call__(self, part: _Chunk) -> Iterator[bytes | memoryview]:
        """Yield the bytes.

        Raises:
            ValueError: the encoder gives other shapes, or numbers that are not finite.
        """
        writer = self.writer
        here = [i for i, row in enumerate(part.rows) if row.text is not None]
        vectors = np.full((len(part.rows), writer.dimension), np.nan, writer.dtype)
        if here:
            texts = [part.rows[i].text for i in here]
            got = self.encoder.encode(texts, show_progress_bar=False, **self.settings)
            want = (len(here), writer.dimension)
            if np.shape(got) != want:
                raise ValueError(f"encoder: want vectors of shape {want}, got {np.shape(got)}")
            with np.errstate(over="ignore"):
                vectors[here] = got
            if not np.isfinite(vectors[here]).all():
                bad = here[int((~np.isfinite(vectors[here])).any(1).argmax())]
                where = f"{self.names[part.sources[bad]]}:{part.rows[bad].line}"
                raise ValueError(f"{where}: want a finite vector in {writer.dtype}, got another")
        files = [self.names[i] for i in part.sources] if len(self.names) > 1 else []
        yield from writer.part(Rows(part.rows, files, vectors))


class _Notes:
    """Passes the first notes on, and counts the others."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note, self._count = note, 0

    def __call__(self, kind: str, message: str) -> None:
        self._count += 1
        if self._count <= _NOTES:
            self._note(message)

    def close(self) -> None:
        if self._count > _NOTES:
            self._note(f"and {self._count - _NOTES:,} more such lines")


def _chunks(readers: Sequence[Reader], size: int) -> Iterator[_Chunk]:
    """Yield the texts of all inputs in chunks whose borders the texts alone decide."""
    chunk, characters, before = _Chunk(0), 0, 0
    for source, reader in enumerate(readers):
        for row in reader:
            chunk.rows.append(row)
            chunk.sources.append(source)
            characters += len(row.text or "")
            if len(chunk.rows) >= size or characters >= _CHUNK_CHARACTERS:
                chunk.position = before + reader.position
                yield chunk
                chunk, characters = _Chunk(chunk.number + 1), 0
        before += reader.position
    if chunk.rows:
        chunk.position = before
        yield chunk


def _wait_for(parts: Sequence[str], work: Work, peers: Peers) -> None:
    """Wait for the parts that are the others' share."""
    for number, name in enumerate(parts):
        if number % peers.world != peers.rank:
            peers.wait(lambda name=name: work.has(name), of=[number % peers.world])


def _leave_together(peers: Peers) -> None:
    """Wait until every other process has seen that its share is done.

    The output is whole; a process that dies now, or never comes, spoils nothing.
    """
    if peers.others:
        try:
            peers.wait(peers.are_ready, of=peers.others)
        except RuntimeError:
            pass
