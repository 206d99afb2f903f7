"""Texts out of files: lines, JSON lines, CSV and Parquet, a bounded piece of a file at a time.

A text that cannot be had is named by file and line. What counts as a line, and so gets a row in
the output: in a text file every line, also an empty one; in JSON lines and CSV every record, while
lines with nothing on them are passed over; in Parquet every record, whose number is its "line". LF
and CRLF end a line; a byte order mark is dropped. Files whose names end in .gz or .xz are
decompressed on the way.
"""

import codecs
import gzip
import importlib.util
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bert_fast.data.records import NOT_UTF8, CsvRecords, ParquetError, decoded, names, parquet_texts

FORMATS = ("txt", "jsonl", "csv", "parquet")
ERRORS = ("strict", "skip", "replace", "repair")
LONG = ("cut", "split")
STDIN = "-"
MAX_CHARACTERS = 1_000_000  # of a text; the rest of it is dropped, or becomes further texts
MAX_RECORD = 16_000_000  # bytes of a JSON line or a CSV record, which have no sense in part
_BUFFER = 1 << 20
_FORMAT_OF = {"": "txt", ".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
_FORMAT_OF[".parquet"] = "parquet"
_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}
_LAST_WORD = re.compile(r"\s\S*\Z")
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadLineError(ValueError):
    """A line that no text can be read from; its message begins with FILE:LINE."""


class Row(NamedTuple):
    """One text.

    Attributes:
        line: number of its line, or of the first of its record's lines; the first line is 1.
        text: None if the line was skipped.
    """

    line: int
    text: str | None


def format_of(source: str, wanted: str | None = None) -> str:
    """Return the format of an input: the wanted one, else what the suffix of its name says.

    Raises:
        ValueError: there is no such format, or the suffix says nothing.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            raise ValueError(f"format: want {', '.join(FORMATS)}, got {wanted!r}")
        return wanted
    path = Path("" if source == STDIN else source)
    if path.suffix.lower() in _COMPRESSED:
        path = path.with_suffix("")
    suffix = path.suffix.lower()
    if suffix not in _FORMAT_OF:
        want = f"a format ({', '.join(FORMATS)})"
        raise ValueError(f"{source}: want {want}: the suffix {suffix} does not tell it")
    return _FORMAT_OF[suffix]


def total_size(sources: Iterable[str]) -> int | None:
    """Return the bytes of all inputs as they lie on the disk; None if a pipe is among them."""
    sizes = [os.stat(name).st_size if os.path.isfile(name) else None for name in sources]
    return None if None in sizes else sum(sizes)


class Reader:
    """The texts of one file.

    Attributes:
        position: bytes of the file, as it lies on the disk, that were read.
        skipped: lines without a text.
        replaced: texts in which something became U+FFFD.
        cut: texts longer than MAX_CHARACTERS that were cut.
        split: those that became several.
    """

    def __init__(
        self,
        source: str,
        *,
        format: str | None = None,
        column: str = "text",
        errors: str = "strict",
        long: str = "cut",
        note: Callable[[str, str], None] = lambda kind, message: None,
    ) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            source: a path, or "-" for the standard input.
            format: "txt", "jsonl", "csv" or "parquet"; None: by the suffix.
            column: field of a JSON line, column of a CSV or Parquet file.
            errors: what a line is answered with that is not UTF-8, holds NUL or half a surrogate
                pair: "strict" raises, "skip" gives a row without text, "replace" puts U+FFFD, which
                a tokenizer drops, where the damage is. A line without a text of its own (broken
                JSON, no such field, a CSV record with other fields than the header) is raised for,
                or with "skip" skipped. "repair" replaces what can be replaced and skips the rest.
            long: of a text with more than MAX_CHARACTERS, "cut" keeps the first; "split" makes
                several of it, each with the number of its line, and what stands in none of them
                is white space. Both divide at white space where there is any.
            note: called for each line that was skipped, changed or cut, with what of that it was
                ("skipped", "replaced", "cut", "split") and a line of text.

        Raises:
            ValueError: format, errors or long is none of these; Parquet inside another compression
                or from the standard input.
            ImportError: Parquet, and pyarrow is not installed.
        """
        if errors not in ERRORS:
            raise ValueError(f"errors: want {', '.join(ERRORS)}, got {errors!r}")
        if long not in LONG:
            raise ValueError(f"long: want {', '.join(LONG)}, got {long!r}")
        self.source, self.format = source, format_of(source, format)
        if self.format == "parquet":
            if source == STDIN or Path(source).suffix.lower() in _COMPRESSED:
                raise ValueError(f"{source}: want a file of Parquet that is not compressed again")
            if importlib.util.find_spec("pyarrow") is None:
                raise ImportError(f"{source}: .parquet needs `pip install pyarrow`")
        self.name = "<stdin>" if source == STDIN else source
        self.column, self.errors, self.long, self._note = column, errors, long, note
        self._repairs, self._skips = errors in ("replace", "repair"), errors in ("skip", "repair")
        self.position = self.skipped = self.replaced = self.cut = self.split = 0
        self._offset = self._number = 0  # bytes and lines of text that were read

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows in order.

        Raises:
            BadLineError: for a line, as `errors` has it; always for a file without the column, and
                where compressed data or a Parquet file are damaged.
            OSError: the file cannot be read.
        """
        read = {
            "txt": self._plain if self.long == "cut" else self._plain_in_pieces,
            "jsonl": self._json,
            "csv": self._csv,
            "parquet": self._parquet,
        }[self.format]
        with _opened(self.source) as (file, on_disk):
            try:
                for row in read(file):
                    self.position = self._offset if on_disk is None else on_disk.tell()
                    yield row
                self.position = self._offset if on_disk is None else on_disk.tell()
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                where = f"{self.name}:{self._number + 1}"
                raise BadLineError(f"{where}: want whole compressed data, got: {error}") from error

    def _lines(
        self, file: BinaryIO, limit: int, pieces: bool = False
    ) -> Iterator[tuple[int, int, bytes, bool]]:
        """Yield (number, where it begins in the file, the line with its end, whether all of it).

        What lies behind the first `limit` bytes of a line is passed over in small pieces, or, with
        `pieces`, yielded as further parts of the line, whose last is "all of it".
        """
        whole = True
        while raw := file.readline(limit):
            start, size = self._offset, len(raw)
            self._number += whole or not pieces
            whole = size < limit or raw[-1:] == b"\n"
            if not whole and not pieces:
                whole = True
                while rest := file.readline(_BUFFER):
                    whole, size = False, size + len(rest)
                    if rest[-1:] == b"\n":
                        break
            self._offset += size
            if not start and raw.startswith(codecs.BOM_UTF8):
                raw, start = raw[3:], 3
            yield self._number, start, raw, whole

    def _plain(self, file: BinaryIO) -> Iterator[Row]:
        # a line that is longer has more characters than are kept, each at most 4 bytes
        for number, start, raw, whole in self._lines(file, 4 * MAX_CHARACTERS + 8):
            text, problem, _ = decoded(_without_end(raw) if whole else raw, start, whole)
            yield from self._rows(number, text, problem)

    def _plain_in_pieces(self, file: BinaryIO) -> Iterator[Row]:
        text, problem, rest, before, parts = "", "", b"", 0, 0
        for number, start, raw, whole in self._lines(file, _BUFFER, pieces=True):
            line = rest + (_without_end(raw) if whole else raw)
            more, found, used = decoded(line, start - len(rest), whole, before)
            text, problem, rest, before = text + more, problem or found, line[used:], before + used
            while len(text) > MAX_CHARACTERS:
                at = _place(text, 0)
                yield self._row(number, text[:at], problem)
                text, problem, parts = text[at:], "", parts + 1
            if whole:
                yield self._row(number, text, problem)
                if parts:
                    self._count_split(number, parts + 1)
                text, problem, rest, before, parts = "", "", b"", 0, 0
        if text or rest:  # the file ends with a part of just the size of the buffer
            more, found, _ = decoded(rest, self._offset - len(rest), True, before)
            yield self._row(self._number, text + more, problem or found)
            if parts:
                self._count_split(self._number, parts + 1)

    def _json(self, file: BinaryIO) -> Iterator[Row]:
        for number, start, raw, whole in self._lines(file, MAX_RECORD):
            if not whole:
                yield self._without(number, f"want at most {MAX_RECORD:,} bytes of JSON, got more")
                continue
            line, problem, _ = decoded(raw, start)
            if not line.strip():
                continue
            if problem and not self._repairs:
                yield self._row(number, "", problem)
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield self._without(number, f"want a JSON object, got {str(error)[:200]}")
                continue
            if not isinstance(fields, dict):
                yield self._without(number, f"want a JSON object, got {type(fields).__name__}")
            elif self.column not in fields:
                got = names(fields)
                yield self._without(number, f"want a field {self.column!r}, got {got}")
            elif not isinstance(text := fields[self.column], str):
                got = type(text).__name__
                yield self._without(number, f"{self.column}: want a string, got {got}")
            else:
                yield from self._rows(number, text, problem)

    def _csv(self, file: BinaryIO) -> Iterator[Row]:
        records = CsvRecords(self._lines(file, MAX_RECORD), MAX_RECORD)
        header: list[str] | None = None
        for line, fields, problem in records:
            if header is None:
                header = fields
                where = f"{self.name}:{line}: "
                if problem:
                    raise BadLineError(where + problem)
                if (count := header.count(self.column)) != 1:
                    got = f"{count} of them" if count else names(header)
                    want = f"want a column {self.column!r} in the first line"
                    raise BadLineError(f"{where}{want}, got {got}")
                continue
            undecoded = problem.startswith(NOT_UTF8)
            if problem and not undecoded:
                yield self._without(line, problem)
            elif len(fields) != len(header):
                want = f"want {len(header)} fields as in the first line"
                yield self._without(line, f"{want}, got {len(fields)}")
            else:
                yield from self._rows(line, fields[header.index(self.column)], problem)

    def _parquet(self, file: BinaryIO) -> Iterator[Row]:
        size = os.fstat(file.fileno()).st_size
        try:
            for share, raw in parquet_texts(file, self.column):
                self._number += 1
                self._offset = int(share * size)
                if raw is None:
                    yield self._without(self._number, f"{self.column}: want a string, got null")
                    continue
                text, problem, _ = decoded(raw, 0)
                problem = problem.rpartition(" of the line, ")[0]
                yield from self._rows(self._number, text, problem)
        except ParquetError as error:
            raise BadLineError(f"{self.name}:{self._number + 1}: {error}") from error
        self._offset = size

    def _rows(self, line: int, text: str, problem: str) -> Iterator[Row]:
        """The rows of a text; `problem`: what decoding it had to replace."""
        if len(text) <= MAX_CHARACTERS:
            yield self._row(line, text, problem)
        elif self.long == "cut":
            text = text[: _place(text, 0)]
            self.cut += 1
            self._note("cut", f"{self.name}:{line}: cut after {len(text):,} characters")
            yield self._row(line, text, problem)
        else:
            start, parts = 0, 0
            while start < len(text):
                at = _place(text, start)
                yield self._row(line, text[start:at], problem)
                start, parts = at, parts + 1
            self._count_split(line, parts)

    def _count_split(self, line: int, parts: int) -> None:
        self.split += 1
        self._note("split", f"{self.name}:{line}: split into {parts:,} texts")

    def _row(self, line: int, text: str, problem: str) -> Row:
        """A text, looked through."""
        if not problem and (at := text.find("\0")) >= 0:
            problem = f"want text, got NUL at character {at}"
        if not problem and not text.isascii() and (half := _SURROGATE.search(text)):
            code = ord(half.group())
            problem = f"want text, got half a surrogate pair, U+{code:04X}, at {half.start()}"
        if not problem:
            return Row(line, text)
        if not self._repairs:
            return self._without(line, problem)
        self.replaced += 1
        self._note("replaced", f"{self.name}:{line}: replaced: {problem}")
        return Row(line, _SURROGATE.sub("\ufffd", text.replace("\0", "\ufffd")))

    def _without(self, line: int, problem: str) -> Row:
        """The row of a line that has no text; an error unless such lines are skipped."""
        if not self._skips:
            raise BadLineError(f"{self.name}:{line}: {problem}")
        self.skipped += 1
        self._note("skipped", f"{self.name}:{line}: skipped: {problem}")
        return Row(line, None)


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _place(text: str, start: int) -> int:
    """Return where a row ends that begins at `start` and has MAX_CHARACTERS or less."""
    most = start + MAX_CHARACTERS
    if len(text) <= most:
        return len(text)
    word = _LAST_WORD.search(text, start, most + 1)
    return word.start() if word and word.start() > start else most


@contextmanager
def _opened(source: str) -> Iterator[tuple[BinaryIO, BinaryIO | None]]:
    """Yield a file of text, and where that is compressed the file that it comes from."""
    if source == STDIN:
        yield sys.stdin.buffer, None
        return
    with open(source, "rb", buffering=_BUFFER) as file:
        decompress = _COMPRESSED.get(Path(source).suffix.lower())
        if decompress is None:
            yield file, None
        else:
            with decompress(file, "rb") as text:
                yield text, file
