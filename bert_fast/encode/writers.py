"""Vectors into files: how the rows of a chunk are kept, and how the chunks become one file.

A line that was skipped keeps its place: NaN in .npy, null in .jsonl and .parquet.
"""

import importlib.util
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from bert_fast.data.readers import Row

PRECISIONS = ("float32", "float16")
_GROUP_BYTES = 32_000_000  # of vectors in a row group of a .parquet file


@dataclass(frozen=True)
class Rows:
    """The rows of one chunk.

    Attributes:
        rows: as they were read.
        files: name of each row's input, or empty where there is only one.
        vectors: (rows, D); NaN where there is no text.
    """

    rows: Sequence[Row]
    files: Sequence[str]
    vectors: np.ndarray


@dataclass(frozen=True)
class NpyWriter:
    """A matrix (rows, D) for numpy.load, also with mmap_mode; row i is the i-th row of input."""

    suffix: ClassVar[str] = ".npy"
    dtype: np.dtype
    dimension: int

    def part(self, chunk: Rows) -> Iterator[bytes | memoryview]:
        """Yield the bytes that keep a chunk."""
        yield memoryview(np.ascontiguousarray(chunk.vectors)).cast("B")

    def join(self, parts: Iterable[Path], rows: int, file: BinaryIO) -> None:
        """Write the file that the parts, with so many rows together, become."""
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        shape = (rows, self.dimension)
        np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
        _concatenate(parts, file)


@dataclass(frozen=True)
class JsonlWriter:
    """An object a row: file (of several), line, text (if kept), embedding."""

    suffix: ClassVar[str] = ".jsonl"
    dtype: np.dtype
    dimension: int
    keep_text: bool

    def part(self, chunk: Rows) -> Iterator[bytes]:
        """Yield the bytes that keep a chunk."""
        digits = {2: 5, 4: 9}[self.dtype.itemsize]  # what brings back the same bits
        form = "[" + ", ".join([f"%.{digits}g"] * self.dimension) + "]"
        for i, row in enumerate(chunk.rows):
            fields: dict[str, Any] = {"file": chunk.files[i]} if chunk.files else {}
            fields["line"] = row.line
            if self.keep_text:
                fields["text"] = row.text
            vector = "null" if row.text is None else form % tuple(chunk.vectors[i].tolist())
            start = json.dumps(fields, ensure_ascii=False)[:-1]
            yield f'{start}, "embedding": {vector}}}\n'.encode()

    def join(self, parts: Iterable[Path], rows: int, file: BinaryIO) -> None:
        """Write the file that the parts become."""
        _concatenate(parts, file)


@dataclass(frozen=True)
class ParquetWriter:
    """Columns file (of several), line, text (if kept), embedding (a list of D)."""

    suffix: ClassVar[str] = ".parquet"
    dtype: np.dtype
    dimension: int
    keep_text: bool
    several: bool

    def part(self, chunk: Rows) -> Iterator[memoryview]:
        """Yield the bytes that keep a chunk."""
        import pyarrow as pa

        missing = np.array([row.text is None for row in chunk.rows])
        flat = pa.array(np.ascontiguousarray(chunk.vectors).reshape(-1))
        columns = {
            "file": chunk.files,
            "line": [row.line for row in chunk.rows],
            "text": [row.text for row in chunk.rows],
            "embedding": pa.FixedSizeListArray.from_arrays(
                flat, type=self._schema().field("embedding").type, mask=pa.array(missing)
            ),
        }
        wanted = {name: columns[name] for name in self._schema().names}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema()) as stream:
            stream.write_table(pa.table(wanted, schema=self._schema()))
        yield memoryview(sink.getvalue())

    def join(self, parts: Iterable[Path], rows: int, file: BinaryIO) -> None:
        """Write the file that the parts become, many of them in a row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        held, size = [], 0
        with pq.ParquetWriter(file, self._schema(), use_dictionary=False) as writer:
            for part in parts:
                with pa.OSFile(str(part), "rb") as source, pa.ipc.open_stream(source) as stream:
                    held.append(stream.read_all())
                size += held[-1].num_rows * self.dimension * self.dtype.itemsize
                if size >= _GROUP_BYTES:
                    writer.write_table(pa.concat_tables(held), row_group_size=1 << 30)
                    held, size = [], 0
            if held:
                writer.write_table(pa.concat_tables(held), row_group_size=1 << 30)

    def _schema(self) -> Any:
        import pyarrow as pa

        number = pa.float32() if self.dtype.itemsize == 4 else pa.float16()
        fields = [("file", pa.string())] if self.several else []
        fields.append(("line", pa.int64()))
        if self.keep_text:
            fields.append(("text", pa.string()))
        return pa.schema([*fields, ("embedding", pa.list_(number, self.dimension))])


Writer = NpyWriter | JsonlWriter | ParquetWriter


def check_output(target: Path, precision: str = "float32", keep_text: bool = False) -> None:
    """Check that an output of this name can be written.

    Raises:
        ValueError: another suffix or precision, or texts for .npy.
        ImportError: .parquet, and pyarrow is not installed.
    """
    suffixes = [kind.suffix for kind in (NpyWriter, JsonlWriter, ParquetWriter)]
    suffix = target.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"{target}: want {', '.join(suffixes)}, got {suffix or 'no suffix'}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: want {' or '.join(PRECISIONS)}, got {precision!r}")
    if suffix == ".npy" and keep_text:
        raise ValueError(f"{target}: want .jsonl or .parquet to keep the texts, got .npy")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{target}: .parquet needs `pip install pyarrow`")


def writer_of(
    target: Path, dimension: int, precision: str, keep_text: bool, several: bool
) -> Writer:
    """Return what writes the output of this name; `several`: rows say which input is theirs."""
    check_output(target, precision, keep_text)
    dtype, suffix = np.dtype(precision), target.suffix.lower()
    if suffix == ".npy":
        return NpyWriter(dtype, dimension)
    if suffix == ".jsonl":
        return JsonlWriter(dtype, dimension, keep_text)
    return ParquetWriter(dtype, dimension, keep_text, several)


def _concatenate(parts: Iterable[Path], file: BinaryIO) -> None:
    for part in parts:
        with open(part, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
